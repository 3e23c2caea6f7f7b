"""Top-k of given scores in PyTorch, with a defined order of ties and NaN."""

from __future__ import annotations

import numpy as np
import torch

from hawk_kernels.selection import Selection, kept_counts, max_kept

_INT32_MIN = -(2**31)


def select_topk(scores: torch.Tensor, r: float | int, mask: torch.Tensor | None, rounding: str) -> Selection:
    """Selection of validated float32 scores `[B, M]`; without a mask every token is a candidate."""
    own_scores = scores.clone(memory_format=torch.contiguous_format)
    if mask is not None:
        own_scores.masked_fill_(~mask, -torch.inf)
    return select(own_scores, r, mask, rounding)


def select(
    scores: torch.Tensor, r: float | int, mask: torch.Tensor | None, rounding: str, width: int | None = None
) -> Selection:
    """As `select_topk`, for scores that are `-inf` outside the mask and may be returned as they are.

    `width` is Kmax, for a caller that has it already.
    """
    if width is None:
        width = max_kept(r, scores.shape[1], rounding)
    if width == 0 or scores.shape[0] == 0:
        return Selection(
            torch.zeros_like(scores, dtype=torch.bool),
            scores.new_empty(scores.shape[0], width, dtype=torch.int64),
            scores,
        )
    if scores.is_cpu:
        if mask is None and scores.shape[0] == 1:
            untied = _untied_row(scores, width)
        else:
            untied = _untied_top(scores, r, mask, rounding, width)
        if untied is not None:
            return untied
    return _ranked_top(scores, r, mask, rounding, width)


def _untied_row(scores: torch.Tensor, width: int) -> Selection | None:
    """As `_untied_top`, for one row whose tokens are all candidates, which takes fewer calls."""
    values = scores.numpy()
    place = values.shape[1] - width
    in_order = values.copy()
    in_order.partition(place)
    keep = values >= in_order[0, place]
    positions = keep.ravel().nonzero()[0]
    if len(positions) != width:
        return None
    return Selection(torch.from_numpy(keep), torch.from_numpy(positions.reshape(1, width)), scores)


def _untied_top(
    scores: torch.Tensor, r: float | int, mask: torch.Tensor | None, rounding: str, width: int
) -> Selection | None:
    """The scores that reach a row's threshold, or None where a tie or a NaN makes them more or fewer than its budget.

    NumPy partitions in a tenth of the time that `torch.topk` takes. Reading values is no host sync on a CPU.
    """
    values = scores.numpy()
    num_rows, num_keys = values.shape
    if mask is None:
        budgets = np.array([width])
        in_order = values.copy()
        in_order.partition(num_keys - width)
        keep = values >= in_order[:, num_keys - width, None]
    else:
        budgets = kept_counts(r, mask.sum(dim=1), rounding).numpy()
        if not budgets.all():
            return None
        places = num_keys - budgets
        keep = values >= [[np.partition(row, place)[place]] for row, place in zip(values, places, strict=True)]
    positions = keep.ravel().nonzero()[0]
    # The counts of the rows matter, not their sum: a NaN makes one too small, a tie another too large.
    if num_rows > 1:
        if (keep.sum(axis=1) != budgets).any():
            return None
        positions %= num_keys
    elif len(positions) != budgets[0]:
        return None
    if len(positions) < num_rows * width:
        packed, positions = positions, np.full((num_rows, width), -1)
        positions[np.arange(width) < budgets[:, None]] = packed
    return Selection(torch.from_numpy(keep), torch.from_numpy(positions).view(num_rows, width), scores)


def _ranked_top(
    scores: torch.Tensor, r: float | int, mask: torch.Tensor | None, rounding: str, width: int
) -> Selection:
    """The best by an order-preserving integer key; ties by a running count, so lower indices win. Static shapes."""
    bits = (scores + 0.0).view(torch.int32)  # -0 + 0 is +0
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key.masked_fill_(scores.isnan(), _INT32_MIN + 1)
    if mask is None:
        num_candidates = torch.full((scores.shape[0],), scores.shape[1], dtype=torch.int64, device=scores.device)
    else:
        key.masked_fill_(~mask, _INT32_MIN)
        num_candidates = mask.sum(dim=1)
    budget = kept_counts(r, num_candidates, rounding)[:, None]

    best = key.topk(width, dim=1).values
    threshold = best.gather(1, (budget - 1).clamp_(min=0))
    above = key > threshold
    tied = key == threshold
    tie_rank = tied.cumsum(dim=1)
    keep = above | (tied & (tie_rank <= budget - above.sum(dim=1, keepdim=True)))
    keep &= budget > 0

    position = torch.where(keep, keep.cumsum(dim=1) - 1, width)
    indices = torch.full((scores.shape[0], width + 1), -1, dtype=torch.int64, device=scores.device)
    columns = torch.arange(scores.shape[1], device=scores.device).expand_as(position)
    indices.scatter_(1, position, columns)
    return Selection(keep, indices[:, :width].contiguous(), scores)
