"""Rotary position embeddings, applied to queries and keys by the text model's own function."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hawk_kernels.hf.anatomy import Anatomy, first_attention_layer
from hawk_kernels.hf.families import FAMILIES, NO_ROPE

Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Rotary:
    """The rotation of each token of a prompt in one layer.

    Attributes:
        rotate: the function beside the layer's attention module, or None for a layer that rotates nothing.
        cos: `[1 or B, T, D']`, or `[axes, 1 or B, T, D']` where `rotate` chooses an axis for each part of a head.
        sin: the same shape.
    """

    rotate: Rotate | None
    cos: torch.Tensor
    sin: torch.Tensor

    def rotated(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate queries or keys `[B, H, N, D]` of the tokens at `positions` in the prompt, int64 `[B, N]`."""
        if self.rotate is None:
            return heads
        positions = positions.to(self.cos.device)
        shape = (*self.cos.shape[:-3], *positions.shape, self.cos.shape[-1])
        cos, sin = (
            angle.expand(*shape[:-2], -1, -1).gather(-2, positions.unsqueeze(-1).expand(shape)).to(heads.device)
            for angle in (self.cos, self.sin)
        )
        return self.rotate(heads, heads, cos, sin)[0].to(heads.dtype)


def check_rotates(anatomy: Anatomy, method: str) -> None:
    """Refuse a family that rotates in a way of its own, for a method that needs rotated queries and keys.

    Raises:
        TypeError: names the families that the method works for.
    """
    if not anatomy.family.plain_rope:
        known = ", ".join(family.model_type for family in FAMILIES if family.plain_rope)
        raise TypeError(
            f"method: expected one that needs no rotary position embeddings of {anatomy.family.model_type}, got "
            f"{method!r}; that method works for {known}"
        )


def rotary_of_first_layer(anatomy: Anatomy, inputs_embeds: torch.Tensor, position_ids: torch.Tensor | None) -> Rotary:
    """Make the rotation of the first attention layer from the arguments of the text model.

    Args:
        anatomy: the model's parts.
        inputs_embeds: `[B, T, hidden]`.
        position_ids: `[1 or B, T]`, `[axes, 1 or B, T]`, or the latter with one more row in front, which counts text;
            None means 0 to T - 1.
    """
    text: Any = anatomy.text
    index, layer = first_attention_layer(text)
    if position_ids is None:
        position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0)
    axes = anatomy.family.position_axes
    if position_ids.dim() == 3 and position_ids.shape[0] == axes + 1:
        position_ids = position_ids[1:]
    module = text.rotary_emb
    rotate = _rotate_of(layer.self_attn)
    has_axes = getattr(module, "mrope_section", None) is not None or isinstance(rotate, partial)
    if position_ids.dim() == 2 and has_axes:
        position_ids = position_ids.unsqueeze(0).expand(axes, -1, -1)
    by_layer = "layer_type" in inspect.signature(module.forward).parameters
    arguments = {"layer_type": text.config.layer_types[index]} if by_layer else {}
    cos, sin = module(inputs_embeds, position_ids, **arguments)
    return Rotary(rotate, cos, sin)


def rotary_of_layer(layer: Any, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None, like: Any) -> Rotary:
    """Make the rotation of a layer from what it was called with; models pass None to a layer that rotates nothing."""
    if position_embeddings is None:
        return Rotary(None, like, like)
    return Rotary(_rotate_of(layer.self_attn), *position_embeddings)


def _rotate_of(attention: Any) -> Rotate | None:
    name = type(attention).__name__
    if any(name.startswith(prefix) and rotates_nothing(attention) for prefix, rotates_nothing in NO_ROPE.items()):
        return None
    if not getattr(attention, "use_rope", True):
        return None
    module = sys.modules[type(attention).__module__]
    of_axes = getattr(module, "apply_multimodal_rotary_pos_emb", None)
    if of_axes is not None:
        # in older versions of transformers some text models hand over the angles of each axis
        return partial(of_axes, mrope_section=attention.config.rope_parameters["mrope_section"])
    rotate: Rotate = module.apply_rotary_pos_emb
    return rotate
