"""PruMerge and PruMerge+: what CLS attends to, each token merged with the dropped ones like it (arXiv 2403.15388)."""

from __future__ import annotations

import torch

from hawk_kernels.methods.base import (
    Method,
    candidates_of_units,
    checked_int,
    checked_merging,
    of_rows,
    of_units,
    product,
    register,
    selected,
)
from hawk_kernels.methods.prefill_view import PrefillView
from hawk_kernels.ranking import order_key, rank
from hawk_kernels.selection import Merge, Selection, kept_counts, max_kept
from hawk_kernels.validation import check_rounding


@register
class PruMerge(Method):
    """Keeps the tokens that the vision encoder's CLS token attends to most, and merges similar dropped ones into them.

    A kept token `p` becomes `(a[p] y[p] + sum of a[q] y[q]) / (a[p] + sum of a[q])` over the `neighbours` dropped
    tokens `q` whose keys have the largest cosine to its own, all heads taken together. `a` is the attention of CLS in
    the last layer that the visual tokens come from, and `y` the rows that enter the projector, which runs on the
    averages. A dropped token may go into several kept ones, or into none. In an encoder without CLS, `a` is the
    attention that a token receives (Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large
    Multimodal Models", ICCV 2025, arXiv 2403.15388).

    With `plus=True`, PruMerge+, a quarter of the budget is chosen by attention, at least one token, and the rest evenly
    over the other tokens in their order, so that every part of the picture is represented. The release adds to `n`
    tokens chosen by attention up to `3 n` such samples, which are these shares.

    The authors keep as many tokens as the attention has outliers, those above the third quartile by more than one and a
    half times the interquartile range, so the number differs from picture to picture. Here `keep_ratio` gives the
    number: all later shapes follow from it, and counting outliers would make the host wait for the encoder every time.

    The release, github 42Shawn/LLaVA-PruMerge, differs in other ways too. It takes neighbours from all other tokens,
    kept ones included, and adds `a[q] y[q]` to `y[p]` without dividing by anything; `merging="release"` does both, with
    the attention of CLS as it is, divided by its sum only where that is above 1, as without CLS. It reads queries and
    keys of the very last layer (`cls_layer=24` of CLIP-L), whose output LLaVA discards, and takes one softmax over all
    heads together. It sets kept tokens in the order of their attention, and after them one more, the sum of all dropped
    ones weighted by their attention. PruMerge+ samples the grid at equal steps and leaves out what is kept already,
    where this class samples the other tokens.

    Args:
        neighbours: dropped tokens that go into each kept one, at least one.
        plus: whether most of the budget is spread evenly over the picture.
        merging: "paper" or "release", what a kept token becomes.
        cls_layer: encoder layer of attention and keys, counted from 1; None takes the last one that visual tokens come
            from.
        rounding: "floor", "ceil" or "nearest" (half to even).

    Raises:
        TypeError, ValueError: an option that is none of these.
    """

    name = "prumerge"
    summary = "Keeps what the vision encoder's CLS token attends to, each merged with the dropped tokens most like it."
    paper = "2403.15388"
    signal = "CLS attention and keys inside the vision encoder"
    uses_cls_attention = True
    uses_encoder_keys = True
    stage = "encoder"

    def __init__(
        self,
        neighbours: int = 32,
        plus: bool = False,
        merging: str = "paper",
        cls_layer: int | None = None,
        rounding: str = "floor",
    ) -> None:
        self.neighbours = checked_int(neighbours, 1, "neighbours: expected an int >= 1", "the release takes 32")
        if not isinstance(plus, bool):
            raise TypeError(f"plus: expected a bool, got {type(plus).__name__}; True is PruMerge+")
        self.plus = plus
        self.merging = checked_merging(merging)
        if cls_layer is not None:
            expected = (
                "cls_layer: expected a layer of the vision encoder, counted from 1, or None for the last one used"
            )
            cls_layer = checked_int(cls_layer, 1, expected, "the release takes 24 of CLIP-L")
        self.cls_layer = cls_layer
        check_rounding(rounding)
        self.rounding = rounding

    def score(self, view: PrefillView) -> torch.Tensor:
        return view.cls_attention().masked_fill(~view.candidates, -torch.inf)

    def select(self, view: PrefillView, r: float | int) -> Selection:
        selection = prumerge_select(
            of_units(view.cls_attention(), view),
            of_units(view.encoder_keys().flatten(2), view),
            r,
            mask=candidates_of_units(view),
            neighbours=self.neighbours,
            plus=self.plus,
            merging=self.merging,
            rounding=self.rounding,
        )
        return of_rows(selection, view)


def prumerge_select(
    attention: torch.Tensor,
    keys: torch.Tensor,
    r: float | int,
    *,
    mask: torch.Tensor,
    neighbours: int = 32,
    plus: bool = False,
    merging: str = "paper",
    rounding: str = "floor",
) -> Selection:
    """Choose as PruMerge does, and merge the nearest dropped tokens into each kept one.

    Args:
        attention: float32 `[B, M]`, attention of CLS.
        keys: float32 `[B, M, C]`.
        r: fraction of a row's candidates that is kept, or the budget.
        mask: bool `[B, M]`, True = candidate.
        neighbours: tokens that go into each kept one.
        plus: whether three quarters of the budget are spread evenly.
        merging: "paper" or "release".
        rounding: "floor", "ceil" or "nearest" (half to even).

    Returns:
        `Selection(mask, indices, scores)` with a merge map of `1 + neighbours` entries for each kept token. A row that
        keeps all its tokens merges none.
    """
    num_tokens = mask.shape[1]
    counts = mask.sum(dim=1, keepdim=True)
    budget = kept_counts(r, counts, rounding)
    by_attention = (budget // 4).clamp(min=1).minimum(budget) if plus else budget
    kept = mask & (rank(order_key(attention, mask)) < by_attention)
    if plus:
        kept = kept | _spread(mask & ~kept, budget - by_attention)
    found = selected(kept, attention.masked_fill(~mask, -torch.inf), max_kept(r, num_tokens, rounding))

    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    targets = found.indices.clamp(min=0)
    of_kept = unit.gather(1, targets.unsqueeze(2).expand(-1, -1, unit.shape[2]))
    cosine = product(of_kept, unit.transpose(1, 2)).nan_to_num(nan=-2.0)
    may_join = (mask if merging == "release" else mask & ~kept).unsqueeze(1)
    itself = torch.arange(num_tokens, device=mask.device) == targets.unsqueeze(2)
    merges = (found.indices >= 0) & (budget < counts)
    cosine = cosine.masked_fill(~(may_join & ~itself & merges.unsqueeze(2)), -torch.inf)
    nearest = cosine.topk(min(neighbours, num_tokens), dim=2)
    source = torch.cat([targets.unsqueeze(2), nearest.indices], dim=2)
    counting = torch.cat([merges.unsqueeze(2), nearest.values > -torch.inf], dim=2)
    weight = attention.unsqueeze(1).expand(-1, targets.shape[1], -1).gather(2, source).where(counting, 0)
    if merging == "release":
        # what CLS gives to patches is less than 1 in sum and counts as it is; what tokens receive is 1 on average
        total = attention.masked_fill(~mask, 0).sum(dim=1).view(-1, 1, 1)
        weight = weight / total.clamp(min=1)
        weight[:, :, 0] = 1
    else:
        total = weight.sum(dim=2, keepdim=True)
        # without any attention a token stays as it is
        alone = torch.zeros_like(weight)
        alone[:, :, 0] = 1
        weight = torch.where(total > 0, weight / total, alone)
    target = torch.where(counting, targets.unsqueeze(2), -1)
    return found.merging(Merge(target.flatten(1), source.flatten(1), weight.flatten(1)))


def _spread(rest: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Mark tokens spread evenly over the `R` of `rest`, bool `[B, M]`: the `j`-th is number `j * R // count`."""
    place = rest.cumsum(dim=1) - 1
    length = rest.sum(dim=1, keepdim=True).clamp(min=1)
    # how many j have j * R / count in [place, place + 1): a difference of two roundings up
    before, upto = (
        torch.div(bound * count + length - 1, length, rounding_mode="floor") for bound in (place, place + 1)
    )
    return rest & (upto > before)
