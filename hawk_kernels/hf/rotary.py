"""Rotary position embeddings, applied as a layer of the text model applies them: by its own function."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hawk_kernels.hf.families import FAMILIES, Anatomy

Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]

# Their attention rotates in another way than by one function of whole queries and keys behind all norms.
_OTHERWISE = ("gemma4", "gemma4_unified", "hunyuan_vl", "kimi_k25", "llama4")


@dataclass(frozen=True)
class Rotary:
    """The rotation of each token of a prompt in one layer.

    Attributes:
        rotate: the function of the layer's module, or None for a layer that rotates nothing.
        cos: `[1 or B, T, D']`.
        sin: the same shape.
    """

    rotate: Rotate | None
    cos: torch.Tensor
    sin: torch.Tensor

    def rotated(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Queries or keys `[B, H, N, D]` that stand at `positions`, int64 `[B, N]`, in the prompt."""
        if self.rotate is None:
            return heads
        positions = positions.to(self.cos.device)
        cos, sin = (
            angle.expand(positions.shape[0], -1, -1)
            .gather(1, positions.unsqueeze(-1).expand(-1, -1, angle.shape[-1]))
            .to(heads.device)
            for angle in (self.cos, self.sin)
        )
        return self.rotate(heads, heads, cos, sin)[0].to(heads.dtype)


def check_rotates(anatomy: Anatomy, method: str) -> None:
    """Refuse a family whose rotation is not known, for a method that needs it.

    Raises:
        TypeError: naming the families that it works for.
    """
    if anatomy.family.model_type in _OTHERWISE:
        known = ", ".join(family.model_type for family in FAMILIES if family.model_type not in _OTHERWISE)
        raise TypeError(
            f"method: expected one that needs no rotary position embeddings of {anatomy.family.model_type}, got "
            f"{method!r}; that works for {known}"
        )


def rotary_of_first_layer(anatomy: Anatomy, inputs_embeds: torch.Tensor, position_ids: torch.Tensor | None) -> Rotary:
    """The rotation of the first attention layer, from the arguments of the text model.

    Args:
        anatomy: the model's parts.
        inputs_embeds: `[B, T, hidden]`.
        position_ids: `[1 or B, T]`, `[axes, 1 or B, T]`, or that with one row in front that counts text; None means
            0 to T - 1.
    """
    text: Any = anatomy.text
    index, layer = next((i, layer) for i, layer in enumerate(text.layers) if hasattr(layer, "self_attn"))
    if position_ids is None:
        position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0)
    axes = anatomy.family.position_axes
    if position_ids.dim() == 3 and position_ids.shape[0] == axes + 1:
        position_ids = position_ids[1:]
    module = text.rotary_emb
    if position_ids.dim() == 2 and getattr(module, "mrope_section", None) is not None:
        position_ids = position_ids.unsqueeze(0).expand(axes, -1, -1)
    by_layer = "layer_type" in inspect.signature(module.forward).parameters
    arguments = {"layer_type": text.config.layer_types[index]} if by_layer else {}
    cos, sin = module(inputs_embeds, position_ids, **arguments)
    return Rotary(_rotate_of(layer.self_attn), cos, sin)


def rotary_of_layer(layer: Any, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None, like: Any) -> Rotary:
    """The rotation of a layer, from what it was called with; models pass None to a layer that rotates nothing."""
    if position_embeddings is None:
        return Rotary(None, like, like)
    return Rotary(_rotate_of(layer.self_attn), *position_embeddings)


def _rotate_of(attention: Any) -> Rotate | None:
    # models that mix windows and full attention without positions tell the two apart by these attributes
    if type(attention).__name__.startswith("Cohere2") and attention.sliding_window is None:
        return None
    if type(attention).__name__.startswith("Exaone4") and attention.sliding_window and not attention.is_sliding:
        return None
    if not getattr(attention, "use_rope", True):
        return None
    return sys.modules[type(attention).__module__].apply_rotary_pos_emb
