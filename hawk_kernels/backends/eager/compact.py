"""Compact in PyTorch: a running count gives each token its slot, and the slots gather, without a host sync on a GPU."""

from __future__ import annotations

import torch


def slots(keep_mask: torch.Tensor, length: int) -> torch.Tensor:
    """Return int64 `[B, T]`, the slot of a kept token in its row of `length`; negative for a token without a slot."""
    counts = keep_mask.sum(dim=1, keepdim=True)
    return torch.where(keep_mask, keep_mask.cumsum(dim=1) + (length - 1 - counts), -1)


def compact(
    inputs_embeds: torch.Tensor, keep_mask: torch.Tensor, position_ids: torch.Tensor | None, length: int
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
    return _packed(inputs_embeds, source, is_token), positions, is_token.long(), source


def _packed(inputs_embeds: torch.Tensor, source: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    batch, num_tokens, hidden_size = inputs_embeds.shape
    if num_tokens == 0:
        return inputs_embeds.new_zeros(*source.shape, hidden_size)
    if inputs_embeds.is_contiguous():
        rows = source + torch.arange(0, batch * num_tokens, num_tokens, device=source.device).unsqueeze(1)
        packed = inputs_embeds.flatten(0, 1).index_select(0, rows.flatten()).view(*source.shape, hidden_size)
    else:
        packed = inputs_embeds.gather(1, source.unsqueeze(-1).expand(-1, -1, hidden_size))
    if packed.device.type == "cpu":
        # Only the padding is written; indexing by a mask is no host sync, because these are CPU tensors.
        packed[~is_token] = 0
        return packed
    return packed.masked_fill_(~is_token.unsqueeze(-1), 0)


def restore(packed: torch.Tensor, keep_mask: torch.Tensor) -> torch.Tensor:
    """Put packed tokens back where they stood, `[B, T', C]` to `[B, T, C]`; dropped ones are zeros. Differentiable."""
    batch, length, hidden_size = packed.shape
    if length == 0:
        return packed.new_zeros(*keep_mask.shape, hidden_size)
    slot = slots(keep_mask, length)
    rows = slot.clamp(min=0) + torch.arange(0, batch * length, length, device=slot.device).unsqueeze(1)
    restored = packed.flatten(0, 1).index_select(0, rows.flatten()).view(*keep_mask.shape, hidden_size)
    return restored.masked_fill(slot.unsqueeze(-1) < 0, 0)
