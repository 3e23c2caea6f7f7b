"""Device functions that select the best of one row: an exact order, by radix, without a sort.

The order is that of a stable descending sort: a float becomes a uint32 key that orders the same way, the key of the last
token that is kept (the threshold) is found eight bits at a time, and tokens that tie with it are taken from the
left by a running count. Kept tokens come out in ascending order, so indices need no sort either.
"""

import triton
import triton.language as tl

RADIX_BITS = tl.constexpr(8)
RADIX_BINS = tl.constexpr(256)


@triton.jit
def ordered_key(score, candidate):
    """uint32 that orders as the score does: NaN is 1, below -inf; 0 is no candidate; -0 equals +0."""
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.uint32, bitcast=True)
    key = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    key = tl.where(score != score, 1, key)
    return tl.where(candidate, key, 0).to(tl.uint32)


@triton.jit
def budget_of(num_candidates, numerator, denominator, budget, CEIL: tl.constexpr):
    """How many tokens a row keeps, int32; `selection.kept_count` on the device."""
    if budget > 0:
        kept = tl.minimum(num_candidates, budget)
    else:
        product = num_candidates.to(tl.int64) * numerator
        if CEIL:
            product += denominator - 1
        kept = tl.maximum((product // denominator).to(tl.int32), 1)
    return tl.where(num_candidates > 0, kept, 0)


@triton.jit
def pick_digit(histogram, remaining):
    """The bin in which the `remaining`-th largest key lies, and how many keys lie in the bins above it."""
    above = tl.cumsum(histogram, 0, reverse=True) - histogram
    bins = tl.arange(0, RADIX_BINS)
    here = (above < remaining) & (above + histogram >= remaining)
    return tl.sum(tl.where(here, bins, 0), 0), tl.sum(tl.where(here, above, 0), 0)


@triton.jit
def threshold_key(key, candidate, kept):
    """The `kept`-th largest key of a row in registers, and how many of the tokens tied with it are kept."""
    prefix = (kept * 0).to(tl.uint32)
    settled = (kept * 0).to(tl.uint32)
    remaining = kept
    for step in tl.static_range(32 // RADIX_BITS):
        shift: tl.constexpr = 32 - RADIX_BITS * (step + 1)
        digit = ((key >> shift) & (RADIX_BINS - 1)).to(tl.int32)
        active = candidate & ((key & settled) == prefix)
        chosen, above = pick_digit(tl.histogram(digit, RADIX_BINS, mask=active), remaining)
        prefix = prefix | (chosen.to(tl.uint32) << shift)
        settled = settled | ((RADIX_BINS - 1) << shift)
        remaining -= above
    return prefix, remaining


@triton.jit
def select_in_registers(
    score, candidate, columns, kept, num_keys, width, mask_ptr, indices_ptr, BLOCK: tl.constexpr
):
    """Write mask and indices of one row that a single program holds; `mask_ptr` and `indices_ptr` are the row's."""
    key = ordered_key(score, candidate)
    threshold, num_tied = threshold_key(key, candidate, kept)
    tied = candidate & (key == threshold)
    tie_rank = tl.cumsum(tied.to(tl.int32), 0)
    keep = candidate & (kept > 0) & ((key > threshold) | (tied & (tie_rank <= num_tied)))
    tl.store(mask_ptr + columns, keep, mask=columns < num_keys)
    position = tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(indices_ptr + position, columns.to(tl.int64), mask=keep)
    padding = tl.full([BLOCK], -1, tl.int64)
    tl.store(indices_ptr + columns, padding, mask=(columns >= kept) & (columns < width))
