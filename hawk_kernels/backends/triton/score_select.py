"""From queries and keys to kept tokens in one launch.

Programs over (tile of keys, block of heads, row) average the queries of their heads, score their keys and leave
the logits `c[h, m]` with what a norm needs of them (two numbers per head and tile). The last of a row's programs to
arrive combines these, sums over the heads and selects. Rows longer than one program can select take three launches:
scores by tile, importance by tile, selection by row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hawk_kernels.backends.triton.launch import arrival_counters, on_device
from hawk_kernels.backends.triton.radix import budget_of, load_candidates, select_from_memory, select_in_registers
from hawk_kernels.backends.triton.select_rows import MAX_ROW_IN_REGISTERS, keep_arguments, row_block, select_topk
from hawk_kernels.selection import Selection, max_kept

# tl.dot takes at least 16 columns, and more heads a program would not fit beside a tile of keys.
HEADS_PER_PROGRAM = 16
# The last arriver works alone: beyond this length sharing its work is worth two more launches.
MAX_ROW_IN_ONE_LAUNCH = 16384
# Programs beyond the multiprocessors only repeat the averaging; this many is about one wave on A100 to B200.
_PROGRAMS_PER_ROW = 128
# The largest tiles that spill on no target, for no dtype, norm or head size (bench/compile_only.py).
_KEYS_PER_TILE = 32
_NUM_WARPS = 4
_QUERY_ELEMENTS = {"row in registers": 256, "row in memory": 512}
_FLOAT32_TINY = tl.constexpr(1.1754943508222875e-38)
_NO_NORM, _L2, _SOFTMAX, _MINMAX = (tl.constexpr(mode) for mode in range(4))
# What the last arriver goes on to: the norms only (long rows), the scores, the selection.
_NORMS, _SCORES, _SELECTION = (tl.constexpr(stage) for stage in range(3))
MODES = {None: _NO_NORM.value, "l2": _L2.value, "softmax": _SOFTMAX.value, "minmax": _MINMAX.value}


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _mean_query(
    q_ptr, q_mask_ptr, heads, head_inside, dims, dim_inside, num_queries,
    stride_h, stride_n, stride_d, mask_stride_n, scale,
    HAS_Q_MASK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean over text of the queries of some heads, times the scale: `[BLOCK_H, BLOCK_D]` float32, NaN without text."""
    total = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    counted = tl.zeros([BLOCK_N], tl.float32)
    head_dim_offsets = heads.to(tl.int64)[:, None] * stride_h + dims.to(tl.int64)[None, :] * stride_d
    head_dim_inside = head_inside[:, None] & dim_inside[None, :]
    for start in range(0, num_queries, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        used = rows < num_queries
        if HAS_Q_MASK:
            used = tl.load(q_mask_ptr + rows.to(tl.int64) * mask_stride_n, mask=used, other=0) != 0
        counted += used.to(tl.float32)
        queries = tl.load(
            q_ptr + head_dim_offsets[:, None, :] + rows.to(tl.int64)[None, :, None] * stride_n,
            mask=head_dim_inside[:, None, :] & used[None, :, None],
            other=0.0,
        )
        total += tl.sum(queries.to(tl.float32), 1)
    count = tl.sum(counted, 0)
    mean = tl.where(count > 0, total / tl.maximum(count, 1.0), float("nan"))
    return tl.where(head_dim_inside, mean * scale, 0.0)


@triton.jit
def _dot(keys, query, product, INTERPRETED: tl.constexpr):
    """`product + keys @ query`, float32.

    Triton's interpreter multiplies the bit patterns of bfloat16, and its BLAS adds in another order at the edges of a
    tile, where equal keys would no longer tie.
    """
    if INTERPRETED:
        return product + tl.sum(keys.to(tl.float32)[:, :, None] * query.to(tl.float32)[None, :, :], 1)
    return tl.dot(keys, query, product, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def _dot_exact(keys, query, INTERPRETED: tl.constexpr):
    """`[BLOCK_M, BLOCK_D] x [BLOCK_H, BLOCK_D]^T` in float32, on tensor cores where the keys are half precision.

    The float32 query is split into terms of the keys' dtype whose sum is the query to float32's last bits (8 bits a
    bfloat16, 11 a float16), so nothing but the order of the additions differs from a float32 product.
    """
    product = tl.zeros([keys.shape[0], query.shape[0]], tl.float32)
    if keys.dtype == tl.float32:
        return _dot(keys, tl.trans(query), product, INTERPRETED)
    unit = tl.full([query.shape[0]], 1.0, tl.float32)
    if keys.dtype == tl.float16:
        # float16 has a narrow range: the largest component becomes 2**14, so that no term is lost below it.
        largest = tl.max(tl.abs(query), 1)
        unit = tl.where(largest == 0, 1.0, largest) * 0.00006103515625
        query = query / unit[:, None]
    query = tl.trans(query)
    high = query.to(keys.dtype)
    rest = query - high.to(tl.float32)
    middle = rest.to(keys.dtype)
    low = (rest - middle.to(tl.float32)).to(keys.dtype)
    product = _dot(keys, high, product, INTERPRETED)
    product = _dot(keys, middle, product, INTERPRETED)
    product = _dot(keys, low, product, INTERPRETED)
    return product * unit[None, :]


@triton.jit
def _neutral_pair(MODE: tl.constexpr):
    """The statistics of no columns at all."""
    if MODE == _SOFTMAX:
        return float("-inf"), 0.0
    if MODE == _MINMAX:
        return float("inf"), float("-inf")
    return 0.0, 0.0


@triton.jit
def _tile_statistics(c, inside, MODE: tl.constexpr):
    """Two numbers per head of a tile `c [BLOCK_M, BLOCK_H]`, combined over tiles by `_combine`.

    l2: largest magnitude, sum of squares relative to it. softmax: maximum, sum of exponentials relative to it.
    minmax: minimum, maximum. A tile without candidates leaves the neutral pair.
    """
    if MODE == _L2:
        first = tl.max(tl.where(inside, tl.abs(c), 0.0), 0)
        divisor = tl.where(first >= _FLOAT32_TINY, first, 1.0)
        relative = tl.where(inside, c / divisor[None, :], 0.0)
        second = tl.sum(relative * relative, 0)
    elif MODE == _SOFTMAX:
        first = tl.max(tl.where(inside, c, float("-inf")), 0)
        shift = tl.where(first == float("-inf"), 0.0, first)
        second = tl.sum(tl.where(inside, tl.exp(c - shift[None, :]), 0.0), 0)
    else:
        first = tl.min(tl.where(inside, c, float("inf")), 0)
        second = tl.max(tl.where(inside, c, float("-inf")), 0)
    return first, second


@triton.jit
def _merge(first, second, tile_first, tile_second, MODE: tl.constexpr):
    """The statistics of two sets of columns, as `_combine` takes them."""
    if MODE == _L2:
        larger = tl.maximum(first, tile_first)
        divisor = tl.where(larger >= _FLOAT32_TINY, larger, 1.0)
        one = first / divisor
        other = tile_first / divisor
        return larger, second * one * one + tile_second * other * other
    if MODE == _SOFTMAX:
        larger = tl.maximum(first, tile_first)
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        return larger, second * tl.exp(first - shift) + tile_second * tl.exp(tile_first - shift)
    return tl.minimum(first, tile_first), tl.maximum(second, tile_second)


@triton.jit
def _combine(first, second, MODE: tl.constexpr):
    """The pair `(a, b)` of each head, as `_normalized` takes it, from those of its tiles `[BLOCK_H, BLOCK_T]`."""
    if MODE == _L2:
        a = tl.max(first, 1)
        divisor = tl.where(a >= _FLOAT32_TINY, a, 1.0)
        relative = first / divisor[:, None]
        b = tl.sqrt(tl.sum(second * relative * relative, 1))
    elif MODE == _SOFTMAX:
        a = tl.max(first, 1)
        shift = tl.where(a == float("-inf"), 0.0, a)
        b = tl.sum(second * tl.exp(first - shift[:, None]), 1)
    else:
        a = tl.min(first, 1)
        b = tl.max(second, 1) - a
    return a, b


@triton.jit
def _normalized(c, a, b, MODE: tl.constexpr):
    if MODE == _L2:
        return tl.where(a >= _FLOAT32_TINY, c / tl.where(a >= _FLOAT32_TINY, a, 1.0) / tl.where(b > 0, b, 1.0), 0.0)
    if MODE == _SOFTMAX:
        return tl.exp(c - a) / b
    if MODE == _MINMAX:
        return tl.where(b > 0, (c - a) / tl.where(b > 0, b, 1.0), 0.0)
    return c


@triton.jit
def _combine_row(
    statistics_ptr, norms_ptr, num_heads, num_tiles,
    MODE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Combine one row's tile statistics `[H, T, 2]` into `norms [H, 2]`, a few heads at a time."""
    for start in range(0, num_heads, BLOCK_H):
        heads = start + tl.arange(0, BLOCK_H)
        head_inside = heads < num_heads
        tiles = tl.arange(0, BLOCK_T)
        pair = statistics_ptr + (heads[:, None] * num_tiles + tiles[None, :]) * 2
        inside = head_inside[:, None] & (tiles[None, :] < num_tiles)
        neutral_first, neutral_second = _neutral_pair(MODE)
        first = tl.load(pair, mask=inside, other=neutral_first, cache_modifier=".cg")
        second = tl.load(pair + 1, mask=inside, other=neutral_second, cache_modifier=".cg")
        a, b = _combine(first, second, MODE)
        tl.store(norms_ptr + heads * 2, a, mask=head_inside)
        tl.store(norms_ptr + heads * 2 + 1, b, mask=head_inside)


@triton.jit
def _importance(
    c_ptr, norms_ptr, w_ptr, columns, candidate, num_c_rows, num_keys, w_stride,
    MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`I[k]` of some columns of one row: the sum over heads, or over partial sums where nothing is normalised."""
    importance = tl.zeros([BLOCK], tl.float32)
    for c_row in range(num_c_rows):
        c = tl.load(c_ptr + columns, mask=candidate, other=0.0, cache_modifier=".cg")
        if MODE == _NO_NORM:
            importance += c
        else:
            a = tl.load(norms_ptr + c_row * 2, cache_modifier=".cg")
            b = tl.load(norms_ptr + c_row * 2 + 1, cache_modifier=".cg")
            weight = tl.load(w_ptr + c_row * w_stride).to(tl.float32)
            importance += weight * _normalized(c, a, b, MODE)
        c_ptr += num_keys
    return tl.where(candidate, importance, float("-inf"))


@triton.jit
def _score_select_kernel(
    q_ptr, k_ptr, w_ptr, q_mask_ptr, k_mask_ptr,
    c_ptr, statistics_ptr, norms_ptr, counters_ptr, scores_ptr, mask_ptr, indices_ptr,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_m, k_stride_d,
    w_stride, q_mask_stride_b, q_mask_stride_n, k_mask_stride_b, k_mask_stride_m,
    num_heads, num_heads_per_group, num_queries, num_keys, keys_per_program,
    width, numerator, denominator, budget, scale,
    HEAD_DIM: tl.constexpr, MODE: tl.constexpr, HAS_Q_MASK: tl.constexpr, HAS_K_MASK: tl.constexpr,
    FINISH: tl.constexpr, CEIL: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_ROW: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    part = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    num_tiles = tl.num_programs(0)
    num_parts = tl.num_programs(1)

    blocks_per_group = tl.cdiv(num_heads_per_group, BLOCK_H)
    group = part // blocks_per_group
    heads_in_group = (part % blocks_per_group) * BLOCK_H + tl.arange(0, BLOCK_H)
    head_inside = heads_in_group < num_heads_per_group
    heads = group * num_heads_per_group + heads_in_group
    dims = tl.arange(0, BLOCK_D)
    dim_inside = dims < HEAD_DIM

    query = _mean_query(
        q_ptr + row * q_stride_b, q_mask_ptr + row * q_mask_stride_b, heads, head_inside, dims, dim_inside,
        num_queries, q_stride_h, q_stride_n, q_stride_d, q_mask_stride_n, scale,
        HAS_Q_MASK, BLOCK_H, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    weight = tl.load(w_ptr + heads * w_stride, mask=head_inside, other=0.0).to(tl.float32)
    neutral_first, neutral_second = _neutral_pair(MODE)
    first = tl.full([BLOCK_H], neutral_first, tl.float32)
    second = tl.full([BLOCK_H], neutral_second, tl.float32)

    k_mask_ptr += row * k_mask_stride_b
    keys_ptr = k_ptr + row * k_stride_b + group.to(tl.int64) * k_stride_h
    begin = tile * keys_per_program
    for start in range(begin, tl.minimum(begin + keys_per_program, num_keys), BLOCK_M):
        columns = start + tl.arange(0, BLOCK_M)
        candidate = load_candidates(k_mask_ptr, columns, num_keys, k_mask_stride_m, HAS_K_MASK)
        keys = tl.load(
            keys_ptr + columns.to(tl.int64)[:, None] * k_stride_m + dims.to(tl.int64)[None, :] * k_stride_d,
            mask=candidate[:, None] & dim_inside[None, :],
            other=0.0,
        )
        c = _dot_exact(keys, query, INTERPRETED)
        c = tl.where(_is_finite(c), c, 0.0)
        if MODE == _NO_NORM:
            # A head outside the group has weight 0 and query 0, so it adds nothing.
            partial = tl.sum(tl.where(head_inside[None, :], c * weight[None, :], 0.0), 1)
            tl.store(c_ptr + (row * num_parts + part) * num_keys + columns, partial, mask=columns < num_keys)
        else:
            offsets = (row * num_heads + heads).to(tl.int64)[None, :] * num_keys + columns[:, None]
            tl.store(c_ptr + offsets, c, mask=candidate[:, None] & head_inside[None, :])
            tile_first, tile_second = _tile_statistics(c, candidate[:, None], MODE)
            first, second = _merge(first, second, tile_first, tile_second, MODE)

    if MODE != _NO_NORM:
        pair = statistics_ptr + ((row * num_heads + heads) * num_tiles + tile) * 2
        tl.store(pair, first, mask=head_inside)
        tl.store(pair + 1, second, mask=head_inside)

    # Triton puts no barrier between these stores, made by all threads, and the atomic, made by one.
    tl.debug_barrier()
    arrived = tl.atomic_add(counters_ptr + row, 1, sem="acq_rel", scope="gpu")
    if arrived == num_tiles * num_parts - 1:
        tl.store(counters_ptr + row, 0)
        norms_row_ptr = norms_ptr + row * num_heads * 2
        if MODE != _NO_NORM:
            _combine_row(
                statistics_ptr + row * num_heads * num_tiles * 2, norms_row_ptr, num_heads, num_tiles,
                MODE, BLOCK_H, BLOCK_T,
            )  # fmt: skip
            tl.debug_barrier()
        if FINISH != _NORMS:
            num_c_rows = num_parts if MODE == _NO_NORM else num_heads
            c_ptr += row * num_c_rows * num_keys
            scores_ptr += row * num_keys
            mask_ptr += row * num_keys
            indices_ptr += row * width
            if IN_REGISTERS:
                columns = tl.arange(0, BLOCK_ROW)
                candidate = load_candidates(k_mask_ptr, columns, num_keys, k_mask_stride_m, HAS_K_MASK)
                importance = _importance(
                    c_ptr, norms_row_ptr, w_ptr, columns, candidate, num_c_rows, num_keys, w_stride, MODE, BLOCK_ROW
                )
                tl.store(scores_ptr + columns, importance, mask=columns < num_keys)
                if FINISH == _SELECTION:
                    kept = budget_of(tl.sum(candidate.to(tl.int32), 0), numerator, denominator, budget, CEIL)
                    select_in_registers(importance, candidate, kept, num_keys, width, mask_ptr, indices_ptr, BLOCK_ROW)
            else:
                counted = tl.zeros([BLOCK_ROW], tl.int32)
                for row_start in range(0, num_keys, BLOCK_ROW):
                    columns = row_start + tl.arange(0, BLOCK_ROW)
                    candidate = load_candidates(k_mask_ptr, columns, num_keys, k_mask_stride_m, HAS_K_MASK)
                    counted += candidate.to(tl.int32)
                    importance = _importance(
                        c_ptr, norms_row_ptr, w_ptr, columns, candidate, num_c_rows, num_keys, w_stride, MODE, BLOCK_ROW
                    )
                    tl.store(scores_ptr + columns, importance, mask=columns < num_keys)
                if FINISH == _SELECTION:
                    tl.debug_barrier()
                    kept = budget_of(tl.sum(counted, 0), numerator, denominator, budget, CEIL)
                    select_from_memory(
                        scores_ptr, k_mask_ptr, k_mask_stride_m, kept, num_keys, width, mask_ptr, indices_ptr,
                        HAS_K_MASK, BLOCK_ROW,
                    )  # fmt: skip


@triton.jit
def _importance_kernel(
    c_ptr, norms_ptr, w_ptr, k_mask_ptr, scores_ptr, w_stride, k_mask_stride_b, k_mask_stride_m,
    num_heads, num_c_rows, num_keys,
    MODE: tl.constexpr, HAS_K_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    candidate = load_candidates(k_mask_ptr + row * k_mask_stride_b, columns, num_keys, k_mask_stride_m, HAS_K_MASK)
    importance = _importance(
        c_ptr + row * num_c_rows * num_keys, norms_ptr + row * num_heads * 2, w_ptr, columns, candidate,
        num_c_rows, num_keys, w_stride, MODE, BLOCK,
    )  # fmt: skip
    tl.store(scores_ptr + row * num_keys + columns, importance, mask=columns < num_keys)


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
    """Selection by validated `[B, H, N, D]` queries and `[B, Hkv, M, D]` keys.

    One launch up to `MAX_ROW_IN_ONE_LAUNCH` keys, three above.
    """
    if k.shape[2] > MAX_ROW_IN_ONE_LAUNCH:
        scores = score_tokens(q, k, w, q_mask, k_mask, normalize, scale)
        return select_topk(scores, r, k_mask, rounding)
    batch, num_keys = k.shape[0], k.shape[2]
    selection = Selection(
        torch.empty((batch, num_keys), dtype=torch.bool, device=k.device),
        torch.empty((batch, max_kept(r, num_keys, rounding)), dtype=torch.int64, device=k.device),
        torch.empty((batch, num_keys), dtype=torch.float32, device=k.device),
    )
    if batch and num_keys:
        _launch(q, k, w, q_mask, k_mask, normalize, scale, selection, _SELECTION, keep_arguments(r, rounding), rounding)
    return selection


def score_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    q_mask: torch.Tensor | None,
    k_mask: torch.Tensor | None,
    normalize: str | None,
    scale: float,
) -> torch.Tensor:
    """Importance `[B, M]` float32 of validated arguments: one launch, two for long rows."""
    batch, num_keys = k.shape[0], k.shape[2]
    scores = torch.empty((batch, num_keys), dtype=torch.float32, device=k.device)
    if batch == 0 or num_keys == 0:
        return scores
    unselected = Selection(scores, scores, scores)
    if num_keys <= MAX_ROW_IN_ONE_LAUNCH:
        _launch(q, k, w, q_mask, k_mask, normalize, scale, unselected, _SCORES, (1, 1, 0), "floor")
        return scores
    c, norms = _launch(q, k, w, q_mask, k_mask, normalize, scale, unselected, _NORMS, (1, 1, 0), "floor")
    block = 1024
    with on_device(k.device):
        _importance_kernel[(triton.cdiv(num_keys, block), batch)](
            c, norms, w, scores if k_mask is None else k_mask, scores,
            w.stride(0), *_strides(k_mask, 2),
            q.shape[1], c.shape[1], num_keys,
            MODE=MODES[normalize], HAS_K_MASK=k_mask is not None, BLOCK=block, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return scores


def _strides(mask: torch.Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if mask is None else mask.stride()


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    q_mask: torch.Tensor | None,
    k_mask: torch.Tensor | None,
    normalize: str | None,
    scale: float,
    selection: Selection,
    finish: tl.constexpr,
    keep: tuple[int, int, int],
    rounding: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the fused kernel; returns its workspace, logits or partial sums `[B, rows, M]` and norms `[B, H, 2]`."""
    batch, num_heads, num_queries, head_dim = q.shape
    num_key_value_heads, num_keys = k.shape[1:3]
    group_size = num_heads // num_key_value_heads
    config = launch_config(group_size, num_key_value_heads, num_keys, head_dim)
    num_tiles, num_parts = config["grid"]
    num_c_rows = num_parts if normalize is None else num_heads
    c = torch.empty((batch, num_c_rows, num_keys), dtype=torch.float32, device=k.device)
    statistics = torch.empty((batch, num_heads, num_tiles + 1, 2), dtype=torch.float32, device=k.device)
    norms = statistics.view(-1)[batch * num_heads * num_tiles * 2 :]
    keep_mask, indices, scores = selection
    numerator, denominator, budget = keep
    with on_device(k.device):
        _score_select_kernel[(num_tiles, num_parts, batch)](
            q, k, w, q if q_mask is None else q_mask, k if k_mask is None else k_mask,
            c, statistics, norms, arrival_counters(batch, k.device), scores, keep_mask, indices,
            *q.stride(), *k.stride(), w.stride(0), *_strides(q_mask, 2), *_strides(k_mask, 2),
            num_heads, group_size, num_queries, num_keys, config["keys_per_program"],
            indices.shape[-1], numerator, denominator, budget, scale,
            HEAD_DIM=head_dim, MODE=MODES[normalize],
            HAS_Q_MASK=q_mask is not None, HAS_K_MASK=k_mask is not None,
            FINISH=finish.value, CEIL=rounding == "ceil", INTERPRETED=k.device.type == "cpu",
            **config["blocks"], num_warps=config["num_warps"], enable_fp_fusion=True,
        )  # fmt: skip
    return c, norms


def launch_config(group_size: int, num_key_value_heads: int, num_keys: int, head_dim: int) -> dict:
    """Grid and block sizes by shape alone, so that the same shape always adds in the same order."""
    num_parts = num_key_value_heads * triton.cdiv(group_size, HEADS_PER_PROGRAM)
    block_d = max(16, triton.next_power_of_2(head_dim))
    tiles_wanted = max(1, _PROGRAMS_PER_ROW // num_parts)
    keys_per_program = triton.cdiv(triton.cdiv(num_keys, tiles_wanted), _KEYS_PER_TILE) * _KEYS_PER_TILE
    num_tiles = triton.cdiv(num_keys, keys_per_program)
    in_registers = num_keys <= MAX_ROW_IN_REGISTERS
    query_elements = _QUERY_ELEMENTS["row in registers" if in_registers else "row in memory"]
    return {
        "grid": (num_tiles, num_parts),
        "keys_per_program": keys_per_program,
        "num_warps": _NUM_WARPS,
        "blocks": {
            "BLOCK_H": HEADS_PER_PROGRAM,
            "BLOCK_M": _KEYS_PER_TILE,
            "BLOCK_N": max(1, query_elements // block_d),
            "BLOCK_D": block_d,
            "BLOCK_T": triton.next_power_of_2(num_tiles),
            "BLOCK_ROW": row_block(num_keys),
            "IN_REGISTERS": in_registers,
        },
    }
