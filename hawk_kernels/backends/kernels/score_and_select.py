"""Scores keys by mean queries and selects the best in one launch, whatever the size.

The grid has these phases (see `phases`): average the queries of each head; score the keys of a tile by all heads that
share them; then those of `finish`. Every phase is spread over many programs, so that none waits for one multiprocessor
to do the work of all.
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
from hawk_kernels.backends.kernels.finish import Logits, histograms_of_row, sum_and_select
from hawk_kernels.backends.kernels.head_norms import MODES, NO_NORM, merge, neutral_pair, pair_of_tile
from hawk_kernels.backends.kernels.launch import check_limits, compiler_options
from hawk_kernels.backends.kernels.phases import arrive, counters_of_row, draw_ticket, wait_for
from hawk_kernels.backends.kernels.plan import HEADS_PER_PROGRAM, Plan
from hawk_kernels.backends.kernels.prepared import PreparedSelection
from hawk_kernels.backends.kernels.queries_and_keys import arranging, layout_of
from hawk_kernels.backends.kernels.radix import Budget, clear_histograms, load_candidates
from hawk_kernels.backends.kernels.views import Matrix, Vector, load_tile, load_vector, row_of
from hawk_kernels.selection import Selection

# One program averages up to this many tiles of a head's queries; more are shared out, at the price of one more phase.
_QUERY_TILES_IN_ONE_PROGRAM = 4
_MOST_QUERY_PARTS = 32
_PARTIAL_MEANS, _MEANS, _LOGITS = (tl.constexpr(counter) for counter in range(3))
_VARYING = (
    "q_mask_ptr", "k_mask_ptr", "q_mask_stride_b", "q_mask_stride_n", "k_mask_stride_b", "k_mask_stride_m",
    "q_stride_b", "q_stride_h", "k_stride_b", "k_stride_h",
    "batch", "num_queries", "num_keys", "num_query_parts", "queries_per_part", "num_tiles", "keys_per_program",
    "width", "numerator", "denominator", "budget",
)  # fmt: skip


class Static(NamedTuple):
    """What the kernel is compiled for, beside the options of a call."""

    head_dim: int
    mode: int
    selects: bool
    block_heads: int
    block_queries: int
    block_keys: int
    block_dims: int
    block_parts: int
    finish: finish.Blocks


@triton.jit
def _partial_mean(
    queries, q_mask, total_ptr, count_ptr, part, queries_per_part, num_queries,
    HAS_Q_MASK: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """Sum and count one head's queries `[N, D]` in one part of the text."""
    BLOCK_N: tl.constexpr = STATIC.block_queries
    BLOCK_D: tl.constexpr = STATIC.block_dims
    dims = tl.arange(0, BLOCK_D)
    dim_inside = dims < STATIC.head_dim
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    counted = tl.zeros([BLOCK_N], tl.float32)
    begin = part * queries_per_part
    end = tl.minimum(begin + queries_per_part, num_queries)
    for start in range(begin, end, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        used = load_candidates(q_mask, rows, end, HAS_Q_MASK)
        counted += used.to(tl.float32)
        total += load_tile(queries, rows, dims, used[:, None] & dim_inside[None, :]).to(tl.float32)
    tl.store(total_ptr + dims, tl.sum(total, 0), mask=dim_inside)
    tl.store(count_ptr, tl.sum(counted, 0))


@triton.jit
def _mean_of_parts(
    total_ptr, count_ptr, mean_ptr, num_parts, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write a head's mean query times the scale; without text it is NaN, which scores 0."""
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
def _load_keys(keys, k_mask, start, end, HAS_K_MASK: tl.constexpr, STATIC: tl.constexpr):
    """Load a tile of keys, and say which of them are candidates."""
    columns = start + tl.arange(0, STATIC.block_keys)
    dims = tl.arange(0, STATIC.block_dims)
    candidate = load_candidates(k_mask, columns, end, HAS_K_MASK)
    return load_tile(keys, columns, dims, candidate[:, None] & (dims < STATIC.head_dim)[None, :]), candidate


@triton.jit
def _score_keys(
    keys, k_mask, means_ptr, w, c_ptr, statistics_ptr, means_counter_ptr, part, tile,
    num_heads, num_heads_per_group, num_keys, num_tiles, keys_per_program,
    HAS_K_MASK: tl.constexpr, INTERPRETED: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """Write logits of some keys by some of the heads that share them, and what their norms need.

    Keys are `[M, D]` of one row and group; the other pointers are the row's.
    """
    HEAD_DIM: tl.constexpr = STATIC.head_dim
    MODE: tl.constexpr = STATIC.mode
    BLOCK_H: tl.constexpr = STATIC.block_heads
    BLOCK_M: tl.constexpr = STATIC.block_keys
    BLOCK_D: tl.constexpr = STATIC.block_dims
    parts_per_group = tl.cdiv(num_heads_per_group, BLOCK_H)
    heads_in_group = (part % parts_per_group) * BLOCK_H + tl.arange(0, BLOCK_H)
    head_inside = heads_in_group < num_heads_per_group
    heads = (part // parts_per_group) * num_heads_per_group + heads_in_group
    dims = tl.arange(0, BLOCK_D)

    begin = tile * keys_per_program
    end = tl.minimum(begin + keys_per_program, num_keys)
    # The first keys are on their way while this program waits for the means.
    tile_of_keys, candidate = _load_keys(keys, k_mask, begin, end, HAS_K_MASK, STATIC)
    weight = load_vector(w, heads, head_inside).to(tl.float32)
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
        next_keys, next_candidate = _load_keys(keys, k_mask, start + BLOCK_M, end, HAS_K_MASK, STATIC)
        columns = start + tl.arange(0, BLOCK_M)
        c = exact_dot(tile_of_keys, query, INTERPRETED)
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
        tile_of_keys, candidate = next_keys, next_candidate
    if MODE != NO_NORM:
        pair = statistics_ptr + (heads * num_tiles + tile) * 2
        tl.store(pair, first, mask=head_inside)
        tl.store(pair + 1, second, mask=head_inside)


@triton.jit(do_not_specialize=_VARYING)
def _score_and_select_kernel(
    tensors, strides, memory, outputs,
    q_mask_ptr, k_mask_ptr, q_mask_stride_b, q_mask_stride_n, k_mask_stride_b, k_mask_stride_m,
    q_stride_b: tl.int64, q_stride_h: tl.int64, k_stride_b: tl.int64, k_stride_h: tl.int64,
    batch, num_heads, num_heads_per_group, num_queries, num_keys,
    num_query_parts, queries_per_part, num_tiles, keys_per_program,
    width, numerator: tl.int64, denominator: tl.int64, budget, scale,
    HAS_Q_MASK: tl.constexpr, HAS_K_MASK: tl.constexpr, ROUNDING: tl.constexpr, INTERPRETED: tl.constexpr,
    STRIDE_UNIT: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    # Named, because Triton 3.6 takes a nested tuple that is passed on unnamed for a tuple of values.
    FINISH: tl.constexpr = STATIC.finish
    ticket = draw_ticket(memory.counters)
    splits_queries = num_query_parts > 1
    num_partial_means = batch * num_heads * num_query_parts
    num_parts = (num_heads // num_heads_per_group) * tl.cdiv(num_heads_per_group, STATIC.block_heads)
    num_c_rows = num_parts if STATIC.mode == NO_NORM else num_heads
    first_scoring = num_partial_means + tl.where(splits_queries, batch * num_heads, 0)
    first_summing = first_scoring + batch * num_parts * num_tiles

    # Totals and counts of the parts of the queries, means, logits, statistics: `make_plan` adds them up alike.
    totals_ptr = memory.floats
    counts_ptr = totals_ptr + num_partial_means * STATIC.head_dim
    means_ptr = counts_ptr + num_partial_means
    c_ptr = means_ptr + batch * num_heads * STATIC.head_dim
    statistics_ptr = c_ptr + tl.cast(batch, tl.int64) * num_c_rows * num_keys

    w = Vector(tensors.w, strides.w)
    q_mask = Matrix(q_mask_ptr, q_mask_stride_b, q_mask_stride_n)
    k_mask = Matrix(k_mask_ptr, k_mask_stride_b, k_mask_stride_m)
    if ticket < num_partial_means:
        part = ticket % num_query_parts
        head = (ticket // num_query_parts) % num_heads
        row = ticket // (num_query_parts * num_heads)
        place = (row * num_heads + head) * num_query_parts
        counters = counters_of_row(memory.counters, row)
        # nested, because Triton takes the outer condition at compile time
        if STATIC.selects and not FINISH.in_registers:  # noqa: SIM102
            if (head == 0) & (part == 0):
                clear_histograms(histograms_of_row(memory.words, row, num_keys, FINISH.row, False))
        q_ptr = tensors.q + (row.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h) * STRIDE_UNIT
        _partial_mean(
            Matrix(q_ptr, strides.q_n, strides.q_d), row_of(q_mask, row),
            totals_ptr + (place + part) * STATIC.head_dim, counts_ptr + place + part,
            part, queries_per_part, num_queries, HAS_Q_MASK, STATIC,
        )  # fmt: skip
        if splits_queries:
            arrive(counters + _PARTIAL_MEANS)
        else:
            tl.debug_barrier()
            _mean_of_parts(
                totals_ptr + place * STATIC.head_dim, counts_ptr + place,
                means_ptr + (row * num_heads + head) * STATIC.head_dim, 1, scale,
                STATIC.head_dim, STATIC.block_dims, 1,
            )  # fmt: skip
            arrive(counters + _MEANS)
    elif ticket < first_scoring:
        index = ticket - num_partial_means
        counters = counters_of_row(memory.counters, index // num_heads)
        wait_for(counters + _PARTIAL_MEANS, num_heads * num_query_parts)
        _mean_of_parts(
            totals_ptr + index * num_query_parts * STATIC.head_dim, counts_ptr + index * num_query_parts,
            means_ptr + index * STATIC.head_dim, num_query_parts, scale,
            STATIC.head_dim, STATIC.block_dims, STATIC.block_parts,
        )  # fmt: skip
        arrive(counters + _MEANS)
    elif ticket < first_summing:
        index = ticket - first_scoring
        tile = index % num_tiles
        part = (index // num_tiles) % num_parts
        row = index // (num_tiles * num_parts)
        counters = counters_of_row(memory.counters, row)
        wide_row = row.to(tl.int64)
        group = part // tl.cdiv(num_heads_per_group, STATIC.block_heads)
        k_ptr = tensors.k + (wide_row * k_stride_b + group.to(tl.int64) * k_stride_h) * STRIDE_UNIT
        _score_keys(
            Matrix(k_ptr, strides.k_m, strides.k_d), row_of(k_mask, row),
            means_ptr + row * num_heads * STATIC.head_dim, w, c_ptr + wide_row * num_c_rows * num_keys,
            statistics_ptr + wide_row * num_heads * num_tiles * 2, counters + _MEANS, part, tile,
            num_heads, num_heads_per_group, num_keys, num_tiles, keys_per_program, HAS_K_MASK, INTERPRETED, STATIC,
        )  # fmt: skip
        arrive(counters + _LOGITS)
    else:
        sum_and_select(
            ticket - first_summing, batch, num_keys, width,
            Logits(c_ptr, statistics_ptr, num_c_rows, num_tiles, num_parts * num_tiles), w, k_mask,
            Budget(numerator, denominator, budget), outputs, memory, _LOGITS,
            STATIC.mode, HAS_K_MASK, STATIC.selects, ROUNDING, FINISH,
        )  # fmt: skip


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
    """Make the plan of a launch; the same shape always adds in the same order."""
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

    num_c_rows = num_parts if normalize is None else num_heads
    num_means = batch * num_heads * (query_parts * (head_dim + 1) + head_dim)
    num_logits = batch * num_c_rows * num_keys
    num_statistics = 0 if normalize is None else batch * num_heads * num_tiles * 2
    num_programs = batch * num_heads * (query_parts + (query_parts > 1))
    num_programs += batch * (num_parts * num_tiles + finish.num_programs(num_keys, config.sum_block, selects))
    check_limits(num_programs, num_keys, num_means, batch)
    return Plan(
        grid=(num_programs,),
        num_floats=num_means + num_logits + num_statistics,
        num_words=batch * finish.num_histogram_words(num_keys) if selects else 0,
        sizes=(
            batch,
            num_heads,
            group_size,
            num_queries,
            num_keys,
            query_parts,
            queries_per_part,
            num_tiles,
            keys_per_program,
        ),
        static=Static(
            head_dim=head_dim,
            mode=MODES[normalize],
            selects=selects,
            block_heads=HEADS_PER_PROGRAM,
            block_queries=block_n,
            block_keys=config.block_keys,
            block_dims=block_d,
            block_parts=_MOST_QUERY_PARTS,
            finish=finish.blocks_of(num_keys, config.sum_block),
        ),
        options=compiler_options(config.num_warps, config.max_registers),
    )


class PreparedCall(PreparedSelection):
    """A call of `score_and_select` or `score_tokens`."""

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
        config: ScoreConfig | None = None,
    ) -> None:
        """Prepare a call by validated `[B, H, N, D]` queries and `[B, Hkv, M, D]` keys, by default the table's.

        Args:
            q, k, w, q_mask, k_mask, normalize, scale, rounding: as in the public function.
            r: None scores and does not select.
            batched: False leaves the batch axis out of the results.
            config: how the launch is cut; None takes it from the table.
        """
        batch, num_key_value_heads, num_keys, head_dim = k.shape
        num_heads, num_queries = q.shape[1:3]
        super().__init__(k.device, batch, num_keys, r, rounding, batched)
        if self.is_empty:
            return
        shape = (batch, num_heads, num_key_value_heads, num_queries, num_keys, head_dim, normalize, self.selects)
        plan = _plan(k.device, k.dtype, *shape) if config is None else make_plan(*shape, config)
        strides, varying, unit = layout_of(q, k, w, q_mask, k_mask)
        numbers = (*varying, *plan.sizes, *self.budget, scale)

        constants = {
            "HAS_Q_MASK": q_mask is not None,
            "HAS_K_MASK": k_mask is not None,
            "ROUNDING": self.rounding,
            "INTERPRETED": k.device.type == "cpu",
            "STRIDE_UNIT": unit,
            "STATIC": plan.static,
        }
        # all but the masks are specialised
        self.prepare(plan, batch, arranging(strides, numbers), constants, num_specialized=9)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        w: torch.Tensor,
        q_mask: torch.Tensor | None,
        k_mask: torch.Tensor | None,
    ) -> Selection:
        """Return mask, indices and scores; without selecting, each of them is the scores."""
        masks = q if q_mask is None else q_mask, k if k_mask is None else k_mask
        return self.run(_score_and_select_kernel, (q, k, w), masks)


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
    """Select by validated `[B, H, N, D]` queries and `[B, Hkv, M, D]` keys in one launch, by default the table's."""
    call = PreparedCall(q, k, w, r, q_mask, k_mask, normalize, scale, rounding, config=config)
    return call(q, k, w, q_mask, k_mask)


def score_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    q_mask: torch.Tensor | None,
    k_mask: torch.Tensor | None,
    normalize: str | None,
    scale: float,
    config: ScoreConfig | None = None,
) -> torch.Tensor:
    """Compute importance `[B, M]` float32 of validated arguments, in one launch, by default the table's."""
    call = PreparedCall(q, k, w, None, q_mask, k_mask, normalize, scale, "floor", config=config)
    return call(q, k, w, q_mask, k_mask).scores


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
