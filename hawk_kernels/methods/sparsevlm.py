"""SparseVLM: the visual tokens that the relevant words attend to, stage by stage (arXiv 2410.04417)."""

from __future__ import annotations

import torch

from hawk_kernels.methods.base import Keep, Method, falling_stages, product, register
from hawk_kernels.methods.prefill_view import PrefillView
from hawk_kernels.ops.attention_column_mean import attention_column_mean
from hawk_kernels.validation import check_rounding


@register
class SparseVLM(Method):
    """Drops visual tokens at three depths, by the attention that the words closest to the images pay to them.

    Raters are the text tokens with `R[n] >= mean(R)`, `R = mean over visual tokens of softmax over text of H_v H_q^T`,
    by the embeddings that enter the text model. At each stage `I[m]` is the attention that visual token m receives from
    the raters, averaged over them and over heads (Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient
    Vision-Language Model Inference", ICML 2025, arXiv 2410.04417).

    The paper lets the rank of the raters' attention matrix decide how many tokens a layer drops; the authors' release
    has that switched off and keeps fixed numbers after layers 3, 7 and 16 of 32 (300, 200 and 110 of 576). Here the
    stages stand at these depths, each keeps the same share of what the one before kept, and `keep_ratio` is what is
    left after the last: 0.19 gives 331, 190 and 109 of 576. The paper turns some dropped tokens into a few new ones by
    clustering; that needs tokens that are merged, and is left out here.

    The release counts as text all that follows the image, here it is the question; and it wants `R[n] > mean(R)`, which
    leaves a question of one word without raters. In layers with sliding windows the attention is that without windows.

    Args:
        rounding: "floor" or "ceil".

    Raises:
        ValueError: another rounding.
    """

    name = "sparsevlm"
    summary = "Keeps what the words closest to the images attend to, fewer tokens at each of three depths."
    paper = "2410.04417"
    signal = "attention of the relevant words at each stage"
    uses_text = True
    uses_positions = True
    ranks_by = "last"
    inside_only = True

    def __init__(self, rounding: str = "floor") -> None:
        self.rounding = check_rounding(rounding)

    def stages(self, keep_ratio: float | int, depth: int) -> dict[int, Keep]:
        return falling_stages(keep_ratio, depth, (3 / 32, 7 / 32, 16 / 32), self.name)

    def score(self, view: PrefillView) -> torch.Tensor:
        layer = view.layer_attention()
        raters = raters_of(view.entered())
        # padding of rows with fewer raters lands in one row after the end
        count = layer.queries.shape[2]
        rows = raters.new_zeros(count + 1)
        rows.scatter_(0, torch.where(raters, layer.text, count).flatten(), raters.flatten())
        queries, keys = layer.queries, layer.keys
        if keys.dtype == torch.float64:
            queries, keys = queries.float(), keys.float()
        received = attention_column_mean(
            queries, keys, cu_seqlens=layer.cu_seqlens, causal=True, q_rows=rows[:count].unsqueeze(0), scale=layer.scale
        )
        return received[0][layer.visual].masked_fill_(~view.candidates, -torch.inf)


def raters_of(view: PrefillView) -> torch.Tensor:
    """Mark the text tokens that are closer to the visual tokens than text tokens are on average, bool `[B, N]`.

    Args:
        view: of the prompt as it enters the text model.
    """
    text, is_text = view.text_embeddings()
    logits = product(view.visual_embeddings().float(), text.float().transpose(1, 2))
    logits.masked_fill_(~is_text.unsqueeze(1), torch.finfo(logits.dtype).min)
    shares = logits.softmax(dim=2) * view.candidates.unsqueeze(2)
    relevance = shares.sum(dim=1) / view.candidates.sum(dim=1, keepdim=True).clamp(min=1)
    mean = relevance.sum(dim=1, keepdim=True) / is_text.sum(dim=1, keepdim=True).clamp(min=1)
    # equal relevances may differ from their mean by rounding
    return is_text & (relevance >= mean * (1 - 1e-6))
