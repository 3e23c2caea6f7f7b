"""Top-k of given scores with a defined order: the public function and its checks."""

from __future__ import annotations

import torch

from hawk_kernels.backends.choose import choose_backend
from hawk_kernels.ops import registration as ops
from hawk_kernels.selection import Selection
from hawk_kernels.validation import check_mask, check_rounding, check_tensor, checked_keep, shape_of


def select_topk(
    scores: torch.Tensor,
    r: float | int,
    *,
    mask: torch.Tensor | None = None,
    rounding: str = "floor",
) -> Selection:
    """Keep the best tokens by given scores, the second half of `score_and_select`.

    Args:
        scores: `[B, M]` or `[M]`, floating point, compared as float32; higher is better, equal scores (`-0 == +0`)
            go to the lower index, NaN ranks last.
        r: as in `score_and_select`.
        mask: bool like `scores`, True = candidate; a token outside is never kept, whatever its score.
        rounding: `"floor"` or `"ceil"`.

    Returns:
        `Selection(mask, indices, scores)` as `score_and_select`.

    Raises:
        TypeError, ValueError: as `score_and_select`.
    """
    check_tensor("scores", scores)
    if not scores.dtype.is_floating_point:
        raise TypeError(f"scores: expected a floating point dtype, got {scores.dtype}; use scores.float()")
    if scores.dim() not in (1, 2):
        raise ValueError(f"scores: expected [B, M] or [M], got shape {shape_of(scores)}; one row a sample")
    batched = scores.dim() == 2
    if mask is not None:
        check_mask("mask", mask, tuple(scores.shape), "one entry a score", scores.device)
    ratio, budget = checked_keep(r, scores.shape[-1], mask is not None)
    check_rounding(rounding)
    if not batched:
        scores, mask = scores.unsqueeze(0), None if mask is None else mask.unsqueeze(0)
    selected = ops.select_topk(
        scores.detach().float(), mask, ratio, budget, rounding, choose_backend(None, scores.device)
    )
    return as_selection(selected, batched)


def as_selection(selected: tuple[torch.Tensor, torch.Tensor, torch.Tensor], batched: bool) -> Selection:
    """What an operator returned, without the batch axis where the caller gave none."""
    mask, indices, scores = selected
    return Selection(mask, indices, scores) if batched else Selection(mask[0], indices[0], scores[0])
