"""Selections of tokens, and how a keep ratio becomes a number of tokens."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import torch

ROUNDINGS = ("floor", "ceil", "nearest")

# A row length below 2**31 times a numerator below 2**31 still fits into an int64 on a device.
_MAX_DENOMINATOR = 2**31 - 1
# Two fractions with denominators up to this differ by more than twice _ROUNDING, so at most one of them is meant.
_MAX_SIMPLE_DENOMINATOR = 2**25
_ROUNDING = Fraction(1, 2**52)

# Padding of a merge map has no target, and sorts after every token.
LAST_PLACE = 2**63 - 1


class Merge(NamedTuple):
    """A sparse map from tokens to kept tokens: the rows that kept tokens become sums of.

    Each entry adds `weight * embedding[source]` to what the kept token `target` becomes. A kept token that is the
    target of no entry stays as it is; one that is a target becomes the sum of its entries alone, so that its own
    embedding counts only where an entry names it as its source. Any number of entries may share a target or a source,
    the same pair may come more than once, and weights need not sum to 1. Position ids do not change.

    The number of entries is a shape, so it is known without asking the device; rows with fewer are padded.

    Attributes:
        target: int64 `[B, E]` (or `[E]`), the kept token that the entry adds to; -1 at padding. `compact` takes them in
            ascending order, padding at the end, which is what `ordered` returns; `prune` takes any order.
        source: int64 `[B, E]` (or `[E]`), the token that is added, kept or dropped; ignored at padding.
        weight: float32 `[B, E]` (or `[E]`), its factor; ignored at padding.
    """

    target: torch.Tensor
    source: torch.Tensor
    weight: torch.Tensor

    def ordered(self) -> Merge:
        """Sort the entries of each row by their target, padding last; entries of a target keep their order."""
        order = torch.where(self.target < 0, LAST_PLACE, self.target).argsort(dim=-1, stable=True)
        return Merge(*(part.gather(-1, order) for part in self))


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

    @property
    def merge(self) -> Merge | None:
        """The map by which kept tokens become sums of tokens; None where they stay as they are."""
        return None

    def merging(self, merge: Merge) -> MergingSelection:
        """Return this selection with a map by which its kept tokens become sums of tokens."""
        return MergingSelection(*self, merge)


class MergingSelection(Selection):
    """A selection some of whose kept tokens become sums of tokens; it unpacks into three like any other.

    Make one by `Selection.merging`; the targets and sources of the map count the same tokens as the mask.
    """

    _merge: Merge

    def __new__(cls, mask: torch.Tensor, indices: torch.Tensor, scores: torch.Tensor, merge: Merge) -> MergingSelection:
        made = super().__new__(cls, mask, indices, scores)
        made._merge = merge
        return made

    @property
    def merge(self) -> Merge:
        """The map by which kept tokens become sums of tokens."""
        return self._merge

    def __getnewargs__(self) -> Any:
        return (*self, self._merge)


Fields = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Mask, indices and scores, as an operator returns them."""


def as_selection(fields: Fields, batched: bool) -> Selection:
    """Make a `Selection` of what an operator returned, without the batch axis if the caller gave none."""
    mask, indices, scores = fields
    return Selection(mask, indices, scores) if batched else Selection(mask[0], indices[0], scores[0])


@lru_cache(maxsize=1024)
def keep_fraction(keep_ratio: float, rounding: str) -> tuple[int, int]:
    """Read a keep ratio as the fraction that its author meant, `(numerator, denominator)`, both below 2**31.

    0.29 is not a binary fraction, and `int(0.29 * 100)` is 28. Whoever writes `0.29` means 29/100, whoever writes
    `1 / 3` means a third, and whoever writes `1 - 0.8` means a fifth. So a ratio is read as the fraction with a
    denominator up to 2**25 that lies within the rounding error of such a subtraction, 2**-52. If there is none, its
    neighbour below (`floor`) or above (`ceil`) among the fractions with denominators below 2**31 is taken instead, or
    of these two the one with the larger denominator (`nearest`). This gives the count of the ratio itself for every row
    of fewer than 2**25 tokens, and for `nearest`, which also compares with halves, of fewer than 2**24.
    """
    exact = Fraction(keep_ratio)
    tolerance = _ROUNDING if exact * 2**12 >= 1 else exact / 2**40
    meant = exact.limit_denominator(_MAX_SIMPLE_DENOMINATOR)
    if abs(meant - exact) > tolerance:
        steps = {"floor": (-1,), "ceil": (1,), "nearest": (-1, 1)}[rounding]
        # of two neighbours one has a denominator above 2**30, so it lies between two tokens and no tie comes of it
        meant = max((_neighbour(exact, step) for step in steps), key=lambda fraction: fraction.denominator)
    return meant.numerator, meant.denominator


def _neighbour(exact: Fraction, step: int) -> Fraction:
    """Return the nearest fraction not above (-1) or not below (1) `exact`, its denominator below 2**31."""
    nearest = exact.limit_denominator(_MAX_DENOMINATOR)
    if nearest == exact or (nearest > exact) == (step == 1):
        return nearest
    # p/q is on the other side of `exact`, and for its neighbour a/b on this side a * q - p * b = step
    p, q = nearest.numerator, nearest.denominator
    denominator = _MAX_DENOMINATOR - (_MAX_DENOMINATOR + step * pow(p, -1, q)) % q
    return Fraction((p * denominator + step) // q, denominator)


def kept_count(r: float | int, num_candidates: int, rounding: str = "floor") -> int:
    """Count the tokens that are kept of `num_candidates`: by default `max(1, floor(r * num_candidates))`, at most all.

    Args:
        r: a float in (0, 1] is the fraction that is kept, an int >= 1 a budget (clamped to the candidates).
        num_candidates: candidates in the row; a row without any keeps none.
        rounding: "floor" (HAWK's paper), "ceil" (HAWK's release) or "nearest" (half to even, other releases).
    """
    if num_candidates == 0:
        return 0
    if isinstance(r, int):
        return min(r, num_candidates)
    kept: int = rounded_share(num_candidates, *keep_fraction(r, rounding), rounding)
    return max(1, kept)


def rounded_share(num_candidates: Any, numerator: int, denominator: int, rounding: str) -> Any:
    """Round `num_candidates * numerator / denominator` to an integer, with integers alone.

    Args:
        num_candidates: an int, also a symbolic one, or an int64 tensor, of which the result is one too; below 2**31.
        numerator, denominator: below 2**31.
        rounding: "floor", "ceil" or "nearest", which takes halves to the even neighbour.
    """
    product = num_candidates * numerator
    if rounding == "ceil":
        product = product + (denominator - 1)
    quotient = product // denominator
    if rounding == "nearest":
        # doubled, an odd quotient's tie lies above the half and an even one's on it
        doubled = (product - quotient * denominator) * 2 + quotient % 2
        quotient = quotient + (doubled + denominator - 1) // (2 * denominator)
    return quotient


def kept_counts(r: float | int, num_candidates: torch.Tensor, rounding: str) -> torch.Tensor:
    """Compute `kept_count` of every row on the device of `num_candidates` (int64 `[B]`), without a host sync."""
    if isinstance(r, int):
        # a budget may be any int, a tensor's bounds may not
        return num_candidates.clamp(max=min(r, _MAX_DENOMINATOR))
    counts = rounded_share(num_candidates, *keep_fraction(r, rounding), rounding)
    return torch.where(num_candidates > 0, counts.clamp(min=1), 0)


def max_kept(r: float | int, num_keys: int, rounding: str) -> int:
    """Return Kmax, the width of `Selection.indices`: what a row keeps if all its keys are candidates."""
    return kept_count(r, num_keys, rounding)
