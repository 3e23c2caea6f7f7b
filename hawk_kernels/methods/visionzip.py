"""VisionZip: what CLS attends to, and the rest merged into a few tokens of context (arXiv 2412.04467)."""

from __future__ import annotations

import torch

from hawk_kernels.methods.base import (
    Method,
    candidates_of_units,
    checked_merging,
    checked_share,
    of_rows,
    of_units,
    product,
    register,
    selected,
)
from hawk_kernels.methods.prefill_view import PrefillView
from hawk_kernels.ranking import order_key, rank
from hawk_kernels.selection import Merge, Selection, keep_fraction, kept_count, kept_counts, max_kept
from hawk_kernels.validation import check_rounding


@register
class VisionZip(Method):
    """Keeps the dominant tokens of the vision encoder, and merges the others into evenly spread contextual tokens.

    Of a budget of `K` tokens, `C = floor(contextual * K)` are contextual and `K - C` dominant: those that the CLS token
    attends to most in the last layer that the visual tokens come from (the layer before the last in LLaVA); in an
    encoder without CLS, those that receive most attention. Among the `R` other tokens, in their order, every
    `R // C`-th is a target until there are `C` of them. Each of the rest goes to the target with the most similar key,
    by the cosine of keys averaged over the heads, and a target becomes the mean of itself and those that came to it.
    The rows that enter the projector are merged, and the projector runs on the means (Yang et al., "VisionZip: Longer
    is Better but Not Necessary in Vision Language Models", CVPR 2025, arXiv 2412.04467).

    The release, github dvlab-research/VisionZip, differs in three ways. A target becomes itself plus the mean of those
    that came to it, about twice as long a vector as any that the projector was trained on; `merging="release"` does
    that. It counts CLS itself among the dominant tokens and hands it to the language model, which transformers never
    does. It sets contextual tokens after the dominant ones and renumbers all positions; here each token keeps its place
    and its position id.

    Args:
        contextual: share of the budget for contextual tokens, in [0, 1); 10 of 64, 20 of 128 and 30 of 192 are 5/32.
            Without CLS, which is among the 64 of the release, 0.16 of 63, 127 and 191 tokens are as many.
        merging: "paper" or "release", what a target becomes.
        rounding: "floor", "ceil" or "nearest" (half to even).

    Raises:
        TypeError, ValueError: an option that is none of these.
    """

    name = "visionzip"
    summary = "Keeps what the vision encoder's CLS token attends to, and merges the rest into tokens of context."
    paper = "2412.04467"
    signal = "CLS attention and keys inside the vision encoder"
    uses_cls_attention = True
    uses_encoder_keys = True
    stage = "encoder"

    def __init__(self, contextual: float = 5 / 32, merging: str = "paper", rounding: str = "floor") -> None:
        self.contextual = checked_share("contextual", contextual, "the paper takes 5/32")
        self.merging = checked_merging(merging)
        check_rounding(rounding)
        self.rounding = rounding

    def score(self, view: PrefillView) -> torch.Tensor:
        return view.cls_attention().masked_fill(~view.candidates, -torch.inf)

    def select(self, view: PrefillView, r: float | int) -> Selection:
        selection = visionzip_select(
            of_units(view.cls_attention(), view),
            of_units(view.encoder_keys().mean(dim=2), view),
            r,
            mask=candidates_of_units(view),
            contextual=self.contextual,
            merging=self.merging,
            rounding=self.rounding,
        )
        return of_rows(selection, view)


def visionzip_select(
    attention: torch.Tensor,
    keys: torch.Tensor,
    r: float | int,
    *,
    mask: torch.Tensor,
    contextual: float = 5 / 32,
    merging: str = "paper",
    rounding: str = "floor",
) -> Selection:
    """Choose dominant and contextual tokens, and merge the others into the contextual ones.

    Args:
        attention: float32 `[B, M]`, attention of CLS.
        keys: float32 `[B, M, C]`.
        r: fraction of a row's candidates that is kept, or the budget.
        mask: bool `[B, M]`, True = candidate.
        contextual: share of the budget for contextual tokens.
        merging: "paper" or "release".
        rounding: "floor", "ceil" or "nearest" (half to even).

    Returns:
        `Selection(mask, indices, scores)` with a merge map of one entry for each token of a contextual cluster.
    """
    num_tokens = mask.shape[1]
    counts = mask.sum(dim=1)
    budget = kept_counts(r, counts, rounding)
    numerator, denominator = keep_fraction(contextual, "floor") if contextual else (0, 1)
    num_targets = torch.div(budget * numerator, denominator, rounding_mode="floor").unsqueeze(1)
    num_dominant = budget.unsqueeze(1) - num_targets
    dominant = mask & (rank(order_key(attention, mask)) < num_dominant)
    rest = mask & ~dominant
    # every step-th of the rest, in their order, is a target
    place = rest.cumsum(dim=1) - 1
    step = torch.div(rest.sum(dim=1, keepdim=True), num_targets.clamp(min=1), rounding_mode="floor").clamp(min=1)
    is_target = rest & (place % step == 0) & (place // step < num_targets)
    kept = dominant | is_target
    width = max_kept(r, num_tokens, rounding)
    most_targets = kept_count(contextual, width) if contextual else 0
    found = selected(kept, attention.masked_fill(~mask, -torch.inf), width)
    if most_targets == 0:
        return found

    targets = selected(is_target, found.scores, most_targets).indices
    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    of_targets = unit.gather(1, targets.clamp(min=0).unsqueeze(2).expand(-1, -1, unit.shape[2]))
    cosine = product(unit, of_targets.transpose(1, 2)).masked_fill((targets < 0).unsqueeze(1), -torch.inf)
    nearest = cosine.nan_to_num(nan=-2.0, neginf=-torch.inf).argmax(dim=2)
    own = torch.arange(num_tokens, device=mask.device).expand_as(nearest)
    target = torch.where(is_target, own, targets.gather(1, nearest))
    others = rest & ~is_target & (num_targets > 0)
    joins = torch.where(others, target, num_tokens)
    came = torch.zeros(len(mask), num_tokens + 1, device=mask.device).scatter_add_(1, joins, others.float())
    came = came.gather(1, target.clamp(min=0))
    if merging == "release":
        weight = torch.where(is_target, 1.0, 1 / came.clamp(min=1))
    else:
        weight = 1 / (came + 1)
    target = torch.where(others | is_target, target, -1)
    return found.merging(Merge(target, own.contiguous(), weight))
