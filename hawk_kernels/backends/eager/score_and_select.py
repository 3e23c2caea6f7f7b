"""Scoring in PyTorch: averages the queries first, runs anywhere.

The mean over text commutes with the dot product, so the work is `(N + M) H D` where the literal steps need `N M H D`,
and the repeated KV heads, the `[H, N, M]` logits and the half-precision intermediate results are never made.

On a CPU the time goes into moving memory and into small calls. The keys therefore pass through float32 tiles that stay
in the cache, and the only full passes over the logits are the norm and the weighted sum: whether every logit is
finite, and whether float32 can hold the squares, can be seen from the norms.
"""

from __future__ import annotations

import math

import torch

from hawk_kernels.backends.eager.select_topk import select
from hawk_kernels.selection import Selection

# A matrix product adds in another order in its last columns, where equal keys would no longer tie. It does not where
# the number of columns is a multiple of this.
COLUMNS = 16
# Elements of a float32 tile of keys: 2 MB, which stay in a cache between the reading and the product.
_TILE = 1 << 19
# Float32 keys of fewer elements, 16 MB, are multiplied all at once, where they are.
_SMALL = 1 << 22
# From this many elements on, a product of an odd number of queries takes longer than one of a query more.
_PAIRED = 1 << 19
# Float32 squares of more columns than this are not added up in float32: the error would show beside that of a score.
_LONGEST_SUM = 2048
# Between these norms no square over- or underflows in float32 that would change a bit of the norm.
_SHORTEST, _LONGEST = 1e-12, 1e18


def score_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    q_mask: torch.Tensor | None,
    k_mask: torch.Tensor | None,
    normalize: str | None,
    scale: float,
) -> torch.Tensor:
    """Importance `[B, M]` float32 of validated `[B, H, N, D]` queries and `[B, Hkv, M, D]` keys."""
    batch, num_key_value_heads, num_keys, _ = k.shape
    if batch == 0 or num_keys == 0:
        return k.new_zeros((batch, num_keys), dtype=torch.float32)
    in_pairs = k.device.type == "cpu" and k.numel() >= _PAIRED
    queries, weights = _queries_and_weights(q, w, q_mask, scale, num_key_value_heads, normalize, in_pairs)
    c = _logits(queries, k)
    importance = weighted_sum(c, weights, _outside(c, k_mask, num_keys, normalize), normalize)
    if importance.shape[1] > num_keys:
        importance = importance[:, :num_keys].contiguous()
    return importance if k_mask is None else importance.masked_fill_(~k_mask, -torch.inf)


def _queries_and_weights(
    q: torch.Tensor,
    w: torch.Tensor,
    q_mask: torch.Tensor | None,
    scale: float,
    num_key_value_heads: int,
    normalize: str | None,
    in_pairs: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean queries `[B, Hkv, R, D]` float32 times the scale, and the weights `[Hkv * R]` of their logits.

    R is the number of heads in a group, or 1 where the group folds into one query, or even where `in_pairs`: then the
    last head of an odd group is its first one once more, with the weight 0.
    """
    weights = w.float()
    mean = _mean_query(q, q_mask, scale)
    queries = mean.view(mean.shape[0], num_key_value_heads, -1, mean.shape[2])
    if normalize is None and q.device.type == "cpu":
        # Without a norm between them the sum over the heads and the product commute. Where a head does not score, or a
        # weight spoils every score, they do not.
        folded = torch.matmul(weights.view(num_key_value_heads, 1, -1), queries)
        if math.isfinite(folded.abs().sum()):
            return folded, weights.new_ones(num_key_value_heads)
    if in_pairs and queries.shape[2] % 2 == 1 and queries.shape[2] > 1:
        queries = torch.cat((queries, queries[:, :, :1]), dim=2)
        weights = torch.constant_pad_nd(weights.view(num_key_value_heads, -1), (0, 1)).view(-1)
    return queries, weights


def _mean_query(q: torch.Tensor, q_mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Mean over text `[B, H, D]` float32, times the scale; NaN (which scores 0) where there is no text."""
    if q_mask is None:
        num_queries = q.shape[2]
        return q.sum(dim=2, dtype=torch.float32).mul_(scale / num_queries if num_queries else torch.nan)
    # Zeroed, not multiplied by the mask: padding may hold NaN.
    total = torch.where(q_mask[:, None, :, None], q, 0).sum(dim=2, dtype=torch.float32)
    return total.mul_(scale / q_mask.sum(dim=1, dtype=torch.float32)[:, None, None])


def _logits(queries: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """`c [B, P, Hkv * R, C]` float32: the keys of a row in P pieces of C, the last one filled up with zeros.

    All products have one shape, whose columns are a multiple of `COLUMNS`, so equal keys tie wherever they stand.
    """
    batch, num_key_value_heads, num_keys, head_dim = k.shape
    group_size = queries.shape[2]
    queries = queries.view(-1, group_size, head_dim)
    if k.dtype == torch.float32 and (k.device.type != "cpu" or k.numel() < _SMALL):
        return _products(queries, k.reshape(-1, num_keys, head_dim)).view(batch, 1, -1, aligned(num_keys))
    pieces, columns, rows_together = _tiling(k)
    c = queries.new_empty(batch, pieces, num_key_value_heads, group_size, columns)
    tile = queries.new_empty(rows_together, num_key_value_heads, columns, head_dim)
    for row in range(0, batch, rows_together):
        rows = slice(row, min(row + rows_together, batch))
        groups = slice(row * num_key_value_heads, rows.stop * num_key_value_heads)
        for piece in range(pieces):
            keys = k[rows, :, piece * columns : (piece + 1) * columns]
            if keys.dtype == torch.float32 and keys.shape[2] == columns:
                # A product reads short stretches of many rows at once, which memory serves slowly. A sum reads the
                # keys in order, and then the product finds them in the cache.
                keys.sum()
            else:
                keys = _copied(keys, tile[: rows.stop - row])
            torch.bmm(
                queries[groups],
                keys.reshape(-1, columns, head_dim).transpose(1, 2),
                out=c[rows, piece].view(-1, group_size, columns),
            )
    return c.flatten(2, 3)


def _products(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`[G, R, C]` of float32 queries `[G, R, D]` and keys `[G, M, D]`, which are read where they are; zeros after M.

    Where M is no multiple of `COLUMNS`, two overlapping products of one shape are put together: products of different
    shapes may add in different orders.
    """
    # torch.matmul would do the same with twice the host work.
    count = keys.shape[1]
    columns = aligned(count)
    if count == columns:
        return torch.bmm(queries, keys.transpose(1, 2))
    if count < COLUMNS:
        return torch.bmm(queries, torch.constant_pad_nd(keys, (0, 0, 0, columns - count)).transpose(1, 2))
    half = aligned(-(-count // 2))
    front = torch.bmm(queries, keys[:, :half].transpose(1, 2))
    back = torch.bmm(queries, keys[:, -half:].transpose(1, 2))
    zeros = front.new_zeros(*front.shape[:2], columns - count)
    return torch.cat((front, back[:, :, 2 * half - count :], zeros), dim=2)


def _tiling(k: torch.Tensor) -> tuple[int, int, int]:
    """Pieces of a row, columns of a piece, and how many rows of one piece make up a tile."""
    batch, num_key_value_heads, num_keys, head_dim = k.shape
    if k.device.type != "cpu":
        return 1, aligned(num_keys), batch
    keys_together = max(1, _TILE // (num_key_value_heads * head_dim))
    columns = aligned(-(-num_keys // max(1, round(num_keys / keys_together))))
    pieces = -(-num_keys // columns)
    return pieces, columns, min(batch, max(1, keys_together // columns)) if pieces == 1 else 1


def _copied(keys: torch.Tensor, tile: torch.Tensor) -> torch.Tensor:
    """The tile, with the keys in front and zeros after them."""
    count = keys.shape[2]
    if count == tile.shape[2]:
        return tile.copy_(keys)
    tile[:, :, :count].copy_(keys)
    tile[:, :, count:].zero_()
    return tile


def _outside(c: torch.Tensor, k_mask: torch.Tensor | None, num_keys: int, normalize: str | None) -> torch.Tensor | None:
    """bool `[B, P, 1, C]`, True at the columns that no norm may see, or None where the norm needs no such mask."""
    batch, pieces, _, columns = c.shape
    extra = pieces * columns - num_keys
    if k_mask is None:
        if extra == 0 or normalize in (None, "l2"):
            return None
        k_mask = torch.ones((batch, num_keys), dtype=torch.bool, device=c.device)
    outside = torch.nn.functional.pad(~k_mask, (0, extra), value=True)
    return outside.view(batch, pieces, 1, columns)


def aligned(count: int) -> int:
    """The number of columns that a product needs so that all of `count` columns are added up in one order."""
    return -(-count // COLUMNS) * COLUMNS


def weighted_sum(c: torch.Tensor, w: torch.Tensor, outside: torch.Tensor | None, normalize: str | None) -> torch.Tensor:
    """`sum_i w[i] norm(c[i, :])`, `[B, P * C]`, of `c [B, P, H, C]`, whose columns stand in P pieces.

    Equal columns get equal sums where C is a multiple of `COLUMNS`.

    A logit that is not finite counts as 0. The norm sees the columns that are not `outside` (bool `[B, P, 1, C]`);
    what the sum is there means nothing. `c` may be overwritten.
    """
    batch, pieces, num_heads, columns = c.shape
    if c.numel() == 0:
        return c.new_zeros(batch, pieces * columns)
    if normalize == "l2":
        weights = _over_l2_norm(c, w, outside)
    else:
        c.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        weights = w.expand(batch, -1)
    if normalize == "softmax":
        if outside is not None:
            c.masked_fill_(outside, -torch.inf)
        c.sub_(c.amax(dim=(1, 3), keepdim=True)).exp_()
        weights = weights / c.sum(dim=(1, 3))
    elif normalize == "minmax":
        lowest = (c if outside is None else c.masked_fill(outside, torch.inf)).amin(dim=(1, 3), keepdim=True)
        highest = (c if outside is None else c.masked_fill(outside, -torch.inf)).amax(dim=(1, 3), keepdim=True)
        extent = (highest - lowest)[:, 0, :, 0]
        weights = torch.where(extent > 0, weights / extent, 0.0)
        c.sub_(lowest)
        if outside is not None:
            c.masked_fill_(outside, 0.0)
    weights = weights.unsqueeze(1)
    if pieces > 1:
        weights = weights.repeat_interleave(pieces, dim=0)
    return torch.bmm(weights, c.view(-1, num_heads, columns)).view(batch, -1)


def _over_l2_norm(c: torch.Tensor, w: torch.Tensor, outside: torch.Tensor | None) -> torch.Tensor:
    """`w[i] / |c[i, :]|`, `[B, H]`, or 0 where the vector is too short to have a direction in float32."""
    if outside is not None:
        c.masked_fill_(outside, 0.0)
    batch, pieces, num_heads, columns = c.shape
    parts = -(-columns // _LONGEST_SUM)
    if c.device.type == "cpu" and columns % parts == 0:
        # Looking at the norms is no host sync: this is for CPU tensors.
        norm = torch.linalg.vector_norm(c.view(batch, pieces, num_heads, parts, -1), dim=4)
        if pieces * parts > 1:
            norm = torch.linalg.vector_norm(norm, dim=(1, 3), dtype=torch.float64)
        norm = norm.view(batch, num_heads)
        shortest, longest = torch.aminmax(norm)
        if shortest.item() >= _SHORTEST and longest.item() <= _LONGEST:
            return torch.div(w, norm).float()
    # In float64 no square over- or underflows; below float32's normal range a vector has no direction left.
    c.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    norm = torch.linalg.vector_norm(c, dim=(1, 3), dtype=torch.float64)
    return torch.div(w, norm.masked_fill_(norm < torch.finfo(torch.float32).tiny, torch.inf)).float()


def score_and_select(
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    r: float | int,
    q_mask: torch.Tensor | None,
    k_mask: torch.Tensor | None,
    normalize: str | None,
    scale: float,
    rounding: str,
) -> Selection:
    """`select_topk(score_tokens(...))` of validated arguments."""
    return select(score_tokens(q, k, w, q_mask, k_mask, normalize, scale), r, k_mask, rounding)
