"""Device functions that select the best of one row: an exact order, by radix, without a sort.

The order is that of a stable descending sort: a float becomes a uint32 key that orders the same way, the key of the
last token that is kept (the threshold) is found eight bits at a time, and tokens that tie with it are taken from
the left by a running count. Kept tokens come out in ascending order, so indices need no sort either.
"""

import triton
import triton.language as tl

RADIX_BITS = tl.constexpr(8)
RADIX_BINS = tl.constexpr(256)


@triton.jit
def load_candidates(mask_ptr, columns, num_keys, stride, HAS_MASK: tl.constexpr):
    """Which columns of a row are candidates; `mask_ptr` is the row's."""
    candidate = columns < num_keys
    if HAS_MASK:
        candidate = tl.load(mask_ptr + columns.to(tl.int64) * stride, mask=candidate, other=0) != 0
    return candidate


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
def _ordered_key(score, candidate):
    """uint32 that orders as the score does: NaN is 1, below -inf; 0 is no candidate; -0 equals +0."""
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.uint32, bitcast=True)
    key = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    key = tl.where(score != score, 1, key)
    return tl.where(candidate, key, 0).to(tl.uint32)


@triton.jit
def _digit_counts(key, candidate, settled, prefix, shift: tl.constexpr):
    """Histogram of the next digit of the keys that start as the threshold does."""
    digit = ((key >> shift) & (RADIX_BINS - 1)).to(tl.int32)
    return tl.histogram(digit, RADIX_BINS, mask=candidate & ((key & settled) == prefix))


@triton.jit
def _pick_digit(histogram, remaining):
    """The bin in which the `remaining`-th largest key lies, and how many keys lie in the bins above it."""
    above = tl.cumsum(histogram, 0, reverse=True) - histogram
    bins = tl.arange(0, RADIX_BINS)
    here = (above < remaining) & (above + histogram >= remaining)
    return tl.sum(tl.where(here, bins, 0), 0), tl.sum(tl.where(here, above, 0), 0)


@triton.jit
def _write_kept(
    key, candidate, columns, threshold, num_tied, kept, num_tied_before, num_kept_before,
    num_keys, width, mask_ptr, indices_ptr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write mask, indices and padding of some columns; returns the running counts of ties and of kept tokens."""
    tied = candidate & (key == threshold)
    tie_rank = num_tied_before + tl.cumsum(tied.to(tl.int32), 0)
    keep = candidate & (kept > 0) & ((key > threshold) | (tied & (tie_rank <= num_tied)))
    tl.store(mask_ptr + columns, keep, mask=columns < num_keys)
    position = num_kept_before + tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(indices_ptr + position, columns.to(tl.int64), mask=keep)
    padding = tl.full([BLOCK], -1, tl.int64)
    tl.store(indices_ptr + columns, padding, mask=(columns >= kept) & (columns < width))
    return num_tied_before + tl.sum(tied.to(tl.int32), 0), num_kept_before + tl.sum(keep.to(tl.int32), 0)


@triton.jit
def select_in_registers(score, candidate, kept, num_keys, width, mask_ptr, indices_ptr, BLOCK: tl.constexpr):
    """Write mask and indices of one row that a single program holds; the pointers are the row's."""
    key = _ordered_key(score, candidate)
    zero = kept * 0
    threshold = zero.to(tl.uint32)
    settled = zero.to(tl.uint32)
    remaining = kept
    for shift in tl.static_range(32 - RADIX_BITS, -1, -RADIX_BITS):
        histogram = _digit_counts(key, candidate, settled, threshold, shift)
        chosen, above = _pick_digit(histogram, remaining)
        threshold = threshold | (chosen.to(tl.uint32) << shift)
        settled = settled | ((RADIX_BINS - 1) << shift)
        remaining -= above
    _write_kept(
        key, candidate, tl.arange(0, BLOCK), threshold, remaining, kept, zero, zero,
        num_keys, width, mask_ptr, indices_ptr, BLOCK,
    )  # fmt: skip


@triton.jit
def _load_keys(scores_ptr, candidates_ptr, columns, num_keys, candidates_stride, HAS_MASK: tl.constexpr):
    candidate = load_candidates(candidates_ptr, columns, num_keys, candidates_stride, HAS_MASK)
    score = tl.load(scores_ptr + columns, mask=candidate, other=float("-inf"), cache_modifier=".cg")
    return _ordered_key(score, candidate), candidate


@triton.jit
def select_from_memory(
    scores_ptr, candidates_ptr, candidates_stride, kept, num_keys, width, mask_ptr, indices_ptr,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `select_in_registers` for a row of any length, whose scores are read again for every digit; pointers are
    the row's."""
    zero = kept * 0
    threshold = zero.to(tl.uint32)
    settled = zero.to(tl.uint32)
    remaining = kept
    for shift in tl.static_range(32 - RADIX_BITS, -1, -RADIX_BITS):
        histogram = tl.zeros([RADIX_BINS], tl.int32)
        for start in range(0, num_keys, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            key, candidate = _load_keys(scores_ptr, candidates_ptr, columns, num_keys, candidates_stride, HAS_MASK)
            histogram += _digit_counts(key, candidate, settled, threshold, shift)
        chosen, above = _pick_digit(histogram, remaining)
        threshold = threshold | (chosen.to(tl.uint32) << shift)
        settled = settled | ((RADIX_BINS - 1) << shift)
        remaining -= above

    num_tied_before = zero
    num_kept_before = zero
    for start in range(0, num_keys, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        key, candidate = _load_keys(scores_ptr, candidates_ptr, columns, num_keys, candidates_stride, HAS_MASK)
        num_tied_before, num_kept_before = _write_kept(
            key, candidate, columns, threshold, remaining, kept, num_tied_before, num_kept_before,
            num_keys, width, mask_ptr, indices_ptr, BLOCK,
        )  # fmt: skip
