"""What a selection is, and how a keep ratio becomes a number of tokens."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import torch

ROUNDINGS = ("floor", "ceil")

# Row lengths are below 2**31, so a fraction with a denominator below 2**31 gives every row the exact
# count and `length * numerator` still fits in int64 on a device.
_MAX_DENOMINATOR = 2**31 - 1
_ROUNDING = Fraction(1, 2**52)


class Selection(NamedTuple):
    """The tokens that a row keeps.

    Attributes:
        mask: bool `[B, M]` (or `[M]`), True where the token is kept.
        indices: int64 `[B, Kmax]` (or `[Kmax]`), positions of the kept tokens, ascending, padded at the end with -1.
        scores: float32 `[B, M]` (or `[M]`), the importance `I[k]`, `-inf` at tokens that were no candidates.
    """

    mask: torch.Tensor
    indices: torch.Tensor
    scores: torch.Tensor


def _simplest_between(low: Fraction, high: Fraction) -> Fraction:
    """The fraction with the smallest denominator in `[low, high]`, `0 <= low <= high` (Stern-Brocot descent)."""
    whole = low.numerator // low.denominator
    if low == whole:
        return Fraction(whole)
    if high >= whole + 1:
        return Fraction(whole + 1)
    return whole + 1 / _simplest_between(1 / (high - whole), 1 / (low - whole))


@lru_cache(maxsize=1024)
def keep_fraction(keep_ratio: float, rounding: str) -> tuple[int, int]:
    """The keep ratio as `(numerator, denominator)`, both below 2**31, as a person meant it.

    0.29 is not a binary fraction: `int(0.29 * 100)` is 28. A person who writes `0.29` means 29/100, one who writes
    `1 / 3` a third and one who writes `1 - 0.8` a fifth, so the ratio is read as the simplest fraction within the
    rounding of such a subtraction, 2**-52. Where that fraction needs a larger denominator, its neighbour below
    (`floor`) or above (`ceil`) among the fractions with denominators below 2**31 gives the same count for every row
    length below 2**31.
    """
    exact = Fraction(keep_ratio)
    tolerance = _ROUNDING if exact * 2**12 >= 1 else exact / 2**40
    meant = _simplest_between(exact - tolerance, exact + tolerance)
    if meant.denominator <= _MAX_DENOMINATOR:
        return meant.numerator, meant.denominator
    lower, upper = _farey_neighbours(meant)
    return lower if rounding == "floor" else upper


def _farey_neighbours(x: Fraction) -> tuple[tuple[int, int], tuple[int, int]]:
    """The nearest fractions below and above `x` with denominators up to `_MAX_DENOMINATOR` (continued fractions)."""
    p_before, q_before, p, q = 0, 1, 1, 0
    numerator, denominator = x.numerator, x.denominator
    while True:
        digit = numerator // denominator
        if q_before + digit * q > _MAX_DENOMINATOR:
            break
        p_before, q_before, p, q = p, q, p_before + digit * p, q_before + digit * q
        numerator, denominator = denominator, numerator - digit * denominator
    steps = (_MAX_DENOMINATOR - q_before) // q
    one, other = (p, q), (p_before + steps * p, q_before + steps * q)
    return (one, other) if Fraction(*one) <= x else (other, one)


def kept_count(r: float | int, num_candidates: int, rounding: str = "floor") -> int:
    """How many of `num_candidates` tokens are kept: `max(1, floor(r * num_candidates))`, at most all of them.

    Args:
        r: a float in (0, 1] is the fraction that is kept, an int >= 1 a budget (clamped to the candidates).
        num_candidates: candidates in the row; a row without any keeps none.
        rounding: "floor" (paper) or "ceil" (the authors' release).
    """
    if num_candidates == 0:
        return 0
    if isinstance(r, int):
        return min(r, num_candidates)
    numerator, denominator = keep_fraction(r, rounding)
    extra = denominator - 1 if rounding == "ceil" else 0
    return max(1, (num_candidates * numerator + extra) // denominator)


def kept_counts(r: float | int, num_candidates: torch.Tensor, rounding: str) -> torch.Tensor:
    """`kept_count` of every row, on the device of `num_candidates` (int64 `[B]`), without a host sync."""
    if isinstance(r, int):
        # a budget may be any int, a tensor's bounds may not
        return num_candidates.clamp(max=min(r, _MAX_DENOMINATOR))
    numerator, denominator = keep_fraction(r, rounding)
    extra = denominator - 1 if rounding == "ceil" else 0
    counts = torch.div(num_candidates * numerator + extra, denominator, rounding_mode="floor")
    return torch.where(num_candidates > 0, counts.clamp(min=1), 0)


def max_kept(r: float | int, num_keys: int, rounding: str) -> int:
    """Kmax, the width of `Selection.indices`: what a row keeps whose keys are all candidates."""
    return kept_count(r, num_keys, rounding)
