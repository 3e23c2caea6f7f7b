"""Normalises a head's logits over all its candidates, of which every program has seen only some.

A norm needs a pair of numbers for each head. The pairs of disjoint sets of keys combine to that of their union, so
tiles leave pairs and a later phase reduces them:

- l2: largest magnitude, sum of squares relative to it;
- softmax: maximum, sum of exponentials relative to it;
- minmax: minimum, maximum.
"""

import triton
import triton.language as tl

_FLOAT32_TINY = tl.constexpr(1.1754943508222875e-38)
NO_NORM, _L2, _SOFTMAX, _MINMAX = (tl.constexpr(mode) for mode in range(4))
MODES = {None: NO_NORM.value, "l2": _L2.value, "softmax": _SOFTMAX.value, "minmax": _MINMAX.value}


@triton.jit
def neutral_pair(MODE: tl.constexpr):
    """Return the pair of no keys at all."""
    if MODE == _SOFTMAX:
        return float("-inf"), 0.0
    if MODE == _MINMAX:
        return float("inf"), float("-inf")
    return 0.0, 0.0


@triton.jit
def _or_one(largest):
    """Return a divisor that is never zero; below float32's normal range a vector has no direction left."""
    return tl.where(largest >= _FLOAT32_TINY, largest, 1.0)


@triton.jit
def _or_zero(highest):
    """Return what to subtract before `exp`: nothing where there is no maximum."""
    return tl.where(highest == float("-inf"), 0.0, highest)


@triton.jit
def pair_of_tile(c, inside, MODE: tl.constexpr):
    """Return the pairs of a tile of logits `[BLOCK_M, BLOCK_H]`, one a head."""
    if MODE == _L2:
        first = tl.max(tl.where(inside, tl.abs(c), 0.0), 0)
        relative = tl.where(inside, c / _or_one(first)[None, :], 0.0)
        second = tl.sum(relative * relative, 0)
    elif MODE == _SOFTMAX:
        first = tl.max(tl.where(inside, c, float("-inf")), 0)
        second = tl.sum(tl.where(inside, tl.exp(c - _or_zero(first)[None, :]), 0.0), 0)
    else:
        first = tl.min(tl.where(inside, c, float("inf")), 0)
        second = tl.max(tl.where(inside, c, float("-inf")), 0)
    return first, second


@triton.jit
def merge(first, second, other_first, other_second, MODE: tl.constexpr):
    """Return the pair of the union of two disjoint sets of keys."""
    if MODE == _L2:
        larger = tl.maximum(first, other_first)
        one = first / _or_one(larger)
        other = other_first / _or_one(larger)
        return larger, second * one * one + other_second * other * other
    if MODE == _SOFTMAX:
        larger = tl.maximum(first, other_first)
        shift = _or_zero(larger)
        return larger, second * tl.exp(first - shift) + other_second * tl.exp(other_first - shift)
    return tl.minimum(first, other_first), tl.maximum(second, other_second)


@triton.jit
def reduce_pairs(first, second, MODE: tl.constexpr):
    """Return the pair of each head from those of its tiles `[BLOCK_H, BLOCK_T]`."""
    if MODE == _L2:
        largest = tl.max(first, 1)
        relative = first / _or_one(largest)[:, None]
        return largest, tl.sum(second * relative * relative, 1)
    if MODE == _SOFTMAX:
        highest = tl.max(first, 1)
        return highest, tl.sum(second * tl.exp(first - _or_zero(highest)[:, None]), 1)
    return tl.min(first, 1), tl.max(second, 1)


@triton.jit
def normalized(c, first, second, MODE: tl.constexpr):
    """Normalise finite logits `[BLOCK_H, BLOCK_M]` by the pairs of their heads `[BLOCK_H]`."""
    first, second = first[:, None], second[:, None]
    if MODE == _L2:
        norm = tl.sqrt(second)
        return tl.where(first >= _FLOAT32_TINY, c / _or_one(first) / tl.where(norm > 0, norm, 1.0), 0.0)
    if MODE == _SOFTMAX:
        return tl.exp(c - first) / second
    extent = second - first
    return tl.where(extent > 0, (c - first) / tl.where(extent > 0, extent, 1.0), 0.0)
