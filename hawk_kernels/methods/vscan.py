"""VScan: what CLS attends to in the picture and its windows, then a second choice mid-decoder (arXiv 2505.22654)."""

from __future__ import annotations

import numbers

import numpy as np
import torch

from hawk_kernels.methods.base import (
    Keep,
    Method,
    attention_of_last_token,
    candidates_of_units,
    checked_int,
    checked_share,
    of_rows,
    of_units,
    product,
    register,
    selected,
)
from hawk_kernels.methods.fastervlm import checked_cls_layer
from hawk_kernels.methods.prefill_view import LocalAttention, PrefillView
from hawk_kernels.ranking import order_key, rank
from hawk_kernels.selection import Merge, Selection, keep_fraction, kept_counts, max_kept
from hawk_kernels.validation import as_written, check_rounding

Grid = tuple[int, int, int]

ALLOCATIONS = ("paper", "release")
# visual tokens along the side of a window: of LLaVA, and of Qwen2.5-VL, whose encoder has no CLS
_WINDOW, _WINDOW_WITHOUT_CLS = 6, 4


@register
class VScan(Method):
    """Scans the picture and each of its windows in the vision encoder, merges the rest, and drops again in the middle.

    Stage one chooses before the first layer. Half of its budget goes to the local scan: the picture is divided into
    windows that share it evenly, and each keeps the tokens that CLS attends to most in a shallow layer of the encoder
    (eq. 3). The other half goes to the global scan: those of the other tokens that CLS attends to most in the last
    layer that the visual tokens come from (eq. 1 and 2). In an encoder without CLS it is the attention that a token
    receives. Each token that neither scan keeps goes to the kept one with the most similar embedding, and a kept token
    becomes the mean of itself and those that came to it (eq. 4). Stage two drops tokens after the middle layer of the
    decoder, by the attention of the last token of the prompt, averaged over heads (eq. 5). (Zhang et al., "VScan:
    Rethinking Visual Token Reduction for Efficient Large Vision-Language Models", TMLR 2026, arXiv 2505.22654.)

    `keep_ratio` is what is left in the end, and stage one keeps `1 / second` times as much: `prune(model, 32,
    method="vscan")` keeps 96 tokens and then 32, the authors' setting for LLaVA-1.5, which is 64 on average over the
    layers. To set both numbers, name the stages: `prune(model, {0: 0.5, 16: 0.2}, method="vscan")`. Either stage may
    stand alone, or beside another method.

    Where the paper is silent, this follows the release, github Tencent/SelfEvolvingAgent. The local scan comes first,
    and the global one chooses among the rest, so that a token is not counted twice. Windows have 6 x 6 tokens in LLaVA
    and 4 x 4 in Qwen2.5-VL, and the last one of a line or column takes what is left over. The embeddings that the
    projector made are merged, not the rows that enter it. Stage two ranks by the layer that follows it.

    The release differs from the paper in three ways. Where the windows do not divide the budget, it keeps fewer tokens
    than asked for in LLaVA, and in Qwen2.5-VL takes tokens in the order of their attention, from each window at most
    the even share rounded up, so that the last windows may go without; `allocation="release"` does the latter. Here
    the shares of windows differ by one token at most, and those with the highest next attention have one more. In
    Qwen2.5-VL it ranks by queries and keys before RoPE in stage two, which is not the attention of the layer. In LLaVA
    it numbers the kept tokens anew; here they keep their position ids.

    Args:
        second: share of stage one's tokens that stay after the middle layer, in (0, 1]; 1 leaves stage two out.
        layer: the last layer that reads what stage two drops, counted from 1; None takes half of the depth, which is 16
            of 32 and 14 of 28 as in the paper.
        local: share of stage one's budget that the local scan takes, in [0, 1).
        window: visual tokens along the side of a window; None takes 6 where the encoder has CLS, and else 4.
        allocation: "paper" or "release", how windows share the budget of the local scan.
        local_layer: encoder layer of the local scan, counted from 1; None takes the last of its first quarter, 6 of
            24 and 8 of 32 as in the paper.
        cls_layer: encoder layer of the global scan, counted from 1; None takes that of the visual features.
        rounding: "floor", "ceil" or "nearest" (half to even).

    Raises:
        TypeError, ValueError: an option that is none of these.
    """

    name = "vscan"
    summary = "Keeps what CLS attends to in the picture and in each window, later what the last token attends to."
    paper = "2505.22654"
    signal = "CLS attention in two encoder layers; attention of the last token in the middle"
    uses_cls_attention = True
    uses_local_attention = True
    stage_options = ("second", "layer")

    def __init__(
        self,
        second: float = 1 / 3,
        layer: int | None = None,
        local: float = 0.5,
        window: int | None = None,
        allocation: str = "paper",
        local_layer: int | None = None,
        cls_layer: int | None = None,
        rounding: str = "floor",
    ) -> None:
        self.second = _checked_second(second)
        if layer is not None:
            expected = "layer: expected the last layer that reads what stage two drops, counted from 1, or None"
            layer = checked_int(layer, 1, expected, "the paper takes the middle one, as None does")
        self.layer = layer
        self.local = checked_share("local", local, "the paper takes 0.5")
        if window is not None:
            window = checked_int(window, 1, "window: expected an int >= 1 or None", "the release takes 6 and 4")
        self.window = window
        if allocation not in ALLOCATIONS:
            raise ValueError(f"allocation: expected 'paper' or 'release', got {allocation!r}; the paper's is even")
        self.allocation = allocation
        if local_layer is not None:
            expected = "local_layer: expected a layer of the vision encoder, counted from 1, or None for a quarter"
            local_layer = checked_int(local_layer, 1, expected, "the paper takes 6 of 24, as None does")
        self.local_layer = local_layer
        self.cls_layer = checked_cls_layer(cls_layer)
        self.rounding = check_rounding(rounding)

    def stages(self, keep_ratio: float | int, depth: int) -> dict[int, Keep]:
        if self.second == 1:
            return {0: keep_ratio}
        if depth < 2:
            raise ValueError(f"second: expected 1 for a text model of {depth} layer, got {self.second}; pass second=1")
        inside = self.layer or depth // 2
        numerator, denominator = keep_fraction(self.second, "floor")
        if isinstance(keep_ratio, int):
            return {0: keep_ratio * denominator // numerator, inside: keep_ratio}
        first = keep_ratio * denominator / numerator
        # a stage that keeps everything has nothing to merge
        return {inside: keep_ratio} if first >= 1 else {0: first, inside: keep_ratio}

    def at_layer(self, layer: int) -> Method:
        return self if layer == 0 else _MiddleLayer(self)

    def score(self, view: PrefillView) -> torch.Tensor:
        return view.cls_attention().masked_fill(~view.candidates, -torch.inf)

    def select(self, view: PrefillView, r: float | int) -> Selection:
        candidates = candidates_of_units(view)
        shallow = view.local_attention()
        side = self.window or (_WINDOW if shallow.has_cls else _WINDOW_WITHOUT_CLS)
        selection = vscan_select(
            of_units(view.cls_attention(), view),
            of_units(shallow.attention, view),
            of_units(view.visual_embeddings(), view),
            r,
            mask=candidates,
            windows=windows_of(_grids_of_units(shallow, view), side, candidates.shape[1]).to(
                candidates.device, non_blocking=True
            ),
            local=self.local,
            allocation=self.allocation,
            rounding=self.rounding,
        )
        return of_rows(selection, view)


class _MiddleLayer(Method):
    """Ranks by the attention of the last token: stage two of VScan (eq. 5).

    Args:
        whole: the method that this is a stage of.
    """

    name = VScan.name
    uses_positions = True
    inside_only = True

    def __init__(self, whole: VScan) -> None:
        self.rounding = whole.rounding
        self._whole = whole

    def score(self, view: PrefillView) -> torch.Tensor:
        return attention_of_last_token(view)

    def at_layer(self, layer: int) -> Method:
        return self._whole.at_layer(layer)

    def options(self) -> dict[str, object]:
        return self._whole.options()


def _checked_second(value: object) -> float:
    expected, remedy = "second: expected a number in (0, 1], the share that stays", "the paper takes 1/3"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{expected}, got {type(value).__name__}; {remedy}")
    second = as_written(value)
    if not 0 < second <= 1:
        raise ValueError(f"{expected}, got {second}; {remedy}")
    return second


def vscan_select(
    of_picture: torch.Tensor,
    of_windows: torch.Tensor,
    embeddings: torch.Tensor,
    r: float | int,
    *,
    mask: torch.Tensor,
    windows: torch.Tensor,
    local: float = 0.5,
    allocation: str = "paper",
    rounding: str = "floor",
) -> Selection:
    """Choose by both scans, and merge every other token into the most similar one that was chosen.

    Args:
        of_picture: float32 `[U, L]`, attention in the deep layer, NaN ranks last.
        of_windows: float32 `[U, L]`, in the shallow layer, likewise.
        embeddings: `[U, L, hidden]`; a token that is not finite has cosine 0 with every other.
        r: fraction of a unit's candidates that is kept, or the budget.
        mask: bool `[U, L]`, True = candidate.
        windows: int64 `[U, L]`, the window of each token, from 0; ignored at padding.
        local: share of the budget for the local scan.
        allocation: "paper" or "release".
        rounding: "floor", "ceil" or "nearest" (half to even).

    Returns:
        `Selection(mask, indices, scores)`, scored by `of_picture`, with a merge map of one entry for each candidate.
    """
    length = mask.shape[1]
    budget = kept_counts(r, mask.sum(dim=1, keepdim=True), rounding)
    numerator, denominator = keep_fraction(local, "floor") if local else (0, 1)
    of_scan = torch.div(budget * numerator, denominator, rounding_mode="floor")
    scanned = _local_scan(of_windows, of_scan, mask, windows, allocation)
    rest = mask & ~scanned
    kept = scanned | (rest & (rank(order_key(of_picture, rest)) < budget - of_scan))
    found = selected(kept, of_picture.masked_fill(~mask, -torch.inf), max_kept(r, length, rounding))

    unit = embeddings.float()
    unit = unit.masked_fill(~unit.isfinite().all(dim=2, keepdim=True), 0)
    unit = torch.nn.functional.normalize(unit, dim=2)
    chosen = found.indices.clamp(min=0)
    of_chosen = unit.gather(1, chosen.unsqueeze(2).expand(-1, -1, unit.shape[2]))
    cosine = product(unit, of_chosen.transpose(1, 2)).masked_fill((found.indices < 0).unsqueeze(1), -torch.inf)
    own = torch.arange(length, device=mask.device).expand_as(mask)
    target = torch.where(kept, own, chosen.gather(1, cosine.argmax(dim=2)))
    size = torch.zeros_like(found.scores).scatter_add_(1, target, mask.float())
    weight = 1 / size.gather(1, target).clamp(min=1)
    return found.merging(Merge(torch.where(mask, target, -1), own.contiguous(), weight))


def _local_scan(
    attention: torch.Tensor, budget: torch.Tensor, mask: torch.Tensor, windows: torch.Tensor, allocation: str
) -> torch.Tensor:
    """Mark the tokens that the windows keep, bool `[U, L]`.

    Args:
        attention: float32 `[U, L]`.
        budget: int64 `[U, 1]`, of all windows of a unit together.
        mask: bool `[U, L]`.
        windows: int64 `[U, L]`.
        allocation: "paper" or "release".
    """
    length = mask.shape[1]
    order = rank(order_key(attention, mask))
    # padding stands after all windows
    window = torch.where(mask, windows, length)
    tokens = torch.zeros(len(mask), length + 2, dtype=torch.int64, device=mask.device)
    tokens.scatter_add_(1, window + 1, torch.ones_like(window))
    in_window = rank(-(window * (length + 1) + order)) - tokens.cumsum(dim=1).gather(1, window)
    if allocation == "paper":
        key = in_window * (length + 1) + order
    else:
        of_windows = (tokens[:, 1:-1] > 0).sum(dim=1, keepdim=True).clamp(min=1)
        share = torch.div(budget + of_windows - 1, of_windows, rounding_mode="floor")
        key = torch.where(in_window < share, order, order + length)
    return mask & (rank(torch.where(mask, -key, -(2 * (length + 1) ** 2))) < budget)


def _grids_of_units(shallow: LocalAttention, view: PrefillView) -> list[list[Grid]]:
    """List the grids on which the tokens of each unit stand, in their order."""
    if view.segments is None:
        return [[grid for image in row for grid in image] for row in shallow.grids]
    return [image for row in shallow.grids for image in row]


def windows_of(units: list[list[Grid]], side: int, width: int) -> torch.Tensor:
    """Number the windows of each unit, and return that of each token, int64 `[U, width]` on the host.

    The windows of a frame are squares of `side` tokens; the last of each line and column takes what is left over.

    Args:
        units: for each unit its grids `(t, h, w)`.
        side: tokens along the side of a window.
        width: tokens of a unit, padding included.
    """
    found = np.zeros((len(units), width), dtype=np.int64)
    for unit, grids in zip(found, units, strict=True):
        start = first = 0
        for frames, height, breadth in grids:
            lines, columns = max(1, height // side), max(1, breadth // side)
            y, x = np.indices((height, breadth))
            window = np.minimum(y // side, lines - 1) * columns + np.minimum(x // side, columns - 1)
            stop = start + frames * height * breadth
            of_frames = np.arange(frames)[:, None] * (lines * columns) + window.ravel()
            unit[start:stop] = first + of_frames.ravel()
            start, first = stop, first + frames * lines * columns
    return torch.from_numpy(found)
