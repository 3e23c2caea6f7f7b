"""VisPruner: the tokens that CLS attends to, and of the rest those that repeat each other least (arXiv 2412.01818)."""

from __future__ import annotations

import math

import torch

from hawk_kernels.methods.base import (
    JointMethod,
    candidates_of_units,
    checked_int,
    of_rows,
    of_units,
    product,
    register,
)
from hawk_kernels.methods.fastervlm import checked_cls_layer
from hawk_kernels.methods.prefill_view import PrefillView
from hawk_kernels.ops.select_topk import select_topk
from hawk_kernels.ranking import order_key, rank
from hawk_kernels.selection import Selection, kept_count, kept_counts
from hawk_kernels.validation import check_rounding


@register
class VisPruner(JointMethod):
    """Keeps the tokens that the encoder's CLS token attends to most, and of the rest those that repeat others least.

    Of a budget of `k` tokens, `floor(k / 2)` go to those with the largest attention of CLS, in the encoder layer that
    the visual features come from. The others stand in the order of that attention and are thinned out, 8 at a time,
    until the budget is met: every second of them is compared with all those between, by the cosine of what enters the
    projector, and those most similar to one of them go. The rest of the compared ones, the least similar last, are then
    placed before the ones between (Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective
    Token Pruning in VLMs", ICCV 2025, arXiv 2412.01818, and github Theia-4869/VisPruner).

    The release raises an error where attention leaves an odd number of tokens, or where a round would take more than
    half of what is left; here any number is thinned out. In the release each tile of an image, such as those of
    LLaVA-NeXT, has a budget, as with `prune(budget="per_tile")`; by default the tiles compete. An encoder without a CLS
    token ranks by the attention that a token receives from all others, see `PrefillView.cls_attention`. Memory grows
    with the square of the number of visual tokens.

    Args:
        important: share of the budget that attention takes, in [0, 1].
        step: how many tokens go at a time, at least 1.
        cls_layer: encoder layer, counted from 1; None takes that of the visual features.
        rounding: "floor", "ceil" or "nearest" (half to even).

    Raises:
        TypeError, ValueError: an option that is none of these.
    """

    name = "vispruner"
    summary = "Keeps what the vision encoder's CLS token attends to, and of the rest what repeats least."
    paper = "2412.01818"
    signal = "attention of CLS and features of the vision encoder"
    uses_cls_attention = True
    uses_encoder_features = True

    def __init__(
        self, important: float = 0.5, step: int = 8, cls_layer: int | None = None, rounding: str = "floor"
    ) -> None:
        expected = "important: expected a number in [0, 1], the share of the budget that attention takes"
        if isinstance(important, bool) or not isinstance(important, int | float):
            raise TypeError(f"{expected}, got {type(important).__name__}; the release takes 0.5")
        if not 0 <= important <= 1:
            raise ValueError(f"{expected}, got {important}; the release takes 0.5")
        self.important = float(important)
        self.step = checked_int(step, 1, "step: expected an int >= 1", "the release takes 8")
        self.cls_layer = checked_cls_layer(cls_layer)
        check_rounding(rounding)
        self.rounding = rounding

    def select(self, view: PrefillView, r: float | int) -> Selection:
        candidates = candidates_of_units(view)
        attention = of_units(view.cls_attention(), view)
        features = of_units(view.encoder_features(), view).float()
        kept = self.thinned(attention, features, candidates, r)
        found = select_topk(kept.float(), r, mask=candidates, rounding=self.rounding)
        scores = attention.masked_fill(~candidates, -torch.inf)
        return of_rows(Selection(found.mask, found.indices, scores), view)

    def thinned(
        self, attention: torch.Tensor, features: torch.Tensor, candidates: torch.Tensor, r: float | int
    ) -> torch.Tensor:
        """Choose in each unit, bool `[U, L]`.

        Args:
            attention: float32 `[U, L]`, NaN ranks last.
            features: float32 `[U, L, C]`; a token that is not finite has cosine 0 with every other.
            candidates: bool `[U, L]`.
            r: fraction kept of each unit, or its budget.
        """
        units, length = candidates.shape
        counts = candidates.sum(dim=1, keepdim=True)
        budget = kept_counts(r, counts, self.rounding)
        first = torch.floor(budget * self.important).long()
        order = rank(order_key(attention, candidates))
        rest = budget - first

        unit = features.masked_fill(~features.isfinite().all(dim=-1, keepdim=True), 0)
        unit = torch.nn.functional.normalize(unit, dim=-1)
        cosine = product(unit, unit.transpose(1, 2)).flatten(0, 1)

        # what is left of the longest unit is an upper bound for all
        longest = kept_count(r, length, self.rounding)
        from_first = math.floor(longest * self.important)
        left, widths = counts - first, self._widths(length - from_first, longest - from_first)
        # the tokens after the important ones, the one with the largest attention first
        places = first + torch.arange(widths[0], device=first.device)
        queue = order.argsort(dim=1).gather(1, places.clamp(max=length - 1))
        starts = torch.arange(units, device=first.device).unsqueeze(1) * length
        for width in widths[1:]:
            evens, odds = queue[:, ::2], queue[:, 1::2]
            even_place, odd_place = (torch.arange(x.shape[1], device=x.device) for x in (evens, odds))
            is_even, is_odd = 2 * even_place < left, 2 * odd_place + 1 < left
            # whole rows and a bias are cheaper to read than single columns
            among = torch.where(is_odd, odds, length)
            bias = cosine.new_full((units, length + 1), -torch.inf).scatter_(1, among, 0)[:, :length]
            rows = cosine.index_select(0, (evens + starts).flatten()).view(units, -1, length)
            likeness = rows.add_(bias.unsqueeze(1)).amax(dim=2)
            num_even = (left + 1) // 2
            gone = torch.minimum((left - rest).clamp(min=0, max=self.step), num_even)
            place = rank(order_key(likeness, is_even)) - gone
            # a unit that has met its budget keeps its order
            even_target = torch.where(gone > 0, place, 2 * even_place)
            odd_target = torch.where(gone > 0, num_even - gone + odd_place, 2 * odd_place + 1)
            even_target = torch.where(is_even & (even_target >= 0), even_target, width).clamp(max=width)
            odd_target = torch.where(is_odd, odd_target, width).clamp(max=width)
            queue = queue.new_zeros(units, width + 1).scatter_(1, even_target, evens).scatter_(1, odd_target, odds)
            queue, left = queue[:, :width], left - gone
        stays = torch.arange(queue.shape[1], device=queue.device) < left
        target = torch.where(stays, queue, length)
        diverse = candidates.new_zeros(units, length + 1).scatter_(1, target, True)[:, :length]
        return ((order < first) | diverse) & candidates

    def _widths(self, most: int, floor: int) -> list[int]:
        """List how many tokens the longest unit has left before the first round and after each, and then some more.

        Half of what is left may be fewer than `step`. A shorter unit may come to that earlier than a longer one, and
        then needs rounds that halve it.

        Args:
            most: tokens at first.
            floor: tokens that stay.
        """
        widths = [most]
        while widths[-1] > floor:
            widths.append(max(floor, widths[-1] - self.step, widths[-1] // 2))
        return widths + [floor] * (2 * self.step).bit_length()
