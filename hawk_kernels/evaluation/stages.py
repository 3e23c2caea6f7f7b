"""Stages in which tokens leave, `{layer: keep}` of `prune`, as command lines and tables write them: `0:0.5,2:0.2`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hawk_kernels.hf.prune import KeepRatio
from hawk_kernels.methods import Method, resolve_method
from hawk_kernels.validation import checked_keep_ratio

EXPECTED = "expected stages LAYER:KEEP or LAYER:METHOD:KEEP, joined by commas, such as 2:0.4 or 0:0.5,2:fastv:0.2"

Kept = float | int | tuple[str | Method, float | int]
"""What stays after a layer, or a method and what stays."""


class Stages(dict[int, Kept]):
    """For each layer, counted from 1, what stays after it, or a method and what stays; 0 is before the first layer.

    It is what `prune` takes as `keep_ratio`, and unlike other dicts it can itself be a key.
    """

    # dict says that it has none
    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self)))

    def __str__(self) -> str:
        return ",".join(f"{layer}:{_words(value, str)}" for layer, value in self.items())


def checked_keep(value: object) -> KeepRatio:
    """Return how much is kept, stages in the order of their layers.

    Raises:
        TypeError, ValueError: `prune` does not take it, or each of its stages names a method of its own.
    """
    if not isinstance(value, Mapping):
        return checked_keep_ratio("keep", value)
    for layer in value:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"keep: expected layers as ints, got {layer!r}; {{2: 0.4}} keeps 40 % after layer 2")
    stages = Stages(sorted(value.items()))
    own = [kept for kept in stages.values() if isinstance(kept, tuple)]
    if len(own) == len(stages):
        raise ValueError(
            f"keep: expected a stage that leaves its method to the comparison, got {str(stages) or 'no stage'!r}; "
            "write LAYER:KEEP for the stage that the methods compete for"
        )
    for name, _ in own:
        try:
            resolve_method(name, {})
        except (TypeError, ValueError) as error:
            raise ValueError(f"keep: {stages}: {error}") from error
    return stages


def stages_from_text(text: str, number: Callable[[str], float | int]) -> Stages:
    """Read `LAYER:KEEP` or `LAYER:METHOD:KEEP`, joined by commas.

    Args:
        text: of the command line.
        number: reads a share or a number of tokens, and raises an error of its own.

    Raises:
        ValueError: it is not spelled like that, or a layer comes twice.
    """
    stages = Stages()
    for part in text.split(","):
        layer, *method, keep = (word.strip() for word in part.split(":")) if ":" in part else (part, "", "", "")
        if not layer.isdecimal() or len(method) > 1 or not all((*method, keep)):
            raise ValueError(f"{EXPECTED}, got {text!r}; layers count from 1, 0 is before the first")
        if int(layer) in stages:
            raise ValueError(f"expected each layer once, got {text!r}; leave out one of the stages after layer {layer}")
        stages[int(layer)] = (method[0], number(keep)) if method else number(keep)
    return stages


def share(keep: KeepRatio) -> str:
    """Write for a table how much is kept: a percentage, a number of tokens, or these by layer."""
    if isinstance(keep, Mapping):
        return ", ".join(f"{layer}: {_words(value, share)}" for layer, value in keep.items())
    return f"{100 * keep:g} %" if isinstance(keep, float) else f"{keep} tokens"


def plain(keep: KeepRatio) -> Any:
    """Return how much is kept ready for JSON: stages as `{layer: keep}` or `{layer: [method, keep]}`."""
    if not isinstance(keep, Mapping):
        return keep
    return {layer: [_name(kept[0]), kept[1]] if isinstance(kept, tuple) else kept for layer, kept in keep.items()}


def _words(value: Kept, number: Callable[[float | int], str]) -> str:
    if not isinstance(value, tuple):
        return number(value)
    method, keep = value
    name = _name(method)
    return f"{name} {number(keep)}" if number is share else f"{name}:{number(keep)}"


def _name(method: str | Method) -> str:
    """Name a method; an object with the options that it was made with, since these are part of what is compared."""
    return method if isinstance(method, str) else f"{method.name}{method.options() or ''}"
