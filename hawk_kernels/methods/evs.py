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
    and the code of its authors in vLLM). The budget is that of the whole video. Tokens of a first frame rank above all
    others, and so do those of a frame whose grid differs from the one before.

    vLLM never keeps less than the first frame, and leaves still images alone; here a budget is met exactly. Where it is
    smaller than the first frames, which are all that a still image has, an even grid of them stays: cells with even
    line and column first, as in ordered dithering.

    The frames are known of families that tell grids or the number of frames: all that take videos as such but Gemma 4,
    Perception LM and VideoLLaMA 3, where a video is one frame.

    Args:
        rounding: "floor" or "ceil"; the release rounds down.

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
        candidates, embeddings = view.candidates, view.visual_embeddings().float()
        placed = [_earlier_and_dither(images, candidates.shape[1]) for images in view.frames()]
        earlier, dither = (
            torch.from_numpy(np.stack(arrays)).to(candidates.device, non_blocking=True)
            for arrays in zip(*placed, strict=True)
        )
        length = embeddings.norm(dim=-1, keepdim=True)
        unit = embeddings / length.clamp(min=1e-12)
        before = unit.gather(1, earlier.clamp(min=0).unsqueeze(-1).expand_as(unit))
        changed = (1 - (unit * before).sum(dim=-1)).clamp(max=2)
        scores = torch.where(earlier < 0, 3 - dither, changed)
        # a first frame is compared with nothing, so that NaN would not show
        scores = scores.masked_fill(~length.squeeze(-1).isfinite(), torch.nan)
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
