"""Compute column statistics of attention in PyTorch, from one tile of whole rows of the matrix at a time."""

from __future__ import annotations

from itertools import groupby, pairwise

import torch

from hawk_kernels.backends.visibility import seeing_rows, segment_bounds, segment_limits

# Logits of a tile: 2 MB of float32, which stay in a core's cache between the product, the softmax and the sum.
_TILE = 1 << 19


def attention_column_mean(
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    causal: bool,
    q_rows: torch.Tensor | None,
    head_weights: torch.Tensor | None,
    reduce_heads: bool,
    reduction: str,
    scale: float,
) -> torch.Tensor:
    """Compute the statistics `[B, M]` or `[B, H, M]`, float32, of validated arguments.

    Reads `q_rows` and `cu_seqlens` on the host: rows that do not count are never multiplied, and neighbouring segments
    of one length run side by side.
    """
    num_queries, num_key_value_heads, num_keys = q.shape[2], *k.shape[1:3]
    queries = q.unflatten(1, (num_key_value_heads, -1))
    columns = q.new_zeros((*queries.shape[:3], num_keys), dtype=torch.float32)
    if cu_seqlens is not None:
        limits = segment_limits(cu_seqlens, num_keys)
        _fill_segments(columns[0], queries[0], k[0], limits, causal, q_rows, reduction, scale)
    elif q_rows is None:
        for out, row_queries, row_keys in zip(columns, queries, k):
            out += _columns(row_queries, row_keys, range(num_queries), causal, reduction, scale)
    else:
        for out, row_queries, row_keys, rows in zip(columns, queries, k, q_rows):
            out += _columns(row_queries, row_keys, rows.nonzero().flatten().tolist(), causal, reduction, scale)
    columns = columns.flatten(1, 2)
    if reduction == "mean":
        bounds = None if cu_seqlens is None else segment_bounds(cu_seqlens, num_keys)
        columns /= seeing_rows(num_queries, num_keys, bounds, causal, q_rows, k.device).unsqueeze(1)
    if not reduce_heads:
        return columns
    return columns.mean(dim=1) if head_weights is None else torch.einsum("h,bhm->bm", head_weights.float(), columns)


def _fill_segments(
    columns: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    limits: list[int],
    causal: bool,
    q_rows: torch.Tensor | None,
    reduction: str,
    scale: float,
) -> None:
    """Fill `columns [Hkv, R, T]` of a packed sequence with queries `[Hkv, R, T, D]` and keys `[Hkv, T, D]`."""
    segments = [(start, end) for start, end in pairwise(limits) if end > start]
    if q_rows is not None:
        for start, end in segments:
            rows = q_rows[0, start:end].nonzero().flatten().tolist()
            columns[..., start:end] = _columns(q[:, :, start:end], k[:, start:end], rows, causal, reduction, scale)
        return
    for length, run in groupby(segments, key=lambda segment: segment[1] - segment[0]):
        neighbours = list(run)
        logits_of_head = q.shape[1] * length**2
        together = max(1, _TILE // logits_of_head)
        for first in range(0, len(neighbours), together):
            batch = neighbours[first : first + together]
            tokens = slice(batch[0][0], batch[-1][1])
            # segments of one head are a view, those of several would be copied
            heads_together = max(1, _TILE // (logits_of_head * len(batch)))
            for head in range(0, len(q), heads_together):
                heads = slice(head, head + heads_together)
                queries = q[heads, :, tokens].unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)
                keys = k[heads, tokens].unflatten(1, (-1, length)).flatten(0, 1)
                found = _columns(queries, keys, range(length), causal, reduction, scale)
                columns[heads, :, tokens] = found.unflatten(0, (-1, len(batch))).transpose(1, 2).flatten(2)


def _columns(
    q: torch.Tensor, k: torch.Tensor, rows: range | list[int], causal: bool, reduction: str, scale: float
) -> torch.Tensor:
    """Compute sums or maxima `[G, R, M]` over `rows` of the attention of queries `[G, R, N, D]` to keys `[G, M, D]`."""
    groups, group_size, num_queries, _ = q.shape
    num_keys = k.shape[1]
    columns = q.new_zeros((groups, group_size, num_keys), dtype=torch.float32)
    offset = num_keys - num_queries
    if causal:
        rows = [row for row in rows if row + offset >= 0]
    if len(rows) == 0 or num_keys == 0:
        return columns
    if len(rows) < num_queries:
        q = q[:, :, torch.tensor(rows, device=q.device)]
    groups_together = max(1, _TILE // (group_size * len(rows) * num_keys))
    rows_together = max(1, _TILE // (groups_together * group_size * num_keys))
    for group in range(0, groups, groups_together):
        of_group = slice(group, group + groups_together)
        keys = k[of_group].float().transpose(1, 2)
        for start in range(0, len(rows), rows_together):
            tile = rows[start : start + rows_together]
            seen = tile[-1] + offset + 1 if causal else num_keys
            queries = q[of_group, :, start : start + len(tile)].float().flatten(1, 2)
            logits = torch.baddbmm(queries.new_empty(1), queries, keys[:, :, :seen], beta=0, alpha=scale)
            logits = logits.unflatten(1, (group_size, len(tile)))
            if causal:
                last = torch.tensor(tile, device=k.device).unsqueeze(1) + offset
                future = torch.arange(seen, device=k.device) > last
                logits.masked_fill_(future, -torch.inf)
            attention = torch.softmax(logits, dim=-1, out=logits)
            if causal:
                # a NaN has filled its whole row, and keys in the future of that row must not see it
                attention.masked_fill_(future, 0.0)
            filled = columns[of_group, :, :seen]
            if reduction == "max":
                torch.maximum(filled, attention.amax(dim=2), out=filled)
            else:
                filled += attention.sum(dim=2)
    return columns
