"""Closes the gaps that dropped tokens leave in a call's arguments, and opens them again in its output."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from hawk_kernels.backends.eager.compact import restore
from hawk_kernels.hf.anatomy import Anatomy
from hawk_kernels.hf.families import VISUAL_FEATURES
from hawk_kernels.hf.hooks import upload
from hawk_kernels.hf.prompt import Prompt
from hawk_kernels.hf.pruned_cache import check_slots, fixed_size
from hawk_kernels.ops.compact import compact
from hawk_kernels.selection import Merge


class Packed(Protocol):
    """Where the tokens of packed rows came from.

    Attributes:
        mask: `[B, P]`, False or 0 at padding.
        source: int64 `[B, P]`, where in its row a packed token stood; 0 at padding.
    """

    @property
    def mask(self) -> torch.Tensor: ...

    @property
    def source(self) -> torch.Tensor: ...


class Packing:
    """Moves the survivors of each row together, left-padded to the longest row, without asking the device anything.

    Args:
        inputs_embeds: `[B, T, hidden]`.
        kept: bool `[B, T]`, the tokens that stay.
        counts: how many stay in each row, known on the host.
        position_ids: `[1 or B, T]` or `[axes, 1 or B, T]`; None means 0 to T - 1.
        extra: columns of padding that every row gets.
        merge: makes kept tokens sums of tokens, by places among the T, targets ascending; None means none.
        embeds_are_merged: whether `inputs_embeds` are sums already, so that the map is for other features alone.

    Attributes:
        length: tokens of a packed row, `P`.
        inputs_embeds: `[B, P, hidden]`.
        position_ids: `[..., B, P]`, the position ids that the tokens had.
        mask: int64 `[B, P]`, the packed attention mask.
        source: int64 `[B, P]`, where in its row a packed token stood; 0 at padding.
        total: tokens of all rows without padding.
        merges: whether kept tokens become sums of tokens.
        is_full: whether no packed row has padding.
        shift: how much lower the packed position ids are than those that the caller counts, for what follows the row,
            `[..., B, 1]`; None where the tokens keep their position ids.
    """

    shift: torch.Tensor | None = None

    def __init__(
        self,
        inputs_embeds: torch.Tensor,
        kept: torch.Tensor,
        counts: list[int],
        position_ids: torch.Tensor | None = None,
        extra: int = 0,
        merge: Merge | None = None,
        embeds_are_merged: bool = False,
    ) -> None:
        # at least two columns, because a call of one token would be a decoding step
        self.length = max(2, *counts) + extra
        self.total = sum(counts)
        self.merges = merge is not None
        self.is_full = min(counts) == self.length
        self._kept, self._merge = kept, merge
        positions = None if position_ids is None else position_ids.to(kept.device)
        # some models count the seconds of a video, so that position ids are fractions
        fractions = positions if positions is not None and positions.is_floating_point() else None
        self.inputs_embeds, self.position_ids, self.mask, self.source = compact(
            inputs_embeds,
            kept,
            position_ids=positions if fractions is None else None,
            length=self.length,
            merge=None if embeds_are_merged else merge,
        )
        if fractions is not None:
            shape = fractions.shape[:-2]
            self.position_ids = fractions.expand(*shape, *kept.shape).gather(-1, self.source.expand(*shape, -1, -1))

    @cached_property
    def _flat_source(self) -> torch.Tensor:
        batch, full_length = self._kept.shape
        start = torch.arange(0, batch * full_length, full_length, device=self.source.device).unsqueeze(1)
        return (self.source + start).flatten()

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Pack `[B, T, ...]` to `[B, P, ...]`; a bool tensor, which marks tokens, marks no padding."""
        rows = self._flat_source.to(tensor.device)
        packed = torch.unflatten(tensor.flatten(0, 1).index_select(0, rows), 0, (tensor.shape[0], self.length))
        if packed.dtype != torch.bool:
            return packed
        return packed & self.mask.to(packed.device, torch.bool).view(*self.mask.shape, *[1] * (packed.dim() - 2))

    def merged(self, tensor: torch.Tensor) -> torch.Tensor:
        """Pack `[B, T, C]` to `[B, P, C]` as the embeddings are packed, and merge it by the same map."""
        device = tensor.device
        merge = None if self._merge is None else Merge(*(part.to(device) for part in self._merge))
        return compact(tensor, self._kept.to(device), length=self.length, merge=merge).inputs_embeds

    def pack_visual(self, features: torch.Tensor, visual: np.ndarray, counts: list[int]) -> torch.Tensor:
        """Pack what only visual tokens have, as the embeddings are packed, and merge it by the same map.

        Args:
            features: `[S, C]`, one row for each True of `visual`, in order.
            visual: bool `[B, T]` on the host.
            counts: how many of the kept tokens of each row have a row.

        Returns:
            `[sum of counts, C]`.
        """
        device, length = features.device, max(counts)
        everywhere = features.new_zeros(visual.size, features.shape[1])
        everywhere = everywhere.index_copy(0, upload(np.flatnonzero(visual), device), features)
        mask = upload(visual, device)
        merge = None if self._merge is None else Merge(*(part.to(device) for part in self._merge))
        packed = compact(
            torch.unflatten(everywhere, 0, visual.shape), self._kept.to(device) & mask, length=length, merge=merge
        )
        is_token = np.arange(length) >= length - np.array(counts)[:, None]
        return packed.inputs_embeds.flatten(0, 1).index_select(0, upload(np.flatnonzero(is_token), device))

    def unpack(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Spread `[B, P, hidden]` out to `[B, T, hidden]`, zero where a token was dropped."""
        restored: torch.Tensor = restore(hidden_states, self._kept.to(hidden_states.device))
        return restored

    def spread(self, values: torch.Tensor, fill: Any) -> torch.Tensor:
        """Spread `[B, P]` out to `[B, T]`, with `fill` where a token was dropped or is padding."""
        batch, full_length = self._kept.shape
        # padding lands in one column after the end
        place = torch.where(self.mask.bool(), self.source, full_length)
        whole = values.new_full((batch, full_length + 1), fill)
        return whole.scatter_(1, place.to(values.device), values)[:, :full_length].contiguous()

    def pack_arguments(
        self, kwargs: dict[str, Any], axes: int = 3, renumbers: bool = False
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """Pack the arguments of the text model, and find the position ids `[..., B, 1]` that the caller counts next.

        Every argument with one entry for each token is packed as the embeddings are. The mask is always given: without
        one, gaps in the position ids are taken for the ends of sequences that share a row.

        Args:
            kwargs: the arguments for the whole prompt.
            axes: rows of position ids that RoPE reads, where it reads several; one more row in front counts text.
            renumbers: whether the tokens of a packed row are numbered one after the other from its first.
        """
        positions = self.position_ids
        following = positions[..., -1:] + 1
        if renumbers:
            positions = self._renumbered(positions)
            self.shift = following - positions[..., -1:] - 1
        if positions.dim() == 3 and positions.shape[0] == axes + 1:
            # the first row only tells sequences of one row apart
            text = (self.mask.cumsum(-1) - 1).clamp(min=0).unsqueeze(0)
            positions = torch.cat([text.to(positions), positions[1:]])
        packed = {
            "inputs_embeds": self.inputs_embeds,
            "position_ids": positions,
            "attention_mask": self.mask,
        }
        others = {name: self._packed(value) for name, value in kwargs.items() if name not in packed}
        return {**others, **packed}, following

    def _renumbered(self, positions: torch.Tensor) -> torch.Tensor:
        """Number the tokens of each packed row from the position id of its first one on, `[..., B, P]`."""
        place = (self.mask.cumsum(-1) - 1).clamp(min=0).to(positions)
        begins = (self.length - self.mask.sum(-1, keepdim=True)).clamp(max=self.length - 1).to(positions.device)
        return positions.gather(-1, begins.expand(*positions.shape[:-1], 1)) + place

    def _packed(self, value: Any) -> Any:
        has_tokens = isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[:2] == self._kept.shape
        return self.pack(value) if has_tokens else value


def pack_call(
    anatomy: Anatomy,
    prompt: Prompt,
    kept: torch.Tensor,
    counts: list[int],
    kwargs: dict[str, Any],
    merge: Merge | None = None,
    embeds_are_merged: bool = False,
    renumbers: bool = False,
) -> tuple[Packing, dict[str, Any], torch.Tensor]:
    """Pack a call of the text model.

    Args:
        anatomy: the model's parts.
        prompt: where visual tokens stand.
        kept: bool `[B, T]`, the tokens that stay.
        counts: how many stay in each row.
        kwargs: the arguments of the call for the whole prompt.
        merge: makes kept tokens sums of visual tokens, by places among the T, targets ascending; None means none.
        embeds_are_merged: whether the embeddings are sums already, so that the map is for other features alone.
        renumbers: whether the tokens that stay are numbered anew.

    Returns:
        How the tokens are packed, the packed arguments, and the position ids `[..., B, 1]` that the caller counts next.

    Raises:
        ValueError: the caller wants router logits, which the model would weigh by the mask of the whole prompt; or
            attention depends on where tokens stand in rows of this length.
    """
    family, embeds, positions = anatomy.family, kwargs["inputs_embeds"], kwargs.get("position_ids")
    splits = splits_at_gaps(anatomy.text, len(embeds), positions, family.position_axes)
    packing = Packing(embeds, kept, counts, positions, int(splits), merge, embeds_are_merged)
    # a cache of fixed size is filled without telling the host, and was made for the tokens before pruning
    length = max(prompt.ids.shape[1], fixed_size(kwargs.get("past_key_values")))
    check_slots(slot_limit(anatomy), length)
    wants_routers = kwargs.get("output_router_logits", getattr(anatomy.text.config, "output_router_logits", False))
    if wants_routers and not (packing.is_full and kwargs.get("attention_mask") is None):
        raise ValueError(
            "output_router_logits: expected False inside prune, got True; the auxiliary loss of the routers weighs the "
            "tokens that stay by the attention_mask of the whole prompt, so leave the option out, or pass rows without "
            "padding and without a mask, of which equally many tokens stay"
        )
    packed, following = packing.pack_arguments(kwargs, family.position_axes, renumbers)
    packed |= packed_features(kwargs, prompt, kept, counts, packing)
    if family.pair_masks:
        packed["attention_mask"] = packed_pair_masks(
            kwargs.get("attention_mask"),
            packing,
            kwargs.get("past_key_values"),
            getattr(anatomy.text.config, "layer_types", None),
        )
    return packing, packed, following


def check_renumbers(anatomy: Anatomy) -> None:
    """Refuse `positions="packed"` for a family in which it has no meaning, or a different one.

    Raises:
        TypeError: the position ids of visual tokens tell rows and columns, or windows are measured in the whole prompt.
    """
    family, text = anatomy.family, anatomy.text
    expected = f"positions: expected 'original' for {family.model_type}, got 'packed'"
    if any(hasattr(module, "get_rope_index") for module in (anatomy.multimodal, text)):
        raise TypeError(
            f"{expected}; its position ids tell time, row and column of a visual token, which have no packed form, and "
            "no release renumbers them"
        )
    kinds = getattr(text.config, "layer_types", None) or []
    if family.pair_masks and any("sliding" in kind for kind in kinds):
        raise TypeError(
            f"{expected}; the masks of its sliding windows are made for the whole prompt, so they would not follow"
        )


def slot_limit(anatomy: Anatomy) -> int | None:
    """Tell how many tokens a row may have before attention depends on where in it they stand; None means any number."""
    limit = anatomy.family.slot_limit
    return None if limit is None else limit(anatomy.text.config)


def splits_at_gaps(text: Any, batch: int, position_ids: torch.Tensor | None, axes: int) -> bool:
    """Tell whether attention would take the gaps in the position ids of a packed prompt for the ends of sequences.

    FlashAttention drops a mask of ones, and then divides a batch of one row by its position ids. Position ids whose
    first row counts text have no gaps there.
    """
    counts_text = position_ids is not None and position_ids.dim() == 3 and position_ids.shape[0] == axes + 1
    return batch == 1 and not counts_text and "flash" in (text.config._attn_implementation or "")


def packed_features(
    kwargs: dict[str, Any], prompt: Prompt, kept: torch.Tensor, counts: list[int], packing: Packing
) -> dict[str, Any]:
    """Select, and merge, the features that later layers add to the visual tokens, for the tokens that stay.

    The model hands over features for every placeholder, also for those that the caller hides.

    Args:
        kwargs: arguments of the text model.
        prompt: where visual tokens stand.
        kept: bool `[B, T]`, the tokens that stay.
        counts: how many stay in each row.
        packing: how they are packed.
    """
    given = {name: kwargs[name] for name in VISUAL_FEATURES if kwargs.get(name) is not None}
    if not given:
        return {}
    placeholders = upload(np.flatnonzero(prompt.all_placeholders()), kept.device)
    stays = kept.flatten().index_select(0, placeholders)
    count = packing.total - int((prompt.valid & ~prompt.visual).sum())
    # those that stay come first, in their order; their number is known, so that the host does not wait for the device
    rows = torch.argsort((~stays).int(), stable=True)[:count]

    def select(features: torch.Tensor) -> torch.Tensor:
        if packing.merges:
            text = (prompt.valid & ~prompt.visual).sum(axis=1).tolist()
            visual_counts = [count - others for count, others in zip(counts, text, strict=True)]
            return packing.pack_visual(features, prompt.all_placeholders(), visual_counts)
        return features.index_select(0, rows.to(features.device))

    return {
        name: {layer: select(features) for layer, features in layers.items()}
        if isinstance(layers, dict)
        else [select(features) for features in layers]
        for name, layers in given.items()
    }


def packed_pair_masks(masks: Any, packing: Packing, cache: Any, layer_types: list[str] | None) -> Any:
    """Pack masks over pairs of tokens, so that each pair of tokens that stay sees each other as before.

    Args:
        masks: a mask `[B or 1, 1, T, keys]`, bool or additive, or a dict of such by kind of layer; None means causal.
        packing: how tokens are packed.
        cache: `past_key_values`, whose layers may want masks of a fixed width.
        layer_types: the kind of each layer.

    Raises:
        ValueError: a mask that does not have 4 dimensions.
    """
    if not isinstance(masks, dict):
        return packed_pairs(masks, packing, _width(cache, packing.length, 0))
    kinds = layer_types or []
    return {
        kind: packed_pairs(mask, packing, _width(cache, packing.length, kinds.index(kind) if kind in kinds else 0))
        for kind, mask in masks.items()
    }


def _width(cache: Any, length: int, layer: int) -> int:
    return length if cache is None else int(cache.get_mask_sizes(length, layer)[0])


def packed_pairs(mask: torch.Tensor | None, packing: Packed, width: int) -> torch.Tensor:
    """Pack one mask over pairs of tokens, `[B or 1, 1, T, keys]` or None for a causal one, to `[B, 1, P, width]`.

    Raises:
        ValueError: a mask that does not have 4 dimensions.
    """
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 4):
        # flex_attention passes block masks, which are not tensors
        came = f"shape {list(mask.shape)}" if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"attention_mask: expected masks of 4 dimensions from the model, got {came}; call "
            "model.set_attn_implementation('sdpa') or load the model with attn_implementation='sdpa' or 'eager'"
        )
    device = packing.mask.device if mask is None else mask.device
    source, is_token = packing.source.to(device), packing.mask.to(device, torch.bool)
    batch, length = source.shape
    if mask is None:
        pairs = torch.ones(batch, 1, length, length, dtype=torch.bool, device=device).tril()
    else:
        rows = source[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
        pairs = mask.expand(batch, -1, -1, -1).gather(2, rows)
        pairs = pairs.gather(3, source[:, None, None, :].expand(*pairs.shape[:3], -1))
    seen, unseen = (True, False) if pairs.dtype == torch.bool else (0.0, torch.finfo(pairs.dtype).min)
    pairs = pairs.masked_fill(~is_token[:, None, None, :], unseen)
    # a row that sees nothing at all would be NaN
    itself = torch.eye(length, dtype=torch.bool, device=device) & ~is_token[:, None, :, None]
    pairs = pairs.masked_fill(itself, seen)
    return torch.nn.functional.pad(pairs, (0, width - length), value=unseen)
