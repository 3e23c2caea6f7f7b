"""Methods that choose which visual tokens of a prompt stay, one a file."""

from __future__ import annotations

import inspect

from hawk_kernels.methods.base import Method
from hawk_kernels.methods.cdpruner import CDPruner
from hawk_kernels.methods.dart import Dart
from hawk_kernels.methods.divprune import DivPrune
from hawk_kernels.methods.downsample import Downsample
from hawk_kernels.methods.fastv import FastV
from hawk_kernels.methods.hawk import Hawk
from hawk_kernels.methods.hawk_rope import HawkRope
from hawk_kernels.methods.hiprune import HiPrune
from hawk_kernels.methods.key_norm import KeyNorm
from hawk_kernels.methods.random import Random
from hawk_kernels.methods.view import EncoderAttention, LastQuery, PrefillView, Segments

__all__ = [
    "METHODS",
    "CDPruner",
    "Dart",
    "DivPrune",
    "Downsample",
    "EncoderAttention",
    "FastV",
    "Hawk",
    "HawkRope",
    "HiPrune",
    "KeyNorm",
    "LastQuery",
    "Method",
    "PrefillView",
    "Random",
    "Segments",
    "resolve_method",
]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (Hawk, HawkRope, HiPrune, FastV, DivPrune, CDPruner, Dart, KeyNorm, Random, Downsample)
}


def resolve_method(method: str | Method, options: dict[str, object]) -> Method:
    """The method object that `method` stands for.

    Args:
        method: a name in `METHODS`, or an instance of a class derived from `Method`.
        options: keyword arguments of the named method; an object brings its own.

    Raises:
        ValueError: unknown name, or an option value the method refuses.
        TypeError: neither a name nor a method, or an option the method does not have.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(
                f"method: expected one of {', '.join(map(repr, sorted(METHODS)))} or an object, got {method!r}"
            )
        known = list(inspect.signature(METHODS[method]).parameters)
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise TypeError(
                f"method {method!r} has no option {', '.join(map(repr, unknown))}; its options are "
                f"{', '.join(map(repr, known)) or 'none'}"
            )
        return METHODS[method](**options)
    if not isinstance(method, Method):
        if isinstance(method, type):
            raise TypeError(
                f"method: expected a name or a method object, got the class {method.__name__}; pass an instance"
            )
        raise TypeError(
            f"method: expected a name or a method object, got {type(method).__name__}; derive it from "
            "hawk_kernels.methods.Method"
        )
    if options:
        raise TypeError(
            f"options {', '.join(map(repr, sorted(options)))} came beside a method object, which brings its own; "
            f"pass them to {type(method).__name__}(...)"
        )
    return method
