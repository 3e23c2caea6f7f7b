"""Heed: tokens that some word of the question attends to or names, and that differ from each other."""

from __future__ import annotations

import torch

from hawk_kernels.methods.base import JointMethod, candidates_of_units, of_rows, of_units, register
from hawk_kernels.methods.cdpruner import max_cosine, relevance
from hawk_kernels.methods.hawk import peaks_of_attention
from hawk_kernels.methods.prefill_view import PrefillView
from hawk_kernels.ops.greedy import greedy_dpp
from hawk_kernels.selection import Selection
from hawk_kernels.validation import check_rounding


@register
class Heed(JointMethod):
    """Keeps the visual tokens that some word of the question attends to or names, and that differ from each other.

    Two signals say how much a visual token `m` matters to the text tokens `n`. One is attention in the first layer
    before RoPE, `a[m] = mean_i max_n softmax_m(q[i, n] . k[i, m] / sqrt(d))` over the heads `i`; the other compares the
    embeddings that enter that layer, `c[m] = max_n cos(v[m], t[n])`. Both take the maximum over the text, so that one
    word suffices. Both are scaled by minimum and maximum over the image or row, `s(x) = (x - min x + 1e-6) / (max x -
    min x + 1e-6)`. The quality of a token is their mean `g[m] = (s(a)[m] + w s(c)[m]) / (1 + w)`, in which the cosine
    weighs more the further its best match stands out, `w = max c - mean c`. Where the embeddings of images and words
    have little in common, no match stands out, and attention decides. The kept tokens are the greedy MAP of a
    determinantal point process with the kernel `L[m, l] = g[m] cos(v[m], v[l]) g[l]`.

    No paper has published this method; it was made here, from three that were. Attention before RoPE is HAWK's (arXiv
    2604.07812), which averages it over the text and weighs the heads; relevance by cosine and the determinantal point
    process are CDPruner's (arXiv 2506.10967), which averages the cosine over the text; the greedy MAP is by Chen et al.
    (arXiv 1709.05135). The heads count the same here: under the maximum, calibrated weights gained nothing on the model
    that the method was chosen on. docs/tinyvqa.md has what it was measured on.

    Args:
        rounding: "floor", "ceil" or "nearest" (half to even).

    Raises:
        ValueError: an option that is none of these.
    """

    name = "heed"
    summary = "Keeps tokens that some word of the question attends to or names, and that differ from each other."
    signal = "queries of the text and keys of the image in the first layer, and the embeddings of both"
    uses_text = True

    def __init__(self, rounding: str = "floor") -> None:
        check_rounding(rounding)
        self.rounding = rounding

    def select(self, view: PrefillView, r: float | int) -> Selection:
        visual, candidates = view.visual_embeddings(), candidates_of_units(view)
        attended = peaks_of_attention(view, None, "softmax").masked_fill(~view.candidates, 0.0)
        named = max_cosine(visual, *view.text_embeddings())
        scaled_attended, scaled_named = (relevance(of_units(x, view), candidates) for x in (attended, named))
        weight = contrast(of_units(named, view), candidates)
        quality = (scaled_attended + weight * scaled_named) / (1 + weight)
        return of_rows(greedy_dpp(of_units(visual, view), quality, r, mask=candidates, rounding=self.rounding), view)


def contrast(similarity: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Tell how far the best match of each unit lies above its average, float32 `[U, 1]`; 0 for one without candidates.

    Args:
        similarity: float32 `[U, L]`.
        candidates: bool `[U, L]`.
    """
    highest = similarity.masked_fill(~candidates, -torch.inf).amax(dim=1, keepdim=True)
    mean = similarity.masked_fill(~candidates, 0.0).sum(dim=1, keepdim=True) / candidates.sum(dim=1, keepdim=True)
    # a match that is not a number stands out no more than none
    return (highest - mean).clamp(min=0).nan_to_num_(nan=0.0)
