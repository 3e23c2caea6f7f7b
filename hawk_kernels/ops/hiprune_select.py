"""Keep tokens as HiPrune does (arXiv 2508.00553): anchors, the buffers around them, and registers."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from hawk_kernels.ranking import LAST, order_key, rank
from hawk_kernels.selection import Selection, kept_count
from hawk_kernels.validation import as_written, check_device, check_rounding, check_tensor, checked_keep, shape_of

Grid = tuple[int, int] | tuple[int, int, int]
DROPPED, ANCHOR, BUFFER, REGISTER = range(4)
_MAX_ALPHA = 5.0
# Above every order-preserving key of a float32, so that tiers never overlap.
_TIER = 1 << 33


def hiprune_select(
    object_attention: torch.Tensor,
    deep_attention: torch.Tensor,
    r: float | int,
    *,
    grid: Grid | Sequence[Grid],
    alpha: float = 0.1,
    rounding: str = "floor",
) -> Selection:
    """Keep the tokens that a vision encoder itself attends to: HiPrune (arXiv 2508.00553), with an exact budget.

    Of `K = max(1, floor(r * M))` tokens, the `round(alpha * K / 5)` that receive the most attention in the object layer
    are anchors; their neighbours above, below, left and right, within their image and frame, are buffers; the rest
    are registers, those that receive the most in the deep layer. Exactly K tokens, always: where anchors and buffers
    exceed K, anchors come first, then buffers by object attention. Equal values (`-0 == +0`) go to the lower index, NaN
    ranks last.

    Args:
        object_attention: `[B, M]` or `[M]`, floating point, compared as float32: attention received in a middle layer.
        deep_attention: the same shape: attention received in the last layer.
        r: float in (0, 1] is the fraction of the M tokens **kept**; int >= 1 is a budget, at most M.
        grid: `(h, w)` of an image or `(t, h, w)` of a video, or one of these for each of a row's images, in order;
            the same for every row. The cells are the M tokens.
        alpha: share of the budget for anchors and buffers if no two of them coincide, in [0, 5]; at 5 all are anchors.
        rounding: `"floor"`, `"ceil"` or `"nearest"` (half to even), how `r` becomes K.

    Returns:
        `Selection(mask, indices, scores)`: bool `[B, M]`, int64 `[B, K]` ascending, and the deep attention as
        float32 `[B, M]`; without the leading B for unbatched input. None requires grad.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, range or name does not fit.
    """
    for name, attention in (("object_attention", object_attention), ("deep_attention", deep_attention)):
        check_tensor(name, attention)
        if not attention.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a floating point dtype, got {attention.dtype}; use {name}.float()")
        if attention.dim() not in (1, 2):
            raise ValueError(f"{name}: expected [B, M] or [M], got shape {shape_of(attention)}; average over the heads")
    if deep_attention.shape != object_attention.shape:
        raise ValueError(
            f"deep_attention: expected shape {shape_of(object_attention)} as object_attention, got "
            f"{shape_of(deep_attention)}; both are of the same tokens"
        )
    check_device("deep_attention", deep_attention, object_attention.device)
    num_tokens = object_attention.shape[-1]
    grids = checked_grids(grid)
    cells = sum(math.prod(one) for one in grids)
    if cells != num_tokens:
        raise ValueError(
            f"grid: expected {num_tokens} cells, one a token, got {cells} in {_shown(grids)}; count visual "
            "tokens, after any merge of patches"
        )
    ratio, budget = checked_keep(r, num_tokens, False)
    check_rounding(rounding)
    kept = kept_count(int(budget) or ratio, num_tokens, rounding)
    anchors = num_anchors(kept, checked_alpha(alpha))

    batched = object_attention.dim() == 2
    of_object, of_deep = (torch.atleast_2d(x.detach()).float() for x in (object_attention, deep_attention))
    device = object_attention.device
    choice = choose(of_object, of_deep, None, grid_neighbours(grids, device), kept, anchors, kept)
    return choice.selection if batched else Selection(*(field[0] for field in choice.selection))


class HiPruneChoice(NamedTuple):
    """A selection, and the role of each token in it.

    Attributes:
        selection: the kept tokens; its scores are the deep attention.
        roles: int8 `[B, M]`: `DROPPED`, `ANCHOR`, `BUFFER` or `REGISTER`.
    """

    selection: Selection
    roles: torch.Tensor


def choose(
    object_attention: torch.Tensor,
    deep_attention: torch.Tensor,
    candidates: torch.Tensor | None,
    neighbours: torch.Tensor,
    budget: torch.Tensor | int,
    anchors: torch.Tensor | int,
    width: int,
) -> HiPruneChoice:
    """Choose by validated arguments, with static shapes and without a host sync.

    Args:
        object_attention: float32 `[B, M]`.
        deep_attention: float32 `[B, M]`.
        candidates: bool `[B, M]`, or None where every token is one.
        neighbours: int64 `[1 or B, M, 4]`, M where there is none.
        budget: tokens kept, or int64 `[B, 1]`, at most the candidates of each row.
        anchors: number of anchors, or int64 `[B, 1]`, at most the budget.
        width: the largest budget.
    """
    batch, num_tokens = object_attention.shape
    object_key, deep_key = (order_key(x, candidates) for x in (object_attention, deep_attention))
    is_anchor = rank(object_key) < anchors
    # int8, because torch.compile's C++ does not build for bools that are padded and gathered
    reachable = torch.nn.functional.pad(is_anchor.to(torch.int8), (0, 1))
    around = neighbours.expand(batch, -1, -1).flatten(1)
    is_near = reachable.gather(1, around).view(batch, num_tokens, 4).any(dim=-1)

    tiered = torch.where(is_anchor, object_key + 2 * _TIER, torch.where(is_near, object_key + _TIER, deep_key))
    if candidates is not None:
        tiered = torch.where(candidates, tiered, LAST)
    kept = rank(tiered) < budget
    role = torch.where(is_anchor, ANCHOR, torch.where(is_near, BUFFER, REGISTER))
    roles = torch.where(kept, role, DROPPED).to(torch.int8)

    slot = torch.where(kept, kept.cumsum(dim=1) - 1, width)
    columns = torch.arange(num_tokens, device=slot.device).expand_as(slot)
    indices = slot.new_full((batch, width + 1), -1).scatter(1, slot, columns)[:, :width].contiguous()
    scores = deep_attention.clone() if candidates is None else deep_attention.masked_fill(~candidates, -torch.inf)
    return HiPruneChoice(Selection(kept, indices, scores), roles)


def num_anchors(kept: int, alpha: float) -> int:
    """Return the number of anchors among `kept` tokens, `round(alpha * kept / 5)`."""
    return round(alpha * kept / 5)


def grid_neighbours(grids: Sequence[tuple[int, int, int]], device: torch.device) -> torch.Tensor:
    """List the tokens above, below, left and right of each, int64 `[1, M, 4]`; M where the frame ends."""
    num_tokens = sum(math.prod(grid) for grid in grids)
    images, start = [], 0
    for frames, height, width in grids:
        inside = torch.arange(frames * height * width, device=device)
        column, line = inside % width, inside // width % height
        token = inside + start
        around = (
            torch.where(line > 0, token - width, num_tokens),
            torch.where(line < height - 1, token + width, num_tokens),
            torch.where(column > 0, token - 1, num_tokens),
            torch.where(column < width - 1, token + 1, num_tokens),
        )
        images.append(torch.stack(around, dim=-1))
        start += frames * height * width
    return torch.cat(images).unsqueeze(0)


def checked_alpha(alpha: float) -> float:
    """Return `alpha`, or raise an error if it is not a number in [0, 5]."""
    expected = "alpha: expected a number in [0, 5], of which a fifth is the share of anchors in the budget"
    if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real):
        raise TypeError(f"{expected}, got {type(alpha).__name__}; the paper uses 0.1")
    if not 0.0 <= alpha <= _MAX_ALPHA:
        raise ValueError(f"{expected}, got {alpha}; the paper uses 0.1")
    return as_written(alpha)


def checked_grids(grid: Grid | Sequence[Grid]) -> list[tuple[int, int, int]]:
    """Return every image of a grid argument as `(t, h, w)`, or raise an error."""
    expected = "grid: expected (h, w), (t, h, w), or a sequence with one of these an image"
    if isinstance(grid, torch.Tensor):
        raise TypeError(f"{expected}, got a Tensor; read it first: grid.tolist() waits for the device")
    if not isinstance(grid, Sequence) or isinstance(grid, str):
        raise TypeError(f"{expected}, got {type(grid).__name__}; use a tuple of ints")
    if len(grid) == 0:
        raise ValueError(f"{expected}, got an empty {type(grid).__name__}; an image has at least one token")
    single = all(isinstance(side, numbers.Integral) for side in grid)
    images: Sequence[Any] = [grid] if single else grid
    grids = []
    for one in images:
        if not isinstance(one, Sequence) or not all(
            isinstance(side, numbers.Integral) and not isinstance(side, bool) for side in one
        ):
            raise TypeError(f"{expected}, got {one!r} in it; use a tuple of ints")
        if len(one) not in (2, 3) or min(one) < 1:
            raise ValueError(f"{expected}, got {tuple(one)}; every side is at least 1")
        frames, height, width = (1, *one) if len(one) == 2 else one
        grids.append((int(frames), int(height), int(width)))
    return grids


def _shown(grids: list[tuple[int, int, int]]) -> str:
    shown = ", ".join(str(grid) for grid in grids[:4])
    return f"{shown}, ... ({len(grids)} images)" if len(grids) > 4 else shown
