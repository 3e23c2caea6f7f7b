"""From the hidden states before the first layer to kept tokens in one launch: neither queries nor keys are made.

With `h = x rms(x)^-1 gamma` the logits are `c = q . k = q . (W_k h + b_k)`, and the mean over text commutes with all
that is linear. So the normalised text is averaged first, the mean meets `W_q` once, and `W_k` and `gamma` are
folded into the mean query: `V = gamma W_k^T q`. A visual token then costs one product of its hidden state with `V`, and
its own `rms` as a factor behind it; its keys would cost `Hkv D / H` times as much.

Phases of the grid (see `phases`): sum parts of the text; its mean; queries; folding; logits of the visual tokens; and
those of `finish`. The folded queries are left in terms of the hidden states' dtype, as `exact_dot` splits them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from hawk_kernels.backends.kernels import finish
from hawk_kernels.backends.kernels.configs import HiddenConfig, hidden_config
from hawk_kernels.backends.kernels.exact_dot import exact_dot, product_of_terms, split_in_terms
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
from hawk_kernels.backends.kernels.score_and_select import HEADS_PER_PROGRAM, Plan
from hawk_kernels.backends.kernels.select_topk import keep_arguments
from hawk_kernels.layer import Layer
from hawk_kernels.selection import Selection, max_kept

# Rows of a batch that meet a tile of W_q together; tl.dot takes at least 16 columns.
ROWS_PER_PROJECTION = 16
# Heads that meet a tile of hidden states together.
_HEADS_PER_SCORING = 32
_MOST_TOKENS_OF_A_PART = 2048
_SUMS, _MEAN, _FOLDED, _LOGITS, _SCORES = (tl.constexpr(counter) for counter in range(5))
_QUERIES, _FOLDING = (tl.constexpr(counter) for counter in range(2))


@triton.jit
def _sum_text(
    x_ptr, q_mask_ptr, sums_ptr, counts_ptr, part, num_parts, chunk, num_tokens, stride_t, stride_c, mask_stride_t,
    epsilon, HIDDEN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Sum of the normalised hidden states of every `num_parts`-th token, as far as it is text, in some channels."""
    tokens = part + tl.arange(0, BLOCK_T) * num_parts
    used = tl.load(q_mask_ptr + tokens.to(tl.int64) * mask_stride_t, mask=tokens < num_tokens, other=0) != 0
    rank = tl.cumsum(used.to(tl.int32), 0)
    count = tl.sum(used.to(tl.int32), 0)
    channels = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C], tl.float32)
    for index in range(count):
        token = tl.sum(tl.where(used & (rank == index + 1), tokens, 0), 0).to(tl.int64)
        squares = tl.zeros([BLOCK_C], tl.float32)
        for start in range(0, HIDDEN, BLOCK_C):
            others = start + tl.arange(0, BLOCK_C)
            x = tl.load(x_ptr + token * stride_t + others.to(tl.int64) * stride_c, mask=others < HIDDEN, other=0.0)
            squares += x.to(tl.float32) * x.to(tl.float32)
        x = tl.load(x_ptr + token * stride_t + channels.to(tl.int64) * stride_c, mask=channels < HIDDEN, other=0.0)
        total += x.to(tl.float32) * tl.rsqrt(tl.sum(squares, 0) / HIDDEN + epsilon)
    tl.store(sums_ptr + part * HIDDEN + channels, total, mask=channels < HIDDEN)
    if chunk == 0:
        tl.store(counts_ptr + part, count.to(tl.float32))


@triton.jit
def _mean_text(
    sums_ptr, counts_ptr, norm_weight_ptr, mean_ptr, num_parts, chunk,
    HIDDEN: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Some channels of a row's mean text, NaN (which scores 0) where there is none."""
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
def _project_means(
    wq_ptr, bq_ptr, means_ptr, queries_ptr, counters_ptr, chunk, tile, batch, num_outputs, num_arrivals,
    stride_o, stride_c, bq_stride,
    HIDDEN: tl.constexpr, HAS_BIAS: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Some components of the mean queries of some rows: `W_q mean + b_q`."""
    outputs = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    output_inside = outputs < num_outputs
    rows = chunk * BLOCK_B + tl.arange(0, BLOCK_B)
    channels = tl.arange(0, BLOCK_C)
    weights_ptr = wq_ptr + outputs.to(tl.int64)[:, None] * stride_o + channels.to(tl.int64)[None, :] * stride_c
    # On their way while the means are waited for.
    weights = tl.load(weights_ptr, mask=output_inside[:, None] & (channels < HIDDEN)[None, :], other=0.0)
    for row in range(chunk * BLOCK_B, tl.minimum(batch, (chunk + 1) * BLOCK_B)):
        wait_for(counters_of_row(counters_ptr, row) + _MEAN, num_arrivals)
    product = tl.zeros([BLOCK_O, BLOCK_B], tl.float32)
    for start in range(0, HIDDEN, BLOCK_C):
        following = start + BLOCK_C + channels
        next_weights = tl.load(
            weights_ptr + tl.cast(start + BLOCK_C, tl.int64) * stride_c,
            mask=output_inside[:, None] & (following < HIDDEN)[None, :],
            other=0.0,
        )
        means = tl.load(
            means_ptr + rows[:, None] * HIDDEN + (start + channels)[None, :],
            mask=(rows < batch)[:, None] & (start + channels < HIDDEN)[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        product += exact_dot(weights, means, INTERPRETED)
        weights = next_weights
    if HAS_BIAS:
        bias = tl.load(bq_ptr + outputs.to(tl.int64) * bq_stride, mask=output_inside, other=0.0).to(tl.float32)
        product += bias[:, None]
    tl.store(
        queries_ptr + rows[None, :] * num_outputs + outputs[:, None],
        product,
        mask=(rows < batch)[None, :] & output_inside[:, None],
    )


@triton.jit
def _fold_keys(
    wk_ptr, bk_ptr, norm_weight_ptr, queries_ptr, terms_ptr, units_ptr, bias_ptr, chunk_counter_ptr, num_arrivals,
    part, chunk, num_heads, num_heads_per_group, num_chunks, term_stride, scale,
    stride_o, stride_c, bk_stride,
    HEAD_DIM: tl.constexpr, HIDDEN: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some channels of the folded queries `V [H, hidden]` of some heads of a row, and what `b_k` adds to each head."""
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
        outputs = (group * HEAD_DIM + dims).to(tl.int64)
        weights = tl.load(
            wk_ptr + outputs[None, :] * stride_o + channels.to(tl.int64)[:, None] * stride_c,
            mask=dim_inside[None, :] & inside[:, None],
            other=0.0,
        )
        queries = scale * tl.load(
            queries_ptr + heads[:, None] * HEAD_DIM + dims[None, :],
            mask=head_inside[:, None] & dim_inside[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        folded += exact_dot(weights, queries, INTERPRETED)
        if HAS_BIAS:
            bias = tl.load(bk_ptr + outputs * bk_stride, mask=dim_inside, other=0.0).to(tl.float32)
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


@triton.jit
def _load_states(x_ptr, tokens, candidate, start, stride_t, stride_c, HIDDEN: tl.constexpr, BLOCK_C: tl.constexpr):
    channels = start + tl.arange(0, BLOCK_C)
    return tl.load(
        x_ptr + tokens.to(tl.int64)[:, None] * stride_t + channels.to(tl.int64)[None, :] * stride_c,
        mask=candidate[:, None] & (channels < HIDDEN)[None, :],
        other=0.0,
    )


@triton.jit
def _score_states(
    x_ptr, k_mask_ptr, terms_ptr, units_ptr, bias_ptr, w_ptr, c_ptr, statistics_ptr, folded_counter_ptr, num_arrivals,
    part, tile, num_heads, num_tokens, num_tiles, tokens_per_program, num_chunks, term_stride,
    stride_t, stride_c, w_stride, mask_stride_t, epsilon,
    HIDDEN: tl.constexpr, MODE: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Logits of some tokens by some heads, and what their norms need; pointers are the row's.

    The chunks of channels are those of `_fold_keys`, whose units belong to a chunk.
    """
    heads = part * BLOCK_H + tl.arange(0, BLOCK_H)
    head_inside = heads < num_heads
    neutral_first, neutral_second = neutral_pair(MODE)
    first = tl.full([BLOCK_H], neutral_first, tl.float32)
    second = tl.full([BLOCK_H], neutral_second, tl.float32)
    weight = tl.load(w_ptr + heads.to(tl.int64) * w_stride, mask=head_inside, other=0.0).to(tl.float32)
    begin = tile * tokens_per_program
    end = tl.minimum(begin + tokens_per_program, num_tokens)
    is_folded = 0
    for block in range(begin, end, BLOCK_M):
        tokens = block + tl.arange(0, BLOCK_M)
        candidate = load_candidates(k_mask_ptr, tokens, end, mask_stride_t, True)
        if tl.sum(candidate.to(tl.int32), 0) > 0:
            states = _load_states(x_ptr, tokens, candidate, 0, stride_t, stride_c, HIDDEN, BLOCK_C)
            if is_folded == 0:
                wait_for(folded_counter_ptr, num_arrivals)
                is_folded = 1
            product = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
            squares = tl.zeros([BLOCK_M], tl.float32)
            for chunk in range(num_chunks):
                following = _load_states(
                    x_ptr, tokens, candidate, (chunk + 1) * BLOCK_C, stride_t, stride_c, HIDDEN, BLOCK_C
                )
                channels = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
                product += product_of_terms(
                    states, terms_ptr + heads[:, None] * HIDDEN + channels[None, :], term_stride,
                    units_ptr + heads * num_chunks + chunk, head_inside, channels < HIDDEN, INTERPRETED,
                )  # fmt: skip
                squares += tl.sum(states.to(tl.float32) * states.to(tl.float32), 1)
                states = following
            bias = tl.load(bias_ptr + heads, mask=head_inside, other=0.0, cache_modifier=".cg")
            c = product * tl.rsqrt(squares / HIDDEN + epsilon)[:, None] + bias[None, :]
            c = tl.where(tl.abs(c) < float("inf"), c, 0.0)
            if MODE == NO_NORM:
                partial = tl.sum(tl.where(head_inside[None, :], c * weight[None, :], 0.0), 1)
                tl.store(c_ptr + part.to(tl.int64) * num_tokens + tokens, partial, mask=candidate)
            else:
                offsets = heads.to(tl.int64)[None, :] * num_tokens + tokens[:, None]
                tl.store(c_ptr + offsets, c, mask=candidate[:, None] & head_inside[None, :])
                tile_first, tile_second = pair_of_tile(c, candidate[:, None], MODE)
                first, second = merge(first, second, tile_first, tile_second, MODE)
    if MODE != NO_NORM:
        pair = statistics_ptr + (heads * num_tiles + tile) * 2
        tl.store(pair, first, mask=head_inside)
        tl.store(pair + 1, second, mask=head_inside)
    if is_folded == 0:
        # Also where there is nothing to score: a row that nobody waits for would be left while some still arrive.
        wait_for(folded_counter_ptr, num_arrivals)


@triton.jit
def _score_hidden_kernel(
    x_ptr, norm_weight_ptr, wq_ptr, bq_ptr, wk_ptr, bk_ptr, w_ptr, q_mask_ptr, k_mask_ptr,
    workspace_ptr, words_ptr, terms_ptr, counters_ptr, scores_ptr, mask_ptr, indices_ptr,
    x_stride_b, x_stride_t, x_stride_c, wq_stride_o, wq_stride_c, bq_stride, wk_stride_o, wk_stride_c, bk_stride,
    w_stride, q_mask_stride_b, q_mask_stride_t, k_mask_stride_b, k_mask_stride_t,
    batch, num_tokens, num_heads, num_heads_per_group, num_text_parts, num_fold_parts, num_parts, num_tiles,
    tokens_per_program, counts_offset, means_offset, queries_offset, units_offset, bias_offset, c_offset,
    statistics_offset, words_per_row, term_stride,
    width, numerator, denominator, budget, scale, epsilon,
    HIDDEN: tl.constexpr, HEAD_DIM: tl.constexpr, MODE: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr,
    HAS_QUERY_BIAS: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, SELECT: tl.constexpr, CEIL: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_TEXT: tl.constexpr, BLOCK_TEXT_C: tl.constexpr, BLOCK_MEAN_C: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_PROJECT_C: tl.constexpr,
    BLOCK_FOLD_H: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_SUM: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_ROW: tl.constexpr, NUM_BLOCKS: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    ticket = draw_ticket(counters_ptr)
    text_chunks: tl.constexpr = (HIDDEN + BLOCK_TEXT_C - 1) // BLOCK_TEXT_C
    mean_chunks: tl.constexpr = (HIDDEN + BLOCK_MEAN_C - 1) // BLOCK_MEAN_C
    num_chunks: tl.constexpr = (HIDDEN + BLOCK_C - 1) // BLOCK_C
    num_outputs = num_heads * HEAD_DIM
    projecting_tiles = tl.cdiv(num_outputs, BLOCK_O)
    num_groups = tl.cdiv(batch, BLOCK_B)
    sum_blocks = tl.cdiv(num_tokens, BLOCK_SUM)
    first_mean = batch * num_text_parts * text_chunks
    first_projecting = first_mean + batch * mean_chunks
    first_folding = first_projecting + num_groups * projecting_tiles
    first_scoring = first_folding + batch * num_fold_parts * num_chunks
    first_summing = first_scoring + batch * num_parts * num_tiles
    first_selecting = first_summing + batch * sum_blocks

    counts_ptr = workspace_ptr + counts_offset
    means_ptr = workspace_ptr + means_offset
    queries_ptr = workspace_ptr + queries_offset
    units_ptr = workspace_ptr + units_offset
    bias_ptr = workspace_ptr + bias_offset
    c_rows = num_parts if MODE == NO_NORM else num_heads
    if ticket < first_mean:
        chunk = ticket % text_chunks
        part = (ticket // text_chunks) % num_text_parts
        row = ticket // (text_chunks * num_text_parts)
        wide_row = row.to(tl.int64)
        # nested, because Triton takes the outer condition at compile time
        if SELECT and not IN_REGISTERS:  # noqa: SIM102
            if (chunk == 0) & (part == 0):
                clear_histograms(words_ptr + wide_row * words_per_row)
        _sum_text(
            x_ptr + wide_row * x_stride_b, q_mask_ptr + wide_row * q_mask_stride_b,
            workspace_ptr + row * num_text_parts * HIDDEN, counts_ptr + row * num_text_parts,
            part, num_text_parts, chunk, num_tokens, x_stride_t, x_stride_c, q_mask_stride_t, epsilon,
            HIDDEN, BLOCK_TEXT_C, BLOCK_TEXT,
        )  # fmt: skip
        arrive(counters_of_row(counters_ptr, row) + _SUMS)
    elif ticket < first_projecting:
        index = ticket - first_mean
        row = index // mean_chunks
        counters = counters_of_row(counters_ptr, row)
        wait_for(counters + _SUMS, num_text_parts * text_chunks)
        _mean_text(
            workspace_ptr + row * num_text_parts * HIDDEN, counts_ptr + row * num_text_parts, norm_weight_ptr,
            means_ptr + row * HIDDEN, num_text_parts, index % mean_chunks,
            HIDDEN, HAS_NORM_WEIGHT, BLOCK_MEAN_C, BLOCK_P,
        )  # fmt: skip
        arrive(counters + _MEAN)
    elif ticket < first_folding:
        index = ticket - first_projecting
        group = index // projecting_tiles
        _project_means(
            wq_ptr, bq_ptr, means_ptr, queries_ptr, counters_ptr, group, index % projecting_tiles, batch, num_outputs,
            mean_chunks, wq_stride_o, wq_stride_c, bq_stride,
            HIDDEN, HAS_QUERY_BIAS, INTERPRETED, BLOCK_O, BLOCK_B, BLOCK_PROJECT_C,
        )  # fmt: skip
        arrive(counters_of_row(counters_ptr, batch + group) + _QUERIES)
    elif ticket < first_scoring:
        index = ticket - first_folding
        chunk = index % num_chunks
        part = (index // num_chunks) % num_fold_parts
        row = index // (num_chunks * num_fold_parts)
        group = row // BLOCK_B
        group_counters = counters_of_row(counters_ptr, batch + group)
        _fold_keys(
            wk_ptr, bk_ptr, norm_weight_ptr, queries_ptr + row * num_outputs, terms_ptr + row * num_heads * HIDDEN,
            units_ptr + row * num_heads * num_chunks, bias_ptr + row * num_heads,
            group_counters + _QUERIES, projecting_tiles,
            part, chunk, num_heads, num_heads_per_group, num_chunks, term_stride, scale,
            wk_stride_o, wk_stride_c, bk_stride,
            HEAD_DIM, HIDDEN, HAS_NORM_WEIGHT, HAS_KEY_BIAS, INTERPRETED, BLOCK_FOLD_H, BLOCK_C, BLOCK_D,
        )  # fmt: skip
        arrive(counters_of_row(counters_ptr, row) + _FOLDED)
        # Whoever waits for the queries of a group of rows has passed here.
        rows_of_group = tl.minimum(batch - group * BLOCK_B, BLOCK_B)
        leave_row(group_counters, group_counters + _FOLDING, rows_of_group * num_fold_parts * num_chunks)
    elif ticket < first_summing:
        index = ticket - first_scoring
        tile = index % num_tiles
        part = (index // num_tiles) % num_parts
        row = index // (num_tiles * num_parts)
        counters = counters_of_row(counters_ptr, row)
        wide_row = row.to(tl.int64)
        _score_states(
            x_ptr + wide_row * x_stride_b, k_mask_ptr + wide_row * k_mask_stride_b,
            terms_ptr + row * num_heads * HIDDEN, units_ptr + row * num_heads * num_chunks, bias_ptr + row * num_heads,
            w_ptr, workspace_ptr + c_offset + wide_row * c_rows * num_tokens,
            workspace_ptr + statistics_offset + wide_row * num_heads * num_tiles * 2,
            counters + _FOLDED, num_fold_parts * num_chunks,
            part, tile, num_heads, num_tokens, num_tiles, tokens_per_program, num_chunks, term_stride,
            x_stride_t, x_stride_c, w_stride, k_mask_stride_t, epsilon,
            HIDDEN, MODE, INTERPRETED, BLOCK_H, BLOCK_M, BLOCK_C,
        )  # fmt: skip
        arrive(counters + _LOGITS)
    elif ticket < first_selecting:
        index = ticket - first_summing
        row = index // sum_blocks
        counters = counters_of_row(counters_ptr, row)
        wide_row = row.to(tl.int64)
        sum_heads(
            index % sum_blocks, workspace_ptr + c_offset + wide_row * c_rows * num_tokens,
            workspace_ptr + statistics_offset + wide_row * num_heads * num_tiles * 2, w_ptr,
            k_mask_ptr + wide_row * k_mask_stride_b, scores_ptr + wide_row * num_tokens,
            words_ptr + wide_row * words_per_row, counters + _LOGITS, num_parts * num_tiles,
            c_rows, num_tiles, num_tokens, w_stride, k_mask_stride_t,
            MODE, True, SELECT and not IN_REGISTERS, BLOCK_SUM, BLOCK_HEADS, BLOCK_T,
        )  # fmt: skip
        if SELECT:
            arrive(counters + _SCORES)
        else:
            leave_row(counters, counters + _SCORES, sum_blocks)
    else:
        if SELECT:
            index = ticket - first_selecting
            blocks = tl.cdiv(num_tokens, BLOCK_ROW)
            row = (index // blocks) % batch
            counters = counters_of_row(counters_ptr, row)
            wide_row = row.to(tl.int64)
            select(
                index // (blocks * batch), index % blocks, scores_ptr + wide_row * num_tokens,
                k_mask_ptr + wide_row * k_mask_stride_b, mask_ptr + wide_row * num_tokens,
                indices_ptr + wide_row * width, words_ptr + wide_row * words_per_row,
                counters, counters + _SCORES, sum_blocks,
                num_tokens, width, numerator, denominator, budget, k_mask_stride_t,
                True, CEIL, IN_REGISTERS, BLOCK_ROW, NUM_BLOCKS,
            )  # fmt: skip


@lru_cache(maxsize=4096)
def make_plan(
    batch: int,
    num_tokens: int,
    hidden_size: int,
    num_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    normalize: str | None,
    selects: bool,
    config: HiddenConfig,
) -> Plan:
    """Grid, workspace and constants; the same shape always adds in the same order."""
    group_size = num_heads // num_key_value_heads
    text_parts = min(num_tokens, max(config.text_parts, triton.cdiv(num_tokens, _MOST_TOKENS_OF_A_PART)))
    fold_parts = num_key_value_heads * triton.cdiv(group_size, HEADS_PER_PROGRAM)
    block_heads = min(_HEADS_PER_SCORING, max(16, triton.next_power_of_2(num_heads)))
    num_parts = triton.cdiv(num_heads, block_heads)
    tiles_wanted = max(1, config.num_programs // (batch * num_parts))
    tokens_per_program = triton.cdiv(triton.cdiv(num_tokens, tiles_wanted), config.block_tokens) * config.block_tokens
    num_tiles = triton.cdiv(num_tokens, tokens_per_program)
    chunks = triton.cdiv(hidden_size, config.block_channels)
    num_c_rows = num_parts if normalize is None else num_heads

    counts = batch * text_parts * hidden_size
    means = counts + batch * text_parts
    queries = means + batch * hidden_size
    units = queries + batch * num_heads * head_dim
    bias = units + batch * num_heads * chunks
    c = bias + batch * num_heads
    statistics = c + batch * num_c_rows * num_tokens

    blocks = finish.num_blocks(num_tokens)
    num_programs = batch * text_parts * triton.cdiv(hidden_size, config.text_channels)
    num_programs += batch * triton.cdiv(hidden_size, config.mean_channels)
    num_programs += triton.cdiv(batch, ROWS_PER_PROJECTION) * triton.cdiv(num_heads * head_dim, config.block_outputs)
    num_programs += batch * (fold_parts * chunks + num_parts * num_tiles + triton.cdiv(num_tokens, config.sum_block))
    if selects:
        num_programs += batch * blocks * finish.num_selecting_phases(num_tokens)
    words_per_row = finish.num_histogram_words(num_tokens) if selects else 0
    check_limits(num_programs, num_tokens, max(c, 3 * batch * num_heads * hidden_size))
    return Plan(
        grid=(num_programs,),
        num_floats=statistics + (0 if normalize is None else batch * num_heads * num_tiles * 2),
        num_words=batch * words_per_row,
        sizes=(
            batch,
            num_tokens,
            num_heads,
            group_size,
            text_parts,
            fold_parts,
            num_parts,
            num_tiles,
            tokens_per_program,
            counts,
            means,
            queries,
            units,
            bias,
            c,
            statistics,
            words_per_row,
            batch * num_heads * hidden_size,
        ),
        constants={
            "HIDDEN": hidden_size,
            "HEAD_DIM": head_dim,
            "MODE": MODES[normalize],
            "SELECT": selects,
            "BLOCK_TEXT": triton.next_power_of_2(triton.cdiv(num_tokens, text_parts)),
            "BLOCK_TEXT_C": config.text_channels,
            "BLOCK_MEAN_C": config.mean_channels,
            "BLOCK_P": 16,
            "BLOCK_O": config.block_outputs,
            "BLOCK_B": ROWS_PER_PROJECTION,
            "BLOCK_PROJECT_C": config.project_channels,
            "BLOCK_FOLD_H": HEADS_PER_PROGRAM,
            "BLOCK_D": config.fold_dims,
            "BLOCK_H": block_heads,
            "BLOCK_M": config.block_tokens,
            "BLOCK_C": config.block_channels,
            "BLOCK_SUM": config.sum_block,
            "BLOCK_HEADS": finish.HEAD_BLOCK,
            "BLOCK_T": finish.TILE_BLOCK,
            "BLOCK_ROW": finish.row_block(num_tokens),
            "NUM_BLOCKS": triton.next_power_of_2(blocks),
            "IN_REGISTERS": num_tokens <= finish.MAX_ROW_IN_REGISTERS,
        },
        options=compiler_options(config.num_warps, config.max_registers),
    )


def score_hidden_and_select(
    x: torch.Tensor,
    layer: Layer,
    w: torch.Tensor,
    r: float | int,
    q_mask: torch.Tensor,
    k_mask: torch.Tensor,
    normalize: str | None,
    scale: float,
    rounding: str,
    config: HiddenConfig | None = None,
) -> Selection:
    """Selection by validated hidden states `[B, T, C]`, in one launch, by default the table's."""
    batch, num_tokens = x.shape[:2]
    selection = Selection(
        torch.empty((batch, num_tokens), dtype=torch.bool, device=x.device),
        torch.empty((batch, max_kept(r, num_tokens, rounding)), dtype=torch.int64, device=x.device),
        torch.empty((batch, num_tokens), dtype=torch.float32, device=x.device),
    )
    if batch and num_tokens:
        keep, ceil = keep_arguments(r, rounding), rounding == "ceil"
        _launch(x, layer, w, q_mask, k_mask, normalize, scale, selection, True, keep, ceil, config)
    return selection


def score_hidden(
    x: torch.Tensor,
    layer: Layer,
    w: torch.Tensor,
    q_mask: torch.Tensor,
    k_mask: torch.Tensor,
    normalize: str | None,
    scale: float,
) -> torch.Tensor:
    """Importance `[B, T]` float32 by validated hidden states, in one launch."""
    scores = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    if scores.numel():
        nothing = Selection(scores, scores, scores)
        _launch(x, layer, w, q_mask, k_mask, normalize, scale, nothing, False, (1, 1, 0), False, None)
    return scores


def _launch(
    x: torch.Tensor,
    layer: Layer,
    w: torch.Tensor,
    q_mask: torch.Tensor,
    k_mask: torch.Tensor,
    normalize: str | None,
    scale: float,
    selection: Selection,
    selects: bool,
    keep: tuple[int, int, int],
    ceil: bool,
    config: HiddenConfig | None,
) -> None:
    norm_weight, norm_eps, wq, bq, wk, bk, _ = layer
    batch, num_tokens, hidden_size = x.shape
    num_heads = w.shape[0]
    head_dim = wq.shape[0] // num_heads
    num_key_value_heads = wk.shape[0] // head_dim
    shape = (batch, num_tokens, hidden_size, num_heads, num_key_value_heads, head_dim, normalize, selects)
    plan = _plan(x.device, x.dtype, *shape) if config is None else make_plan(*shape, config)
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    num_terms = 1 if x.dtype == torch.float32 else 3
    mask, indices, scores = selection
    with on_device(x.device):
        floats, words = workspace(plan.num_floats, plan.num_words, x.device)
        terms = torch.empty(num_terms * batch * num_heads * hidden_size, dtype=x.dtype, device=x.device)
        counters = launch_counters(num_counters(batch + triton.cdiv(batch, ROWS_PER_PROJECTION)), x.device)
        _score_hidden_kernel[plan.grid](
            x, x if norm_weight is None else norm_weight, wq, wq if bq is None else bq, wk, wk if bk is None else bk,
            w, q_mask, k_mask, floats, words, terms, counters, scores, mask, indices,
            *x.stride(), *wq.stride(), 0 if bq is None else bq.stride(0), *wk.stride(),
            0 if bk is None else bk.stride(0), w.stride(0), *q_mask.stride(), *k_mask.stride(),
            *plan.sizes, indices.shape[-1], *keep, scale, norm_eps,
            HAS_NORM_WEIGHT=norm_weight is not None, HAS_QUERY_BIAS=bq is not None, HAS_KEY_BIAS=bk is not None,
            CEIL=ceil, INTERPRETED=x.device.type == "cpu", **plan.constants, **plan.options,
        )  # fmt: skip


@lru_cache(maxsize=4096)
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    num_tokens: int,
    hidden_size: int,
    num_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    normalize: str | None,
    selects: bool,
) -> Plan:
    config = hidden_config(device, dtype, batch, num_tokens, hidden_size)
    shape = (batch, num_tokens, hidden_size, num_heads, num_key_value_heads, head_dim)
    return make_plan(*shape, normalize, selects, config)
