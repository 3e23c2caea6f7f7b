"""Turns the text before the first layer into queries for hidden states: the first four phases of `score_hidden`.

The phases sum parts of the text, take its mean, project it, and fold the key projection into it. Each function here is
a program of one of these phases.
"""

import triton
import triton.language as tl

from hawk_kernels.backends.kernels.exact_dot import exact_dot, split_in_terms
from hawk_kernels.backends.kernels.phases import counters_of_row, wait_for
from hawk_kernels.backends.kernels.radix import load_candidates
from hawk_kernels.backends.kernels.views import load_tile, load_vector, row_of


@triton.jit
def sum_text(
    x, q_mask, sums_ptr, counts_ptr, part, num_parts, chunk, num_tokens, epsilon,
    HIDDEN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Sum some channels of the normalised hidden states of every `num_parts`-th token, as far as it is text.

    `x` is the row's `[T, C]`, `q_mask` its mask of text.
    """
    channels = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C], tl.float32)
    counted = part * 0
    for first in range(part, num_tokens, BLOCK_T * num_parts):
        tokens = first + tl.arange(0, BLOCK_T) * num_parts
        used = load_candidates(q_mask, tokens, num_tokens, True)
        rank = tl.cumsum(used.to(tl.int32), 0)
        count = tl.sum(used.to(tl.int32), 0)
        for index in range(count):
            token = tl.sum(tl.where(used & (rank == index + 1), tokens, 0), 0)
            states = row_of(x, token)
            squares = tl.zeros([BLOCK_C], tl.float32)
            for start in range(0, HIDDEN, BLOCK_C):
                others = start + tl.arange(0, BLOCK_C)
                values = load_vector(states, others, others < HIDDEN).to(tl.float32)
                squares += values * values
            values = load_vector(states, channels, channels < HIDDEN).to(tl.float32)
            total += values * tl.rsqrt(tl.sum(squares, 0) / HIDDEN + epsilon)
        counted += count
    tl.store(sums_ptr + part * HIDDEN + channels, total, mask=channels < HIDDEN)
    if chunk == 0:
        tl.store(counts_ptr + part, counted.to(tl.float32))


@triton.jit
def mean_text(
    sums_ptr, counts_ptr, norm_weight_ptr, mean_ptr, num_parts, chunk,
    HIDDEN: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write some channels of a row's mean text; without text they are NaN, which scores 0."""
    channels = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channels < HIDDEN
    total = tl.zeros([BLOCK_C], tl.float32)
    counted = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, num_parts, BLOCK_P):
        parts = start + tl.arange(0, BLOCK_P)
        part_inside = parts < num_parts
        counted += tl.load(counts_ptr + parts, mask=part_inside, other=0.0, cache_modifier=".cg")
        sums = tl.load(
            sums_ptr + parts[:, None] * HIDDEN + channels[None, :],
            mask=part_inside[:, None] & inside[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        total += tl.sum(sums, 0)
    count = tl.sum(counted, 0)
    mean = tl.where(count > 0, total / tl.maximum(count, 1.0), float("nan"))
    if HAS_NORM_WEIGHT:
        mean *= tl.load(norm_weight_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(mean_ptr + channels, mean, mask=inside)


@triton.jit
def project_means(
    wq, bq, means_ptr, queries_ptr, counters_ptr, chunk, tile, batch, num_outputs, num_arrivals,
    MEAN: tl.constexpr, HIDDEN: tl.constexpr, HAS_BIAS: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write some components of the mean queries of some rows, `W_q mean + b_q`.

    MEAN is the counter of a row that the programs of its mean arrive at.
    """
    outputs = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    output_inside = outputs < num_outputs
    rows = chunk * BLOCK_B + tl.arange(0, BLOCK_B)
    channels = tl.arange(0, BLOCK_C)
    # The first weights are on their way while this program waits for the means.
    weights = load_tile(wq, outputs, channels, output_inside[:, None] & (channels < HIDDEN)[None, :])
    for row in range(chunk * BLOCK_B, tl.minimum(batch, (chunk + 1) * BLOCK_B)):
        wait_for(counters_of_row(counters_ptr, row) + MEAN, num_arrivals)
    product = tl.zeros([BLOCK_O, BLOCK_B], tl.float32)
    for start in range(0, HIDDEN, BLOCK_C):
        following = start + BLOCK_C + channels
        next_weights = load_tile(wq, outputs, following, output_inside[:, None] & (following < HIDDEN)[None, :])
        means = tl.load(
            means_ptr + rows[:, None] * HIDDEN + (start + channels)[None, :],
            mask=(rows < batch)[:, None] & (start + channels < HIDDEN)[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        product += exact_dot(weights, means, INTERPRETED)
        weights = next_weights
    if HAS_BIAS:
        product += load_vector(bq, outputs, output_inside).to(tl.float32)[:, None]
    tl.store(
        queries_ptr + rows[None, :] * num_outputs + outputs[:, None],
        product,
        mask=(rows < batch)[None, :] & output_inside[:, None],
    )


@triton.jit
def fold_keys(
    wk, bk, norm_weight_ptr, queries_ptr, terms_ptr, units_ptr, bias_ptr, chunk_counter_ptr, num_arrivals,
    part, chunk, num_heads_per_group, num_chunks, term_stride, scale,
    HEAD_DIM: tl.constexpr, HIDDEN: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write some channels of the folded queries `V [H, C]` of some heads of a row, and what `b_k` adds to each head.

    `wk` is the transposed key projection, `[C, Hkv D]`.
    """
    parts_per_group = tl.cdiv(num_heads_per_group, BLOCK_H)
    group = part // parts_per_group
    heads_in_group = (part % parts_per_group) * BLOCK_H + tl.arange(0, BLOCK_H)
    head_inside = heads_in_group < num_heads_per_group
    heads = group * num_heads_per_group + heads_in_group
    channels = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channels < HIDDEN
    wait_for(chunk_counter_ptr, num_arrivals)
    folded = tl.zeros([BLOCK_C, BLOCK_H], tl.float32)
    offset = tl.zeros([BLOCK_H], tl.float32)
    for start in range(0, HEAD_DIM, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        dim_inside = dims < HEAD_DIM
        outputs = group * HEAD_DIM + dims
        weights = load_tile(wk, channels, outputs, dim_inside[None, :] & inside[:, None])
        queries = scale * tl.load(
            queries_ptr + heads[:, None] * HEAD_DIM + dims[None, :],
            mask=head_inside[:, None] & dim_inside[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        folded += exact_dot(weights, queries, INTERPRETED)
        if HAS_BIAS:
            bias = load_vector(bk, outputs, dim_inside).to(tl.float32)
            offset += tl.sum(queries * bias[None, :], 1)
    if HAS_NORM_WEIGHT:
        folded *= tl.load(norm_weight_ptr + channels, mask=inside, other=0.0).to(tl.float32)[:, None]
    unit, high, middle, low = split_in_terms(folded, terms_ptr.dtype.element_ty)
    place = heads[None, :] * HIDDEN + channels[:, None]
    stored = inside[:, None] & head_inside[None, :]
    tl.store(terms_ptr + place, high, mask=stored)
    if terms_ptr.dtype.element_ty != tl.float32:
        tl.store(terms_ptr + term_stride + place, middle, mask=stored)
        tl.store(terms_ptr + 2 * term_stride + place, low, mask=stored)
        tl.store(units_ptr + heads * num_chunks + chunk, unit, mask=head_inside)
    if chunk == 0:
        tl.store(bias_ptr + heads, offset, mask=head_inside)
