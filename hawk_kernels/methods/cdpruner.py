"""CDPruner: tokens that are relevant to the question and differ from each other (arXiv 2506.10967)."""

from __future__ import annotations

import numbers

import torch

from hawk_kernels.methods.base import JointMethod, candidates_of_units, of_rows, of_units, product, register
from hawk_kernels.methods.prefill_view import PrefillView
from hawk_kernels.ops.greedy import greedy_dpp
from hawk_kernels.selection import Selection
from hawk_kernels.validation import check_rounding

_LEAST = 1e-6


@register
class CDPruner(JointMethod):
    """Keeps the visual tokens of largest conditional diversity: greedy MAP of a determinantal point process.

    With embeddings `v[i]` of the visual and `t[n]` of the text tokens, relevance is `rho[i] = mean_n cos(v[i], t[n])`,
    `q = (rho - min rho + 1e-6) / (max rho - min rho + 1e-6)` over the image or row, and the kernel is
    `L[i, j] = q[i] cos(v[i], v[j]) q[j]` (Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional
    Diversity for Token Pruning in MLLMs", NeurIPS 2025, arXiv 2506.10967, and github Theia-4869/CDPruner; greedy MAP by
    Chen et al., arXiv 1709.05135).

    For LLaVA the authors take relevance from CLIP's own text encoder, which a checkpoint of the language model does not
    contain, and negate it, since CLIP's patches are least similar to the text that they show. For models without such
    an encoder they take it from the embeddings that enter the language model, as this class always does.

    Args:
        negate: whether the least similar tokens count as the most relevant, as in the release for CLIP.
        rounding: "floor", "ceil" or "nearest" (half to even).
        text: "mean" (paper) or "max", how the cosines with the text tokens become one number. With the maximum, which
            is ours, one word that names what a token shows makes it relevant.
        theta: None (paper), or how much relevance counts against diversity, in [0, 1): the quality of a token then is
            `exp(alpha q[i])` with `alpha = theta / (2 (1 - theta))`, which is how Chen et al. weigh the two. 0 looks at
            diversity alone; OpenVINO's CDPruner takes 0.5.
        scale_over: what relevance is scaled over where each image has a budget of its own: "budget" scales each image
            by itself, "prompt" all images of a row together. Without such budgets the two are the same.

    Raises:
        TypeError, ValueError: an option that is none of these.
    """

    name = "cdpruner"
    summary = "Keeps tokens that are relevant to the question and differ from each other."
    paper = "2506.10967"
    signal = "embeddings of the image and of the text"
    uses_text = True

    def __init__(
        self,
        negate: bool = False,
        rounding: str = "floor",
        text: str = "mean",
        theta: float | None = None,
        scale_over: str = "budget",
    ) -> None:
        if not isinstance(negate, bool):
            raise TypeError(f"negate: expected a bool, got {type(negate).__name__}; True negates the relevance")
        self.negate = negate
        check_rounding(rounding)
        self.rounding = rounding
        if text not in _COSINES:
            raise ValueError(f"text: expected 'mean' (paper) or 'max' over the text, got {text!r}")
        self.text = text
        self.theta = None if theta is None else _checked_theta(theta)
        if scale_over not in ("budget", "prompt"):
            raise ValueError(
                f"scale_over: expected 'budget' or 'prompt', got {scale_over!r}; 'prompt' scales all images together"
            )
        self.scale_over = scale_over

    def select(self, view: PrefillView, r: float | int) -> Selection:
        visual, candidates = view.visual_embeddings(), candidates_of_units(view)
        similarity = _COSINES[self.text](visual, *view.text_embeddings())
        if self.negate:
            similarity = -similarity
        if self.scale_over == "prompt":
            quality = of_units(relevance(similarity, view.candidates), view)
        else:
            quality = relevance(of_units(similarity, view), candidates)
        if self.theta is not None:
            # a factor for the whole row changes nothing, and with this one exp cannot overflow: no relevance is above 1
            quality = torch.exp(self.theta / (2 * (1 - self.theta)) * (quality - 1))
        return of_rows(greedy_dpp(of_units(visual, view), quality, r, mask=candidates, rounding=self.rounding), view)


def _checked_theta(theta: object) -> float:
    expected = "theta: expected None or a number in [0, 1)"
    remedy = "0 looks at diversity alone, 0.5 is OpenVINO's"
    if isinstance(theta, bool) or not isinstance(theta, numbers.Real):
        raise TypeError(f"{expected}, got {type(theta).__name__}; {remedy}")
    number = float(theta)
    if not 0 <= number < 1:
        raise ValueError(f"{expected}, got {theta}; {remedy}")
    return number


def mean_cosine(visual: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
    """Average over the text the cosine with each visual token, float32 `[B, M]`; 0 for a row without text.

    Args:
        visual: `[B, M, hidden]`.
        text: `[B, N, hidden]`.
        text_mask: bool `[B, N]`, True = this token counts.
    """
    of_text = torch.nn.functional.normalize(text.float(), dim=-1).masked_fill(~text_mask.unsqueeze(-1), 0)
    mean = of_text.sum(dim=1) / text_mask.sum(dim=1, keepdim=True).clamp(min=1)
    return product(torch.nn.functional.normalize(visual.float(), dim=-1), mean.unsqueeze(-1)).squeeze(-1)


def max_cosine(visual: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
    """Find the largest cosine of each visual token with a text token; arguments and result as in `mean_cosine`."""
    of_visual, of_text = (torch.nn.functional.normalize(tokens.float(), dim=-1) for tokens in (visual, text))
    cosines = product(of_visual, of_text.transpose(1, 2)).masked_fill_(~text_mask.unsqueeze(1), -torch.inf)
    return cosines.amax(dim=2).masked_fill_(~text_mask.any(dim=1, keepdim=True), 0.0)


_COSINES = {"mean": mean_cosine, "max": max_cosine}


def relevance(similarity: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Scale similarity `[U, L]` by its minimum and maximum over the candidates of each unit; 1 if all are equal."""
    lowest = similarity.masked_fill(~candidates, torch.inf).amin(dim=1, keepdim=True)
    highest = similarity.masked_fill(~candidates, -torch.inf).amax(dim=1, keepdim=True)
    # a unit without candidates is infinite on both sides
    return ((similarity - lowest + _LEAST) / (highest - lowest + _LEAST)).nan_to_num_(nan=0.0)
