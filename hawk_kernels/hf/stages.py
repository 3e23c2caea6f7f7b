"""Reads stages that a caller names one by one: after which layer, how much stays, and which method chooses."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from hawk_kernels.hf.stats import Stage
from hawk_kernels.methods import Method, resolve_method
from hawk_kernels.methods.base import Falling
from hawk_kernels.validation import checked_keep_ratio

_EXPECTED = "keep_ratio: expected stages {layer: keep} or {layer: (method, keep)}"
MODES = ("drop", "hide")


def named_stages(stages: Mapping[Any, Any], method: str | Method, options: dict[str, Any]) -> tuple[Stage, ...]:
    """Read the stages that a caller has named.

    Args:
        stages: for each layer, counted from 1, what stays after it of the original visual tokens, or a method and what
            stays; layer 0 stands for before the first.
        method: the method of the stages that name none.
        options: the options of `method`.

    Returns:
        The stages, in the order of their layers.

    Raises:
        ValueError: there is no stage, a layer or number is out of range, or a stage keeps more than the one before it.
        TypeError: a layer, a number or a method has another type, or options belong to no stage.
    """
    if not stages:
        raise ValueError(f"{_EXPECTED}, got none; {{2: 0.4}} keeps 40 % after layer 2")
    given = {layer: value for layer, value in stages.items() if not isinstance(value, tuple)}
    if options and not given:
        raise TypeError(
            f"options {', '.join(map(repr, sorted(options)))} came beside stages that name their own methods; pass "
            "method objects, such as {0: (Hawk(normalize=None), 0.5)}"
        )
    common = resolve_method(method, options) if given else None
    if common is not None:
        moot = sorted(set(options) & set(common.stage_options))
        if moot:
            raise TypeError(
                f"options {', '.join(map(repr, moot))} came beside stages, which say the same; leave them out"
            )
    named = [_stage(layer, value, common) for layer, value in stages.items()]
    named.sort(key=lambda stage: stage.layer)
    for earlier, later in pairwise(named):
        before, after = earlier.keep, later.keep
        if isinstance(before, Falling) or isinstance(after, Falling) or type(before) is not type(after):
            continue
        if after > before:
            raise ValueError(
                f"keep_ratio[{later.layer}]: expected at most {earlier.keep}, which stays after layer {earlier.layer}, "
                f"got {later.keep}; each stage says how much of the original visual tokens is left"
            )
    return tuple(named)


def checked_mode(mode: str | None, stages: tuple[Stage, ...]) -> str:
    """Return what happens to tokens that leave inside the stack: as the caller says, or else as the methods say.

    Raises:
        ValueError: neither "drop" nor "hide", or methods that do not agree.
    """
    if mode is not None:
        if mode not in MODES:
            raise ValueError(f"mode: expected 'drop' or 'hide', got {mode!r}; None leaves it to the method")
        return mode
    wanted = sorted({stage.method.mode for stage in stages if stage.layer})
    if len(wanted) > 1:
        raise ValueError("mode: expected one for all stages, got methods that drop and methods that hide; pass mode=")
    return wanted[0] if wanted else "drop"


def _stage(layer: object, value: object, common: Method | None) -> Stage:
    if isinstance(layer, bool) or not isinstance(layer, numbers.Integral):
        raise TypeError(f"{_EXPECTED}, got the layer {layer!r}; count layers from 1, 0 is before the first")
    number = int(layer)
    if number < 0:
        raise ValueError(f"{_EXPECTED}, got the layer {number}; count layers from 1, 0 is before the first")
    method = common
    if isinstance(value, tuple):
        if len(value) != 2:
            raise TypeError(f"{_EXPECTED}, got {len(value)} values for layer {number}; write (method, keep)")
        name, value = value
        method = resolve_method(name, {})
    assert method is not None
    method = method.at_layer(number)
    if method.inside_only and number == 0:
        raise TypeError(
            f"method: expected one that can choose before the first layer for stage 0, got {method.name!r}; it reads "
            "the attention of a layer, so name a layer of 1 or more"
        )
    return Stage(number, method, checked_keep_ratio(f"keep_ratio[{number}]", value))
