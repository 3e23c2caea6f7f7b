"""Scoring in PyTorch: averages the queries first, runs anywhere.

The mean over text commutes with the dot product, so the work is `(N + M) H D` where the literal steps need `N M H D`,
and the repeated KV heads, the `[H, N, M]` logits and the half-precision intermediate results are never made.

On a CPU the time goes into the product, into moving memory and into small calls. Float32 keys are therefore multiplied
where they lie, half-precision keys pass through float32 tiles that stay in the cache, the scale rides along with the
product, and the only full passes over the logits are the norm and the weighted sum: whether every logit is finite, and
whether float32 can hold the squares, can be seen from the norms.
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
# Float32 keys of at least so many elements, 16 MB, do not stay in a cache. A product whose columns are the keys reads
# them several times as slowly as memory can serve them; one whose rows are the keys reads them in order.
_STREAMED = 1 << 22
# From so many elements on, a product of 4 n - 1 queries takes longer than one of 4 n and the padding.
_PADDED = 1 << 18
# Float32 squares of more columns than this are not added up in float32: the error would show beside that of a score.
_LONGEST_SUM = 2048
# A norm adds up a row in this many parts at most.
_MOST_PARTS = COLUMNS
# Float32 keys stand in pieces of at most so many, for the sake of these parts.
_LONGEST_PIECE = _LONGEST_SUM * _MOST_PARTS
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
    queries = _mean_queries(q, q_mask, num_key_value_heads)
    weights = w.float().view(num_key_value_heads, -1)
    if k.is_cpu:
        folded = _folded(queries, weights) if normalize is None else None
        if folded is not None:
            queries, weights = folded, weights.new_ones(num_key_value_heads, 1)
        elif queries.shape[2] % 4 == 3 and k.numel() >= _PADDED:
            queries = torch.constant_pad_nd(queries, (0, 0, 0, 1))
    c = _logits(queries, k, scale)
    importance = weighted_sum(c, weights, _outside(c, k_mask, num_keys, normalize), normalize)
    scores = _joined(importance, num_keys)
    return scores if k_mask is None else scores.masked_fill_(~k_mask, -torch.inf)


def _mean_queries(q: torch.Tensor, q_mask: torch.Tensor | None, num_key_value_heads: int) -> torch.Tensor:
    """Mean over text `[B, Hkv, R, D]` float32; NaN (which scores 0) where there is no text."""
    if q_mask is None:
        mean = q.mean(dim=2, dtype=torch.float32)
    else:
        # Zeroed, not multiplied by the mask: padding may hold NaN.
        total = torch.where(q_mask[:, None, :, None], q, 0).sum(dim=2, dtype=torch.float32)
        mean = total.div_(q_mask.sum(dim=1, dtype=torch.float32)[:, None, None])
    return mean.view(q.shape[0], num_key_value_heads, -1, q.shape[3])


def _folded(queries: torch.Tensor, weights: torch.Tensor) -> torch.Tensor | None:
    """One query a group, `[B, Hkv, 1, D]`, whose logits are the weighted sum of the group's, or None if there is none.

    Without a norm between them the sum over the heads and the product commute. Where a head does not score, or a weight
    spoils every score, they do not.
    """
    folded = torch.matmul(weights.unsqueeze(1), queries)
    return folded if math.isfinite(folded.abs().sum()) else None


def _logits(queries: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """`c [P, B, Hkv, R, C]` float32, the keys times the queries times the scale, the columns in P pieces of C.

    All products have one shape, whose columns are a multiple of `COLUMNS`, so equal keys tie wherever they stand. The
    last piece ends where the row ends. Its first `P * C - M` columns are 0: they lie before the row, or in the piece in
    front of it as well.
    """
    batch, num_key_value_heads, num_keys, head_dim = k.shape
    is_aligned = num_keys % COLUMNS == 0
    pieces = max(1 if is_aligned else 2, -(-num_keys // _LONGEST_PIECE))
    if k.dtype != torch.float32 or num_keys < COLUMNS:
        multiply, pieces = _multiply_tiles, 1
        if k.is_cpu:
            pieces = max(1, round(num_keys * num_key_value_heads * head_dim / _TILE))
    elif k.is_cpu and k.numel() >= _STREAMED:
        multiply = _multiply_streamed
    elif is_aligned or num_keys > _LONGEST_PIECE or batch * num_key_value_heads == 1 or not k.is_contiguous():
        multiply = _multiply_in_place
    else:
        multiply, pieces = _multiply_neighbours, 1
    columns = aligned(-(-num_keys // pieces))
    pieces = -(-num_keys // columns)
    unused = pieces * columns - num_keys
    shape = (pieces, batch, num_key_value_heads, queries.shape[2], columns)
    if unused == 0:
        c = queries.new_empty(shape)
        multiply(c, queries, k, scale)
        return c
    # Neighbours share a buffer that is longer by as much as the columns of some are shifted.
    size = math.prod(shape)
    c = queries.new_empty(size + unused).narrow(0, 0, size).view(shape)
    multiply(c, queries, k, scale)
    c[-1].narrow(3, 0, unused).zero_()
    return c


def _multiply_in_place(c: torch.Tensor, queries: torch.Tensor, k: torch.Tensor, scale: float) -> None:
    """Fill `c` from float32 keys, read where they lie."""
    pieces, _, _, group_size, columns = c.shape
    num_keys, head_dim = k.shape[2:]
    queries, keys = queries.view(-1, group_size, head_dim), k.reshape(-1, num_keys, head_dim)
    for piece in range(pieces):
        start = _start(piece, columns, num_keys)
        these = keys if pieces == 1 else keys[:, start : start + columns]
        out = c[piece].view(-1, group_size, columns)
        out.baddbmm_(queries, these.transpose(1, 2), beta=0, alpha=scale)


def _multiply_neighbours(c: torch.Tensor, queries: torch.Tensor, k: torch.Tensor, scale: float) -> None:
    """Fill the one piece of `c` from contiguous float32 keys of at least two heads, read where they lie.

    The columns that are not used come from keys of a neighbour in memory: the first half of the heads reads on after
    its keys, and writes as much further to the right, into columns that are not used; the second half reads what lies
    before its keys.
    """
    _, _, _, group_size, columns = c.shape
    num_keys, head_dim = k.shape[2:]
    unused = columns - num_keys
    queries, keys = queries.view(-1, group_size, head_dim), k.view(-1, num_keys, head_dim)
    heads = keys.shape[0]
    strides = num_keys * head_dim, 1, head_dim
    matrix = group_size * columns
    for first, last, before in ((0, heads // 2, 0), (heads // 2, heads, unused)):
        shape = last - first, head_dim, columns
        window = keys.as_strided(shape, strides, keys.storage_offset() + (first * num_keys - before) * head_dim)
        shape = last - first, group_size, columns
        out = c.as_strided(shape, (matrix, columns, 1), first * matrix + unused - before)
        out.baddbmm_(queries.narrow(0, first, last - first), window, beta=0, alpha=scale)


def _multiply_streamed(c: torch.Tensor, queries: torch.Tensor, k: torch.Tensor, scale: float) -> None:
    """Fill `c` from float32 keys, read where they lie and in order: one key after the other meets all queries."""
    pieces, batch, num_key_value_heads, group_size, columns = c.shape
    turned = c.new_empty(num_key_value_heads, columns, group_size)
    for row in range(batch):
        for piece in range(pieces):
            start = _start(piece, columns, k.shape[2])
            out = c[piece, row].view(turned.shape) if group_size == 1 else turned
            out.baddbmm_(k[row, :, start : start + columns], queries[row].transpose(1, 2), beta=0, alpha=scale)
            if out is turned:
                c[piece, row].copy_(turned.transpose(1, 2))


def _multiply_tiles(c: torch.Tensor, queries: torch.Tensor, k: torch.Tensor, scale: float) -> None:
    """Fill `c` from keys of any dtype and number, which are copied into float32 tiles of whole rows or of one piece."""
    pieces, batch, num_key_value_heads, group_size, columns = c.shape
    num_keys, head_dim = k.shape[2:]
    rows_together = 1
    if pieces == 1:
        rows_together = max(1, _TILE // (num_key_value_heads * columns * head_dim)) if k.is_cpu else batch
    tile = c.new_empty(min(batch, rows_together), num_key_value_heads, columns, head_dim)
    for row in range(0, batch, rows_together):
        rows = slice(row, row + rows_together)
        for piece in range(pieces):
            start = _start(piece, columns, num_keys)
            keys = _copied(k[rows, :, start : start + columns], tile)
            out = c[piece, rows].view(-1, group_size, columns)
            out.baddbmm_(
                queries[rows].reshape(-1, group_size, head_dim),
                keys.view(-1, columns, head_dim).transpose(1, 2),
                beta=0,
                alpha=scale,
            )


def _start(piece: int, columns: int, num_keys: int) -> int:
    """The first key of a piece."""
    return min(piece * columns, max(num_keys - columns, 0))


def _copied(keys: torch.Tensor, tile: torch.Tensor) -> torch.Tensor:
    """The rows of the tile that hold these keys, with zeros in front of them."""
    rows, _, count, _ = keys.shape
    if rows < tile.shape[0]:
        tile = tile[:rows]
    unused = tile.shape[2] - count
    if unused == 0:
        return tile.copy_(keys)
    tile[:, :, :unused].zero_()
    tile[:, :, unused:].copy_(keys)
    return tile


def _outside(c: torch.Tensor, k_mask: torch.Tensor | None, num_keys: int, normalize: str | None) -> torch.Tensor | None:
    """bool `[P, B, 1, 1, C]`, True at the columns that no norm may see, or None where the norm needs no such mask."""
    pieces, batch, _, _, columns = c.shape
    unused = pieces * columns - num_keys
    if k_mask is None:
        if unused == 0 or normalize in (None, "l2"):
            return None
        k_mask = torch.ones((batch, num_keys), dtype=torch.bool, device=c.device)
    outside = ~k_mask
    if unused > 0:
        last = (pieces - 1) * columns
        outside = torch.cat((outside[:, :last], outside.new_ones(batch, unused), outside[:, last:]), dim=1)
    return outside.view(batch, pieces, columns).transpose(0, 1)[:, :, None, None]


def aligned(count: int) -> int:
    """The number of columns that a product needs so that all of `count` columns are added up in one order."""
    return -(-count // COLUMNS) * COLUMNS


def weighted_sum(c: torch.Tensor, w: torch.Tensor, outside: torch.Tensor | None, normalize: str | None) -> torch.Tensor:
    """`sum_i w[i] norm(c[i, :])`, `[P, B, C]`, of `c [P, B, G, R, C]`, whose columns stand in P pieces.

    Equal columns get equal sums where C is a multiple of `COLUMNS`.

    A logit that is not finite counts as 0. Of the R logits of a group, those after the first `w.shape[1]` do not count.
    The norm sees the columns that are not `outside` (bool `[P, B, 1, 1, C]`); what the sum is there means nothing. `c`
    may be overwritten.
    """
    pieces, batch, groups, rows, columns = c.shape
    if c.numel() == 0:
        return c.new_zeros(pieces, batch, columns)
    if normalize == "l2":
        weights = _over_l2_norm(c, w, outside)
    else:
        c.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        weights = w.expand(batch, -1, -1)
    if normalize == "softmax":
        if outside is not None:
            c.masked_fill_(outside, -torch.inf)
        c.sub_(c.amax(dim=(0, 4), keepdim=True)).exp_()
        weights = weights / c.sum(dim=(0, 4))[:, :, : w.shape[1]]
    elif normalize == "minmax":
        lowest = (c if outside is None else c.masked_fill(outside, torch.inf)).amin(dim=(0, 4), keepdim=True)
        highest = (c if outside is None else c.masked_fill(outside, -torch.inf)).amax(dim=(0, 4), keepdim=True)
        extent = (highest - lowest)[0, :, :, : w.shape[1], 0]
        weights = torch.where(extent > 0, weights / extent, 0.0)
        c.sub_(lowest)
        if outside is not None:
            c.masked_fill_(outside, 0.0)
    if rows > w.shape[1]:
        weights = torch.constant_pad_nd(weights, (0, rows - w.shape[1]))
    weights = weights.reshape(batch, 1, -1)
    if pieces > 1:
        weights = weights.repeat(pieces, 1, 1)
    return torch.bmm(weights, c.view(pieces * batch, groups * rows, columns)).view(pieces, batch, columns)


def _over_l2_norm(c: torch.Tensor, w: torch.Tensor, outside: torch.Tensor | None) -> torch.Tensor:
    """`w[i] / |c[i, :]|`, `[B, G, R]`, or 0 where the vector is too short to have a direction in float32."""
    if outside is not None:
        c.masked_fill_(outside, 0.0)
    counted = c if c.shape[3] == w.shape[1] else c.narrow(3, 0, w.shape[1])
    if c.is_cpu:
        # Looking at the norms is no host sync: this is for CPU tensors.
        norm = _float32_norm(counted)
        if norm is not None:
            return torch.div(w, norm).float()
    # In float64 no square over- or underflows; below float32's normal range a vector has no direction left.
    c.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    norm = torch.linalg.vector_norm(counted, dim=(0, 4), dtype=torch.float64)
    return torch.div(w, norm.masked_fill_(norm < torch.finfo(torch.float32).tiny, torch.inf)).float()


def _float32_norm(c: torch.Tensor) -> torch.Tensor | None:
    """L2 norms `[B, G, R]` of `c [P, B, G, R, C]`, or None where float32 cannot hold the squares or their sum."""
    pieces, batch, groups, rows, columns = c.shape
    parts = 1
    while parts < _MOST_PARTS and columns > parts * _LONGEST_SUM and columns % (2 * parts) == 0:
        parts *= 2
    if columns > parts * _LONGEST_SUM:
        return None
    norm = torch.linalg.vector_norm(c.view(pieces, batch, groups, rows, parts, -1), dim=5)
    if pieces * parts > 1:
        norm = torch.linalg.vector_norm(norm, dim=(0, 4), dtype=torch.float64)
    shortest, longest = torch.aminmax(norm)
    return norm.view(batch, groups, rows) if shortest.item() >= _SHORTEST and longest.item() <= _LONGEST else None


def _joined(sums: torch.Tensor, num_keys: int) -> torch.Tensor:
    """`[B, M]`, the columns of the keys in `sums [P, B, C]`, in one row."""
    pieces, _, columns = sums.shape
    unused = pieces * columns - num_keys
    if pieces == 1:
        return sums[0] if unused == 0 else sums[0, :, unused:].contiguous()
    return torch.cat((*sums[:-1], sums[-1, :, unused:]), dim=1)


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
