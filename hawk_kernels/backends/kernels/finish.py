"""The phases after the logits: sum over heads, then select. Shared by the kernels that end with a selection.

Logits `c [rows, M]` float32 are left by an earlier phase: one row a head, and the pairs that its norm needs; or,
where nothing is normalised, partial sums over heads that already carry their weights.
"""

import triton
import triton.language as tl

from hawk_kernels.backends.kernels.head_norms import NO_NORM, merge, neutral_pair, normalized, reduce_pairs
from hawk_kernels.backends.kernels.phases import arrive, leave_row, wait_for
from hawk_kernels.backends.kernels.radix import (
    NUM_DIGITS,
    RADIX_BINS,
    SUFFIXES,
    budget_of,
    count_digit,
    count_first_digit,
    load_candidates,
    ordered_key,
    select_in_registers,
    write_block,
)

# The scores, keys and running counts of a longer row do not fit in the registers of one program.
MAX_ROW_IN_REGISTERS = 2048
# A block of columns in the phases of a longer row; a histogram wants at least as many elements as bins.
SELECT_BLOCK = 1024
# Heads, or tiles of their statistics, that a program holds at once beside a block of columns.
HEAD_BLOCK = 16
TILE_BLOCK = 32


def row_block(num_keys: int) -> int:
    """Columns that a selecting program holds."""
    return SELECT_BLOCK if num_keys > MAX_ROW_IN_REGISTERS else max(256, triton.next_power_of_2(num_keys))


def num_selecting_phases(num_keys: int) -> int:
    """Phases of the selection of a row whose first digit has been counted, if it is a long one."""
    return NUM_DIGITS.value if num_keys > MAX_ROW_IN_REGISTERS else 1


def num_blocks(num_keys: int) -> int:
    """Programs of one such phase for one row."""
    return triton.cdiv(num_keys, row_block(num_keys))


def num_histogram_words(num_keys: int) -> int:
    """Int32 words that the selection of one row needs: histograms, then the suffixes of its blocks."""
    if num_keys <= MAX_ROW_IN_REGISTERS:
        return 0
    return NUM_DIGITS.value * RADIX_BINS.value + num_blocks(num_keys) * SUFFIXES.value


@triton.jit
def _norm_of_heads(
    statistics_ptr, heads, head_inside, num_tiles, MODE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr
):
    """The pairs `[BLOCK_H]` of some heads from those of their tiles, `statistics [H, T, 2]`."""
    neutral_first, neutral_second = neutral_pair(MODE)
    first = tl.full([BLOCK_H], neutral_first, tl.float32)
    second = tl.full([BLOCK_H], neutral_second, tl.float32)
    for start in range(0, num_tiles, BLOCK_T):
        tiles = start + tl.arange(0, BLOCK_T)
        pair = statistics_ptr + (heads[:, None] * num_tiles + tiles[None, :]) * 2
        inside = head_inside[:, None] & (tiles < num_tiles)[None, :]
        of_tiles = tl.load(pair, mask=inside, other=neutral_first, cache_modifier=".cg")
        of_tiles_second = tl.load(pair + 1, mask=inside, other=neutral_second, cache_modifier=".cg")
        some_first, some_second = reduce_pairs(of_tiles, of_tiles_second, MODE)
        first, second = merge(first, second, some_first, some_second, MODE)
    return first, second


@triton.jit
def importance_of(
    c_ptr, statistics_ptr, w_ptr, columns, candidate, num_c_rows, num_tiles, num_keys, w_stride,
    MODE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """`I[k]` of some columns of one row, `-inf` where there is no candidate."""
    importance = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_c_rows, BLOCK_H):
        rows = start + tl.arange(0, BLOCK_H)
        row_inside = rows < num_c_rows
        c = tl.load(
            c_ptr + rows[:, None].to(tl.int64) * num_keys + columns[None, :],
            mask=row_inside[:, None] & candidate[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        if MODE != NO_NORM:
            weight = tl.load(w_ptr + rows.to(tl.int64) * w_stride, mask=row_inside, other=0.0).to(tl.float32)
            first, second = _norm_of_heads(statistics_ptr, rows, row_inside, num_tiles, MODE, BLOCK_H, BLOCK_T)
            c = tl.where(row_inside[:, None], weight[:, None] * normalized(c, first, second, MODE), 0.0)
        importance += tl.sum(c, 0)
    return tl.where(candidate, importance, float("-inf"))


@triton.jit
def sum_heads(
    block, c_ptr, statistics_ptr, w_ptr, k_mask_ptr, scores_ptr, histograms_ptr, logits_counter_ptr, num_arrivals,
    num_c_rows, num_tiles, num_keys, w_stride, k_mask_stride,
    MODE: tl.constexpr, HAS_K_MASK: tl.constexpr, COUNT: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Scores of a block of columns, once all logits of the row are there; counts their first digit if asked."""
    columns = block * BLOCK + tl.arange(0, BLOCK)
    candidate = load_candidates(k_mask_ptr, columns, num_keys, k_mask_stride, HAS_K_MASK)
    wait_for(logits_counter_ptr, num_arrivals)
    importance = importance_of(
        c_ptr, statistics_ptr, w_ptr, columns, candidate, num_c_rows, num_tiles, num_keys, w_stride,
        MODE, BLOCK, BLOCK_H, BLOCK_T,
    )  # fmt: skip
    tl.store(scores_ptr + columns, importance, mask=columns < num_keys)
    if COUNT:
        count_first_digit(ordered_key(importance, candidate), candidate, histograms_ptr)


@triton.jit
def select(
    phase, block, scores_ptr, k_mask_ptr, mask_ptr, indices_ptr, histograms_ptr, counters_ptr, scored_ptr,
    num_arrivals, num_keys, width, numerator, denominator, budget, k_mask_stride,
    HAS_K_MASK: tl.constexpr, CEIL: tl.constexpr, IN_REGISTERS: tl.constexpr,
    BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program of a selecting phase of one row; its arrivals are counted behind those of the scores at `scored_ptr`.

    A row in registers has one phase of one program. A longer one has a phase for each digit but the first, and one
    that writes.
    """
    columns = block * BLOCK + tl.arange(0, BLOCK)
    candidate = load_candidates(k_mask_ptr, columns, num_keys, k_mask_stride, HAS_K_MASK)
    blocks = tl.cdiv(num_keys, BLOCK)
    wait_for(scored_ptr + phase, tl.where(phase == 0, num_arrivals, blocks))
    score = tl.load(scores_ptr + columns, mask=candidate, other=float("-inf"), cache_modifier=".cg")
    if IN_REGISTERS:
        kept = budget_of(tl.sum(candidate.to(tl.int32), 0), numerator, denominator, budget, CEIL)
        select_in_registers(score, candidate, kept, num_keys, width, mask_ptr, indices_ptr, BLOCK)
        leave_row(counters_ptr, scored_ptr + 1, 1)
    else:
        key = ordered_key(score, candidate)
        suffixes_ptr = histograms_ptr + NUM_DIGITS * RADIX_BINS
        if phase == NUM_DIGITS - 1:
            write_block(
                key, candidate, columns, block, histograms_ptr, suffixes_ptr, numerator, denominator, budget,
                num_keys, width, mask_ptr, indices_ptr, CEIL, BLOCK, NUM_BLOCKS,
            )  # fmt: skip
            leave_row(counters_ptr, scored_ptr + NUM_DIGITS, blocks)
        else:
            for DIGIT in tl.static_range(1, NUM_DIGITS):
                if phase == DIGIT - 1:
                    count_digit(
                        key, candidate, block, histograms_ptr, suffixes_ptr, numerator, denominator, budget, CEIL, DIGIT
                    )
            arrive(scored_ptr + phase + 1)
