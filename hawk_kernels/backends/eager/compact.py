"""Compact in PyTorch: a running count gives each token its slot, and the slots gather, without a host sync on a GPU."""

from __future__ import annotations

import torch

from hawk_kernels.selection import LAST_PLACE

Entries = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Targets, sources and weights `[B, E]` of a merge map."""


def slots(keep_mask: torch.Tensor, length: int) -> torch.Tensor:
    """Return int64 `[B, T]`, the slot of a kept token in its row of `length`; negative for a token without a slot."""
    counts = keep_mask.sum(dim=1, keepdim=True)
    return torch.where(keep_mask, keep_mask.cumsum(dim=1) + (length - 1 - counts), -1)


def compact(
    inputs_embeds: torch.Tensor,
    keep_mask: torch.Tensor,
    position_ids: torch.Tensor | None,
    length: int,
    merge: Entries | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pack embeddings `[B, T', C]`, positions `[A, B, T']`, mask and source `[B, T']` of validated arguments."""
    batch, num_tokens = keep_mask.shape
    slot = slots(keep_mask, length)
    tokens = torch.arange(num_tokens, device=keep_mask.device).expand_as(slot)
    # Tokens without a slot all write to an extra one at the end, which is cut off.
    target = torch.where(slot >= 0, slot, length)
    source = tokens.new_zeros(batch, length + 1).scatter_(1, target, tokens)[:, :length].contiguous()
    column = torch.arange(length, device=keep_mask.device)
    is_token = column >= length - keep_mask.sum(dim=1, keepdim=True)

    if position_ids is None:
        positions = source.unsqueeze(0).clone()
    elif num_tokens == 0:
        positions = position_ids.new_zeros(len(position_ids), batch, length)
    else:
        positions = position_ids.gather(2, source.expand(len(position_ids), -1, -1)).masked_fill_(~is_token, 0)
    packed = _packed(inputs_embeds, source, is_token)
    if merge is not None and num_tokens:
        packed = _merged(packed, inputs_embeds, source, is_token, merge)
    return packed, positions, is_token.long(), source


def _packed(inputs_embeds: torch.Tensor, source: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    if inputs_embeds.shape[1] == 0:
        return inputs_embeds.new_zeros(*source.shape, inputs_embeds.shape[2])
    packed = _rows(inputs_embeds, source)
    if packed.device.type == "cpu":
        # Only the padding is written; indexing by a mask is no host sync, because these are CPU tensors.
        packed[~is_token] = 0
        return packed
    return packed.masked_fill_(~is_token.unsqueeze(-1), 0)


def _rows(tensor: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Gather `[B, N, C]` from `[B, T, C]`, by the places `[B, N]` of rows among the T."""
    batch, length, hidden_size = tensor.shape
    if tensor.is_contiguous():
        rows = places + torch.arange(0, batch * length, length, device=places.device).unsqueeze(1)
        return tensor.flatten(0, 1).index_select(0, rows.flatten()).view(*places.shape, hidden_size)
    return tensor.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden_size))


def _merged(
    packed: torch.Tensor, inputs_embeds: torch.Tensor, source: torch.Tensor, is_token: torch.Tensor, merge: Entries
) -> torch.Tensor:
    """Replace the rows `[B, T', C]` that are targets of a merge map by the sums of their entries.

    Targets ascend, so that the entries of a slot stand together. Each slot is a bag of entries; entries without a slot,
    padding among them, fall into the bags between and are left out.
    """
    target, added, weight = merge
    (batch, num_entries), num_tokens = target.shape, inputs_embeds.shape[1]
    if num_entries == 0 or packed.numel() == 0:
        return packed
    places = torch.where(target < 0, LAST_PLACE, target).contiguous()
    begins = torch.searchsorted(places, source).masked_fill_(~is_token, 0)
    ends = torch.searchsorted(places, source, right=True).masked_fill_(~is_token, 0)
    starts = torch.arange(0, batch * num_entries, num_entries, device=target.device).unsqueeze(1)
    bags = torch.nn.functional.pad(torch.stack([begins, ends], dim=2).flatten(1), (1, 0))
    exists = (added >= 0) & (added < num_tokens)
    rows = (
        torch.where(exists, added, 0) + torch.arange(0, batch * num_tokens, num_tokens, device=target.device)[:, None]
    )
    wide = _wide(packed)
    sums = torch.nn.functional.embedding_bag(
        rows.flatten(),
        inputs_embeds.flatten(0, 1).to(wide),
        (bags + starts).flatten(),
        mode="sum",
        per_sample_weights=torch.where(exists, weight, 0).to(wide).flatten(),
    )
    sums = torch.unflatten(sums, 0, (batch, -1))[:, 1::2].to(packed.dtype)
    return torch.where((ends > begins).unsqueeze(-1), sums, packed)


def _places(slot: torch.Tensor, merge: Entries) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the slot `[B, E]` that each entry adds to, and whether it has one and a source, bool `[B, E]`."""
    target, source, _ = merge
    last = slot.shape[1] - 1
    place = slot.gather(1, target.clamp(0, last))
    return place, (target >= 0) & (target <= last) & (source >= 0) & (source <= last) & (place >= 0)


def _are_listed(places: torch.Tensor, length: int) -> torch.Tensor:
    """Mark the places, out of `length`, that are among `places` `[B, E]`; a place of `length` is none."""
    listed = torch.zeros(len(places), length + 1, dtype=torch.bool, device=places.device)
    return listed.scatter_(1, places, True)[:, :length]


def _sums(added: torch.Tensor, places: torch.Tensor, length: int) -> torch.Tensor:
    """Sum `[B, E, C]` by places `[B, E]` into `[B, length, C]`, in one order; a place of `length` is left out."""
    batch, _, hidden_size = added.shape
    rows = places + torch.arange(0, batch * (length + 1), length + 1, device=places.device).unsqueeze(1)
    zeros = added.new_zeros(batch * (length + 1), hidden_size)
    if added.device.type == "cuda":
        # this one sorts the rows; index_add adds by atomics there
        sums = zeros.index_put((rows.flatten(),), added.flatten(0, 1), accumulate=True)
    else:
        sums = zeros.index_add(0, rows.flatten(), added.flatten(0, 1))
    return torch.unflatten(sums, 0, (batch, length + 1))[:, :length]


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def restore(packed: torch.Tensor, keep_mask: torch.Tensor) -> torch.Tensor:
    """Put packed tokens back where they stood, `[B, T', C]` to `[B, T, C]`; dropped ones are zeros. Differentiable."""
    batch, length, hidden_size = packed.shape
    if length == 0:
        return packed.new_zeros(*keep_mask.shape, hidden_size)
    slot = slots(keep_mask, length)
    rows = slot.clamp(min=0) + torch.arange(0, batch * length, length, device=slot.device).unsqueeze(1)
    restored = packed.flatten(0, 1).index_select(0, rows.flatten()).view(*keep_mask.shape, hidden_size)
    return restored.masked_fill(slot.unsqueeze(-1) < 0, 0)


def restore_merged(gradient: torch.Tensor, keep_mask: torch.Tensor, merge: Entries) -> torch.Tensor:
    """Return the gradient `[B, T, C]` of the embeddings from that of rows packed by a merge map. Differentiable."""
    target, source, weight = merge
    length, num_tokens = gradient.shape[1], keep_mask.shape[1]
    restored = restore(gradient, keep_mask)
    if not (length and num_tokens):
        return restored
    place, counts = _places(slots(keep_mask, length), merge)
    wide = _wide(gradient)
    passed = _rows(gradient, place.clamp(min=0)).to(wide) * weight.to(wide).unsqueeze(-1)
    sums = _sums(passed, torch.where(counts, source, num_tokens), num_tokens)
    # a target passes nothing on but by its entries
    are_targets = _are_listed(torch.where(counts, target, num_tokens), num_tokens)
    return (restored.masked_fill(are_targets.unsqueeze(-1), 0).to(wide) + sums).to(gradient.dtype)


def weight_gradient(
    gradient: torch.Tensor, inputs_embeds: torch.Tensor, keep_mask: torch.Tensor, merge: Entries
) -> torch.Tensor:
    """Return the gradient `[B, E]` of a merge map's weights from that of the packed rows. Differentiable."""
    _, source, weight = merge
    length, num_tokens = gradient.shape[1], keep_mask.shape[1]
    if not (length and num_tokens):
        return torch.zeros_like(weight)
    place, counts = _places(slots(keep_mask, length), merge)
    wide = _wide(gradient)
    passed = _rows(gradient, place.clamp(min=0)).to(wide) * _rows(inputs_embeds, source.clamp(0, num_tokens - 1))
    return torch.where(counts, passed.sum(dim=-1), 0).to(weight.dtype)
