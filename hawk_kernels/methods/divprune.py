"""DivPrune: the tokens that differ most from each other (arXiv 2503.02175)."""

from __future__ import annotations

from hawk_kernels.methods.base import JointMethod, candidates_of_units, of_rows, of_units
from hawk_kernels.methods.view import PrefillView
from hawk_kernels.ops.greedy import greedy_max_min
from hawk_kernels.selection import Selection
from hawk_kernels.validation import check_rounding


class DivPrune(JointMethod):
    """Keeps visual tokens whose smallest distance to each other is large, whatever is asked.

    Over the embeddings that enter the language model, the max-min diversity problem is solved greedily with the
    distance `1 - cos`: first the token whose nearest other is farthest, then the token whose nearest kept one is
    farthest (Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025,
    arXiv 2503.02175, algorithm 1, and github vbdi/divprune).

    Args:
        rounding: "floor" or "ceil"; the release rounds to the nearest.

    Raises:
        ValueError: an option that is none of these.
    """

    name = "divprune"

    def __init__(self, rounding: str = "floor") -> None:
        self.rounding = check_rounding(rounding)

    def select(self, view: PrefillView, r: float | int) -> Selection:
        features, candidates = of_units(view.visual_embeddings(), view), candidates_of_units(view)
        return of_rows(greedy_max_min(features, r, mask=candidates, rounding=self.rounding), view)
