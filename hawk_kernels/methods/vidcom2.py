"""VidCom2: unusual tokens, and more of them in unusual frames (arXiv 2505.14454)."""

from __future__ import annotations

import numpy as np
import torch

from hawk_kernels.methods.base import JointMethod, candidates_of_units, of_rows, of_units, register
from hawk_kernels.methods.prefill_view import PrefillView
from hawk_kernels.ops.select_topk import select_topk
from hawk_kernels.ranking import order_key, rank
from hawk_kernels.selection import Selection
from hawk_kernels.validation import check_rounding

_TEMPERATURE = 0.01
_STEPS = 65536
_WIDTHS = tuple(2.0**k for k in range(-3, 2))


@register
class VidCom2(JointMethod):
    """Keeps the tokens that are least like their frame and their video, and most of them in the most unusual frames.

    Of the embeddings that enter the language model, the half of the channels that vary least over the video counts;
    `x[i]` are the tokens in these channels, scaled to length 1, `c` is their mean and `c[t]` the mean of frame `t`.
    With `g(d) = sum_a exp(-d^2 / 2a)` over `a = 1/8, 1/4, 1/2, 1, 2`, a token's likeness is
    `g(|x[i] - c|) + g(|x[i] - c[t]|)`. A frame's uniqueness is `u[t] = -mean_i g(|x[i] - c|)` over its tokens, and of
    `T` frames with `p = softmax(u / 0.01)` each keeps `r (1 + p[t] - 1/T)` of its tokens (Liu et al., "Video
    Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models", arXiv 2505.14454, and
    github xuyang-liu16/VidCom2).

    The release rounds each frame's share by itself, keeps at least one token of each, and lets the total come out as it
    may. Here the budget is met exactly: shares are rounded by Webster's method, which gives the counts of the release
    wherever these add up to the budget, and every frame keeps one token if the budget allows. What a full frame cannot
    take goes to the others. A still image is a video of one frame, which keeps its most unusual tokens. Where the
    frames are not known (see `EVS`), a video counts as one. Images that share a budget are frames of one video.

    Args:
        rounding: "floor", "ceil" or "nearest" (half to even), for the whole budget.

    Raises:
        ValueError: an option that is none of these.
    """

    name = "vidcom2"
    summary = "Keeps tokens that are unlike their frame and their video, and more of them in unusual frames."
    paper = "2505.14454"
    signal = "embeddings of the whole video"
    uses_grids = True

    def __init__(self, rounding: str = "floor") -> None:
        check_rounding(rounding)
        self.rounding = rounding

    def select(self, view: PrefillView, r: float | int) -> Selection:
        candidates = candidates_of_units(view)
        rows = view.frames()
        units = [image for row in rows for image in row]
        if view.segments is None:
            units = [[frame for image in row for frame in image] for row in rows]
        sizes = [[height * width for height, width in frames] for frames in units]
        frame_of, starts = (
            torch.from_numpy(x).to(candidates.device, non_blocking=True) for x in _layout(sizes, candidates.shape[1])
        )
        of_video, likeness = likenesses(of_units(view.visual_embeddings(), view), frame_of, starts.shape[1], candidates)
        weights = frame_weights(of_video, frame_of, starts.shape[1], candidates)
        key = webster_key(-likeness, weights, frame_of, starts, candidates)
        kept = select_topk(key, r, mask=candidates, rounding=self.rounding)
        scores = (-likeness).masked_fill(~candidates, -torch.inf)
        return of_rows(Selection(kept.mask, kept.indices, scores), view)


def _layout(sizes: list[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Number the frames of each unit: the frame of each token, int64 `[U, width]`, and where frames start, `[U, T]`.

    Padding belongs to the last frame; a unit with fewer frames than others has empty ones at its end.
    """
    most = max(1, *(len(unit) for unit in sizes))
    frame_of = np.full((len(sizes), width), most - 1)
    starts = np.full((len(sizes), most), width)
    for unit, lengths in enumerate(sizes):
        ends = np.cumsum(lengths)
        starts[unit, : len(lengths)] = ends - lengths
        frame_of[unit, : sum(lengths)] = np.repeat(np.arange(len(lengths)), lengths)
    return frame_of, starts


def likenesses(
    embeddings: torch.Tensor, frame_of: torch.Tensor, num_frames: int, candidates: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Measure how like its video, and how like its video and its frame, each token is, both float32 `[U, L]`.

    Args:
        embeddings: `[U, L, hidden]`; tokens that are not finite are NaN, and count for no other token.
        frame_of: int64 `[U, L]`.
        num_frames: of the longest video.
        candidates: bool `[U, L]`.
    """
    embeddings = embeddings.float()
    finite = embeddings.isfinite().all(dim=-1)
    counts = (finite & candidates).float()
    total = counts.sum(dim=1, keepdim=True).clamp(min=1)
    seen = embeddings.masked_fill(~(finite & candidates).unsqueeze(-1), 0)
    mean = seen.sum(dim=1, keepdim=True) / total.unsqueeze(-1)
    spread = ((seen - mean) ** 2 * counts.unsqueeze(-1)).sum(dim=1)
    steady = spread.argsort(dim=1, stable=True)[:, : max(1, embeddings.shape[2] // 2)]
    steady = steady.sort(dim=1).values.unsqueeze(1).expand(-1, embeddings.shape[1], -1)
    unit = torch.nn.functional.normalize(seen.gather(2, steady), dim=-1)
    of_video = unit.sum(dim=1, keepdim=True) / total.unsqueeze(-1)
    shape = (unit.shape[0], num_frames, unit.shape[2])
    where = frame_of.unsqueeze(-1).expand_as(unit)
    in_frame = counts.new_zeros(shape[:2]).scatter_add_(1, frame_of, counts).clamp(min=1).unsqueeze(-1)
    of_frame = unit.new_zeros(shape).scatter_add_(1, where, unit) / in_frame
    video, frame = _gaussians(unit - of_video), _gaussians(unit - of_frame.gather(1, where))
    return video.masked_fill(~finite, torch.nan), (video + frame).masked_fill(~finite, torch.nan)


def _gaussians(difference: torch.Tensor) -> torch.Tensor:
    squared = (difference**2).sum(dim=-1)
    return torch.stack([torch.exp(-squared / (2 * width)) for width in _WIDTHS]).sum(dim=0)


def frame_weights(
    of_video: torch.Tensor, frame_of: torch.Tensor, num_frames: int, candidates: torch.Tensor
) -> torch.Tensor:
    """Weigh the frames of each video by their tokens and their uniqueness, float64 `[U, T]`; 0 for no frame.

    Shares are rounded to 1/65536, so that frames which are alike have equal ones, whatever the noise of float32.

    Args:
        of_video: float32 `[U, L]`, how like its video each token is.
        frame_of, num_frames, candidates: as in `likenesses`.
    """
    counted = candidates & of_video.isfinite()
    zeros = torch.zeros(len(of_video), num_frames, dtype=torch.float64, device=of_video.device)
    # in float64 the sums of float32 numbers do not depend on the order of the terms
    likeness = zeros.scatter_add(1, frame_of, of_video.masked_fill(~counted, 0).double())
    sizes, known = (zeros.scatter_add(1, frame_of, mask.double()) for mask in (candidates, counted))
    uniqueness = -likeness / known.clamp(min=1)
    share = torch.softmax((uniqueness / _TEMPERATURE).masked_fill(sizes == 0, -torch.inf), dim=1)
    # a unit without tokens has no shares
    share = (share.nan_to_num(0.0) * _STEPS).round() / _STEPS
    evenly = 1 / (sizes > 0).sum(dim=1, keepdim=True).clamp(min=1).double()
    return (sizes * (1 + share - evenly)).masked_fill(sizes == 0, 0)


def webster_key(
    scores: torch.Tensor, weights: torch.Tensor, frame_of: torch.Tensor, starts: torch.Tensor, candidates: torch.Tensor
) -> torch.Tensor:
    """Rank tokens so that the first `k`, for any `k`, are each frame's best in Webster's proportion to its weight.

    The `j`-th token of a frame, counted from 0, has the quotient `weight / (j + 1/2)`; each frame's best token comes
    before all others.

    Args:
        scores: float32 `[U, L]`, higher is better within a frame; NaN last.
        weights: float64 `[U, T]`.
        frame_of: int64 `[U, L]`.
        starts: int64 `[U, T]`, where frames start.
        candidates: bool `[U, L]`.

    Returns:
        float32 `[U, L]`.
    """
    length = scores.shape[1]
    place = rank(-(frame_of * (length + 1) + rank(order_key(scores, candidates)))) - starts.gather(1, frame_of)
    relative = weights / weights.amax(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    quotient = relative.gather(1, frame_of) / (place + 0.5)
    # NaN tokens come after those of every frame
    return torch.where(place == 0, quotient + 3, quotient).float().masked_fill(scores.isnan(), torch.nan)
