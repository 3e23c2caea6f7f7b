"""Closing the gaps that dropped tokens leave, and opening them again."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from hawk_kernels.backends.eager.compact import restore
from hawk_kernels.ops.compact import compact


def splits_at_gaps(text: Any, batch: int, position_ids: torch.Tensor | None, axes: int) -> bool:
    """Whether attention would take the gaps in the position ids of a packed prompt for the ends of sequences.

    FlashAttention drops a mask of ones, and then reads a single row by its position ids. A row of positions that counts
    text alone has no gaps.
    """
    counts_text = position_ids is not None and position_ids.dim() == 3 and position_ids.shape[0] == axes + 1
    return batch == 1 and not counts_text and "flash" in (text.config._attn_implementation or "")


class Packing:
    """Moves the survivors of each row together, left-padded to the longest row, without asking the device anything.

    Args:
        inputs_embeds: `[B, T, hidden]`.
        kept: bool `[B, T]`, the tokens that stay.
        counts: how many those are in each row, known on the host.
        position_ids: `[1 or B, T]` or `[axes, 1 or B, T]`; None: 0 to T - 1.
        extra: columns of padding that every row gets.

    Attributes:
        length: tokens of a packed row, `P`.
        inputs_embeds: `[B, P, hidden]`.
        position_ids: `[..., B, P]`, those that the tokens had.
        mask: int64 `[B, P]`, the packed attention mask.
        source: int64 `[B, P]`, where in its row a packed token stood; 0 at padding.
        total: tokens of all rows without padding.
        is_full: whether no packed row has padding.
    """

    def __init__(
        self,
        inputs_embeds: torch.Tensor,
        kept: torch.Tensor,
        counts: list[int],
        position_ids: torch.Tensor | None = None,
        extra: int = 0,
    ) -> None:
        # never one column: a call of one token is a decoding step
        self.length = max(2, *counts) + extra
        self.total = sum(counts)
        self.is_full = min(counts) == self.length
        self._kept = kept
        positions = None if position_ids is None else position_ids.to(kept.device)
        # some models count seconds of a video, in fractions
        fractions = positions if positions is not None and positions.is_floating_point() else None
        self.inputs_embeds, self.position_ids, self.mask, self.source = compact(
            inputs_embeds, kept, position_ids=positions if fractions is None else None, length=self.length
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
        """`[B, T, ...]` to `[B, P, ...]`; what marks tokens marks no padding."""
        rows = self._flat_source.to(tensor.device)
        packed = tensor.flatten(0, 1).index_select(0, rows).unflatten(0, (tensor.shape[0], self.length))
        if packed.dtype != torch.bool:
            return packed
        return packed & self.mask.to(packed.device, torch.bool).view(*self.mask.shape, *[1] * (packed.dim() - 2))

    def unpack(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[B, P, hidden]` to `[B, T, hidden]`, zero where a token was dropped."""
        return restore(hidden_states, self._kept.to(hidden_states.device))

    def pack_arguments(self, kwargs: dict[str, Any], axes: int = 3) -> tuple[dict[str, Any], torch.Tensor]:
        """The arguments of the text model for the packed prompt, and the position ids `[..., B, 1]` of what follows.

        Whatever else has one entry a token is packed as the embeddings are. The mask is always given: without one, gaps
        in the position ids are taken for the ends of sequences that share a row.

        Args:
            kwargs: the arguments for the whole prompt.
            axes: rows of position ids that RoPE reads, where there are several; one more in front counts text.
        """
        positions = self.position_ids
        following = positions[..., -1:] + 1
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

    def _packed(self, value: Any) -> Any:
        has_tokens = isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[:2] == self._kept.shape
        return self.pack(value) if has_tokens else value
