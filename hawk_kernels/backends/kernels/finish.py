"""Holds the phases after the logits, which all kernels that end with a selection share: sum over heads, then select.

An earlier phase writes logits `c [rows, M]` float32 for each row of the batch: one row for each head, and the pairs
that its norm needs; or, where nothing is normalised, partial sums over heads that are already weighted.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hawk_kernels.backends.kernels.head_norms import NO_NORM, merge, neutral_pair, normalized, reduce_pairs
from hawk_kernels.backends.kernels.phases import arrive, counters_of_row, leave_row, wait_for
from hawk_kernels.backends.kernels.radix import (
    NUM_DIGITS,
    RADIX_BINS,
    SUFFIXES,
    Selected,
    budget_of,
    count_digit,
    count_first_digit,
    load_candidates,
    ordered_key,
    select_in_registers,
    write_block,
)
from hawk_kernels.backends.kernels.views import load_vector, row_of

# The scores, keys and running counts of a longer row do not fit in the registers of one program.
MAX_ROW_IN_REGISTERS = 2048
# A block of columns in the phases of a longer row, and of a row that is not longer than it; a histogram wants at least
# as many elements as bins. A block for each power of two would be a kernel for each, compiled in the middle of a chat.
SELECT_BLOCK = 1024
# A program of a longer row looks at this many blocks before its own; only rows of over 262144 columns have more.
_FEWEST_BLOCKS = 256
# Heads, or tiles of their statistics, that a program holds at once beside a block of columns.
HEAD_BLOCK = 16
TILE_BLOCK = 32


class Blocks(NamedTuple):
    """How the last phases are cut; a kernel is compiled for one such cut.

    Attributes:
        columns: whose heads a program sums.
        heads: that a program holds at once.
        tiles: of statistics that a program holds at once.
        row: columns that a selecting program holds.
        num_blocks: a power of two that is at least the number of selecting programs of a row.
        in_registers: whether one program selects a whole row.
    """

    columns: int
    heads: int
    tiles: int
    row: int
    num_blocks: int
    in_registers: bool


class Outputs(NamedTuple):
    """Where a launch writes, as pointers to `[B, M]` scores and mask and `[B, width]` indices."""

    scores: Any
    mask: Any
    indices: Any


class Memory(NamedTuple):
    """What a launch works with, as pointers: floats, words and counters; see `launch`."""

    floats: Any
    words: Any
    counters: Any


class Logits(NamedTuple):
    """What the scoring programs of a row leave: `c [B, num_rows, M]` and `statistics [B, num_rows, num_tiles, 2]`."""

    c_ptr: Any
    statistics_ptr: Any
    num_rows: Any
    num_tiles: Any
    num_programs: Any


def blocks_of(num_keys: int, sum_block: int) -> Blocks:
    """Return how the last phases of rows of this length are cut, which is the same for most lengths."""
    is_short = num_keys <= MAX_ROW_IN_REGISTERS
    return Blocks(
        columns=sum_block,
        heads=HEAD_BLOCK,
        tiles=TILE_BLOCK,
        row=row_block(num_keys),
        num_blocks=1 if is_short else max(_FEWEST_BLOCKS, triton.next_power_of_2(num_blocks(num_keys))),
        in_registers=is_short,
    )


def num_programs(num_keys: int, sum_block: int, selects: bool) -> int:
    """Return how many programs sum the heads of one row and select from it."""
    selecting = num_blocks(num_keys) * num_selecting_phases(num_keys) if selects else 0
    return int(triton.cdiv(num_keys, sum_block)) + selecting


def row_block(num_keys: int) -> int:
    """Return how many columns a selecting program holds."""
    return MAX_ROW_IN_REGISTERS if SELECT_BLOCK < num_keys <= MAX_ROW_IN_REGISTERS else SELECT_BLOCK


def num_selecting_phases(num_keys: int) -> int:
    """Return how many phases select from a row; of a long one, the first digit has been counted before."""
    return int(NUM_DIGITS.value) if num_keys > MAX_ROW_IN_REGISTERS else 1


def num_blocks(num_keys: int) -> int:
    """Return how many programs one such phase has for one row."""
    return int(triton.cdiv(num_keys, row_block(num_keys)))


def num_histogram_words(num_keys: int) -> int:
    """Return how many int32 words the selection of one row needs: histograms, then the suffixes of its blocks."""
    if num_keys <= MAX_ROW_IN_REGISTERS:
        return 0
    return int(NUM_DIGITS.value * RADIX_BINS.value + num_blocks(num_keys) * SUFFIXES.value)


@triton.jit
def histograms_of_row(words_ptr, row, num_keys, BLOCK: tl.constexpr, IN_REGISTERS: tl.constexpr):
    """Return a row's histograms, as `num_histogram_words` lays them out; a row in registers has none."""
    if IN_REGISTERS:
        return words_ptr
    num_words = NUM_DIGITS * RADIX_BINS + tl.cdiv(num_keys, BLOCK) * SUFFIXES
    return words_ptr + row.to(tl.int64) * num_words


@triton.jit
def _norm_of_heads(
    statistics_ptr, heads, head_inside, num_tiles, MODE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Merge the pairs of the tiles of some heads, `statistics [H, T, 2]`, to one `[BLOCK_H]`."""
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
def _importance_of(
    c_ptr, statistics_ptr, w, columns, candidate, num_c_rows, num_tiles, num_keys,
    MODE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Return `I[k]` of some columns of one row, `-inf` where there is no candidate."""
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
            weight = load_vector(w, rows, row_inside).to(tl.float32)
            first, second = _norm_of_heads(statistics_ptr, rows, row_inside, num_tiles, MODE, BLOCK_H, BLOCK_T)
            c = tl.where(row_inside[:, None], weight[:, None] * normalized(c, first, second, MODE), 0.0)
        importance += tl.sum(c, 0)
    return tl.where(candidate, importance, float("-inf"))


@triton.jit
def select(
    phase, block, scores_ptr, mask, selected, histograms_ptr, counters_ptr, scored_ptr, num_arrivals, budget,
    HAS_MASK: tl.constexpr, ROUNDING: tl.constexpr, IN_REGISTERS: tl.constexpr,
    BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Run one program of a selecting phase of one row.

    A row in registers has one phase of one program. A longer one has a phase for each digit but the first, and one
    that writes. The counter at `scored_ptr` counts the programs that made the scores, those after it the phases here.
    """
    columns = block * BLOCK + tl.arange(0, BLOCK)
    candidate = load_candidates(mask, columns, selected.num_keys, HAS_MASK)
    blocks = tl.cdiv(selected.num_keys, BLOCK)
    wait_for(scored_ptr + phase, tl.where(phase == 0, num_arrivals, blocks))
    score = tl.load(scores_ptr + columns, mask=candidate, other=float("-inf"), cache_modifier=".cg")
    if IN_REGISTERS:
        kept = budget_of(tl.sum(candidate.to(tl.int32), 0), budget, ROUNDING)
        select_in_registers(score, candidate, kept, selected, BLOCK)
        leave_row(counters_ptr, scored_ptr + 1, 1)
    else:
        key = ordered_key(score, candidate)
        suffixes_ptr = histograms_ptr + NUM_DIGITS * RADIX_BINS
        if phase == NUM_DIGITS - 1:
            write_block(
                key, candidate, columns, block, histograms_ptr, suffixes_ptr, budget, selected, ROUNDING, BLOCK,
                NUM_BLOCKS,
            )  # fmt: skip
            leave_row(counters_ptr, scored_ptr + NUM_DIGITS, blocks)
        else:
            for DIGIT in tl.static_range(1, NUM_DIGITS):
                if phase == DIGIT - 1:
                    count_digit(key, candidate, block, histograms_ptr, suffixes_ptr, budget, ROUNDING, DIGIT)
            arrive(scored_ptr + phase + 1)


@triton.jit
def sum_and_select(
    index, batch, num_keys, width, logits, w, k_mask, budget, outputs, memory, LOGITS: tl.constexpr,
    MODE: tl.constexpr, HAS_K_MASK: tl.constexpr, SELECT: tl.constexpr, ROUNDING: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Run the `index`-th program of the phases after the logits.

    `k_mask` is the mask of candidates `[B, M]`; LOGITS is the counter that the scoring programs have arrived at, and
    the counters after it count the arrivals of these phases.
    """
    sum_blocks = tl.cdiv(num_keys, BLOCKS.columns)
    num_summing = batch * sum_blocks
    if index < num_summing:
        row = index // sum_blocks
        wide_row = row.to(tl.int64)
        columns = (index % sum_blocks) * BLOCKS.columns + tl.arange(0, BLOCKS.columns)
        candidate = load_candidates(row_of(k_mask, row), columns, num_keys, HAS_K_MASK)
        counters = counters_of_row(memory.counters, row)
        wait_for(counters + LOGITS, logits.num_programs)
        importance = _importance_of(
            logits.c_ptr + wide_row * logits.num_rows * num_keys,
            logits.statistics_ptr + wide_row * logits.num_rows * logits.num_tiles * 2,
            w, columns, candidate, logits.num_rows, logits.num_tiles, num_keys,
            MODE, BLOCKS.columns, BLOCKS.heads, BLOCKS.tiles,
        )  # fmt: skip
        tl.store(outputs.scores + wide_row * num_keys + columns, importance, mask=columns < num_keys)
        if SELECT:
            if not BLOCKS.in_registers:
                histograms_ptr = histograms_of_row(memory.words, row, num_keys, BLOCKS.row, BLOCKS.in_registers)
                count_first_digit(ordered_key(importance, candidate), candidate, histograms_ptr)
            arrive(counters + LOGITS + 1)
        else:
            leave_row(counters, counters + LOGITS + 1, sum_blocks)
    else:
        if SELECT:
            blocks = tl.cdiv(num_keys, BLOCKS.row)
            row = ((index - num_summing) // blocks) % batch
            wide_row = row.to(tl.int64)
            counters = counters_of_row(memory.counters, row)
            select(
                (index - num_summing) // (blocks * batch), (index - num_summing) % blocks,
                outputs.scores + wide_row * num_keys, row_of(k_mask, row),
                Selected(outputs.mask + wide_row * num_keys, outputs.indices + wide_row * width, num_keys, width),
                histograms_of_row(memory.words, row, num_keys, BLOCKS.row, BLOCKS.in_registers),
                counters, counters + LOGITS + 1, sum_blocks, budget,
                HAS_K_MASK, ROUNDING, BLOCKS.in_registers, BLOCKS.row, BLOCKS.num_blocks,
            )  # fmt: skip
