"""DART: tokens that duplicate a few pivots least (arXiv 2502.11494)."""

from __future__ import annotations

import torch

from hawk_kernels.methods.base import (
    JointMethod,
    Keep,
    candidates_of_units,
    checked_int,
    of_rows,
    of_units,
    product,
    register,
)
from hawk_kernels.methods.prefill_view import PrefillView
from hawk_kernels.ranking import order_key, rank
from hawk_kernels.selection import Selection, kept_counts, max_kept
from hawk_kernels.validation import check_rounding


@register
class Dart(JointMethod):
    """Keeps pivots with large keys and, for each pivot, the visual tokens that are least similar to it.

    Pivots are the visual and the text tokens with the largest `|k|_1`, keys of all heads taken together. Visual pivots
    are kept; the rest of the budget is divided evenly among all pivots, visual ones first, the largest first; each in
    turn takes the tokens with the smallest cosine to it that are still there (Wen et al., "Stop Looking for Important
    Tokens in Multimodal Language Models: Duplication Matters More", EMNLP 2025, arXiv 2502.11494, and github
    ZichenWen1/DART, with four pivots of each kind). The authors prune after the second decoder layer, as `layer=2`
    does; by default this is done before the first. Either way the keys are those of the layer that follows, before
    RoPE, and the cosines those of the states that enter it.

    The release takes the keys of the layer before, after RoPE, and the cosines of the states after the model's last
    norm. Its pivots choose in the order of a Python set, and each takes an eighth of the budget, rounded down, so that
    the visual pivots come on top.

    Args:
        pivots: visual pivots, at least one.
        text_pivots: text pivots, 0 or more.
        rounding: "floor", "ceil" or "nearest" (half to even).
        layer: the last layer that reads every token, counted from 1; None drops tokens before the first.

    Raises:
        TypeError, ValueError: an option that is none of these.
    """

    name = "dart"
    summary = "Keeps the tokens that duplicate a few pivot tokens least."
    paper = "2502.11494"
    signal = "keys in the first layer; embeddings of the image and of the text"
    uses_text = True
    stage_options = ("layer",)

    def __init__(
        self, pivots: int = 4, text_pivots: int = 4, rounding: str = "floor", layer: int | None = None
    ) -> None:
        remedy = "the release takes 4"
        self.pivots = checked_int(pivots, 1, "pivots: expected an int >= 1", remedy)
        self.text_pivots = checked_int(text_pivots, 0, "text_pivots: expected an int >= 0", remedy)
        check_rounding(rounding)
        self.rounding = rounding
        expected = "layer: expected the last layer that sees every token, counted from 1, or None"
        self.layer = None if layer is None else checked_int(layer, 1, expected, "the release takes 2")

    def stages(self, keep_ratio: float | int, depth: int) -> dict[int, Keep]:
        return {self.layer or 0: keep_ratio}

    def select(self, view: PrefillView, r: float | int) -> Selection:
        text, text_mask = view.text_embeddings()
        text_norm = key_norm(view.text_keys())
        if view.segments is not None:
            row = view.segments.index[:, 0] // view.candidates.shape[1]
            text, text_mask, text_norm = text[row], text_mask[row], text_norm[row]
        selection = dart_select(
            of_units(view.visual_embeddings(), view),
            of_units(key_norm(view.visual_keys()), view),
            text,
            text_norm,
            r,
            mask=candidates_of_units(view),
            text_mask=text_mask,
            pivots=self.pivots,
            text_pivots=self.text_pivots,
            rounding=self.rounding,
        )
        return of_rows(selection, view)


def key_norm(keys: torch.Tensor) -> torch.Tensor:
    """Return `|k|_1` of keys `[B, Hkv, N, D]` with all heads taken together, float32 `[B, N]`."""
    return keys.float().abs().sum(dim=(1, 3))


def dart_select(
    visual: torch.Tensor,
    visual_norm: torch.Tensor,
    text: torch.Tensor,
    text_norm: torch.Tensor,
    r: float | int,
    *,
    mask: torch.Tensor,
    text_mask: torch.Tensor,
    pivots: int = 4,
    text_pivots: int = 4,
    rounding: str = "floor",
) -> Selection:
    """Choose as DART does, in one step over whole rows for each pivot.

    Args:
        visual: `[B, M, hidden]`, embeddings.
        visual_norm: float32 `[B, M]`, `|k|_1`.
        text: `[B, N, hidden]`.
        text_norm: float32 `[B, N]`.
        r: fraction of a row's candidates that is kept, or the budget.
        mask: bool `[B, M]`, True = candidate.
        text_mask: bool `[B, N]`, True = text token.
        pivots: visual pivots, at most the budget.
        text_pivots: text pivots, at most the text tokens.
        rounding: "floor", "ceil" or "nearest" (half to even).

    Returns:
        `Selection(mask, indices, scores)`; scores are `1 - cos` to the nearest pivot, 2 for visual pivots.
    """
    num_tokens = visual.shape[1]
    visual, text = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (visual, text))
    budget = kept_counts(r, mask.sum(dim=1), rounding).unsqueeze(1)
    visual_order, text_order = _by_norm(visual_norm, mask, pivots), _by_norm(text_norm, text_mask, text_pivots)
    visual_pivots = budget.clamp(max=pivots)
    num_pivots = visual_pivots + text_mask.sum(dim=1, keepdim=True).clamp(max=text_pivots)
    remaining = budget - visual_pivots

    slot = torch.arange(visual_order.shape[1], device=mask.device)
    target = torch.where(slot < visual_pivots, visual_order, num_tokens)
    is_pivot = torch.nn.functional.pad(torch.zeros_like(mask), (0, 1)).scatter_(1, target, True)[:, :num_tokens]
    kept, nearest = is_pivot.clone(), torch.full_like(visual_norm, -torch.inf)
    none = torch.zeros_like(visual_pivots)
    turns = [(visual, visual_order, i, none + i, i < visual_pivots) for i in range(visual_order.shape[1])]
    turns += [
        (text, text_order, i, visual_pivots + i, visual_pivots + i < num_pivots) for i in range(text_order.shape[1])
    ]
    for tokens, by_norm, i, place, active in turns:
        pivot = by_norm[:, i : i + 1]
        vector = tokens.gather(1, pivot.unsqueeze(2).expand(-1, -1, tokens.shape[2]))
        cosine = product(vector, visual.transpose(1, 2)).squeeze(1)
        parts = num_pivots.clamp(min=1)
        share = (place + 1) * remaining // parts - place * remaining // parts
        kept |= rank(order_key(-cosine, mask & ~kept)) < torch.where(active, share, 0)
        nearest = torch.where(active, torch.maximum(nearest, cosine), nearest)
    scores = torch.where(is_pivot, 2.0, 1 - nearest)
    width = max_kept(r, num_tokens, rounding)
    slot = torch.where(kept, kept.cumsum(dim=1) - 1, width)
    columns = torch.arange(num_tokens, device=mask.device).expand_as(slot)
    indices = slot.new_full((mask.shape[0], width + 1), -1).scatter_(1, slot, columns)[:, :width].contiguous()
    return Selection(kept, indices, scores.masked_fill(~mask, -torch.inf))


def _by_norm(norm: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
    """Return the `count` tokens of each row with the largest norm, the largest first, int64 `[B, at most count]`."""
    return order_key(norm, mask).argsort(dim=1, descending=True, stable=True)[:, :count]
