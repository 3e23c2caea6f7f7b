"""Key norm: tokens by the length of their keys alone (arXiv 2406.11430, turned around by default)."""

from __future__ import annotations

import torch

from hawk_kernels.methods.base import Method, register
from hawk_kernels.methods.prefill_view import PrefillView
from hawk_kernels.validation import check_rounding

KEEPS = ("longest", "shortest")


@register
class KeyNorm(Method):
    """Keeps visual tokens by the length of their keys in the first layer, whatever the question.

    The score is `I[m] = mean over heads of |k[h, m]|_2`: a longer key changes the attention of any query more, and DART
    (arXiv 2502.11494) finds its pivots in the same way. Devoto et al., "A Simple and Effective L2 Norm-Based Strategy
    for KV Cache Compression", arXiv 2406.11430, observe the opposite in the caches of language models, where tokens
    with short keys get most of the attention, and keep those; `keep="shortest"` is their order.

    Some models normalise each key. Without learned weights (Llama 4, Muse Glimmer) all keys are then equally long, and
    `prune` refuses this method. With learned weights (Qwen3, Gemma 3 and others) lengths still differ, but only by how
    much of a key lies along the directions that the weights stretch, which is not what the papers study.

    Args:
        keep: "longest" or "shortest".
        rounding: "floor", "ceil" or "nearest" (half to even).

    Raises:
        ValueError: an option that is none of these.
    """

    name = "key_norm"
    summary = "Keeps the tokens with the longest keys, whatever the question."
    paper = "2406.11430"
    signal = "keys of the image in the first layer"
    uses_key_lengths = True

    def __init__(self, keep: str = "longest", rounding: str = "floor") -> None:
        if keep not in KEEPS:
            raise ValueError(f"keep: expected 'longest' or 'shortest' (arXiv 2406.11430), got {keep!r}")
        self.keep = keep
        check_rounding(rounding)
        self.rounding = rounding

    def score(self, view: PrefillView) -> torch.Tensor:
        length: torch.Tensor = torch.linalg.vector_norm(view.visual_keys().float(), dim=-1).mean(dim=1)
        score = -length if self.keep == "shortest" else length
        return score.masked_fill(~view.candidates, -torch.inf)
