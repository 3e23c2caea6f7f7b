"""DivPrune: the tokens that differ most from each other (arXiv 2503.02175)."""

from __future__ import annotations

from hawk_kernels.methods.base import JointMethod, candidates_of_units, of_rows, of_units, register
from hawk_kernels.methods.prefill_view import PrefillView
from hawk_kernels.ops.greedy import greedy_max_min
from hawk_kernels.selection import Selection
from hawk_kernels.validation import check_rounding


@register
class DivPrune(JointMethod):
    """Keeps visual tokens whose smallest distance to each other is large, whatever the question.

    The max-min diversity problem over the embeddings that enter the language model is solved greedily with the
    distance `1 - cos`: the first pick is the token whose nearest neighbour is farthest, each later one the token whose
    nearest kept one is farthest (Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal
    Models", CVPR 2025, arXiv 2503.02175, algorithm 1, and github vbdi/divprune).

    Args:
        rounding: "floor" or "ceil"; the release rounds to the nearest.

    Raises:
        ValueError: an option that is none of these.
    """

    name = "divprune"
    summary = "Keeps the tokens that differ most from each other, whatever the question."
    paper = "2503.02175"
    signal = "embeddings of the image"
    reads_layer = False

    def __init__(self, rounding: str = "floor") -> None:
        check_rounding(rounding)
        self.rounding = rounding

    def select(self, view: PrefillView, r: float | int) -> Selection:
        features, candidates = of_units(view.visual_embeddings(), view), candidates_of_units(view)
        return of_rows(greedy_max_min(features, r, mask=candidates, rounding=self.rounding), view)
