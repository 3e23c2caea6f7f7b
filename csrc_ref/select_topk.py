"""Top-k with a defined order: a stable descending sort, nothing else."""

import math
from fractions import Fraction
from typing import NamedTuple

import torch


class Selection(NamedTuple):
    mask: torch.Tensor
    indices: torch.Tensor
    scores: torch.Tensor


def select_topk(scores, r, *, mask=None, rounding="floor"):
    """Keep the best `K_b = max(1, floor(r * M_b))` of each row's `M_b` candidates.

    Args:
        scores: `[B, M]` or `[M]`; higher is better, equal scores (`-0 == +0`) go to the lower index, NaN ranks last.
        r: float in (0, 1] = fraction kept, int >= 1 = budget (clamped to the candidates).
        mask: bool like `scores`, True = candidate.
        rounding: "floor" (paper), "ceil" (release) or "nearest" (half to even).

    Returns:
        `Selection(mask, indices, scores)`: bool like `scores`; int64 `[B, Kmax]` ascending, padded with -1; the scores
        with `-inf` at non-candidates.
    """
    if scores.dim() == 1:
        row = select_topk(scores[None], r, mask=None if mask is None else mask[None], rounding=rounding)
        return Selection(row.mask[0], row.indices[0], row.scores[0])

    batch, num_keys = scores.shape
    candidates = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    keep = torch.zeros_like(candidates)
    indices = torch.full((batch, _count(r, num_keys, rounding)), -1, dtype=torch.int64, device=scores.device)
    for b in range(batch):
        values = scores[b].tolist()
        row = [position for position in range(num_keys) if candidates[b, position]]
        budget = _count(r, len(row), rounding)
        kept = sorted(sorted(row, key=lambda position: _rank(values[position]))[:budget])
        keep[b, kept] = True
        indices[b, : len(kept)] = torch.tensor(kept, dtype=torch.int64, device=scores.device)
    return Selection(keep, indices, torch.where(candidates, scores, -torch.inf))


def _rank(score):
    """Sort key, best first; `sorted` is stable, so equal scores stay in index order."""
    return (1, 0.0) if math.isnan(score) else (0, -score)


def _count(r, num_candidates, rounding):
    """`K_b` of the paper (floor), of the release (ceil) or of other releases (nearest, half to even), at least 1.

    The ratio is a binary fraction beside the number that was written. Where `count / num_candidates` is `r` up to the
    rounding of `1 - 0.8`, that count was meant: 0.29 of 100 is 29. So is a half where the ratio is one.
    """
    if num_candidates == 0:
        return 0
    if isinstance(r, int):
        return min(r, num_candidates)
    product = Fraction(r) * num_candidates
    below, above = math.floor(product), math.ceil(product)
    if rounding == "nearest":
        is_half = _is_meant(2 * below + 1, 2 * num_candidates, r)
        return max(1, round(Fraction(2 * below + 1, 2)) if is_half else round(product))
    if rounding == "ceil":
        return max(1, below if _is_meant(below, num_candidates, r) else above)
    return max(1, above if _is_meant(above, num_candidates, r) else below)


def _is_meant(count, num_candidates, r):
    return abs(Fraction(count, num_candidates) - Fraction(r)) <= min(Fraction(1, 2**52), Fraction(r) / 2**40)
