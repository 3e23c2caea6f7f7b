"""EVS: the cells of a video that change from one frame to the next (arXiv 2510.14624)."""

from __future__ import annotations

import numpy as np
import torch

from hawk_kernels.methods.base import Method, register
from hawk_kernels.methods.prefill_view import PrefillView
from hawk_kernels.validation import check_rounding

Frame = tuple[int, int]


@register
class EVS(Method):
    """Keeps the visual tokens of a video that differ from the same cell one frame earlier, and its first frame.

    The score of a token is `1 - cos` between its embedding and that of the same cell in the frame before (Bagrov et
    al., "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference", arXiv 2510.14624,
    and the code of its authors in vLLM). One budget covers the whole video. Tokens of a first frame rank above all
    others, and so do those of a frame whose grid differs from the one before.

    vLLM never keeps less than the first frame, and leaves still images alone; here a budget is met exactly. Where it is
    smaller than the first frames, which are all that a still image has, an even grid of them stays: cells with even
    line and column first, as in ordered dithering.

    The frames are known in families that report grids or the number of frames: all that take videos except Gemma 4,
    Perception LM and VideoLLaMA 3, where a video counts as one frame.

    Args:
        rounding: "floor", "ceil" or "nearest" (half to even); the release rounds down.

    Raises:
        ValueError: an option that is none of these.
    """

    name = "evs"
    summary = "Keeps what changes from one frame of a video to the next, and the first frame, whatever the question."
    paper = "2510.14624"
    signal = "embeddings of successive frames"
    uses_grids = True

    def __init__(self, rounding: str = "floor") -> None:
        check_rounding(rounding)
        self.rounding = rounding

    def score(self, view: PrefillView) -> torch.Tensor:
        candidates, embeddings = view.candidates, view.visual_embeddings()
        placed = [_earlier_and_dither(images, candidates.shape[1]) for images in view.frames()]
        earlier, dither = (np.stack(arrays) for arrays in zip(*placed, strict=True))
        starts = np.arange(len(earlier))[:, None] * earlier.shape[1]
        now, before = (
            torch.from_numpy(places).to(candidates.device, non_blocking=True)
            for places in (np.flatnonzero(earlier >= 0), (earlier + starts)[earlier >= 0])
        )
        tokens = embeddings.flatten(0, 1)
        one, other = (tokens.index_select(0, places).float() for places in (now, before))
        same = torch.cosine_similarity(one, other, dim=-1)
        first = torch.from_numpy(3 - dither).to(candidates.device, non_blocking=True)
        scores = first.flatten().scatter_(0, now, (1 - same).clamp(max=2)).view(candidates.shape)
        # a first frame is compared with nothing, so a NaN in it would not show
        least, largest = torch.aminmax(embeddings, dim=-1)
        scores = scores.masked_fill(~(least.isfinite() & largest.isfinite()), torch.nan)
        return scores.masked_fill(~candidates, -torch.inf)


def _earlier_and_dither(images: list[list[Frame]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Lay out a row of `width` tokens: where each cell stood one frame earlier, or -1, and its place in its frame.

    Args:
        images: the frames `(h, w)` of each image of the row.
        width: its tokens, padding included.
    """
    earlier, dither = np.full(width, -1, dtype=np.int64), np.zeros(width, dtype=np.float32)
    start = 0
    for frames in images:
        previous = None
        for frame in frames:
            stop = start + frame[0] * frame[1]
            if frame == previous:
                earlier[start:stop] = np.arange(start, stop) - (stop - start)
            else:
                dither[start:stop] = _dither(*frame)
            previous, start = frame, stop
    return earlier, dither


def _dither(height: int, width: int) -> np.ndarray:
    """Rank the cells of a frame in [0, 1), so that those below any threshold are evenly spread: Bayer's matrix."""
    y, x = np.indices((height, width)).reshape(2, -1)
    ranks = np.zeros(height * width)
    for bit in range(max(height, width).bit_length()):
        of_y, of_x = y >> bit & 1, x >> bit & 1
        ranks += (2 * (of_y ^ of_x) + of_y) / 4.0 ** (bit + 1)
    return ranks
