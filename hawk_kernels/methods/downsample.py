"""Uniform down-sampling: an even grid of tokens, whatever the picture shows and the question asks."""

from __future__ import annotations

import math

import torch

from hawk_kernels.methods.base import JointMethod, candidates_of_units, of_rows, register
from hawk_kernels.methods.prefill_view import PrefillView
from hawk_kernels.selection import Selection, max_kept
from hawk_kernels.validation import check_rounding

Frame = tuple[int, int]


@register
class Downsample(JointMethod):
    """Keeps tokens that are evenly spread over every image and video.

    A budget is shared by the images of a row, and by the frames of a video, in proportion to their tokens. The `k`
    kept tokens of an `h x w` frame stand on `round(sqrt(k h / w))` evenly spaced lines, evenly spaced on each.

    Args:
        rounding: "floor", "ceil" or "nearest" (half to even).

    Raises:
        ValueError: an option that is none of these.
    """

    name = "downsample"
    summary = "Keeps an even grid of each image, as a smaller picture would have."
    signal = "where the tokens stand in their image"
    uses_grids = True

    def __init__(self, rounding: str = "floor") -> None:
        check_rounding(rounding)
        self.rounding = rounding

    def select(self, view: PrefillView, r: float | int) -> Selection:
        candidates = candidates_of_units(view)
        images = [image for row in view.frames() for image in row]
        if view.segments is None:
            images = [[frame for image in row for frame in image] for row in view.frames()]
        kept = torch.zeros(candidates.shape, dtype=torch.bool)
        indices = torch.full((len(images), max_kept(r, candidates.shape[1], self.rounding)), -1)
        for row, frames in enumerate(images):
            count = self.kept_count(r, sum(math.prod(frame) for frame in frames))
            places = torch.tensor(downsample_places(frames, count), dtype=torch.int64)
            kept[row, places] = True
            indices[row, : len(places)] = places
        kept, indices = (x.to(candidates.device, non_blocking=True) for x in (kept, indices))
        scores = kept.float().masked_fill(~candidates, -torch.inf)
        return of_rows(Selection(kept, indices, scores), view)


def downsample_places(frames: list[Frame], count: int) -> list[int]:
    """Return the places of `count` tokens spread over successive frames, ascending."""
    places, start = [], 0
    for (height, width), share in zip(frames, _shares([h * w for h, w in frames], count), strict=True):
        if share:
            places += [start + y * width + x for y, x in _cells(height, width, share)]
        start += height * width
    return places


def _cells(height: int, width: int, count: int) -> list[tuple[int, int]]:
    fewest = math.ceil(count / width)
    lines = min(height, count, max(fewest, round(math.sqrt(count * height / width))))
    shares = _shares([1] * lines, count)
    return [(y, x) for y, share in zip(_centres(height, lines), shares, strict=True) for x in _centres(width, share)]


def _shares(sizes: list[int], count: int) -> list[int]:
    """Divide `count` in proportion to `sizes`; no share exceeds its size if `count` is at most their sum."""
    total, before, shares = sum(sizes), 0, []
    for size in sizes:
        shares.append((before + size) * count // total - before * count // total)
        before += size
    return shares


def _centres(length: int, count: int) -> list[int]:
    """Return the midpoints of `count` equal parts of a line."""
    return [(2 * part + 1) * length // (2 * count) for part in range(count)]
