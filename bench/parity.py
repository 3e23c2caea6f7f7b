"""What must hold before a time is printed: the kept tokens are those of float64, to the contender's own rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import csrc_ref
from hawk_kernels import Selection

# Scores in float32 of exact inputs, relative to the largest score.
FLOAT32_ERROR = 4e-6


@dataclass(frozen=True)
class Parity:
    """How far a contender is from float64.

    Attributes:
        error: by how much the worst token that it kept scores below the worst that it should have kept, and where it
            gives scores the largest error of these; both relative to the largest score.
        differing: kept tokens that float64 would not have kept.
    """

    error: float
    differing: int


class ParityError(AssertionError):
    """Raised when a contender computes something else."""


def check_kept(indices: torch.Tensor, expected: torch.Tensor, tolerance: float) -> Parity:
    """Parity of kept indices `[B, K]`, in any order, with float64 scores `[B, M]`, `-inf` at non-candidates.

    Raises:
        ParityError: an index twice or out of range, or a token kept in place of one that is better by more than
            `tolerance` times the largest score.
    """
    indices = indices.long()
    count, num_keys = indices.shape[1], expected.shape[1]
    ordered = indices.sort(dim=1).values
    if ordered.min() < 0 or ordered.max() >= num_keys or bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise ParityError(f"indices: expected {count} different ones below {num_keys}, got others")
    best = expected.topk(count, dim=1)
    shortfall = best.values[:, -1] - expected.gather(1, indices).amin(dim=1)
    largest = expected.masked_fill(expected.isinf(), 0.0).abs().amax(dim=1)
    error = (shortfall / largest).max().item()
    kept = torch.zeros_like(expected, dtype=torch.bool).scatter_(1, indices, True)
    differing = indices.numel() - int(kept.gather(1, best.indices).sum())
    if not error <= tolerance:
        raise ParityError(f"kept a token that scores {error:.1e} below the one left out, allowed is {tolerance:.0e}")
    return Parity(error, differing)


def check_selection(
    selection: Selection,
    expected: torch.Tensor,
    r: float | int,
    *,
    mask: torch.Tensor | None = None,
    rounding: str = "floor",
    tolerance: float = FLOAT32_ERROR,
) -> float:
    """Error of a selection's scores relative to the largest; the rest must be exact.

    Args:
        selection: what is checked, `[B, M]`.
        expected: float64 scores `[B, M]`, `-inf` at non-candidates.
        r, mask, rounding: as in `select_topk`; mask is `k_mask`.
        tolerance: of the error.

    Raises:
        ParityError: scores further away, or a selection that is not the stable sort of the scores it came with.
    """
    scores = selection.scores
    finite = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(scores), finite):
        raise ParityError("scores: finite where they should not be, or the other way round")
    error = 0.0
    if finite.any():
        largest = expected[finite].abs().max().clamp(min=1e-30)
        error = ((scores.double() - expected)[finite].abs().max() / largest).item()
    if not error <= tolerance:
        raise ParityError(f"scores are off by {error:.1e} of the largest, allowed is {tolerance:.0e}")
    exact = csrc_ref.select_topk(scores.cpu(), r, mask=None if mask is None else mask.cpu(), rounding=rounding)
    if not torch.equal(selection.mask.cpu(), exact.mask) or not torch.equal(selection.indices.cpu(), exact.indices):
        raise ParityError("mask, indices: not the stable sort of the scores beside them")
    return error
