"""Methods that choose which visual tokens of a prompt stay, one in each file of this folder.

A file registers its class with `@register`, and this package imports every file that it finds here, so a new method
needs no other line. The classes are attributes of the package under their own names, for example `HiPrune`.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from hawk_kernels.methods.base import METHODS, JointMethod, Method, register, resolve_method
from hawk_kernels.methods.prefill_view import (
    EncoderAttention,
    LastQuery,
    LayerAttention,
    LocalAttention,
    PrefillView,
    Segments,
)

__all__ = [
    "METHODS",
    "EncoderAttention",
    "JointMethod",
    "LastQuery",
    "LayerAttention",
    "LocalAttention",
    "Method",
    "PrefillView",
    "Segments",
    "register",
    "resolve_method",
]

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

_CLASSES = {method.__name__: method for method in METHODS.values()}
__all__ += sorted(_CLASSES)


def __getattr__(name: str) -> Any:
    """Return the class of a method of this package by its name."""
    if name in _CLASSES:
        return _CLASSES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_CLASSES})
