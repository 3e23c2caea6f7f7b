"""HiPrune: the tokens that the vision encoder itself attends to, whatever the question (arXiv 2508.00553)."""

from __future__ import annotations

import math

import torch

from hawk_kernels.methods.base import Method, checked_int, merged_segments, register
from hawk_kernels.methods.prefill_view import PrefillView
from hawk_kernels.ops.hiprune_select import HiPruneChoice, checked_alpha, choose, grid_neighbours, num_anchors
from hawk_kernels.selection import Selection
from hawk_kernels.validation import check_rounding


@register
class HiPrune(Method):
    """Keeps anchors of a middle encoder layer, the buffers around them, and registers of a deep one.

    As in the authors' release, a token's attention is what all query rows of the encoder give it, CLS among them, and
    the deep layer is the last one that the visual tokens come from: 23 of the 24 of CLIP-L in LLaVA, which takes the
    output of the layer before the last. In the release, the neighbours of an anchor at the end of a line are on the
    next or the previous line, and those of one in the first or last line are the first or last token of the image; here
    they are what the picture has beside it. A row has one budget for all its images. Tokens without a cell in the
    image, such as the image newlines of LLaVA-NeXT, always stay and do not count.

    Args:
        alpha: share of the budget for anchors and their neighbours, in [0, 5].
        object_layer: encoder layer of the anchors, counted from 1; None takes the published one (9 of the 24 of CLIP-L,
            16 of the 32 of Qwen2.5-VL), in another CLIP the same share of its depth, in other encoders the middle.
        rounding: "floor", "ceil" or "nearest" (half to even).

    Raises:
        TypeError, ValueError: an option that is none of these.
    """

    name = "hiprune"
    summary = "Keeps what the vision encoder itself attends to, with its surroundings, whatever the question."
    paper = "2508.00553"
    signal = "attention inside the vision encoder"
    uses_encoder_attention = True

    def __init__(self, alpha: float = 0.1, object_layer: int | None = None, rounding: str = "floor") -> None:
        self.alpha = checked_alpha(alpha)
        expected = "object_layer: expected a layer of the vision encoder, counted from 1, or None for the middle one"
        if object_layer is not None:
            object_layer = checked_int(object_layer, 1, expected, "the paper takes 16 of Qwen2.5-VL")
        self.object_layer = object_layer
        check_rounding(rounding)
        self.rounding = rounding

    def score(self, view: PrefillView) -> torch.Tensor:
        return view.encoder_attention().deep.masked_fill(~view.candidates, -torch.inf)

    def select(self, view: PrefillView, r: float | int) -> Selection:
        attention = view.encoder_attention()
        if view.segments is None:
            units = [[grid for image in row for grid in image] for row in attention.grids]
            return self.choose(attention.object, attention.deep, view.candidates, units, r).selection
        images = [image for row in attention.grids for image in row]
        of_object, of_deep = (x.reshape(-1)[view.segments.index] for x in (attention.object, attention.deep))
        of_segments = self.choose(of_object, of_deep, view.segments.mask, images, r).selection
        return merged_segments(of_segments.mask, self.score(view), view.segments)

    def choose(
        self,
        of_object: torch.Tensor,
        of_deep: torch.Tensor,
        candidates: torch.Tensor,
        grids: list[list[tuple[int, int, int]]],
        r: float | int,
    ) -> HiPruneChoice:
        """Choose in each unit, a row or an image, and say why each token was chosen.

        Args:
            of_object: float32 `[U, L]`, attention received in the object layer.
            of_deep: float32 `[U, L]`, in the last layer.
            candidates: bool `[U, L]`, False at the padding of shorter units.
            grids: `(t, h, w)` of the images of each unit; its tokens are their cells.
            r: fraction kept of each unit, or its budget.
        """
        device, width = of_object.device, of_object.shape[1]
        around = torch.full((len(grids), width, 4), width, device=device)
        for unit, inside in zip(around, grids, strict=True):
            length = sum(math.prod(grid) for grid in inside)
            if length:
                # a missing neighbour is written as the place after the padding
                near = grid_neighbours(inside, device)[0]
                unit[:length] = near.masked_fill_(near == length, width)
        kept = [self.kept_count(r, sum(math.prod(grid) for grid in inside)) for inside in grids]
        anchors = [num_anchors(count, self.alpha) for count in kept]
        budget, first = (torch.tensor(x).unsqueeze(1).to(device, non_blocking=True) for x in (kept, anchors))
        return choose(of_object, of_deep, candidates, around, budget, first, max(kept))
