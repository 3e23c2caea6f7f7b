"""HAWK: head importance times text-to-visual attention before RoPE (arXiv 2604.07812)."""

from __future__ import annotations

import torch

from hawk_kernels.api import NORMALIZATIONS, score_and_select, score_tokens
from hawk_kernels.methods.base import Method, check_rounding, select_in_segments
from hawk_kernels.methods.view import PrefillView
from hawk_kernels.selection import Selection


class Hawk(Method):
    """Keeps the visual tokens that the text attends to, each head counted by its importance.

    Args:
        normalize: how a head's scores are normalised over the visual tokens: "l2" (the authors' release), None
            (the paper's equation), "softmax" or "minmax".
        rounding: "floor" (paper) or "ceil" (release).

    Raises:
        ValueError: an option that is none of these.
    """

    name = "hawk"
    uses_head_weights = True
    uses_text = True

    def __init__(self, normalize: str | None = "l2", rounding: str = "floor") -> None:
        if normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize: expected one of {NORMALIZATIONS}, got {normalize!r}")
        self.normalize = normalize
        self.rounding = check_rounding(rounding)

    def score(self, view: PrefillView) -> torch.Tensor:
        queries, keys, query_mask = _projected(view)
        return score_tokens(
            queries, keys, view.head_weights, q_mask=query_mask, k_mask=view.candidates, normalize=self.normalize
        )

    def select(self, view: PrefillView, r: float | int) -> Selection:
        if view.segments is not None:
            return select_in_segments(self.score(view), r, view.segments, self.rounding)
        queries, keys, query_mask = _projected(view)
        return score_and_select(
            queries,
            keys,
            view.head_weights,
            r,
            q_mask=query_mask,
            k_mask=view.candidates,
            normalize=self.normalize,
            rounding=self.rounding,
        )


def _projected(view: PrefillView) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Queries, keys and the queries' mask; a float64 model is scored in float32, as the kernels are."""
    queries, query_mask = view.mean_text_query()
    keys = view.visual_keys()
    if keys.dtype == torch.float64:
        queries, keys = queries.float(), keys.float()
    return queries, keys, query_mask
