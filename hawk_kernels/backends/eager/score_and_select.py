"""Scoring in PyTorch: averages the queries first, runs anywhere.

The mean over text commutes with the dot product, so the work is `(N + M) H D` where the literal steps need `N M H D`,
and the repeated KV heads, the `[H, N, M]` logits and the half-precision intermediate results are never made.

On a CPU the time goes into the product, into moving memory and into small calls. Float32 keys are therefore multiplied
where they lie, half-precision keys pass through float32 tiles that stay in the cache, the scale rides along with the
product, and the only full passes over the logits are the norm and the weighted sum: whether every logit is finite, and
whether float32 can hold the squares, can be seen from the norms. What shapes, strides and options decide is decided
once for all calls of a signature (`PreparedCall`), and the memory between the steps, with every view of it that a step
reads or writes, is kept for the next call, so that a call makes few views and allocates only what it returns.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from hawk_kernels.backends.eager.select_topk import select
from hawk_kernels.selection import Selection, as_selection, max_kept

# A matrix product adds in another order in its last columns, where equal keys would no longer tie. It does not where
# the number of columns is a multiple of this.
COLUMNS = 16
# Elements of a float32 tile of keys: 2 MB, which stay in a cache between the reading and the product.
_TILE = 1 << 19
# Float32 keys of at least so many elements, 16 MB, do not stay in a cache. A product whose columns are the keys reads
# them several times as slowly as memory can serve them; one whose rows are the keys reads them in order.
_STREAMED = 1 << 22
# Float32 squares of more columns than this are not added up in float32: the error would show beside that of a score.
_LONGEST_SUM = 2048
# A norm adds up a row in this many parts at most.
_MOST_PARTS = COLUMNS
# Float32 keys stand in pieces of at most so many, for the sake of these parts.
_LONGEST_PIECE = _LONGEST_SUM * _MOST_PARTS
# Between these norms no square over- or underflows in float32 that would change a bit of the norm.
_SHORTEST, _LONGEST = 1e-12, 1e18
# Memory is kept for the next call of a signature where it has at most so many bytes, for at most so many signatures.
_MOST_KEPT_BYTES = 1 << 22
_MOST_KEPT = 8


class PreparedCall:
    """A call of one signature, which can be made again with other tensors of it, by any number of threads."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        w: torch.Tensor,
        r: float | int | None,
        q_mask: torch.Tensor | None,
        k_mask: torch.Tensor | None,
        normalize: str | None,
        scale: float,
        rounding: str,
        batched: bool = True,
    ) -> None:
        """Prepare a call by validated `[B, H, N, D]` queries and `[B, Hkv, M, D]` keys.

        Args:
            q, k, w, q_mask, k_mask, normalize, scale, rounding: as in the public function.
            r: None scores and does not select.
            batched: False means that the tensors of the calls have no batch axis, and leaves it out of the results.
        """
        self._scores = _Scores(q, k, normalize, scale)
        self._r = r
        self._rounding = rounding
        self._width = 0 if r is None else max_kept(r, k.shape[2], rounding)
        self._batched = batched
        self._device_type = k.device.type

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        w: torch.Tensor,
        q_mask: torch.Tensor | None,
        k_mask: torch.Tensor | None,
    ) -> Selection:
        """Return mask, indices and scores; without selecting, each of them is the scores."""
        if torch.is_autocast_enabled(self._device_type):
            # It would cast the products of float32 scores to half precision.
            with torch.autocast(self._device_type, enabled=False):
                return self(q, k, w, q_mask, k_mask)
        if not self._batched:
            q, k = q.unsqueeze(0), k.unsqueeze(0)
            q_mask = None if q_mask is None else q_mask.unsqueeze(0)
            k_mask = None if k_mask is None else k_mask.unsqueeze(0)
        if q.requires_grad or k.requires_grad or w.requires_grad:
            q, k, w = q.detach(), k.detach(), w.detach()
        # A call takes the memory out, so that no other thread finds it meanwhile.
        memory = _kept.pop(self, None) or self._scores.memory()
        scores = self._scores.compute(memory, q, k, w, q_mask, k_mask)
        if memory.may_be_kept:
            if len(_kept) >= _MOST_KEPT:
                _kept.clear()
            _kept[self] = memory
        if self._r is None:
            selection = Selection(scores, scores, scores)
        else:
            selection = select(scores, self._r, k_mask, self._rounding, self._width)
        return selection if self._batched else as_selection(selection, False)


def free_kept_memory() -> int:
    """Free the memory that prepared calls keep until their next call, and return how many bytes that was."""
    num_bytes = 0
    # Other threads may take memory out or put it back meanwhile.
    with suppress(KeyError):
        while True:
            num_bytes += _kept.popitem()[1].num_bytes
    return num_bytes


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
    scores = _Scores(q, k, normalize, scale)
    return scores.compute(scores.memory(), q, k, w, q_mask, k_mask)


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


class _Scores:
    """Scores `[B, M]` by tensors of one signature: how the keys are multiplied, and in which memory."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, normalize: str | None, scale: float, folds: bool = True
    ) -> None:
        batch, num_key_value_heads, num_keys, _ = k.shape
        group_size = q.shape[1] // num_key_value_heads
        self._weights_shape = num_key_value_heads, group_size
        self._normalize, self._scale, self._device = normalize, scale, k.device
        # Without a norm between them the sum over the heads and the product commute, so one query a group is enough.
        folds = folds and normalize is None and k.is_cpu
        self._unfolded = _Scores(q, k, None, scale, folds=False) if folds else None
        self._layout = _layout(k, group_size, folds)
        self._is_empty = batch == 0 or num_keys == 0

    def memory(self) -> _Memory:
        """Return memory to compute in."""
        return _Memory(self._layout, self._normalize, self._device)

    def compute(
        self,
        memory: _Memory,
        q: torch.Tensor,
        k: torch.Tensor,
        w: torch.Tensor,
        q_mask: torch.Tensor | None,
        k_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute the scores of tensors of the signature, `[B, ...]` and without grad."""
        layout = self._layout
        if self._is_empty:
            return k.new_zeros((layout.batch, layout.num_keys), dtype=torch.float32)
        if q_mask is None:
            torch.mean(q, 2, dtype=torch.float32, out=memory.mean)
        else:
            _mean_of_masked(q, q_mask, memory.mean)
        weights = w.float().view(self._weights_shape)
        if self._unfolded is not None:
            # Where a head does not score, or a weight spoils every score, the sum and the product do not commute.
            torch.matmul(weights.unsqueeze(1), memory.heads, out=memory.folded)
            if not math.isfinite(memory.folded.abs().sum()):
                return self._unfolded.compute(self._unfolded.memory(), q, k, w, q_mask, k_mask)
            weights = memory.ones
        first_key: Any = k.storage_offset()
        for multiply in memory.products:
            multiply(k, first_key, self._scale)
        if k_mask is None and not memory.needs_mask:
            outside = None
        else:
            outside = _outside(layout, k_mask, self._device)
        scores = memory.weighted_sum(weights, outside)
        if layout.columns != layout.num_keys:
            scores = _joined(scores, layout)
        return scores if k_mask is None else scores.masked_fill_(~k_mask, -torch.inf)


class _Layout(NamedTuple):
    """How the logits `c [P, B, Hkv, R, C]` lie: the keys times the queries times the scale, in P pieces of C columns.

    All products have one shape, whose columns are a multiple of `COLUMNS`, so equal keys tie wherever they stand. The
    last piece ends where the row ends. Its first `unused` columns, `P * C - M`, lie before the row, or in the piece in
    front of it as well. The last `R - group_size` rows of a group are of no use but to the product.
    """

    way: type[_InPlace | _Neighbours | _Streamed | _Tiled]
    pieces: int
    batch: int
    num_key_value_heads: int
    rows: int
    columns: int
    group_size: int
    num_keys: int
    head_dim: int
    strides: tuple[int, ...]
    """Of the keys, `[B, Hkv, M, D]`."""
    num_folded: int
    """The heads of a group whose weighted sum is its one query; 0 where every head is a query."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self[1:6]

    @property
    def unused(self) -> int:
        return self.pieces * self.columns - self.num_keys

    def start(self, piece: int) -> int:
        """Return the first key of a piece."""
        return min(piece * self.columns, max(self.num_keys - self.columns, 0))


def _layout(k: torch.Tensor, group_size: int, folds: bool) -> _Layout:
    """Choose how keys are multiplied."""
    batch, num_key_value_heads, num_keys, head_dim = k.shape
    is_aligned = num_keys % COLUMNS == 0
    pieces = max(1 if is_aligned else 2, -(-num_keys // _LONGEST_PIECE))
    way: type[_InPlace | _Neighbours | _Streamed | _Tiled]
    if k.dtype != torch.float32 or num_keys < COLUMNS:
        way, pieces = _Tiled, 1
        if k.is_cpu:
            pieces = max(1, round(num_keys * num_key_value_heads * head_dim / _TILE))
    elif k.is_cpu and k.numel() >= _STREAMED:
        way = _Streamed
    elif is_aligned or num_keys > _LONGEST_PIECE or batch * num_key_value_heads == 1 or not k.is_contiguous():
        way = _InPlace
    else:
        way, pieces = _Neighbours, 1
    columns = max(COLUMNS, aligned(-(-num_keys // pieces)))
    num_folded, group_size = (group_size, 1) if folds else (0, group_size)
    return _Layout(
        way=way,
        pieces=max(1, -(-num_keys // columns)),
        batch=batch,
        num_key_value_heads=num_key_value_heads,
        # MKL takes longer for 4 n - 1 queries than for 4 n.
        rows=group_size + 1 if k.is_cpu and group_size % 4 == 3 else group_size,
        columns=columns,
        group_size=group_size,
        num_keys=num_keys,
        head_dim=head_dim,
        strides=k.stride(),
        num_folded=num_folded,
    )


class _Memory:
    """What one call at a time computes in: buffers, and every view of them that is read or written on the way."""

    def __init__(self, layout: _Layout, normalize: str | None, device: torch.device) -> None:
        # A tensor that is made in inference mode could not be written outside.
        with torch.inference_mode(False):
            self._make(layout, normalize, device)

    def _make(self, layout: _Layout, normalize: str | None, device: torch.device) -> None:
        batch, num_key_value_heads, head_dim = layout.batch, layout.num_key_value_heads, layout.head_dim
        groups = batch * num_key_value_heads
        heads_of_group = layout.num_folded or layout.group_size
        padding = layout.rows - layout.group_size
        means = torch.ones(groups * heads_of_group + padding, head_dim, device=device, dtype=torch.float32)
        self.heads = means[: groups * heads_of_group].view(batch, num_key_value_heads, heads_of_group, head_dim)
        self.mean = self.heads.view(batch, num_key_value_heads * heads_of_group, head_dim)
        if layout.num_folded:
            self.folded = means.new_empty(batch, num_key_value_heads, 1, head_dim)
            self.ones = means.new_ones(num_key_value_heads, 1)
            queries = self.folded.view(groups, 1, head_dim)
        else:
            # A group is padded with the first query of the next one, and the last group with ones.
            queries = means.as_strided((groups, layout.rows, head_dim), (layout.group_size * head_dim, head_dim, 1))
        size = math.prod(layout.shape)
        # Neighbours need a buffer that is longer by as much as the columns of some are shifted.
        buffer = means.new_empty(size + layout.unused)
        c = buffer[:size].view(layout.shape)
        self.products = layout.way.all_of(layout, c, queries)
        self.weighted_sum = _WeightedSum(c, layout.group_size, normalize, layout.unused)
        self.needs_mask = layout.unused > 0 and normalize in ("softmax", "minmax")
        # products share what they need
        num_elements = max((product.num_elements for product in self.products), default=0)
        self.num_bytes = 4 * (means.numel() + buffer.numel() + num_elements)
        self.may_be_kept = device.type == "cpu" and self.num_bytes <= _MOST_KEPT_BYTES


_kept: dict[PreparedCall, _Memory] = {}


class _Window(NamedTuple):
    """A part of the keys."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int

    def of(self, k: torch.Tensor, first_key: int) -> torch.Tensor:
        """Return the part of these keys, the first of which stands there in memory."""
        return k.as_strided(self.shape, self.strides, first_key + self.start)


class _InPlace(NamedTuple):
    """A product with float32 keys, read where they lie."""

    window: _Window
    queries: torch.Tensor
    out: torch.Tensor

    @property
    def num_elements(self) -> int:
        """Of the memory that it needs."""
        return 0

    def __call__(self, k: torch.Tensor, first_key: int, scale: float) -> None:
        self.out.baddbmm_(self.queries, self.window.of(k, first_key), beta=0, alpha=scale)

    @classmethod
    def all_of(cls, layout: _Layout, c: torch.Tensor, queries: torch.Tensor) -> list[_InPlace]:
        """Return the products of a layout."""
        heads = layout.num_key_value_heads
        batch_stride, head_stride, key_stride, dim_stride = layout.strides
        matrices, matrix_stride = heads, head_stride
        if heads == 1:
            matrices, matrix_stride = layout.batch, batch_stride
        elif layout.batch == 1 or batch_stride == heads * head_stride:
            matrices = layout.batch * heads
        products = []
        for piece in range(layout.pieces):
            rows_of_piece = c[piece].view(-1, layout.rows, layout.columns)
            for first in range(0, layout.batch * heads, matrices):
                window = _Window(
                    (matrices, layout.head_dim, layout.columns),
                    (matrix_stride, dim_stride, key_stride),
                    first // heads * batch_stride + layout.start(piece) * key_stride,
                )
                these = slice(first, first + matrices)
                products.append(cls(window, queries[these], rows_of_piece[these]))
        return products


class _Neighbours:
    """Products with contiguous float32 keys of at least two heads, in one piece, read where they lie.

    The columns that are not used come from keys of a neighbour in memory: the first half of the heads reads on after
    its keys, and writes as much further to the right, into columns that are not used; the second half reads what lies
    before its keys.
    """

    @staticmethod
    def all_of(layout: _Layout, c: torch.Tensor, queries: torch.Tensor) -> list[_InPlace]:
        """Return the products of a layout."""
        heads = layout.batch * layout.num_key_value_heads
        matrix = layout.rows * layout.columns
        products = []
        for first, last, before in ((0, heads // 2, 0), (heads // 2, heads, layout.unused)):
            window = _Window(
                (last - first, layout.head_dim, layout.columns),
                (layout.num_keys * layout.head_dim, 1, layout.head_dim),
                (first * layout.num_keys - before) * layout.head_dim,
            )
            out = c.as_strided(
                (last - first, layout.rows, layout.columns),
                (matrix, layout.columns, 1),
                first * matrix + layout.unused - before,
            )
            products.append(_InPlace(window, queries[first:last], out))
        return products


class _Streamed(NamedTuple):
    """A product with float32 keys, read where they lie and in order: one key after the other meets all queries."""

    window: _Window
    queries: torch.Tensor
    turned: torch.Tensor
    """`[Hkv, C, R]`."""
    out: torch.Tensor | None
    """Where the product is copied to, `[Hkv, C, R]`; None where `turned` is there already."""

    @property
    def num_elements(self) -> int:
        return 0 if self.out is None else self.turned.numel()

    def __call__(self, k: torch.Tensor, first_key: int, scale: float) -> None:
        self.turned.baddbmm_(self.window.of(k, first_key), self.queries, beta=0, alpha=scale)
        if self.out is not None:
            self.out.copy_(self.turned)

    @classmethod
    def all_of(cls, layout: _Layout, c: torch.Tensor, queries: torch.Tensor) -> list[_Streamed]:
        """Return the products of a layout."""
        heads = layout.num_key_value_heads
        batch_stride, *strides = layout.strides
        turned = c.new_empty(heads, layout.columns, layout.rows)
        products = []
        for row in range(layout.batch):
            turned_queries = queries[row * heads : (row + 1) * heads].transpose(1, 2)
            for piece in range(layout.pieces):
                window = _Window(
                    (heads, layout.columns, layout.head_dim),
                    tuple(strides),
                    row * batch_stride + layout.start(piece) * strides[1],
                )
                out = c[piece, row]
                is_turned = layout.rows == 1
                products.append(
                    cls(window, turned_queries, out.view(turned.shape), None)
                    if is_turned
                    else cls(window, turned_queries, turned, out.transpose(1, 2))
                )
        return products


class _Tiled(NamedTuple):
    """A product with keys of any dtype and number, which are copied into a float32 tile of whole rows or of one piece.

    Where a tile is longer than the keys, zeros stand in front of them.
    """

    window: _Window
    tile: torch.Tensor
    keys: torch.Tensor
    queries: torch.Tensor
    out: torch.Tensor

    @property
    def num_elements(self) -> int:
        return self.keys.numel()

    def __call__(self, k: torch.Tensor, first_key: int, scale: float) -> None:
        self.tile.copy_(self.window.of(k, first_key))
        self.out.baddbmm_(self.queries, self.keys, beta=0, alpha=scale)

    @classmethod
    def all_of(cls, layout: _Layout, c: torch.Tensor, queries: torch.Tensor) -> list[_Tiled]:
        """Return the products of a layout."""
        heads, columns = layout.num_key_value_heads, layout.columns
        batch_stride, *strides = layout.strides
        rows_together = 1
        if layout.pieces == 1:
            rows_together = max(1, _TILE // (heads * columns * layout.head_dim)) if c.is_cpu else layout.batch
        tiles = c.new_zeros(min(layout.batch, rows_together), heads, columns, layout.head_dim)
        count = min(columns, layout.num_keys)
        products = []
        for row in range(0, layout.batch, rows_together):
            tile = tiles[: layout.batch - row]
            matrices = slice(row * heads, (row + len(tile)) * heads)
            for piece in range(layout.pieces):
                window = _Window(
                    (len(tile), heads, count, layout.head_dim),
                    layout.strides,
                    row * batch_stride + layout.start(piece) * strides[1],
                )
                products.append(
                    cls(
                        window,
                        tile[:, :, columns - count :],
                        tile.view(-1, columns, layout.head_dim).transpose(1, 2),
                        queries[matrices],
                        c[piece].view(-1, layout.rows, columns)[matrices],
                    )
                )
        return products


def _mean_of_masked(q: torch.Tensor, q_mask: torch.Tensor, mean: torch.Tensor) -> None:
    """Write the mean over the text `[B, H, D]` in float32; NaN (which scores 0) where there is none."""
    # Zeroed, not multiplied by the mask: padding may hold NaN.
    torch.sum(torch.where(q_mask[:, None, :, None], q, 0), 2, dtype=torch.float32, out=mean)
    mean.div_(q_mask.sum(dim=1, dtype=torch.float32)[:, None, None])


def _outside(layout: _Layout, k_mask: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """bool `[P, B, 1, 1, C]`, True at the columns that no norm may see."""
    pieces, batch, columns, unused = layout.pieces, layout.batch, layout.columns, layout.unused
    if k_mask is None:
        k_mask = torch.ones((batch, layout.num_keys), dtype=torch.bool, device=device)
    outside = ~k_mask
    if unused > 0:
        last = (pieces - 1) * columns
        outside = torch.cat((outside[:, :last], outside.new_ones(batch, unused), outside[:, last:]), dim=1)
    return outside.view(batch, pieces, columns).transpose(0, 1)[:, :, None, None]


def _joined(sums: torch.Tensor, layout: _Layout) -> torch.Tensor:
    """`[B, M]`, the columns of the keys in `sums [P * B, C]`, in one row."""
    unused = layout.unused
    if layout.pieces == 1:
        scores = sums.narrow(1, unused, layout.num_keys)
        return scores if layout.batch == 1 else scores.contiguous()
    pieces = sums.view(layout.pieces, layout.batch, layout.columns)
    return torch.cat((*pieces[:-1], pieces[-1, :, unused:]), dim=1)


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
    pieces, batch, _, _, columns = c.shape
    if c.numel() == 0:
        return c.new_zeros(pieces, batch, columns)
    return _WeightedSum(c, w.shape[1], normalize)(w, outside).view(pieces, batch, columns)


class _WeightedSum:
    """`weighted_sum` of what lies in `c` whenever it is called, as `[P * B, C]`."""

    def __init__(self, c: torch.Tensor, group_size: int, normalize: str | None, unused: int = 0) -> None:
        """Look at `c`, the first `unused` columns of whose last piece an L2 norm does not see either."""
        pieces, batch, groups, rows, columns = c.shape
        self._c, self._normalize, self._group_size = c, normalize, group_size
        weights = c.new_zeros(pieces, batch, groups, rows)
        self._weights = weights[..., :group_size]
        is_single = pieces * batch == 1
        self._multiply = torch.mm if is_single else torch.bmm
        rows_of_piece = groups * rows
        self._all_weights = weights.view(1, -1) if is_single else weights.view(pieces * batch, 1, rows_of_piece)
        self._rows = c.view(-1, columns) if is_single else c.view(pieces * batch, rows_of_piece, columns)

        self._unused = c[-1, ..., :unused] if unused > 0 else None
        self._unused_of_parts = None
        self._parts: torch.Tensor | None = None
        # Looking at the norms is no host sync on a CPU.
        parts = _parts(columns) if normalize == "l2" and c.is_cpu and c.numel() > 0 else None
        if parts is None:
            return
        matrices = batch * rows_of_piece
        self._parts = c.view(-1, columns // parts)
        self._norms_of_parts = self._norms = c.new_empty(pieces * matrices * parts)
        self._parts_of_rows: torch.Tensor | None = None
        if pieces * parts == 1:
            self._parts = self._parts[:, unused:]
        else:
            self._unused_of_parts = self._unused
            self._parts_of_rows = self._norms_of_parts.view(pieces, matrices, parts)
            self._norms = c.new_empty(matrices, dtype=torch.float64)
        self._norm = self._norms.view(batch, groups, rows)[..., :group_size].expand(self._weights.shape)

    def __call__(self, w: torch.Tensor, outside: torch.Tensor | None) -> torch.Tensor:
        """Add up with weights `w [G, R]`, float32."""
        if self._normalize == "l2":
            self._divide_by_l2_norm(w, outside)
        else:
            self._normalize_otherwise(w, outside)
        sums: torch.Tensor = self._multiply(self._all_weights, self._rows)
        return sums if sums.dim() == 2 else sums.squeeze(1)

    def _divide_by_l2_norm(self, w: torch.Tensor, outside: torch.Tensor | None) -> None:
        """Write the weights `w[i] / |c[i, :]|`, or 0 where the vector is too short to have a direction in float32."""
        c = self._c
        if outside is not None:
            c.masked_fill_(outside, 0.0)
        elif self._unused_of_parts is not None:
            self._unused_of_parts.zero_()
        if self._parts is not None:
            torch.linalg.vector_norm(self._parts, dim=1, out=self._norms_of_parts)
            if self._parts_of_rows is not None:
                torch.linalg.vector_norm(self._parts_of_rows, dim=(0, 2), dtype=torch.float64, out=self._norms)
            # No norm is longer than their sum, which shows a NaN too. Python adds up a few numbers faster than PyTorch.
            norms = self._norms.tolist()
            if sum(norms) <= _LONGEST and min(norms) >= _SHORTEST:
                torch.div(w, self._norm, out=self._weights)
                return
        # In float64 no square over- or underflows; below float32's normal range a vector has no direction left.
        c.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        if self._unused is not None:
            self._unused.zero_()
        norm = torch.linalg.vector_norm(c[..., : self._group_size, :], dim=(0, 4), dtype=torch.float64)
        self._weights.copy_(w / norm.masked_fill_(norm < torch.finfo(torch.float32).tiny, torch.inf))

    def _normalize_otherwise(self, w: torch.Tensor, outside: torch.Tensor | None) -> None:
        """Normalise the logits in place as far as the weights cannot, and write the weights."""
        c = self._c
        c.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        if self._normalize is None:
            self._weights.copy_(w)
        elif self._normalize == "softmax":
            if outside is not None:
                c.masked_fill_(outside, -torch.inf)
            c.sub_(c.amax(dim=(0, 4), keepdim=True)).exp_()
            self._weights.copy_(w / c.sum(dim=(0, 4))[..., : self._group_size])
        elif self._normalize == "minmax":
            lowest = (c if outside is None else c.masked_fill(outside, torch.inf)).amin(dim=(0, 4), keepdim=True)
            highest = (c if outside is None else c.masked_fill(outside, -torch.inf)).amax(dim=(0, 4), keepdim=True)
            extent = (highest - lowest)[0, ..., : self._group_size, 0]
            self._weights.copy_(torch.where(extent > 0, w / extent, 0.0))
            c.sub_(lowest)
            if outside is not None:
                c.masked_fill_(outside, 0.0)


def _parts(columns: int) -> int | None:
    """Return in how many parts a row is added up in float32, or None where there are too many."""
    parts = 1
    while parts < _MOST_PARTS and columns > parts * _LONGEST_SUM and columns % (2 * parts) == 0:
        parts *= 2
    return parts if columns <= parts * _LONGEST_SUM else None
