"""Scores the hidden states before the first layer and selects in one launch, without making their queries or keys.

With `h = x rms(x)^-1 gamma` the logits are `c = q . k = q . (W_k h + b_k)`, and the mean over text commutes with all
that is linear. So the normalised text is averaged first, the mean meets `W_q` once, and `W_k` and `gamma` are folded
into the mean query: `V = gamma W_k^T q`. A visual token then costs one product of its hidden state with `V`, times its
own `rms` afterwards; its keys would cost `Hkv D / H` times as much.

The grid has these phases (see `phases`): the four of `folded_queries`; logits of the visual tokens; and those of
`finish`. The folded queries are left in terms of the hidden states' dtype, as `exact_dot` splits them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from hawk_kernels.backends.kernels import finish
from hawk_kernels.backends.kernels.configs import HiddenConfig, hidden_config
from hawk_kernels.backends.kernels.exact_dot import product_of_terms
from hawk_kernels.backends.kernels.finish import Logits, Outputs, histograms_of_row, sum_and_select
from hawk_kernels.backends.kernels.folded_queries import fold_keys, mean_text, project_means, sum_text
from hawk_kernels.backends.kernels.head_norms import MODES, NO_NORM, merge, neutral_pair, pair_of_tile
from hawk_kernels.backends.kernels.launch import check_limits, compiler_options
from hawk_kernels.backends.kernels.phases import arrive, counters_of_row, draw_ticket, leave_row, wait_for
from hawk_kernels.backends.kernels.plan import HEADS_PER_PROGRAM, Plan
from hawk_kernels.backends.kernels.prepared import PreparedSelection
from hawk_kernels.backends.kernels.radix import Budget, clear_histograms, load_candidates
from hawk_kernels.backends.kernels.views import Matrix, Vector, load_tile, load_vector, row_of
from hawk_kernels.layer import Layer
from hawk_kernels.selection import Selection

# Rows of a batch that meet a tile of W_q together; tl.dot takes at least 16 columns.
ROWS_PER_PROJECTION = 16
# Heads that meet a tile of hidden states together.
_HEADS_PER_SCORING = 32
_MOST_TOKENS_OF_A_PART = 2048
_MEAN_BLOCK_PARTS = 16
# Tokens that a program of the text looks at together. With 64 parts a short row has at most 32 in each.
_TEXT_BLOCK_OF_SHORT_ROWS = 32
_TEXT_BLOCK_OF_LONG_ROWS = 256
# The counters of a row, then those of the group of rows whose means are projected together.
_SUMS, _MEAN, _FOLDED, _LOGITS = (tl.constexpr(counter) for counter in range(4))
_QUERIES, _FOLDING = (tl.constexpr(counter) for counter in range(2))
_VARYING = (
    "q_mask_ptr", "k_mask_ptr", "q_mask_stride_b", "q_mask_stride_t", "k_mask_stride_b", "k_mask_stride_t",
    "batch", "num_tokens", "num_text_parts", "num_tiles", "tokens_per_program",
    "width", "numerator", "denominator", "budget",
)  # fmt: skip


class Tensors(NamedTuple):
    """What a launch reads, as pointers, beside the masks, whose alignment varies; an absent weight is any pointer."""

    x: Any
    norm_weight: Any
    wq: Any
    bq: Any
    wk: Any
    bk: Any
    w: Any


class Strides(NamedTuple):
    """Strides that a model has, whatever the prompt; those that vary with it are arguments of their own."""

    x_t: Any
    x_c: Any
    wq_o: Any
    wq_c: Any
    bq: Any
    wk_o: Any
    wk_c: Any
    bk: Any
    w: Any


class Memory(NamedTuple):
    """What a launch works with, as pointers: `finish.Memory`, and the folded queries in terms."""

    floats: Any
    words: Any
    counters: Any
    terms: Any


class Static(NamedTuple):
    """What the kernel is compiled for, beside the options of a call."""

    hidden_size: int
    head_dim: int
    mode: int
    selects: bool
    block_text: int
    text_channels: int
    mean_channels: int
    block_parts: int
    block_outputs: int
    block_rows: int
    project_channels: int
    block_fold_heads: int
    fold_dims: int
    block_heads: int
    block_tokens: int
    block_channels: int
    finish: finish.Blocks


@triton.jit
def _load_states(x, tokens, candidate, start, STATIC: tl.constexpr):
    channels = start + tl.arange(0, STATIC.block_channels)
    return load_tile(x, tokens, channels, candidate[:, None] & (channels < STATIC.hidden_size)[None, :])


@triton.jit
def _score_states(
    x, k_mask, terms_ptr, units_ptr, bias_ptr, w, c_ptr, statistics_ptr, folded_counter_ptr, num_arrivals,
    part, tile, num_heads, num_tokens, num_tiles, tokens_per_program, num_chunks, term_stride, epsilon,
    INTERPRETED: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """Write logits of some tokens by some heads, and what their norms need; pointers are the row's.

    The chunks of channels are those of `fold_keys`, whose units belong to a chunk.
    """
    MODE: tl.constexpr = STATIC.mode
    HIDDEN: tl.constexpr = STATIC.hidden_size
    BLOCK_H: tl.constexpr = STATIC.block_heads
    BLOCK_M: tl.constexpr = STATIC.block_tokens
    BLOCK_C: tl.constexpr = STATIC.block_channels
    heads = part * BLOCK_H + tl.arange(0, BLOCK_H)
    head_inside = heads < num_heads
    neutral_first, neutral_second = neutral_pair(MODE)
    first = tl.full([BLOCK_H], neutral_first, tl.float32)
    second = tl.full([BLOCK_H], neutral_second, tl.float32)
    weight = load_vector(w, heads, head_inside).to(tl.float32)
    begin = tile * tokens_per_program
    end = tl.minimum(begin + tokens_per_program, num_tokens)
    is_folded = 0
    for block in range(begin, end, BLOCK_M):
        tokens = block + tl.arange(0, BLOCK_M)
        candidate = load_candidates(k_mask, tokens, end, True)
        if tl.sum(candidate.to(tl.int32), 0) > 0:
            states = _load_states(x, tokens, candidate, 0, STATIC)
            if is_folded == 0:
                wait_for(folded_counter_ptr, num_arrivals)
                is_folded = 1
            product = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
            squares = tl.zeros([BLOCK_M], tl.float32)
            for chunk in range(num_chunks):
                following = _load_states(x, tokens, candidate, (chunk + 1) * BLOCK_C, STATIC)
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
        # A tile without candidates waits too: the row could be left while some of its programs still arrive.
        wait_for(folded_counter_ptr, num_arrivals)


@triton.jit(do_not_specialize=_VARYING)
def _score_hidden_kernel(
    tensors, strides, memory, outputs,
    q_mask_ptr, k_mask_ptr, q_mask_stride_b, q_mask_stride_t, k_mask_stride_b, k_mask_stride_t, x_stride_b: tl.int64,
    batch, num_tokens, num_heads, num_heads_per_group, num_text_parts, num_tiles, tokens_per_program,
    width, numerator: tl.int64, denominator: tl.int64, budget, scale, epsilon,
    HAS_NORM_WEIGHT: tl.constexpr, HAS_QUERY_BIAS: tl.constexpr, HAS_KEY_BIAS: tl.constexpr,
    ROUNDING: tl.constexpr, INTERPRETED: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    ticket = draw_ticket(memory.counters)
    # Named, because Triton 3.6 takes a nested tuple that is passed on unnamed for a tuple of values.
    FINISH: tl.constexpr = STATIC.finish
    HIDDEN: tl.constexpr = STATIC.hidden_size
    BLOCK_B: tl.constexpr = STATIC.block_rows
    text_chunks: tl.constexpr = (HIDDEN + STATIC.text_channels - 1) // STATIC.text_channels
    mean_chunks: tl.constexpr = (HIDDEN + STATIC.mean_channels - 1) // STATIC.mean_channels
    num_chunks: tl.constexpr = (HIDDEN + STATIC.block_channels - 1) // STATIC.block_channels
    num_outputs = num_heads * STATIC.head_dim
    projecting_tiles = tl.cdiv(num_outputs, STATIC.block_outputs)
    num_fold_parts = (num_heads // num_heads_per_group) * tl.cdiv(num_heads_per_group, STATIC.block_fold_heads)
    num_parts = tl.cdiv(num_heads, STATIC.block_heads)
    num_c_rows = num_parts if STATIC.mode == NO_NORM else num_heads
    first_mean = batch * num_text_parts * text_chunks
    first_projecting = first_mean + batch * mean_chunks
    first_folding = first_projecting + tl.cdiv(batch, BLOCK_B) * projecting_tiles
    first_scoring = first_folding + batch * num_fold_parts * num_chunks
    first_summing = first_scoring + batch * num_parts * num_tiles

    # Sums and counts of the parts of the text, means, queries, units and biases of the folded queries, logits,
    # statistics: `make_plan` adds them up alike.
    sums_ptr = memory.floats
    counts_ptr = sums_ptr + batch * num_text_parts * HIDDEN
    means_ptr = counts_ptr + batch * num_text_parts
    queries_ptr = means_ptr + batch * HIDDEN
    units_ptr = queries_ptr + batch * num_outputs
    bias_ptr = units_ptr + batch * num_heads * num_chunks
    c_ptr = bias_ptr + batch * num_heads
    statistics_ptr = c_ptr + tl.cast(batch, tl.int64) * num_c_rows * num_tokens
    term_stride = batch * num_heads * HIDDEN

    x = Matrix(tensors.x, strides.x_t, strides.x_c)
    w = Vector(tensors.w, strides.w)
    q_mask = Matrix(q_mask_ptr, q_mask_stride_b, q_mask_stride_t)
    k_mask = Matrix(k_mask_ptr, k_mask_stride_b, k_mask_stride_t)
    if ticket < first_mean:
        chunk = ticket % text_chunks
        part = (ticket // text_chunks) % num_text_parts
        row = ticket // (text_chunks * num_text_parts)
        # nested, because Triton takes the outer condition at compile time
        if STATIC.selects and not FINISH.in_registers:  # noqa: SIM102
            if (chunk == 0) & (part == 0):
                clear_histograms(histograms_of_row(memory.words, row, num_tokens, FINISH.row, False))
        sum_text(
            Matrix(x.ptr + row.to(tl.int64) * x_stride_b, x.row_stride, x.column_stride), row_of(q_mask, row),
            sums_ptr + row * num_text_parts * HIDDEN, counts_ptr + row * num_text_parts,
            part, num_text_parts, chunk, num_tokens, epsilon, HIDDEN, STATIC.text_channels, STATIC.block_text,
        )  # fmt: skip
        arrive(counters_of_row(memory.counters, row) + _SUMS)
    elif ticket < first_projecting:
        index = ticket - first_mean
        row = index // mean_chunks
        counters = counters_of_row(memory.counters, row)
        wait_for(counters + _SUMS, num_text_parts * text_chunks)
        mean_text(
            sums_ptr + row * num_text_parts * HIDDEN, counts_ptr + row * num_text_parts, tensors.norm_weight,
            means_ptr + row * HIDDEN, num_text_parts, index % mean_chunks,
            HIDDEN, HAS_NORM_WEIGHT, STATIC.mean_channels, STATIC.block_parts,
        )  # fmt: skip
        arrive(counters + _MEAN)
    elif ticket < first_folding:
        index = ticket - first_projecting
        group = index // projecting_tiles
        project_means(
            Matrix(tensors.wq, strides.wq_o, strides.wq_c), Vector(tensors.bq, strides.bq), means_ptr, queries_ptr,
            memory.counters, group, index % projecting_tiles, batch, num_outputs, mean_chunks,
            _MEAN, HIDDEN, HAS_QUERY_BIAS, INTERPRETED, STATIC.block_outputs, BLOCK_B, STATIC.project_channels,
        )  # fmt: skip
        arrive(counters_of_row(memory.counters, batch + group) + _QUERIES)
    elif ticket < first_scoring:
        index = ticket - first_folding
        chunk = index % num_chunks
        part = (index // num_chunks) % num_fold_parts
        row = index // (num_chunks * num_fold_parts)
        group = row // BLOCK_B
        group_counters = counters_of_row(memory.counters, batch + group)
        fold_keys(
            Matrix(tensors.wk, strides.wk_c, strides.wk_o), Vector(tensors.bk, strides.bk), tensors.norm_weight,
            queries_ptr + row * num_outputs, memory.terms + row * num_heads * HIDDEN,
            units_ptr + row * num_heads * num_chunks, bias_ptr + row * num_heads,
            group_counters + _QUERIES, projecting_tiles,
            part, chunk, num_heads_per_group, num_chunks, term_stride, scale,
            STATIC.head_dim, HIDDEN, HAS_NORM_WEIGHT, HAS_KEY_BIAS, INTERPRETED,
            STATIC.block_fold_heads, STATIC.block_channels, STATIC.fold_dims,
        )  # fmt: skip
        arrive(counters_of_row(memory.counters, row) + _FOLDED)
        # Whoever waits for the queries of a group of rows has passed here.
        rows_of_group = tl.minimum(batch - group * BLOCK_B, BLOCK_B)
        leave_row(group_counters, group_counters + _FOLDING, rows_of_group * num_fold_parts * num_chunks)
    elif ticket < first_summing:
        index = ticket - first_scoring
        tile = index % num_tiles
        part = (index // num_tiles) % num_parts
        row = index // (num_tiles * num_parts)
        counters = counters_of_row(memory.counters, row)
        wide_row = row.to(tl.int64)
        _score_states(
            Matrix(x.ptr + wide_row * x_stride_b, x.row_stride, x.column_stride), row_of(k_mask, row),
            memory.terms + row * num_heads * HIDDEN, units_ptr + row * num_heads * num_chunks,
            bias_ptr + row * num_heads, w, c_ptr + wide_row * num_c_rows * num_tokens,
            statistics_ptr + wide_row * num_heads * num_tiles * 2, counters + _FOLDED, num_fold_parts * num_chunks,
            part, tile, num_heads, num_tokens, num_tiles, tokens_per_program, num_chunks, term_stride, epsilon,
            INTERPRETED, STATIC,
        )  # fmt: skip
        arrive(counters + _LOGITS)
    else:
        sum_and_select(
            ticket - first_summing, batch, num_tokens, width,
            Logits(c_ptr, statistics_ptr, num_c_rows, num_tiles, num_parts * num_tiles), w, k_mask,
            Budget(numerator, denominator, budget), outputs, memory, _LOGITS,
            STATIC.mode, True, STATIC.selects, ROUNDING, FINISH,
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
    """Make the plan of a launch; the same shape always adds in the same order."""
    group_size = num_heads // num_key_value_heads
    text_parts = min(num_tokens, max(config.text_parts, triton.cdiv(num_tokens, _MOST_TOKENS_OF_A_PART)))
    fold_parts = num_key_value_heads * triton.cdiv(group_size, HEADS_PER_PROGRAM)
    block_heads = min(_HEADS_PER_SCORING, max(16, triton.next_power_of_2(num_heads)))
    num_parts = triton.cdiv(num_heads, block_heads)
    tiles_wanted = max(1, config.num_programs // (batch * num_parts))
    tokens_per_program = triton.cdiv(triton.cdiv(num_tokens, tiles_wanted), config.block_tokens) * config.block_tokens
    num_tiles = triton.cdiv(num_tokens, tokens_per_program)
    chunks = triton.cdiv(hidden_size, config.block_channels)
    blocks = finish.blocks_of(num_tokens, config.sum_block)

    num_before_logits = batch * (text_parts * (hidden_size + 1) + hidden_size + num_heads * (head_dim + chunks + 1))
    num_logits = batch * (num_parts if normalize is None else num_heads) * num_tokens
    num_statistics = 0 if normalize is None else batch * num_heads * num_tiles * 2
    groups = triton.cdiv(batch, ROWS_PER_PROJECTION)
    num_programs = batch * text_parts * triton.cdiv(hidden_size, config.text_channels)
    num_programs += batch * triton.cdiv(hidden_size, config.mean_channels)
    num_programs += groups * triton.cdiv(num_heads * head_dim, config.block_outputs)
    num_programs += batch * (fold_parts * chunks + num_parts * num_tiles)
    num_programs += batch * finish.num_programs(num_tokens, config.sum_block, selects)
    check_limits(num_programs, num_tokens, max(num_before_logits, 3 * batch * num_heads * hidden_size), batch + groups)
    return Plan(
        grid=(num_programs,),
        num_floats=num_before_logits + num_logits + num_statistics,
        num_words=batch * finish.num_histogram_words(num_tokens) if selects else 0,
        sizes=(
            batch,
            num_tokens,
            num_heads,
            group_size,
            text_parts,
            num_tiles,
            tokens_per_program,
        ),
        static=Static(
            hidden_size=hidden_size,
            head_dim=head_dim,
            mode=MODES[normalize],
            selects=selects,
            block_text=_TEXT_BLOCK_OF_SHORT_ROWS if blocks.in_registers else _TEXT_BLOCK_OF_LONG_ROWS,
            text_channels=config.text_channels,
            mean_channels=config.mean_channels,
            block_parts=_MEAN_BLOCK_PARTS,
            block_outputs=config.block_outputs,
            block_rows=ROWS_PER_PROJECTION,
            project_channels=config.project_channels,
            block_fold_heads=HEADS_PER_PROGRAM,
            fold_dims=config.fold_dims,
            block_heads=block_heads,
            block_tokens=config.block_tokens,
            block_channels=config.block_channels,
            finish=blocks,
        ),
        options=compiler_options(config.num_warps, config.max_registers),
    )


class PreparedCall(PreparedSelection):
    """A call of `score_hidden_and_select` or `score_hidden`."""

    def __init__(
        self,
        x: torch.Tensor,
        layer: Layer,
        w: torch.Tensor,
        r: float | int | None,
        q_mask: torch.Tensor,
        k_mask: torch.Tensor,
        normalize: str | None,
        scale: float,
        rounding: str,
        batched: bool = True,
        config: HiddenConfig | None = None,
    ) -> None:
        """Prepare a call by validated hidden states `[B, T, C]`, by default the table's.

        Args:
            x, layer, w, q_mask, k_mask, normalize, scale, rounding: as in the public function.
            r: None scores and does not select.
            batched: False leaves the batch axis out of the results.
            config: how the launch is cut; None takes it from the table.
        """
        norm_weight, norm_eps, wq, bq, wk, bk, _ = layer
        batch, num_tokens, hidden_size = x.shape
        num_heads = w.shape[0]
        head_dim = wq.shape[0] // num_heads
        super().__init__(x.device, batch, num_tokens, r, rounding, batched)
        self._num_terms = 0
        if self.is_empty:
            return
        shape = (batch, num_tokens, hidden_size, num_heads, wk.shape[0] // head_dim, head_dim, normalize, self.selects)
        plan = _plan(x.device, x.dtype, *shape) if config is None else make_plan(*shape, config)
        self._num_terms = (1 if x.dtype == torch.float32 else 3) * batch * num_heads * hidden_size
        strides = Strides._make((
            *x.stride()[1:], *wq.stride(), 0 if bq is None else bq.stride(0),
            *wk.stride(), 0 if bk is None else bk.stride(0), w.stride(0),
        ))  # fmt: skip
        numbers = (
            *q_mask.stride(), *k_mask.stride(), x.stride(0), *plan.sizes, *self.budget, scale, norm_eps,
        )  # fmt: skip

        def arrange(
            x: Any, norm_weight: Any, wq: Any, bq: Any, wk: Any, bk: Any, w: Any, terms: Any,
            floats: Any, words: Any, counters: Any, scores: Any, mask: Any, indices: Any,
            q_mask: Any, k_mask: Any,
        ) -> tuple[Any, ...]:  # fmt: skip
            memory, outputs = Memory(floats, words, counters, terms), Outputs(scores, mask, indices)
            return Tensors(x, norm_weight, wq, bq, wk, bk, w), strides, memory, outputs, q_mask, k_mask, *numbers

        constants = {
            "HAS_NORM_WEIGHT": norm_weight is not None,
            "HAS_QUERY_BIAS": bq is not None,
            "HAS_KEY_BIAS": bk is not None,
            "ROUNDING": self.rounding,
            "INTERPRETED": x.device.type == "cpu",
            "STATIC": plan.static,
        }
        # all but the masks are specialised
        num_groups = triton.cdiv(batch, ROWS_PER_PROJECTION)
        self.prepare(plan, batch + num_groups, arrange, constants, num_specialized=14)

    def __call__(
        self, x: torch.Tensor, layer: Layer, w: torch.Tensor, q_mask: torch.Tensor, k_mask: torch.Tensor
    ) -> Selection:
        """Return mask, indices and scores; without selecting, each of them is the scores."""
        norm_weight, _, wq, bq, wk, bk, _ = layer
        norm_weight = x if norm_weight is None else norm_weight.contiguous()
        terms = torch.empty(self._num_terms, dtype=x.dtype, device=x.device)
        tensors = x, norm_weight, wq, wq if bq is None else bq, wk, wk if bk is None else bk, w, terms
        return self.run(_score_hidden_kernel, tensors, (q_mask, k_mask))


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
    """Select by validated hidden states `[B, T, C]`, in one launch, by default the table's."""
    call = PreparedCall(x, layer, w, r, q_mask, k_mask, normalize, scale, rounding, config=config)
    return call(x, layer, w, q_mask, k_mask)


def score_hidden(
    x: torch.Tensor,
    layer: Layer,
    w: torch.Tensor,
    q_mask: torch.Tensor,
    k_mask: torch.Tensor,
    normalize: str | None,
    scale: float,
    config: HiddenConfig | None = None,
) -> torch.Tensor:
    """Compute importance `[B, T]` float32 by validated hidden states, in one launch, by default the table's."""
    call = PreparedCall(x, layer, w, None, q_mask, k_mask, normalize, scale, "floor", config=config)
    return call(x, layer, w, q_mask, k_mask).scores


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
