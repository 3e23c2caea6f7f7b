"""Which rows see which keys under right-aligned causality and segments: for each key it is one range of rows."""

from __future__ import annotations

from itertools import pairwise

import torch


def segment_limits(cu_seqlens: torch.Tensor, length: int) -> list[int]:
    """Read `cu_seqlens`, or raise a ValueError if they are not the segments of a packed sequence. Syncs with a GPU."""
    limits = cu_seqlens.tolist()
    if limits[0] != 0 or limits[-1] != length or any(end < start for start, end in pairwise(limits)):
        shown = limits if len(limits) <= 8 else [*limits[:4], "...", *limits[-3:]]
        raise ValueError(
            f"cu_seqlens: expected ascending positions from 0 to {length}, the length of the packed sequence, got "
            f"{shown}; use torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()"
        )
    return limits


def segment_bounds(cu_seqlens: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the segment of each token begins and ends, int32 `[T]` each, without a host sync."""
    cu_seqlens = cu_seqlens.contiguous()
    tokens = torch.arange(length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    segment = torch.searchsorted(cu_seqlens, tokens, right=True).clamp_(1, max(1, cu_seqlens.shape[0] - 1))
    return cu_seqlens[segment - 1], cu_seqlens[segment]


def seeing_rows(
    num_queries: int,
    num_keys: int,
    bounds: tuple[torch.Tensor, torch.Tensor] | None,
    causal: bool,
    q_rows: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """Count the rows that count and see each key, float32 `[1 or B, M]`, at least 1 so that it can divide.

    Args:
        num_queries: N.
        num_keys: M.
        bounds: `segment_bounds`, or None for one segment.
        causal: whether row `n` sees keys up to `n + M - N` only.
        q_rows: bool `[B, N]`, the rows that count, or None for all.
        device: of the result.
    """
    keys = torch.arange(num_keys, device=device)
    first, end = (torch.zeros_like(keys), torch.full_like(keys, num_queries)) if bounds is None else bounds
    if causal:
        # rows before N - M see no key
        first = keys + (num_queries - num_keys)
    # unchecked segments are clamped, because an index out of bounds destroys the context of a GPU
    first, end = (rows.clamp(0, num_queries).long() for rows in (first, end))
    if q_rows is None:
        return (end - first).clamp(min=1).float().unsqueeze(0)
    before = torch.nn.functional.pad(q_rows.cumsum(dim=1), (1, 0))
    return (before[:, end] - before[:, first]).clamp(min=1).float()
