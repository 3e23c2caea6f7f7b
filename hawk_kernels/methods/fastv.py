"""FastV: the visual tokens that the last token attends to in an early layer (arXiv 2403.06764)."""

from __future__ import annotations

import torch

from hawk_kernels.methods.base import Keep, Method, attention_of_last_token, checked_int, register
from hawk_kernels.methods.prefill_view import PrefillView
from hawk_kernels.validation import check_rounding


@register
class FastV(Method):
    """Drops visual tokens after layer `layer`, by the attention of the last token in that layer.

    `I[m] = mean over heads of softmax(q_last k^T / sqrt(d))[m]` in layer `layer`, counted from 1, after RoPE (Chen et
    al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024, arXiv 2403.06764, with `K = layer`; the authors take
    K = 2). Layers 1 to K read every token; later layers read the kept ones alone, at their original positions, in the
    prompt and while they generate, as in the authors' code that drops tokens. Their code that masks them chooses anew
    for each generated token; `prune(mode="hide")` masks those that would be dropped, with the same answers.

    The method needs sdpa or eager attention. A cache that was filled inside the block must be continued inside one.

    Args:
        layer: the last layer that reads every token, counted from 1.
        rounding: "floor", "ceil" or "nearest" (half to even).

    Raises:
        TypeError, ValueError: an option that is none of these.
    """

    name = "fastv"
    summary = "Keeps what the last token attends to in an early layer; later layers read nothing else."
    paper = "2403.06764"
    signal = "attention of the last token in an early layer"
    uses_positions = True
    ranks_by = "last"
    inside_only = True
    stage_options = ("layer",)

    def __init__(self, layer: int = 2, rounding: str = "floor") -> None:
        expected = "layer: expected the last layer that sees every token, counted from 1"
        self.layer = checked_int(layer, 1, expected, "the paper takes 2")
        check_rounding(rounding)
        self.rounding = rounding

    def stages(self, keep_ratio: float | int, depth: int) -> dict[int, Keep]:
        return {self.layer: keep_ratio}

    def score(self, view: PrefillView) -> torch.Tensor:
        return attention_of_last_token(view)
