"""Computes column statistics of attention in two passes over the keys and a sum over the heads.

The first pass writes the maximum and the sum of exponentials of each row, for each of several ranges of keys, so that
even a few queries fill the device. The second pass goes through the rows for each tile of keys, computes their
attention again and adds up its columns, for each of several ranges of rows. There are no atomic additions, so the same
shape always adds in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hawk_kernels.backends.kernels.launch import PreparedLaunch, on_device
from hawk_kernels.backends.kernels.views import stride_unit
from hawk_kernels.backends.visibility import seeing_rows, segment_bounds

# About two waves on A100 to B200.
_PROGRAMS = 264
_BLOCK_FINISH = 256
_LOG2_E = 1.4426950408889634
# Maxima and sums share an allocation, so the alignment of the sums varies with their number.
_VARYING = (
    "q_rows_ptr", "starts_ptr", "ends_ptr", "peaks_ptr", "sums_ptr", "q_rows_stride_b", "q_rows_stride_n",
    "q_stride_b", "q_stride_h", "k_stride_b", "k_stride_h",
    "num_queries", "num_keys", "keys_per_split", "num_splits",
)  # fmt: skip
_VARYING_IN_COLUMN_PASS = (*_VARYING[:-2], "columns_ptr", "rows_per_split", "num_row_splits", "num_splits")
_VARYING_IN_FINISH = (
    "columns_ptr", "counts_ptr", "out_ptr",
    "counts_stride_b", "heads_per_program", "num_row_splits", "num_keys", "num_queries",
)  # fmt: skip


@triton.jit
def _load_rows(
    ptr, rows, used, stride_n, stride_d,
    HEAD_DIM: tl.constexpr, START: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Load `[BLOCK, BLOCK_D]`, the dimensions from START on; zero where a row is unused and beyond HEAD_DIM."""
    dims = START + tl.arange(0, BLOCK_D)
    tile = tl.load(
        ptr + rows.to(tl.int64)[:, None] * stride_n + dims.to(tl.int64)[None, :] * stride_d,
        mask=used[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def _logits(q, q_tail, k, k_tail, scale, BLOCK_TAIL: tl.constexpr):
    """Return `[BLOCK_N, BLOCK_M]` float32 in units of log 2; the head is cut in two so that 80 is not padded to 128."""
    product = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=tl.float32)
    if BLOCK_TAIL > 0:
        product = tl.dot(q_tail, tl.trans(k_tail), product, input_precision="ieee", out_dtype=tl.float32)
    return product * scale


@triton.jit
def _rows_that_count(q_rows_ptr, rows, num_queries, stride_n, HAS_Q_ROWS: tl.constexpr):
    used = rows < num_queries
    if HAS_Q_ROWS:
        used = used & (tl.load(q_rows_ptr + rows.to(tl.int64) * stride_n, mask=used, other=0) != 0)
    return used


@triton.jit
def _visible_keys(
    rows, used, starts_ptr, ends_ptr, num_queries, num_keys, CAUSAL: tl.constexpr, SEGMENTED: tl.constexpr
):
    """Return the first key that each row sees and the one after the last; a row that is not used sees none."""
    first = tl.zeros_like(rows)
    stop = tl.zeros_like(rows) + num_keys
    if SEGMENTED:
        first = tl.load(starts_ptr + rows, mask=used, other=0)
        stop = tl.load(ends_ptr + rows, mask=used, other=0)
    if CAUSAL:
        stop = tl.minimum(stop, rows + (num_keys - num_queries + 1))
    return first, tl.where(used, stop, 0)


@triton.jit(do_not_specialize=_VARYING)
def _row_pass(
    q_ptr, k_ptr, q_rows_ptr, starts_ptr, ends_ptr, peaks_ptr, sums_ptr,
    q_stride_b: tl.int64, q_stride_h: tl.int64, q_stride_n, q_stride_d,
    k_stride_b: tl.int64, k_stride_h: tl.int64, k_stride_n, k_stride_d,
    q_rows_stride_b: tl.int64, q_rows_stride_n: tl.int64,
    num_heads, group_size, num_queries, num_keys, keys_per_split, num_splits, scale,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, SEGMENTED: tl.constexpr, HAS_Q_ROWS: tl.constexpr,
    UPCAST: tl.constexpr, STRIDE_UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """Write maximum and sum of exponentials of some rows over one range of keys, `[B, H, splits, N]`.

    A tile without rows that count sees no keys, so its loop is empty.
    """
    row_tiles = tl.cdiv(num_queries, BLOCK_N)
    pair = tl.program_id(0) // row_tiles
    split = tl.program_id(1)
    batch = (pair // num_heads).to(tl.int64)
    head = pair % num_heads
    rows = (tl.program_id(0) % row_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    used = _rows_that_count(q_rows_ptr + batch * q_rows_stride_b, rows, num_queries, q_rows_stride_n, HAS_Q_ROWS)
    first, stop = _visible_keys(rows, used, starts_ptr, ends_ptr, num_queries, num_keys, CAUSAL, SEGMENTED)

    q_ptr += (batch * q_stride_b + head.to(tl.int64) * q_stride_h) * STRIDE_UNIT
    k_ptr += (batch * k_stride_b + (head // group_size).to(tl.int64) * k_stride_h) * STRIDE_UNIT
    q = _load_rows(q_ptr, rows, used, q_stride_n, q_stride_d, HEAD_DIM, 0, BLOCK_D, UPCAST)
    q_tail = q
    if BLOCK_TAIL > 0:
        q_tail = _load_rows(q_ptr, rows, used, q_stride_n, q_stride_d, HEAD_DIM, BLOCK_D, BLOCK_TAIL, UPCAST)

    peak = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    begin = split * keys_per_split
    end = tl.minimum(begin + keys_per_split, num_keys)
    if SEGMENTED:
        begin = tl.maximum(begin, tl.min(tl.where(used, first, num_keys), 0) // BLOCK_M * BLOCK_M)
    end = tl.minimum(end, tl.max(stop, 0))
    for start in range(begin, end, BLOCK_M):
        keys = start + tl.arange(0, BLOCK_M)
        inside = keys < num_keys
        k = _load_rows(k_ptr, keys, inside, k_stride_n, k_stride_d, HEAD_DIM, 0, BLOCK_D, UPCAST)
        k_tail = k
        if BLOCK_TAIL > 0:
            k_tail = _load_rows(k_ptr, keys, inside, k_stride_n, k_stride_d, HEAD_DIM, BLOCK_D, BLOCK_TAIL, UPCAST)
        logits = _logits(q, q_tail, k, k_tail, scale, BLOCK_TAIL)
        seen = (keys[None, :] >= first[:, None]) & (keys[None, :] < stop[:, None])
        logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
        peak = higher
    out = (pair.to(tl.int64) * num_splits + split) * num_queries + rows
    tl.store(peaks_ptr + out, peak, mask=rows < num_queries)
    tl.store(sums_ptr + out, total, mask=rows < num_queries)


@triton.jit
def _log_sums(peaks_ptr, sums_ptr, rows, used, num_queries, num_splits):
    """Return the base 2 logarithm of the sum of exponentials of each row, from its ranges of keys."""
    peak = tl.full(rows.shape, float("-inf"), tl.float32)
    total = tl.zeros(rows.shape, tl.float32)
    for split in range(0, num_splits):
        part_peak = tl.load(peaks_ptr + split * num_queries + rows, mask=used, other=float("-inf"))
        part_total = tl.load(sums_ptr + split * num_queries + rows, mask=used, other=0.0)
        higher = tl.maximum(peak, part_peak)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(peak - shift) + part_total * tl.exp2(part_peak - shift)
        peak = higher
    return peak + tl.log2(tl.where(total == 0, 1.0, total))


@triton.jit
def _larger(a, b):
    """Return the maximum, which is NaN where either is, as in PyTorch."""
    return tl.where((a >= b) | (a != a), a, b)


@triton.jit(do_not_specialize=_VARYING_IN_COLUMN_PASS)
def _column_pass(
    q_ptr, k_ptr, q_rows_ptr, starts_ptr, ends_ptr, peaks_ptr, sums_ptr, columns_ptr,
    q_stride_b: tl.int64, q_stride_h: tl.int64, q_stride_n, q_stride_d,
    k_stride_b: tl.int64, k_stride_h: tl.int64, k_stride_n, k_stride_d,
    q_rows_stride_b: tl.int64, q_rows_stride_n: tl.int64,
    num_heads, group_size, num_queries, num_keys, rows_per_split, num_row_splits, num_splits, scale,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, SEGMENTED: tl.constexpr, HAS_Q_ROWS: tl.constexpr,
    MAXIMUM: tl.constexpr, UPCAST: tl.constexpr, STRIDE_UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """Write the sum or maximum of some columns over one range of rows, `[B, H, row splits, M]`."""
    key_tiles = tl.cdiv(num_keys, BLOCK_M)
    pair = tl.program_id(0) // key_tiles
    split = tl.program_id(1)
    batch = (pair // num_heads).to(tl.int64)
    head = pair % num_heads
    first_key = (tl.program_id(0) % key_tiles) * BLOCK_M
    keys = first_key + tl.arange(0, BLOCK_M)
    inside = keys < num_keys

    q_ptr += (batch * q_stride_b + head.to(tl.int64) * q_stride_h) * STRIDE_UNIT
    k_ptr += (batch * k_stride_b + (head // group_size).to(tl.int64) * k_stride_h) * STRIDE_UNIT
    k = _load_rows(k_ptr, keys, inside, k_stride_n, k_stride_d, HEAD_DIM, 0, BLOCK_D, UPCAST)
    k_tail = k
    if BLOCK_TAIL > 0:
        k_tail = _load_rows(k_ptr, keys, inside, k_stride_n, k_stride_d, HEAD_DIM, BLOCK_D, BLOCK_TAIL, UPCAST)
    statistics = pair.to(tl.int64) * num_splits * num_queries
    q_rows_ptr += batch * q_rows_stride_b

    columns = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, num_queries)
    if SEGMENTED:
        first_row = tl.min(tl.load(starts_ptr + keys, mask=inside, other=num_queries), 0)
        begin = tl.maximum(begin, first_row // BLOCK_N * BLOCK_N)
        end = tl.minimum(end, tl.max(tl.load(ends_ptr + keys, mask=inside, other=0), 0))
    if CAUSAL:
        first_row = tl.maximum(first_key + num_queries - num_keys, 0)
        begin = tl.maximum(begin, first_row // BLOCK_N * BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        used = _rows_that_count(q_rows_ptr, rows, num_queries, q_rows_stride_n, HAS_Q_ROWS)
        some_count = True
        if HAS_Q_ROWS:
            some_count = tl.max(used.to(tl.int32), 0) > 0
        if some_count:
            first, stop = _visible_keys(rows, used, starts_ptr, ends_ptr, num_queries, num_keys, CAUSAL, SEGMENTED)
            q = _load_rows(q_ptr, rows, used, q_stride_n, q_stride_d, HEAD_DIM, 0, BLOCK_D, UPCAST)
            q_tail = q
            if BLOCK_TAIL > 0:
                q_tail = _load_rows(q_ptr, rows, used, q_stride_n, q_stride_d, HEAD_DIM, BLOCK_D, BLOCK_TAIL, UPCAST)
            log_sum = _log_sums(peaks_ptr + statistics, sums_ptr + statistics, rows, used, num_queries, num_splits)
            logits = _logits(q, q_tail, k, k_tail, scale, BLOCK_TAIL)
            seen = (keys[None, :] >= first[:, None]) & (keys[None, :] < stop[:, None])
            attention = tl.where(seen, tl.exp2(logits - log_sum[:, None]), 0.0)
            if MAXIMUM:
                columns = _larger(columns, attention)
            else:
                columns += attention
    reduced = tl.reduce(columns, 0, _larger) if MAXIMUM else tl.sum(columns, 0)
    out = (pair.to(tl.int64) * num_row_splits + split) * num_keys + keys
    tl.store(columns_ptr + out, reduced, mask=inside)


@triton.jit(do_not_specialize=_VARYING_IN_FINISH)
def _finish(
    columns_ptr, weights_ptr, counts_ptr, out_ptr,
    weights_stride, counts_stride_b, num_heads, heads_per_program, num_row_splits, num_keys, num_queries,
    MAXIMUM: tl.constexpr, MEAN: tl.constexpr, HAS_COUNTS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Join row ranges, divide by the rows that count, and join the heads where a program has several."""
    key_tiles = tl.cdiv(num_keys, BLOCK)
    batch = (tl.program_id(0) // key_tiles).to(tl.int64)
    first_head = tl.program_id(1) * heads_per_program
    keys = (tl.program_id(0) % key_tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = keys < num_keys
    total = tl.zeros([BLOCK], tl.float32)
    for head in range(first_head, first_head + heads_per_program):
        column = tl.zeros([BLOCK], tl.float32)
        for split in range(0, num_row_splits):
            place = ((batch * num_heads + head) * num_row_splits + split) * num_keys + keys
            part = tl.load(columns_ptr + place, mask=inside, other=0.0)
            column = _larger(column, part) if MAXIMUM else column + part
        if HAS_WEIGHTS:
            column = column * tl.load(weights_ptr + tl.cast(head, tl.int64) * weights_stride).to(tl.float32)
        total += column
    if not HAS_WEIGHTS:
        total = total / heads_per_program
    if MEAN:
        if HAS_COUNTS:
            total = total / tl.load(counts_ptr + batch * counts_stride_b + keys, mask=inside, other=1.0)
        else:
            total = total / num_queries
    out = (batch * (num_heads // heads_per_program) + tl.program_id(1)) * num_keys + keys
    tl.store(out_ptr + out, total, mask=inside)


class PreparedCall:
    """A call of one signature, which can be repeated with other tensors of that signature."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        causal: bool,
        q_rows: torch.Tensor | None,
        head_weights: torch.Tensor | None,
        reduce_heads: bool,
        reduction: str,
        scale: float,
        batched: bool = True,
    ) -> None:
        """Prepare a call by validated `[B, H, N, D]` queries and `[B, Hkv, M, D]` keys.

        The arguments are those of the public function; the result has a batch axis if `batched`.
        """
        batch, num_heads, num_queries, head_dim = q.shape
        num_key_value_heads, num_keys = k.shape[1:3]
        heads_per_program = num_heads if reduce_heads else 1
        self._device, self._causal = k.device, causal
        self._num_queries, self._num_keys = num_queries, num_keys
        self._shape = (*((batch,) if batched else ()), *(() if reduce_heads else (num_heads,)), num_keys)
        self._is_empty = batch == 0 or num_queries == 0 or num_keys == 0
        if self._is_empty:
            return
        config = launch_config(batch * num_heads, num_queries, num_keys, head_dim, k.element_size())
        num_splits, num_row_splits = config["key_splits"], config["row_splits"]
        self._statistics_shape = (2, batch, num_heads, num_splits, num_queries)
        self._columns_shape = (batch, num_heads, num_row_splits, num_keys)
        is_segmented, is_maximum = cu_seqlens is not None, reduction == "max"
        self._is_counted = reduction == "mean" and (causal or is_segmented or q_rows is not None)

        unit = stride_unit(head_dim, *q.stride()[:2], *k.stride()[:2])
        strides = [stride // unit if axis < 2 else stride for of in (q, k) for axis, stride in enumerate(of.stride())]
        shared = (
            *strides, *((0, 0) if q_rows is None else q_rows.stride()),
            num_heads, num_heads // num_key_value_heads, num_queries, num_keys,
        )  # fmt: skip
        row_numbers = (*shared, config["keys_per_split"], num_splits, scale * _LOG2_E)
        column_numbers = (*shared, config["rows_per_split"], num_row_splits, num_splits, scale * _LOG2_E)
        # the counts of a batch may be those of one row
        counts_stride = num_keys if self._is_counted and q_rows is not None and batch > 1 else 0
        weights_stride = 0 if head_weights is None else head_weights.stride(0)
        finish_numbers = (
            weights_stride, counts_stride, num_heads, heads_per_program, num_row_splits, num_keys, num_queries,
        )  # fmt: skip
        constants = {
            "HEAD_DIM": head_dim, "CAUSAL": causal, "SEGMENTED": is_segmented, "HAS_Q_ROWS": q_rows is not None,
        }  # fmt: skip
        more = {"UPCAST": k.device.type == "cpu", "STRIDE_UNIT": unit, **config["blocks"]}
        options = {"num_warps": config["num_warps"], "enable_fp_fusion": True}
        # only queries, keys and weights are specialised
        self._row_launch = PreparedLaunch(
            (config["row_tiles"] * batch * num_heads, num_splits),
            lambda *pointers: (*pointers, *row_numbers),
            {**constants, **more}, options, num_specialized=2,
        )  # fmt: skip
        self._column_launch = PreparedLaunch(
            (config["key_tiles"] * batch * num_heads, num_row_splits),
            lambda *pointers: (*pointers, *column_numbers),
            {**constants, "MAXIMUM": is_maximum, **more}, options, num_specialized=2,
        )  # fmt: skip
        self._finish_launch = PreparedLaunch(
            (triton.cdiv(num_keys, _BLOCK_FINISH) * batch, num_heads // heads_per_program),
            lambda weights, columns, counts, out: (columns, weights, counts, out, *finish_numbers),
            {
                "MAXIMUM": is_maximum, "MEAN": reduction == "mean", "HAS_COUNTS": self._is_counted,
                "HAS_WEIGHTS": head_weights is not None, "BLOCK": _BLOCK_FINISH,
            },
            {"num_warps": 4, "enable_fp_fusion": True}, num_specialized=1,
        )  # fmt: skip

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        q_rows: torch.Tensor | None,
        head_weights: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the statistic of each key, `[B, M]` or `[B, H, M]`."""
        device = self._device
        if self._is_empty:
            return torch.zeros(self._shape, dtype=torch.float32, device=device)
        out = torch.empty(self._shape, dtype=torch.float32, device=device)
        peaks, sums = torch.empty(self._statistics_shape, dtype=torch.float32, device=device)
        columns = torch.empty(self._columns_shape, dtype=torch.float32, device=device)
        bounds = None if cu_seqlens is None else segment_bounds(cu_seqlens, self._num_keys)
        starts, ends = (q, q) if bounds is None else bounds
        counts = columns
        if self._is_counted:
            rows = q_rows if q_rows is None or q_rows.dim() == 2 else q_rows.unsqueeze(0)
            counts = seeing_rows(self._num_queries, self._num_keys, bounds, self._causal, rows, device)
        inputs = (q, k, q if q_rows is None else q_rows, starts, ends, peaks, sums)
        with on_device(device):
            self._row_launch(_row_pass, *inputs)
            self._column_launch(_column_pass, *inputs, columns)
            self._finish_launch(_finish, columns if head_weights is None else head_weights, columns, counts, out)
        return out


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
    """Compute `[B, M]` or `[B, H, M]` float32 of validated arguments in three launches, without a host sync."""
    call = PreparedCall(q, k, cu_seqlens, causal, q_rows, head_weights, reduce_heads, reduction, scale)
    return call(q, k, cu_seqlens, q_rows, head_weights)


def launch_config(num_pairs: int, num_queries: int, num_keys: int, head_dim: int, itemsize: int) -> dict[str, Any]:
    """Choose block sizes and splits by shape alone; `num_pairs` are rows of the batch times heads."""
    block_d = max(16, 1 << (head_dim.bit_length() - 1))
    block_tail = 0 if head_dim <= block_d else max(16, triton.next_power_of_2(head_dim - block_d))
    is_wide = block_d + block_tail >= 128
    # float32 products run without tensor cores, and larger tiles of them spill.
    block_n, block_m, num_warps = ((16, 32, 8) if is_wide else (32, 32, 4)) if itemsize == 4 else (64, 64, 4)
    block_n = 16 if num_queries <= 16 else block_n
    row_tiles, key_tiles = triton.cdiv(num_queries, block_n), triton.cdiv(num_keys, block_m)
    keys_per_split = triton.cdiv(key_tiles, min(key_tiles, triton.cdiv(_PROGRAMS, row_tiles * num_pairs))) * block_m
    rows_per_split = triton.cdiv(row_tiles, min(row_tiles, triton.cdiv(_PROGRAMS, key_tiles * num_pairs))) * block_n
    return {
        "row_tiles": row_tiles,
        "key_tiles": key_tiles,
        "keys_per_split": keys_per_split,
        "rows_per_split": rows_per_split,
        "key_splits": triton.cdiv(num_keys, keys_per_split),
        "row_splits": triton.cdiv(num_queries, rows_per_split),
        "num_warps": num_warps,
        "blocks": {"BLOCK_N": block_n, "BLOCK_M": block_m, "BLOCK_D": block_d, "BLOCK_TAIL": block_tail},
    }
