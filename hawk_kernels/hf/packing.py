"""Closing the gaps that dropped tokens leave, and opening them again."""

from __future__ import annotations

from typing import Any

import torch


def splits_at_gaps(text: Any, batch: int, position_ids: torch.Tensor | None, axes: int) -> bool:
    """Whether attention would take the gaps in the position ids of a packed prompt for the ends of sequences.

    FlashAttention drops a mask of ones, and then reads a single row by its position ids. A row of positions that counts
    text alone has no gaps.
    """
    counts_text = position_ids is not None and position_ids.dim() == 3 and position_ids.shape[0] == axes + 1
    return batch == 1 and not counts_text and "flash" in (text.config._attn_implementation or "")


class Packing:
    """Moves the survivors of each row together, left-padded to the longest row.

    Args:
        kept: bool `[B, T]`, the tokens that stay.
        counts: how many those are in each row, known on the host.
        extra: columns of padding that every row gets.

    Attributes:
        length: tokens of a packed row, `P`.
        mask: int64 `[B, P]`, the packed attention mask.
        total: tokens of all rows without padding.
        is_full: whether no packed row has padding.
        source: int64 `[B, P]`, where in its row a packed token stood; 0 at padding.
    """

    def __init__(self, kept: torch.Tensor, counts: list[int], extra: int = 0) -> None:
        batch, full_length = kept.shape
        device = kept.device
        self._kept = kept
        # never one column: a call of one token is a decoding step
        self.length = max(2, *counts) + extra
        self.total = sum(counts)
        self.is_full = min(counts) == self.length
        padding = torch.tensor([self.length - count for count in counts]).to(device, non_blocking=True).unsqueeze(1)
        self.mask = (torch.arange(self.length, device=device) >= padding).long()
        self._slot = padding + kept.cumsum(1) - 1
        # dropped tokens all write to one slot behind the end
        target = torch.where(kept, self._slot, self.length)
        position = torch.arange(full_length, device=device).expand(batch, -1)
        self.source = position.new_zeros(batch, self.length + 1).scatter_(1, target, position)[:, :-1]
        start = torch.arange(0, batch * full_length, full_length, device=device).unsqueeze(1)
        self._flat_source = (self.source + start).flatten()

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[B, T, ...]` to `[B, P, ...]`; what marks tokens marks no padding."""
        rows = self._flat_source.to(tensor.device)
        packed = tensor.flatten(0, 1).index_select(0, rows).unflatten(0, (tensor.shape[0], self.length))
        if packed.dtype != torch.bool:
            return packed
        return packed & self.mask.to(packed.device, torch.bool).view(*self.mask.shape, *[1] * (packed.dim() - 2))

    def pack_positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Position ids `[..., 1 or B, T]` to `[..., B, P]`."""
        source = self.source.to(position_ids.device)
        shape = (*position_ids.shape[:-2], *source.shape)
        return position_ids.expand(*shape[:-1], -1).gather(-1, source.expand(shape))

    def unpack(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[B, P, hidden]` to `[B, T, hidden]`, zero where a token was dropped."""
        kept = self._kept.to(hidden_states.device).unsqueeze(-1)
        slot = self._slot.clamp(min=0).to(hidden_states.device).unsqueeze(-1)
        return hidden_states.gather(1, slot.expand(-1, -1, hidden_states.shape[-1])).masked_fill(~kept, 0)

    def pack_arguments(self, kwargs: dict[str, Any], axes: int = 3) -> tuple[dict[str, Any], torch.Tensor]:
        """The arguments of the text model for the packed prompt, and the position ids `[..., B, 1]` of what follows.

        Whatever has one entry a token is packed as the embeddings are. The mask is always given: without one, gaps in
        the position ids are taken for the ends of sequences that share a row.

        Args:
            kwargs: the arguments for the whole prompt.
            axes: rows of position ids that RoPE reads, where there are several; one more in front counts text.
        """
        shape = self._kept.shape
        packed = {
            name: self.pack(value)
            if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[:2] == shape
            else value
            for name, value in kwargs.items()
        }
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(shape[1], device=self.mask.device).unsqueeze(0)
        positions = self.pack_positions(positions)
        following = positions[..., -1:] + 1
        if positions.dim() == 3 and positions.shape[0] == axes + 1:
            # the first row only tells sequences of one row apart
            text = (self.mask.cumsum(-1) - 1).clamp(min=0).unsqueeze(0)
            positions = torch.cat([text.to(positions), positions[1:]])
        return {**packed, "position_ids": positions, "attention_mask": self.mask}, following
