"""FasterVLM: the tokens that the vision encoder's CLS token attends to (arXiv 2412.01818, version 1)."""

from __future__ import annotations

import torch

from hawk_kernels.methods.base import Method, checked_int, register
from hawk_kernels.methods.prefill_view import PrefillView
from hawk_kernels.validation import check_rounding


@register
class FasterVLM(Method):
    """Keeps the visual tokens that the vision encoder's CLS token attends to most.

    The score is the CLS row of the attention in the encoder layer that the visual features come from (in LLaVA the one
    before the last), averaged over heads (Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual Token
    Pruning: Make VLM Inference Faster", arXiv 2412.01818, version 1, and github Theia-4869/FasterVLM). An encoder
    without a CLS token ranks by the attention that a token receives from all others, see `PrefillView.cls_attention`.
    With tiles, as in LLaVA-NeXT, the release keeps the same number of each tile, as `prune(budget="per_tile")` does; by
    default all tiles of an image compete.

    Args:
        cls_layer: encoder layer, counted from 1; None takes that of the visual features.
        rounding: "floor", "ceil" or "nearest" (half to even).

    Raises:
        TypeError, ValueError: an option that is none of these.
    """

    name = "fastervlm"
    summary = "Keeps what the vision encoder's CLS token attends to, whatever the question."
    paper = "2412.01818"
    signal = "attention of CLS inside the vision encoder"
    uses_cls_attention = True

    def __init__(self, cls_layer: int | None = None, rounding: str = "floor") -> None:
        self.cls_layer = checked_cls_layer(cls_layer)
        check_rounding(rounding)
        self.rounding = rounding

    def score(self, view: PrefillView) -> torch.Tensor:
        return view.cls_attention().masked_fill(~view.candidates, -torch.inf)


def checked_cls_layer(cls_layer: object) -> int | None:
    """Return the option `cls_layer` of a method.

    Raises:
        TypeError: neither an integer nor None.
        ValueError: less than 1.
    """
    expected = "cls_layer: expected a layer of the vision encoder, counted from 1, or None for that of the features"
    return None if cls_layer is None else checked_int(cls_layer, 1, expected, "the papers take None")
