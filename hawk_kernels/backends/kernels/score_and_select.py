"""From queries and keys to kept tokens in one launch, whatever the size.

Phases of the grid (see `phases`): average the queries of each head; score the keys of a tile by all heads that share
them; sum over the heads, normalised; select. Every phase is spread over many programs, so that none waits for one
multiprocessor to do the work of all.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hawk_kernels.backends.kernels import finish
from hawk_kernels.backends.kernels.configs import ScoreConfig, score_config
from hawk_kernels.backends.kernels.exact_dot import exact_dot
from hawk_kernels.backends.kernels.finish import select, sum_heads
from hawk_kernels.backends.kernels.head_norms import MODES, NO_NORM, merge, neutral_pair, pair_of_tile
from hawk_kernels.backends.kernels.launch import (
    check_limits,
    compiler_options,
    launch_counters,
    on_device,
    workspace,
)
from hawk_kernels.backends.kernels.phases import (
    arrive,
    counters_of_row,
    draw_ticket,
    leave_row,
    num_counters,
    wait_for,
)
from hawk_kernels.backends.kernels.radix import clear_histograms, load_candidates
from hawk_kernels.backends.kernels.select_topk import keep_arguments
from hawk_kernels.selection import Selection, max_kept

# tl.dot takes at least 16 columns, and more heads a program would not fit beside a tile of keys.
HEADS_PER_PROGRAM = 16
# Up to so many tiles of queries one program averages a head's; more are shared out, at the price of one more phase.
_QUERY_TILES_IN_ONE_PROGRAM = 4
_MOST_QUERY_PARTS = 32
_PARTIAL_MEANS, _MEANS, _LOGITS, _SCORES = (tl.constexpr(counter) for counter in range(4))


@triton.jit
def _partial_mean(
    q_ptr, q_mask_ptr, total_ptr, count_ptr, part, queries_per_part, num_queries, stride_n, stride_d, mask_stride_n,
    HEAD_DIM: tl.constexpr, HAS_Q_MASK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum and number of one head's queries in one part of the text; pointers are the row's and the head's."""
    dims = tl.arange(0, BLOCK_D)
    dim_inside = dims < HEAD_DIM
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    counted = tl.zeros([BLOCK_N], tl.float32)
    begin = part * queries_per_part
    end = tl.minimum(begin + queries_per_part, num_queries)
    for start in range(begin, end, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        used = rows < end
        if HAS_Q_MASK:
            used = tl.load(q_mask_ptr + rows.to(tl.int64) * mask_stride_n, mask=used, other=0) != 0
        counted += used.to(tl.float32)
        queries = tl.load(
            q_ptr + rows.to(tl.int64)[:, None] * stride_n + dims.to(tl.int64)[None, :] * stride_d,
            mask=used[:, None] & dim_inside[None, :],
            other=0.0,
        )
        total += queries.to(tl.float32)
    tl.store(total_ptr + dims, tl.sum(total, 0), mask=dim_inside)
    tl.store(count_ptr, tl.sum(counted, 0))


@triton.jit
def _mean_of_parts(
    total_ptr, count_ptr, mean_ptr, num_parts, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A head's mean query times the scale, NaN (which scores 0) without text; pointers are the row's and the head's."""
    dims = tl.arange(0, BLOCK_D)
    parts = tl.arange(0, BLOCK_P)
    part_inside = parts < num_parts
    totals = tl.load(
        total_ptr + parts[:, None] * HEAD_DIM + dims[None, :],
        mask=part_inside[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
        cache_modifier=".cg",
    )
    count = tl.sum(tl.load(count_ptr + parts, mask=part_inside, other=0.0, cache_modifier=".cg"), 0)
    mean = tl.where(count > 0, tl.sum(totals, 0) / tl.maximum(count, 1.0), float("nan"))
    tl.store(mean_ptr + dims, mean * scale, mask=dims < HEAD_DIM)


@triton.jit
def _load_keys(
    keys_ptr, k_mask_ptr, start, end, stride_m, stride_d, mask_stride_m,
    HEAD_DIM: tl.constexpr, HAS_K_MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    columns = start + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    candidate = load_candidates(k_mask_ptr, columns, end, mask_stride_m, HAS_K_MASK)
    keys = tl.load(
        keys_ptr + columns.to(tl.int64)[:, None] * stride_m + dims.to(tl.int64)[None, :] * stride_d,
        mask=candidate[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )
    return keys, candidate


@triton.jit
def _score_keys(
    keys_ptr, k_mask_ptr, means_ptr, w_ptr, c_ptr, statistics_ptr, means_counter_ptr, part, tile,
    num_heads, num_heads_per_group, num_keys, num_tiles, keys_per_program,
    stride_m, stride_d, w_stride, mask_stride_m,
    HEAD_DIM: tl.constexpr, MODE: tl.constexpr, HAS_K_MASK: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Logits of some keys by some of the heads that share them, and what their norms need; pointers are the row's."""
    parts_per_group = tl.cdiv(num_heads_per_group, BLOCK_H)
    heads_in_group = (part % parts_per_group) * BLOCK_H + tl.arange(0, BLOCK_H)
    head_inside = heads_in_group < num_heads_per_group
    heads = (part // parts_per_group) * num_heads_per_group + heads_in_group
    dims = tl.arange(0, BLOCK_D)

    begin = tile * keys_per_program
    end = tl.minimum(begin + keys_per_program, num_keys)
    # On their way while the means are waited for.
    keys, candidate = _load_keys(
        keys_ptr, k_mask_ptr, begin, end, stride_m, stride_d, mask_stride_m, HEAD_DIM, HAS_K_MASK, BLOCK_M, BLOCK_D
    )
    weight = tl.load(w_ptr + heads.to(tl.int64) * w_stride, mask=head_inside, other=0.0).to(tl.float32)
    neutral_first, neutral_second = neutral_pair(MODE)
    first = tl.full([BLOCK_H], neutral_first, tl.float32)
    second = tl.full([BLOCK_H], neutral_second, tl.float32)

    wait_for(means_counter_ptr, num_heads)
    query = tl.load(
        means_ptr + heads[:, None] * HEAD_DIM + dims[None, :],
        mask=head_inside[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
        cache_modifier=".cg",
    )
    for start in range(begin, end, BLOCK_M):
        next_keys, next_candidate = _load_keys(
            keys_ptr, k_mask_ptr, start + BLOCK_M, end, stride_m, stride_d, mask_stride_m,
            HEAD_DIM, HAS_K_MASK, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        columns = start + tl.arange(0, BLOCK_M)
        c = exact_dot(keys, query, INTERPRETED)
        c = tl.where(tl.abs(c) < float("inf"), c, 0.0)
        if MODE == NO_NORM:
            # A head outside the group has weight 0 and query 0, so it adds nothing.
            partial = tl.sum(tl.where(head_inside[None, :], c * weight[None, :], 0.0), 1)
            tl.store(c_ptr + part.to(tl.int64) * num_keys + columns, partial, mask=candidate)
        else:
            offsets = heads.to(tl.int64)[None, :] * num_keys + columns[:, None]
            tl.store(c_ptr + offsets, c, mask=candidate[:, None] & head_inside[None, :])
            tile_first, tile_second = pair_of_tile(c, candidate[:, None], MODE)
            first, second = merge(first, second, tile_first, tile_second, MODE)
        keys, candidate = next_keys, next_candidate
    if MODE != NO_NORM:
        pair = statistics_ptr + (heads * num_tiles + tile) * 2
        tl.store(pair, first, mask=head_inside)
        tl.store(pair + 1, second, mask=head_inside)


@triton.jit
def _score_and_select_kernel(
    q_ptr, k_ptr, w_ptr, q_mask_ptr, k_mask_ptr, workspace_ptr, words_ptr, counters_ptr,
    scores_ptr, mask_ptr, indices_ptr,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_m, k_stride_d,
    w_stride, q_mask_stride_b, q_mask_stride_n, k_mask_stride_b, k_mask_stride_m,
    batch, num_heads, num_heads_per_group, num_queries, num_keys, num_query_parts, queries_per_part,
    num_parts, num_tiles, keys_per_program, counts_offset, means_offset, c_offset, statistics_offset, words_per_row,
    width, numerator, denominator, budget, scale,
    HEAD_DIM: tl.constexpr, MODE: tl.constexpr, HAS_Q_MASK: tl.constexpr, HAS_K_MASK: tl.constexpr,
    SELECT: tl.constexpr, CEIL: tl.constexpr, INTERPRETED: tl.constexpr, SPLIT_QUERIES: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_SUM: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_ROW: tl.constexpr, NUM_BLOCKS: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    ticket = draw_ticket(counters_ptr)
    num_partial_means = batch * num_heads * num_query_parts
    num_means = batch * num_heads if SPLIT_QUERIES else 0
    num_scoring = batch * num_parts * num_tiles
    sum_blocks = tl.cdiv(num_keys, BLOCK_SUM)
    num_summing = batch * sum_blocks

    counts_ptr = workspace_ptr + counts_offset
    means_ptr = workspace_ptr + means_offset
    num_c_rows = num_parts if MODE == NO_NORM else num_heads
    if ticket < num_partial_means:
        part = ticket % num_query_parts
        head = (ticket // num_query_parts) % num_heads
        row = ticket // (num_query_parts * num_heads)
        place = (row * num_heads + head) * num_query_parts
        counters = counters_of_row(counters_ptr, row)
        wide_row = row.to(tl.int64)
        # nested, because Triton takes the outer condition at compile time
        if SELECT and not IN_REGISTERS:  # noqa: SIM102
            if (head == 0) & (part == 0):
                clear_histograms(words_ptr + wide_row * words_per_row)
        _partial_mean(
            q_ptr + wide_row * q_stride_b + head.to(tl.int64) * q_stride_h, q_mask_ptr + wide_row * q_mask_stride_b,
            workspace_ptr + (place + part) * HEAD_DIM, counts_ptr + place + part,
            part, queries_per_part, num_queries, q_stride_n, q_stride_d, q_mask_stride_n,
            HEAD_DIM, HAS_Q_MASK, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        if SPLIT_QUERIES:
            arrive(counters + _PARTIAL_MEANS)
        else:
            tl.debug_barrier()
            _mean_of_parts(
                workspace_ptr + place * HEAD_DIM, counts_ptr + place,
                means_ptr + (row * num_heads + head) * HEAD_DIM, 1, scale, HEAD_DIM, BLOCK_D, 1,
            )  # fmt: skip
            arrive(counters + _MEANS)
    elif ticket < num_partial_means + num_means:
        index = ticket - num_partial_means
        row = index // num_heads
        counters = counters_of_row(counters_ptr, row)
        wait_for(counters + _PARTIAL_MEANS, num_heads * num_query_parts)
        _mean_of_parts(
            workspace_ptr + index * num_query_parts * HEAD_DIM, counts_ptr + index * num_query_parts,
            means_ptr + index * HEAD_DIM, num_query_parts, scale, HEAD_DIM, BLOCK_D, BLOCK_P,
        )  # fmt: skip
        arrive(counters + _MEANS)
    elif ticket < num_partial_means + num_means + num_scoring:
        index = ticket - num_partial_means - num_means
        tile = index % num_tiles
        part = (index // num_tiles) % num_parts
        row = index // (num_tiles * num_parts)
        counters = counters_of_row(counters_ptr, row)
        wide_row = row.to(tl.int64)
        group = part // tl.cdiv(num_heads_per_group, BLOCK_H)
        _score_keys(
            k_ptr + wide_row * k_stride_b + group.to(tl.int64) * k_stride_h, k_mask_ptr + wide_row * k_mask_stride_b,
            means_ptr + row * num_heads * HEAD_DIM, w_ptr,
            workspace_ptr + c_offset + wide_row * num_c_rows * num_keys,
            workspace_ptr + statistics_offset + wide_row * num_heads * num_tiles * 2,
            counters + _MEANS, part, tile,
            num_heads, num_heads_per_group, num_keys, num_tiles, keys_per_program,
            k_stride_m, k_stride_d, w_stride, k_mask_stride_m,
            HEAD_DIM, MODE, HAS_K_MASK, INTERPRETED, BLOCK_H, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        arrive(counters + _LOGITS)
    elif ticket < num_partial_means + num_means + num_scoring + num_summing:
        index = ticket - num_partial_means - num_means - num_scoring
        row = index // sum_blocks
        counters = counters_of_row(counters_ptr, row)
        wide_row = row.to(tl.int64)
        sum_heads(
            index % sum_blocks, workspace_ptr + c_offset + wide_row * num_c_rows * num_keys,
            workspace_ptr + statistics_offset + wide_row * num_heads * num_tiles * 2, w_ptr,
            k_mask_ptr + wide_row * k_mask_stride_b, scores_ptr + wide_row * num_keys,
            words_ptr + wide_row * words_per_row, counters + _LOGITS, num_parts * num_tiles,
            num_c_rows, num_tiles, num_keys, w_stride, k_mask_stride_m,
            MODE, HAS_K_MASK, SELECT and not IN_REGISTERS, BLOCK_SUM, BLOCK_C, BLOCK_T,
        )  # fmt: skip
        if SELECT:
            arrive(counters + _SCORES)
        else:
            leave_row(counters, counters + _SCORES, sum_blocks)
    else:
        if SELECT:
            index = ticket - num_partial_means - num_means - num_scoring - num_summing
            blocks = tl.cdiv(num_keys, BLOCK_ROW)
            row = (index // blocks) % batch
            counters = counters_of_row(counters_ptr, row)
            wide_row = row.to(tl.int64)
            select(
                index // (blocks * batch), index % blocks, scores_ptr + wide_row * num_keys,
                k_mask_ptr + wide_row * k_mask_stride_b, mask_ptr + wide_row * num_keys, indices_ptr + wide_row * width,
                words_ptr + wide_row * words_per_row, counters, counters + _SCORES, sum_blocks,
                num_keys, width, numerator, denominator, budget, k_mask_stride_m,
                HAS_K_MASK, CEIL, IN_REGISTERS, BLOCK_ROW, NUM_BLOCKS,
            )  # fmt: skip


class Plan(NamedTuple):
    """All that a launch takes from shapes alone; made once for each."""

    grid: tuple[int]
    num_floats: int
    num_words: int
    sizes: tuple[int, ...]
    constants: dict
    options: dict


@lru_cache(maxsize=4096)
def make_plan(
    batch: int,
    num_heads: int,
    num_key_value_heads: int,
    num_queries: int,
    num_keys: int,
    head_dim: int,
    normalize: str | None,
    selects: bool,
    config: ScoreConfig,
) -> Plan:
    """Grid, workspace and constants; the same shape always adds in the same order."""
    group_size = num_heads // num_key_value_heads
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_n = max(1, config.query_elements // block_d)
    in_one_program = block_n * _QUERY_TILES_IN_ONE_PROGRAM
    query_parts = min(_MOST_QUERY_PARTS, triton.cdiv(max(1, num_queries), in_one_program))
    queries_per_part = triton.cdiv(triton.cdiv(num_queries, query_parts), block_n) * block_n
    query_parts = max(1, triton.cdiv(num_queries, max(1, queries_per_part)))

    num_parts = num_key_value_heads * triton.cdiv(group_size, HEADS_PER_PROGRAM)
    tiles_wanted = max(1, config.num_programs // (batch * num_parts))
    keys_per_program = triton.cdiv(triton.cdiv(num_keys, tiles_wanted), config.block_keys) * config.block_keys
    num_tiles = triton.cdiv(num_keys, keys_per_program)

    in_registers = num_keys <= finish.MAX_ROW_IN_REGISTERS
    blocks = finish.num_blocks(num_keys)
    num_c_rows = num_parts if normalize is None else num_heads
    counts = batch * num_heads * query_parts * head_dim
    means = counts + batch * num_heads * query_parts
    c = means + batch * num_heads * head_dim
    statistics = c + batch * num_c_rows * num_keys
    num_programs = batch * num_heads * (query_parts + (query_parts > 1))
    num_programs += batch * (num_parts * num_tiles + triton.cdiv(num_keys, config.sum_block))
    if selects:
        num_programs += batch * blocks * finish.num_selecting_phases(num_keys)
    words_per_row = finish.num_histogram_words(num_keys) if selects else 0
    check_limits(num_programs, num_keys, c)
    return Plan(
        grid=(num_programs,),
        num_floats=statistics + (0 if normalize is None else batch * num_heads * num_tiles * 2),
        num_words=batch * words_per_row,
        sizes=(
            batch,
            num_heads,
            group_size,
            num_queries,
            num_keys,
            query_parts,
            queries_per_part,
            num_parts,
            num_tiles,
            keys_per_program,
            counts,
            means,
            c,
            statistics,
            words_per_row,
        ),
        constants={
            "HEAD_DIM": head_dim,
            "MODE": MODES[normalize],
            "SELECT": selects,
            "SPLIT_QUERIES": query_parts > 1,
            "BLOCK_H": HEADS_PER_PROGRAM,
            "BLOCK_N": block_n,
            "BLOCK_M": config.block_keys,
            "BLOCK_D": block_d,
            "BLOCK_P": triton.next_power_of_2(query_parts),
            "BLOCK_SUM": config.sum_block,
            "BLOCK_C": finish.HEAD_BLOCK,
            "BLOCK_T": finish.TILE_BLOCK,
            "BLOCK_ROW": finish.row_block(num_keys),
            "NUM_BLOCKS": triton.next_power_of_2(blocks),
            "IN_REGISTERS": in_registers,
        },
        options=compiler_options(config.num_warps, config.max_registers),
    )


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
    config: ScoreConfig | None = None,
) -> Selection:
    """Selection by validated `[B, H, N, D]` queries and `[B, Hkv, M, D]` keys in one launch, by default the table's."""
    batch, _, num_keys, _ = k.shape
    selection = Selection(
        torch.empty((batch, num_keys), dtype=torch.bool, device=k.device),
        torch.empty((batch, max_kept(r, num_keys, rounding)), dtype=torch.int64, device=k.device),
        torch.empty((batch, num_keys), dtype=torch.float32, device=k.device),
    )
    if batch and num_keys:
        keep = keep_arguments(r, rounding)
        _launch(q, k, w, q_mask, k_mask, normalize, scale, selection, True, keep, rounding == "ceil", config)
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
    """Importance `[B, M]` float32 of validated arguments, in one launch."""
    batch, num_keys = k.shape[0], k.shape[2]
    scores = torch.empty((batch, num_keys), dtype=torch.float32, device=k.device)
    if batch and num_keys:
        unselected = Selection(scores, scores, scores)
        _launch(q, k, w, q_mask, k_mask, normalize, scale, unselected, False, (1, 1, 0), False, None)
    return scores


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    q_mask: torch.Tensor | None,
    k_mask: torch.Tensor | None,
    normalize: str | None,
    scale: float,
    selection: Selection,
    selects: bool,
    keep: tuple[int, int, int],
    ceil: bool,
    config: ScoreConfig | None,
) -> None:
    device = k.device
    _, num_heads, num_queries, _ = q.shape
    batch, num_key_value_heads, num_keys, head_dim = k.shape
    shape = (batch, num_heads, num_key_value_heads, num_queries, num_keys, head_dim, normalize, selects)
    plan = _plan(device, k.dtype, *shape) if config is None else make_plan(*shape, config)
    mask, indices, scores = selection
    with on_device(device):
        floats, words = workspace(plan.num_floats, plan.num_words, device)
        _score_and_select_kernel[plan.grid](
            q, k, w, q if q_mask is None else q_mask, k if k_mask is None else k_mask,
            floats, words, launch_counters(num_counters(batch), device), scores, mask, indices,
            *q.stride(), *k.stride(), w.stride(0),
            *((0, 0) if q_mask is None else q_mask.stride()), *((0, 0) if k_mask is None else k_mask.stride()),
            *plan.sizes, indices.shape[-1], *keep, scale,
            HAS_Q_MASK=q_mask is not None, HAS_K_MASK=k_mask is not None, CEIL=ceil,
            INTERPRETED=device.type == "cpu", **plan.constants, **plan.options,
        )  # fmt: skip


@lru_cache(maxsize=4096)
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    num_heads: int,
    num_key_value_heads: int,
    num_queries: int,
    num_keys: int,
    head_dim: int,
    normalize: str | None,
    selects: bool,
) -> Plan:
    config = score_config(device, dtype, batch, num_heads, num_key_value_heads, num_keys, head_dim)
    shape = (batch, num_heads, num_key_value_heads, num_queries, num_keys, head_dim)
    return make_plan(*shape, normalize, selects, config)
