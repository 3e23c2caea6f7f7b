"""Selects the best of one row in an exact order by radix on the device, without a sort.

The order is that of a stable descending sort: a float becomes a uint32 key that orders the same way, the key of the
last token that is kept (the threshold) is found eight bits at a time, and tokens that tie with it are taken from
the left by a running count. Kept tokens come out in ascending order, so indices need no sort either.

A row that fits in the registers of one program is selected by it (`select_in_registers`). A longer one is cut into
blocks of columns: programs over these count one digit after the other into histograms of the row (`count_digit`),
and then each writes its own columns (`write_block`).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hawk_kernels.backends.kernels.views import load_vector

RADIX_BITS = tl.constexpr(8)
RADIX_BINS = tl.constexpr(256)
NUM_DIGITS = tl.constexpr(4)
# A block's counts of the last digit from the top, after the number of keys above all of them.
SUFFIXES = tl.constexpr(257)


class Budget(NamedTuple):
    """How many tokens a row keeps: `count` of them, or where that is 0 the fraction of its candidates."""

    numerator: Any
    denominator: Any
    count: Any


class Selected(NamedTuple):
    """Where the selection of one row is written: its mask, and its indices, which are at most `width`."""

    mask_ptr: Any
    indices_ptr: Any
    num_keys: Any
    width: Any


@triton.jit
def load_candidates(mask, columns, num_keys, HAS_MASK: tl.constexpr):
    """Say which columns of a row are candidates; `mask` is the row's vector."""
    candidate = columns < num_keys
    if HAS_MASK:
        candidate = load_vector(mask, columns, candidate) != 0
    return candidate


@triton.jit
def budget_of(num_candidates, budget, ROUNDING: tl.constexpr):
    """Return how many tokens a row keeps, int32; this is `selection.kept_count` on the device."""
    if budget.count > 0:
        kept = tl.minimum(num_candidates, budget.count)
    else:
        product = num_candidates.to(tl.int64) * budget.numerator
        if ROUNDING == "ceil":
            product += budget.denominator - 1
        quotient = product // budget.denominator
        if ROUNDING == "nearest":
            doubled = (product - quotient * budget.denominator) * 2 + quotient % 2
            # a tie goes up from an odd quotient alone
            quotient += (doubled > budget.denominator).to(tl.int64)
        kept = tl.maximum(quotient.to(tl.int32), 1)
    return tl.where(num_candidates > 0, kept, 0)


@triton.jit
def ordered_key(score, candidate):
    """Return a uint32 that orders as the score does: NaN is 1, below -inf; 0 marks a non-candidate; -0 equals +0."""
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.uint32, bitcast=True)
    key = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    key = tl.where(score != score, 1, key)
    return tl.where(candidate, key, 0).to(tl.uint32)


@triton.jit
def _digit_counts(key, candidate, settled, prefix, DIGIT: tl.constexpr):
    """Count a digit of the keys that start as the threshold does; digit 0 is the highest."""
    shift: tl.constexpr = 32 - RADIX_BITS * (DIGIT + 1)
    digit = ((key >> shift) & (RADIX_BINS - 1)).to(tl.int32)
    return tl.histogram(digit, RADIX_BINS, mask=candidate & ((key & settled) == prefix))


@triton.jit
def _settle_digit(threshold, settled, remaining, histogram, DIGIT: tl.constexpr):
    """Give the threshold the digit of the `remaining`-th largest key, and take the keys above it from `remaining`."""
    shift: tl.constexpr = 32 - RADIX_BITS * (DIGIT + 1)
    above = tl.cumsum(histogram, 0, reverse=True) - histogram
    here = (above < remaining) & (above + histogram >= remaining)
    digit = tl.sum(tl.where(here, tl.arange(0, RADIX_BINS), 0), 0)
    remaining -= tl.sum(tl.where(here, above, 0), 0)
    return threshold | (digit.to(tl.uint32) << shift), settled | ((RADIX_BINS - 1) << shift), remaining


@triton.jit
def _write_kept(
    key, candidate, columns, threshold, num_tied, kept, num_tied_before, num_kept_before, selected, BLOCK: tl.constexpr
):
    """Write mask, indices and padding of some columns, `num_tied` of the row's ties being kept."""
    tied = candidate & (key == threshold)
    tie_rank = num_tied_before + tl.cumsum(tied.to(tl.int32), 0)
    keep = candidate & (kept > 0) & ((key > threshold) | (tied & (tie_rank <= num_tied)))
    tl.store(selected.mask_ptr + columns, keep, mask=columns < selected.num_keys)
    position = num_kept_before + tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(selected.indices_ptr + position, columns.to(tl.int64), mask=keep)
    padding = tl.full([BLOCK], -1, tl.int64)
    tl.store(selected.indices_ptr + columns, padding, mask=(columns >= kept) & (columns < selected.width))


@triton.jit
def select_in_registers(score, candidate, kept, selected, BLOCK: tl.constexpr):
    """Write mask and indices of one row that a single program holds."""
    key = ordered_key(score, candidate)
    zero = kept * 0
    threshold = zero.to(tl.uint32)
    settled = zero.to(tl.uint32)
    remaining = kept
    for DIGIT in tl.static_range(NUM_DIGITS):
        histogram = _digit_counts(key, candidate, settled, threshold, DIGIT)
        threshold, settled, remaining = _settle_digit(threshold, settled, remaining, histogram, DIGIT)
    _write_kept(key, candidate, tl.arange(0, BLOCK), threshold, remaining, kept, zero, zero, selected, BLOCK)


@triton.jit
def clear_histograms(histograms_ptr):
    """Zero the histograms `[NUM_DIGITS, RADIX_BINS]` of one row."""
    bins = tl.arange(0, NUM_DIGITS * RADIX_BINS)
    tl.store(histograms_ptr + bins, tl.zeros([NUM_DIGITS * RADIX_BINS], tl.int32))


@triton.jit
def _settled_digits(histograms_ptr, budget, ROUNDING: tl.constexpr, DIGITS: tl.constexpr):
    """Return the threshold by its first digits, the digits settled, what remains, and how many tokens the row keeps."""
    bins = tl.arange(0, RADIX_BINS)
    histogram = tl.load(histograms_ptr + bins, cache_modifier=".cg")
    kept = budget_of(tl.sum(histogram, 0), budget, ROUNDING)
    zero = kept * 0
    threshold = zero.to(tl.uint32)
    settled = zero.to(tl.uint32)
    remaining = kept
    for DIGIT in tl.static_range(DIGITS):
        histogram = tl.load(histograms_ptr + DIGIT * RADIX_BINS + bins, cache_modifier=".cg")
        threshold, settled, remaining = _settle_digit(threshold, settled, remaining, histogram, DIGIT)
    return threshold, settled, remaining, kept


@triton.jit
def count_first_digit(key, candidate, histograms_ptr):
    """Add a block's keys to the row's histogram of the highest digit; integers add up the same in any order."""
    zero = tl.sum(candidate.to(tl.int32), 0) * 0
    histogram = _digit_counts(key, candidate, zero.to(tl.uint32), zero.to(tl.uint32), 0)
    tl.atomic_add(histograms_ptr + tl.arange(0, RADIX_BINS), histogram, mask=histogram > 0, sem="relaxed", scope="gpu")


@triton.jit
def count_digit(
    key, candidate, block, histograms_ptr, suffixes_ptr, budget, ROUNDING: tl.constexpr, DIGIT: tl.constexpr
):
    """Add a block's keys to the row's histogram of a lower digit, once those of all higher ones are complete.

    At the last digit also leave, for each of its values, how many keys of the block are at least that high: whatever
    the threshold turns out to be, two of these say how many of the block are above it and how many tie with it.
    """
    threshold, settled, _, _ = _settled_digits(histograms_ptr, budget, ROUNDING, DIGIT)
    histogram = _digit_counts(key, candidate, settled, threshold, DIGIT)
    bins = tl.arange(0, RADIX_BINS)
    tl.atomic_add(histograms_ptr + DIGIT * RADIX_BINS + bins, histogram, mask=histogram > 0, sem="relaxed", scope="gpu")
    if DIGIT == NUM_DIGITS - 1:
        above = tl.sum((candidate & ((key & settled) > threshold)).to(tl.int32), 0)
        suffixes_ptr += block * SUFFIXES
        tl.store(suffixes_ptr + bins, above + tl.cumsum(histogram, 0, reverse=True))
        tl.store(suffixes_ptr + RADIX_BINS, above)


@triton.jit
def write_block(
    key, candidate, columns, block, histograms_ptr, suffixes_ptr, budget, selected,
    ROUNDING: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Write mask and indices of a block's columns, once every block has counted every digit.

    `NUM_BLOCKS` is the number of blocks or a power of two above it.
    """
    threshold, _, num_tied, kept = _settled_digits(histograms_ptr, budget, ROUNDING, NUM_DIGITS)
    blocks = tl.arange(0, NUM_BLOCKS)
    suffixes_ptr += blocks * SUFFIXES + (threshold & (RADIX_BINS - 1)).to(tl.int32)
    reaching = tl.sum(tl.load(suffixes_ptr, mask=blocks < block, other=0, cache_modifier=".cg"), 0)
    above = tl.sum(tl.load(suffixes_ptr + 1, mask=blocks < block, other=0, cache_modifier=".cg"), 0)
    num_tied_before = reaching - above
    _write_kept(
        key, candidate, columns, threshold, num_tied, kept, num_tied_before,
        above + tl.minimum(num_tied_before, num_tied), selected, BLOCK,
    )  # fmt: skip
