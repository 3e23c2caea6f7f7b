"""Looking at the arguments of a model's forward."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    if not args:
        return kwargs
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


def call_length(kwargs: dict[str, Any]) -> int:
    """Tokens of a call, `T`."""
    tokens = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    return 0 if tokens is None else tokens.shape[1]


def visual_features(kwargs: dict[str, Any], names: tuple[str, ...]) -> tuple[Any, ...]:
    """The images and videos of a call: pixels, or what `generate` has encoded beforehand."""
    encoded = (kwargs.get("mm_encoder_outputs") or {}).values()
    return tuple(feature for feature in (*(kwargs.get(name) for name in names), *encoded) if feature is not None)
