"""Scores each key by the text token that attends to it most, in one launch.

The grid has these phases (see `phases`): find what the norm of each text token of each head needs, over some of the
keys; make the same products again, now with the norms, and take their maximum over the text for the keys of a tile;
sum the heads as in `finish`. Without a norm the first phase is left out. The products are made twice, because keeping
them would take as much memory as the matrix.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from hawk_kernels.backends.kernels import finish
from hawk_kernels.backends.kernels.finish import Logits, sum_and_select
from hawk_kernels.backends.kernels.head_norms import (
    MODES,
    NO_NORM,
    merge,
    neutral_pair,
    normalized,
    pair_of_tile,
    reduce_pairs,
)
from hawk_kernels.backends.kernels.launch import check_limits, compiler_options
from hawk_kernels.backends.kernels.phases import arrive, counters_of_row, draw_ticket, wait_for
from hawk_kernels.backends.kernels.plan import Plan
from hawk_kernels.backends.kernels.prepared import PreparedSelection
from hawk_kernels.backends.kernels.queries_and_keys import arranging, layout_of
from hawk_kernels.backends.kernels.radix import Budget, load_candidates
from hawk_kernels.backends.kernels.views import Matrix, Vector, load_tile, row_of

# About two waves on A100 to B200; the interpreter takes milliseconds for each program.
_PROGRAMS, _PROGRAMS_INTERPRETED = 264, 32
# Each range of keys leaves a pair for each text token; a program loads the pairs of all ranges at once.
_MOST_SPLITS = 32
_SUM_BLOCK = 256
# Tiles of rows this long or longer do not fit in the registers of the usual number of threads.
_WIDE_BYTES = 512
_MAX_REGISTERS = 255
_PAIRS, _LOGITS = (tl.constexpr(counter) for counter in range(2))
_VARYING = (
    "q_mask_ptr", "k_mask_ptr", "q_mask_stride_b", "q_mask_stride_n", "k_mask_stride_b", "k_mask_stride_m",
    "q_stride_b", "q_stride_h", "k_stride_b", "k_stride_h",
    "batch", "num_queries", "num_keys", "num_splits", "keys_per_split", "num_tiles", "parts_per_group",
    "heads_per_part",
)  # fmt: skip


class Static(NamedTuple):
    """What the kernel is compiled for, beside the masks."""

    head_dim: int
    mode: int
    block_queries: int
    block_keys: int
    block_dims: int
    block_splits: int
    finish: finish.Blocks


class Text(NamedTuple):
    """The queries `[N, D]` of one row and head, and the row's mask of those that count."""

    queries: Any
    mask: Any
    num_queries: Any


class Pairs(NamedTuple):
    """What the norms of one row and head need: pointers to `[splits, N]` first and second numbers."""

    first_ptr: Any
    second_ptr: Any
    num_splits: Any


@triton.jit
def _load_queries(text, start, HAS_Q_MASK: tl.constexpr, STATIC: tl.constexpr):
    """Load a tile of queries, and say which of them count."""
    rows = start + tl.arange(0, STATIC.block_queries)
    dims = tl.arange(0, STATIC.block_dims)
    used = load_candidates(text.mask, rows, text.num_queries, HAS_Q_MASK)
    inside = used[:, None] & (dims < STATIC.head_dim)[None, :]
    return load_tile(text.queries, rows, dims, inside), rows, used


@triton.jit
def _load_keys(keys, k_mask, start, end, HAS_K_MASK: tl.constexpr, STATIC: tl.constexpr):
    """Load a tile of keys, and say which of them are candidates."""
    columns = start + tl.arange(0, STATIC.block_keys)
    dims = tl.arange(0, STATIC.block_dims)
    candidate = load_candidates(k_mask, columns, end, HAS_K_MASK)
    inside = candidate[:, None] & (dims < STATIC.head_dim)[None, :]
    return load_tile(keys, columns, dims, inside), columns, candidate


@triton.jit
def _products(queries, keys, scale, INTERPRETED: tl.constexpr):
    """Return `[BLOCK_N, BLOCK_M]` float32; a product that is not finite is 0.

    Triton's interpreter multiplies the bit patterns of bfloat16, and its BLAS adds in another order at the edges of a
    tile, where equal keys would no longer tie.
    """
    if INTERPRETED:
        c = tl.sum(queries.to(tl.float32)[:, None, :] * keys.to(tl.float32)[None, :, :], 2)
    else:
        c = tl.dot(queries, tl.trans(keys), input_precision="ieee", out_dtype=tl.float32)
    c *= scale
    return tl.where(tl.abs(c) < float("inf"), c, 0.0)


@triton.jit
def _find_pairs(
    text, keys, k_mask, pairs, split, keys_per_split, num_keys, scale,
    HAS_Q_MASK: tl.constexpr, HAS_K_MASK: tl.constexpr, INTERPRETED: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """Write what the norms of one head's text tokens need of one range of keys."""
    MODE: tl.constexpr = STATIC.mode
    BLOCK_N: tl.constexpr = STATIC.block_queries
    begin = split * keys_per_split
    end = tl.minimum(begin + keys_per_split, num_keys)
    for start in range(0, text.num_queries, STATIC.block_queries):
        queries, rows, used = _load_queries(text, start, HAS_Q_MASK, STATIC)
        neutral_first, neutral_second = neutral_pair(MODE)
        first = tl.full([BLOCK_N], neutral_first, tl.float32)
        second = tl.full([BLOCK_N], neutral_second, tl.float32)
        # a tile of the text in which no token counts sees no keys
        some_count = tl.max(used.to(tl.int32), 0)
        for key in range(begin, tl.where(some_count > 0, end, begin), STATIC.block_keys):
            tile, _, candidate = _load_keys(keys, k_mask, key, end, HAS_K_MASK, STATIC)
            c = _products(queries, tile, scale, INTERPRETED)
            tile_first, tile_second = pair_of_tile(tl.trans(c), candidate[:, None], MODE)
            first, second = merge(first, second, tile_first, tile_second, MODE)
        place = split * text.num_queries + rows
        tl.store(pairs.first_ptr + place, first, mask=rows < text.num_queries)
        tl.store(pairs.second_ptr + place, second, mask=rows < text.num_queries)


@triton.jit
def _pairs_of(pairs, rows, used, num_queries, STATIC: tl.constexpr):
    """Merge the pairs of all ranges of keys to one for each of some text tokens."""
    neutral_first, neutral_second = neutral_pair(STATIC.mode)
    splits = tl.arange(0, STATIC.block_splits)
    places = splits[None, :] * num_queries + rows[:, None]
    inside = used[:, None] & (splits < pairs.num_splits)[None, :]
    first = tl.load(pairs.first_ptr + places, mask=inside, other=neutral_first, cache_modifier=".cg")
    second = tl.load(pairs.second_ptr + places, mask=inside, other=neutral_second, cache_modifier=".cg")
    return reduce_pairs(first, second, STATIC.mode)


@triton.jit
def _peaks(
    text, tile, pairs, scale,
    HAS_Q_MASK: tl.constexpr, INTERPRETED: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """Return `max_n norm(q[n] . k)` of one head for a tile of keys, `[BLOCK_M]`; 0 without text."""
    BLOCK_M: tl.constexpr = STATIC.block_keys
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for start in range(0, text.num_queries, STATIC.block_queries):
        queries, rows, used = _load_queries(text, start, HAS_Q_MASK, STATIC)
        if tl.max(used.to(tl.int32), 0) > 0:
            c = _products(queries, tile, scale, INTERPRETED)
            if STATIC.mode != NO_NORM:
                first, second = _pairs_of(pairs, rows, used, text.num_queries, STATIC)
                c = normalized(c, first, second, STATIC.mode)
            peak = tl.maximum(peak, tl.max(tl.where(used[:, None], c, float("-inf")), 0))
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit(do_not_specialize=_VARYING)
def _score_peaks_kernel(
    tensors, strides, memory, outputs,
    q_mask_ptr, k_mask_ptr, q_mask_stride_b, q_mask_stride_n, k_mask_stride_b, k_mask_stride_m,
    q_stride_b: tl.int64, q_stride_h: tl.int64, k_stride_b: tl.int64, k_stride_h: tl.int64,
    batch, num_heads, num_heads_per_group, num_queries, num_keys,
    num_splits, keys_per_split, num_tiles, parts_per_group, heads_per_part, scale,
    HAS_Q_MASK: tl.constexpr, HAS_K_MASK: tl.constexpr, INTERPRETED: tl.constexpr,
    STRIDE_UNIT: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    # Named, because Triton 3.6 takes a nested tuple that is passed on unnamed for a tuple of values.
    FINISH: tl.constexpr = STATIC.finish
    BLOCK_M: tl.constexpr = STATIC.block_keys
    ticket = draw_ticket(memory.counters)
    pairs_of_row = num_heads * num_splits
    num_pairing = 0 if STATIC.mode == NO_NORM else batch * pairs_of_row
    num_parts = (num_heads // num_heads_per_group) * parts_per_group
    first_summing = num_pairing + batch * num_parts * num_tiles

    # First and second numbers of the pairs, then partial sums over heads: `make_plan` adds them up alike.
    num_pairs = tl.cast(num_pairing, tl.int64) * num_queries
    c_ptr = memory.floats + 2 * num_pairs

    w = Vector(tensors.w, strides.w)
    q_mask = Matrix(q_mask_ptr, q_mask_stride_b, q_mask_stride_n)
    k_mask = Matrix(k_mask_ptr, k_mask_stride_b, k_mask_stride_m)
    if ticket < num_pairing:
        split = ticket % num_splits
        head = (ticket // num_splits) % num_heads
        row = ticket // pairs_of_row
        wide_row, wide_head = row.to(tl.int64), head.to(tl.int64)
        q_ptr = tensors.q + (wide_row * q_stride_b + wide_head * q_stride_h) * STRIDE_UNIT
        k_ptr = tensors.k + (wide_row * k_stride_b + (wide_head // num_heads_per_group) * k_stride_h) * STRIDE_UNIT
        first_ptr = memory.floats + (wide_row * num_heads + head) * num_splits * num_queries
        _find_pairs(
            Text(Matrix(q_ptr, strides.q_n, strides.q_d), row_of(q_mask, row), num_queries),
            Matrix(k_ptr, strides.k_m, strides.k_d), row_of(k_mask, row),
            Pairs(first_ptr, first_ptr + num_pairs, num_splits),
            split, keys_per_split, num_keys, scale, HAS_Q_MASK, HAS_K_MASK, INTERPRETED, STATIC,
        )  # fmt: skip
        arrive(counters_of_row(memory.counters, row) + _PAIRS)
    elif ticket < first_summing:
        index = ticket - num_pairing
        tile_index = index % num_tiles
        part = (index // num_tiles) % num_parts
        row = index // (num_tiles * num_parts)
        wide_row = row.to(tl.int64)
        group = part // parts_per_group
        first_head = (part % parts_per_group) * heads_per_part
        stop_head = tl.minimum(first_head + heads_per_part, num_heads_per_group)
        k_ptr = tensors.k + (wide_row * k_stride_b + group.to(tl.int64) * k_stride_h) * STRIDE_UNIT
        counters = counters_of_row(memory.counters, row)
        # The keys are on their way while this program waits for the norms.
        tile, columns, candidate = _load_keys(
            Matrix(k_ptr, strides.k_m, strides.k_d), row_of(k_mask, row), tile_index * STATIC.block_keys, num_keys,
            HAS_K_MASK, STATIC,
        )  # fmt: skip
        if STATIC.mode != NO_NORM:
            wait_for(counters + _PAIRS, pairs_of_row)
        total = tl.zeros([BLOCK_M], tl.float32)
        for head_in_group in range(first_head, stop_head):
            head = tl.cast(group * num_heads_per_group + head_in_group, tl.int64)
            q_ptr = tensors.q + (wide_row * q_stride_b + head * q_stride_h) * STRIDE_UNIT
            first_ptr = memory.floats + (wide_row * num_heads + head) * num_splits * num_queries
            peak = _peaks(
                Text(Matrix(q_ptr, strides.q_n, strides.q_d), row_of(q_mask, row), num_queries), tile,
                Pairs(first_ptr, first_ptr + num_pairs, num_splits), scale, HAS_Q_MASK, INTERPRETED, STATIC,
            )  # fmt: skip
            total += tl.load(w.ptr + head * w.stride).to(tl.float32) * peak
        tl.store(c_ptr + (wide_row * num_parts + part) * num_keys + columns, total, mask=candidate)
        arrive(counters + _LOGITS)
    else:
        sum_and_select(
            ticket - first_summing, batch, num_keys, 0,
            Logits(c_ptr, c_ptr, num_parts, num_tiles, num_parts * num_tiles), w, k_mask,
            Budget(1, 1, 0), outputs, memory, _LOGITS,
            NO_NORM, HAS_K_MASK, False, False, FINISH,
        )  # fmt: skip


@lru_cache(maxsize=4096)
def make_plan(
    batch: int,
    num_heads: int,
    num_key_value_heads: int,
    num_queries: int,
    num_keys: int,
    head_dim: int,
    itemsize: int,
    normalize: str | None,
    programs: int = _PROGRAMS,
) -> Plan:
    """Make the plan of a launch; the same shape always adds in the same order."""
    group_size = num_heads // num_key_value_heads
    block_d = max(16, triton.next_power_of_2(head_dim))
    is_wide = block_d * itemsize >= _WIDE_BYTES
    # float32 products run without tensor cores, and larger tiles of them spill, as do those of wide rows
    block_n, block_m = (16, 32) if itemsize == 4 or is_wide or num_queries <= 16 else (32, 64)
    num_tiles = triton.cdiv(num_keys, block_m)
    splits = min(num_tiles, _MOST_SPLITS, triton.cdiv(programs, batch * num_heads))
    keys_per_split = triton.cdiv(num_tiles, splits) * block_m
    num_splits = triton.cdiv(num_keys, keys_per_split)
    parts_wanted = min(group_size, triton.cdiv(programs, batch * num_key_value_heads * num_tiles))
    heads_per_part = triton.cdiv(group_size, parts_wanted)
    parts_per_group = triton.cdiv(group_size, heads_per_part)

    num_parts = num_key_value_heads * parts_per_group
    num_pairing = 0 if normalize is None else batch * num_heads * num_splits
    num_programs = num_pairing + batch * num_parts * num_tiles
    num_programs += batch * finish.num_programs(num_keys, _SUM_BLOCK, selects=False)
    check_limits(num_programs, num_keys, 2 * num_pairing * num_queries, batch)
    return Plan(
        grid=(num_programs,),
        num_floats=2 * num_pairing * num_queries + batch * num_parts * num_keys,
        num_words=0,
        sizes=(
            batch,
            num_heads,
            group_size,
            num_queries,
            num_keys,
            num_splits,
            keys_per_split,
            num_tiles,
            parts_per_group,
            heads_per_part,
        ),
        static=Static(
            head_dim=head_dim,
            mode=MODES[normalize],
            block_queries=block_n,
            block_keys=block_m,
            block_dims=block_d,
            block_splits=_MOST_SPLITS,
            # nothing is selected, so the length of a row changes nothing
            finish=finish.blocks_of(1, _SUM_BLOCK),
        ),
        options=compiler_options(8 if is_wide and itemsize == 4 else 4, _MAX_REGISTERS),
    )


class PreparedCall(PreparedSelection):
    """A call of `score_peaks`."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        w: torch.Tensor,
        q_mask: torch.Tensor | None,
        k_mask: torch.Tensor | None,
        normalize: str | None,
        scale: float,
        batched: bool = True,
    ) -> None:
        """Prepare a call by validated `[B, H, N, D]` queries and `[B, Hkv, M, D]` keys.

        The arguments are those of the public function; the result has a batch axis if `batched`.
        """
        _, num_heads, num_queries, _ = q.shape
        batch, num_key_value_heads, num_keys, head_dim = k.shape
        super().__init__(k.device, batch, num_keys, None, "floor", batched)
        if self.is_empty:
            return
        is_interpreted = k.device.type == "cpu"
        plan = make_plan(
            batch, num_heads, num_key_value_heads, num_queries, num_keys, head_dim, k.element_size(), normalize,
            _PROGRAMS_INTERPRETED if is_interpreted else _PROGRAMS,
        )  # fmt: skip
        strides, varying, unit = layout_of(q, k, w, q_mask, k_mask)
        numbers = (*varying, *plan.sizes, scale)

        constants = {
            "HAS_Q_MASK": q_mask is not None,
            "HAS_K_MASK": k_mask is not None,
            "INTERPRETED": is_interpreted,
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
    ) -> torch.Tensor:
        """Return importance, `[B, M]` or `[M]`."""
        masks = q if q_mask is None else q_mask, k if k_mask is None else k_mask
        return self.run(_score_peaks_kernel, (q, k, w), masks).scores


def score_peaks(
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    q_mask: torch.Tensor | None,
    k_mask: torch.Tensor | None,
    normalize: str | None,
    scale: float,
) -> torch.Tensor:
    """Compute importance `[B, M]` float32 of validated arguments in one launch, without a host sync."""
    return PreparedCall(q, k, w, q_mask, k_mask, normalize, scale)(q, k, w, q_mask, k_mask)
