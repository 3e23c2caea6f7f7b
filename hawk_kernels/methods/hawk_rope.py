"""HAWK with rotary position embeddings, the ablation of its paper (arXiv 2604.07812)."""

from __future__ import annotations

import torch

from hawk_kernels.methods.base import Method, register
from hawk_kernels.methods.hawk import Hawk
from hawk_kernels.methods.prefill_view import PrefillView
from hawk_kernels.ops.score_and_select import score_tokens
from hawk_kernels.ops.score_peaks import score_peaks


@register
class HawkRope(Hawk):
    """HAWK's score of queries and keys after RoPE: `c[i, m] = mean_n R(p_n) q[i, n] . R(p_m) k[i, m] / sqrt(d)`.

    The rotations `R` are those of the first layer at the tokens' own positions, M-RoPE where the model has it. The
    paper leaves them out because they favour visual tokens that stand near the text. Options and errors as in `Hawk`.
    """

    name = "hawk_rope"
    summary = "Keeps what HAWK would keep if queries and keys were rotated first, the ablation of its paper."
    paper = "2604.07812"
    signal = "queries of the text and keys of the image in the first layer, after RoPE"
    uses_positions = True
    # the fused kernel that Hawk.select calls knows no positions, so the scores of this class are ranked instead
    select = Method.select

    def score(self, view: PrefillView) -> torch.Tensor:
        queries, mask = view.rotated_text_queries()
        keys = view.rotated_visual_keys()
        if keys.dtype == torch.float64:
            queries, keys = queries.float(), keys.float()
        score = score_peaks if self.reduce == "max" else score_tokens
        return score(queries, keys, view.head_weights, q_mask=mask, k_mask=view.candidates, normalize=self.normalize)
