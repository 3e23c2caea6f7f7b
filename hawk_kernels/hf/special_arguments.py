"""Arguments of text models that are more than one entry a token: features of visual tokens, masks over pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hawk_kernels.hf.packing import Packing
from hawk_kernels.hf.prompt import Prompt
from hawk_kernels.hf.upload import upload

VISUAL_FEATURES = ("deepstack_visual_embeds", "deepstack_features")
"""Arguments with one row a visual token of the batch, for each of several layers."""


def packed_features(kwargs: dict[str, Any], prompt: Prompt, kept: torch.Tensor, packing: Packing) -> dict[str, Any]:
    """Features that later layers add to the visual tokens, for those that stay; they come for hidden ones as well.

    Args:
        kwargs: arguments of the text model.
        prompt: where visual tokens stand.
        kept: bool `[B, T]`, the tokens that stay.
        packing: how they are packed.
    """
    given = {name: kwargs[name] for name in VISUAL_FEATURES if kwargs.get(name) is not None}
    if not given:
        return {}
    placeholders = upload(np.flatnonzero(prompt.all_placeholders()), kept.device)
    stays = kept.flatten().index_select(0, placeholders)
    count = packing.total - int((prompt.valid & ~prompt.visual).sum())
    # those that stay first, in their order; their number is known, so that nobody waits for the device
    rows = torch.argsort((~stays).int(), stable=True)[:count]

    def select(features: torch.Tensor) -> torch.Tensor:
        return features.index_select(0, rows.to(features.device))

    return {
        name: {layer: select(features) for layer, features in layers.items()}
        if isinstance(layers, dict)
        else [select(features) for features in layers]
        for name, layers in given.items()
    }


def packed_pair_masks(masks: Any, packing: Packing, cache: Any, layer_types: list[str] | None) -> Any:
    """Masks over pairs of tokens, for those that stay: every pair sees each other as it did before.

    Args:
        masks: a mask `[B or 1, 1, T, keys]`, bool or additive, or a dict of such by kind of layer; None: causal.
        packing: how tokens are packed.
        cache: `past_key_values`, whose layers may want masks of a fixed width.
        layer_types: the kind of each layer.
    """
    if not isinstance(masks, dict):
        return _packed_pairs(masks, packing, _width(cache, packing.length, 0))
    kinds = layer_types or []
    return {
        kind: _packed_pairs(mask, packing, _width(cache, packing.length, kinds.index(kind) if kind in kinds else 0))
        for kind, mask in masks.items()
    }


def _width(cache: Any, length: int, layer: int) -> int:
    return length if cache is None else int(cache.get_mask_sizes(length, layer)[0])


def _packed_pairs(mask: torch.Tensor | None, packing: Packing, width: int) -> torch.Tensor:
    device = packing.mask.device if mask is None else mask.device
    source, is_token = packing.source.to(device), packing.mask.to(device, torch.bool)
    batch, length = source.shape
    if mask is None:
        pairs = torch.ones(batch, 1, length, length, dtype=torch.bool, device=device).tril()
    else:
        if mask.dim() != 4:
            raise ValueError(
                f"attention_mask: expected masks of 4 dimensions from the model, got shape {list(mask.shape)}; load "
                "the model with attn_implementation='sdpa' or 'eager'"
            )
        rows = source[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
        pairs = mask.expand(batch, -1, -1, -1).gather(2, rows)
        pairs = pairs.gather(3, source[:, None, None, :].expand(*pairs.shape[:3], -1))
    seen, hidden = (True, False) if pairs.dtype == torch.bool else (0.0, torch.finfo(pairs.dtype).min)
    pairs = pairs.masked_fill(~is_token[:, None, None, :], hidden)
    # a row that sees nothing at all would be NaN
    itself = torch.eye(length, dtype=torch.bool, device=device) & ~is_token[:, None, :, None]
    pairs = pairs.masked_fill(itself, seen)
    return torch.nn.functional.pad(pairs, (0, width - length), value=hidden)
