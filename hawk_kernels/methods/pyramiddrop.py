"""PyramidDrop: fewer and fewer visual tokens, by the attention of the last token at each stage (arXiv 2410.17247)."""

from __future__ import annotations

import torch

from hawk_kernels.methods.base import Keep, Method, attention_of_last_token, falling_stages, register
from hawk_kernels.methods.prefill_view import PrefillView
from hawk_kernels.validation import check_rounding


@register
class PyramidDrop(Method):
    """Drops visual tokens after a quarter, a half and three quarters of the layers, by the last token's attention.

    At each stage `I[m] = mean over heads of softmax(q_last k^T / sqrt(d))[m]`, after RoPE, in the layer after the
    stage, before it runs (Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual
    Redundancy Reduction", CVPR 2025, arXiv 2410.17247). Each stage keeps the same share `lambda` of what the one before
    kept. Here `keep_ratio` is the fraction of the original tokens that is left after the last stage, so that `lambda`
    is its cube root: 0.125 is the paper's 0.5, 0.25, 0.125. Name the stages for other ones:
    `prune(model, {8: 0.5, 16: 0.2}, method="pyramiddrop")`.

    The authors' release drops after layers 8, 16 and 24 of 32 and ranks by the layer that follows, as here. It numbers
    the kept tokens anew after each stage; here they keep the position ids that they had.

    Args:
        rounding: "floor" (release) or "ceil".

    Raises:
        ValueError: another rounding.
    """

    name = "pyramiddrop"
    summary = "Keeps what the last token attends to, fewer tokens after each quarter of the layers."
    paper = "2410.17247"
    signal = "attention of the last token at each stage"
    uses_positions = True
    inside_only = True

    def __init__(self, rounding: str = "floor") -> None:
        self.rounding = check_rounding(rounding)

    def stages(self, keep_ratio: float | int, depth: int) -> dict[int, Keep]:
        return falling_stages(keep_ratio, depth, (1 / 4, 2 / 4, 3 / 4), self.name)

    def score(self, view: PrefillView) -> torch.Tensor:
        return attention_of_last_token(view)
