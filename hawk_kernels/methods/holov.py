"""HoloV: every part of the picture keeps its share, by attention and diversity (arXiv 2510.02912)."""

from __future__ import annotations

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
from hawk_kernels.selection import Selection, kept_counts
from hawk_kernels.validation import check_rounding

_SCALES = ("crop", "image")
_EPSILON = 1e-6


@register
class HoloV(JointMethod):
    """Keeps in each crop of the image the tokens that CLS attends to, and shares the budget among the crops.

    The visual tokens are cut into 16 crops of equal length in their order, which are bands of the image. Token `i` of a
    crop has the attention `a[i]` of the encoder's CLS token, in the layer that the visual features come from, and
    `v[i]`, the variance of its cosines with the other embeddings of the crop. A crop scores the mean of
    `a[i] + 0.09 v[i] mean(a) / mean(v)`, gets the part of the budget that its score is of all, rounded down, and the
    tokens that remain go one each to the crops with the largest scores. A crop keeps the tokens with the largest
    attention (Zou et al., "Don't Just Chase Highlighted Tokens in MLLMs: Revisiting Visual Holistic Context Retention",
    NeurIPS 2025, arXiv 2510.02912, and github obananas/HoloV, which this follows).

    The release takes the two means over the crop. Then the variance cancels, and a crop scores 1.09 times its mean
    attention, whatever its diversity. `scale="image"` takes them over the whole image, so that diverse crops get more,
    which is what the paper argues for. Where a share exceeds its crop, the release fills up with zero vectors; here the
    surplus goes to the tokens of other crops with the largest attention. The release hands the tokens of a crop over in
    the order of their attention; here they keep their places. A crop of one token, which has no variance,
    counts a thousandth in the release, and fully here.

    An encoder without a CLS token ranks by the attention that a token receives from all others, see
    `PrefillView.cls_attention`. So does the release for Qwen2.5-VL, but it leaves that attention in the order of the
    encoder's windows, so that tokens get the attention of others. Images that share a budget are cut as one.

    Args:
        crops: number of crops, at least 1.
        diversity: weight of the variance, at least 0.
        scale: "crop" (release) or "image", what the means are taken over.
        cls_layer: encoder layer, counted from 1; None takes that of the visual features.
        rounding: "floor", "ceil" or "nearest" (half to even).

    Raises:
        TypeError, ValueError: an option that is none of these.
    """

    name = "holov"
    summary = "Keeps in every crop of the image what the vision encoder's CLS token attends to there."
    paper = "2510.02912"
    signal = "attention of CLS inside the vision encoder; embeddings of the image"
    uses_cls_attention = True

    def __init__(
        self,
        crops: int = 16,
        diversity: float = 0.09,
        scale: str = "crop",
        cls_layer: int | None = None,
        rounding: str = "floor",
    ) -> None:
        self.crops = checked_int(crops, 1, "crops: expected an int >= 1", "the release takes 16")
        expected = "diversity: expected a number >= 0"
        if isinstance(diversity, bool) or not isinstance(diversity, int | float):
            raise TypeError(f"{expected}, got {type(diversity).__name__}; the release takes 0.09")
        if not diversity >= 0:
            raise ValueError(f"{expected}, got {diversity}; the release takes 0.09")
        self.diversity = float(diversity)
        if scale not in _SCALES:
            raise ValueError(f"scale: expected 'crop' (release) or 'image', got {scale!r}; choose one")
        self.scale = scale
        self.cls_layer = checked_cls_layer(cls_layer)
        check_rounding(rounding)
        self.rounding = rounding

    def select(self, view: PrefillView, r: float | int) -> Selection:
        candidates = candidates_of_units(view)
        attention = of_units(view.cls_attention(), view)
        sizes, starts = crops_of(candidates.sum(dim=1, keepdim=True), self.crops)
        weights = self.crop_weights(attention, of_units(view.visual_embeddings(), view), sizes, starts)
        budget = kept_counts(r, sizes.sum(dim=1), self.rounding).unsqueeze(1)
        wanted = shares(weights, budget)

        length = candidates.shape[1]
        places = torch.arange(length, device=candidates.device).expand_as(candidates)
        crop = (torch.searchsorted(starts, places.contiguous(), right=True) - 1).clamp(max=self.crops - 1)
        order = rank(order_key(attention, candidates))
        in_crop = rank(-(crop * (length + 1) + order)) - starts.gather(1, crop)
        # what a crop cannot take goes to the tokens that are next in the whole unit
        key = torch.where(in_crop < wanted.gather(1, crop), order, order + length)
        kept = select_topk(-key.float(), r, mask=candidates, rounding=self.rounding)
        scores = attention.masked_fill(~candidates, -torch.inf)
        return of_rows(Selection(kept.mask, kept.indices, scores), view)

    def crop_weights(
        self, attention: torch.Tensor, embeddings: torch.Tensor, sizes: torch.Tensor, starts: torch.Tensor
    ) -> torch.Tensor:
        """Score each crop, float32 `[U, crops]`; tokens that are not finite count as 0.

        Args:
            attention: float32 `[U, L]`.
            embeddings: `[U, L, hidden]`.
            sizes: int64 `[U, crops]`.
            starts: int64 `[U, crops]`.
        """
        length = attention.shape[1]
        steps = torch.arange(-(-length // self.crops), device=attention.device)
        inside = steps < sizes.unsqueeze(-1)
        places = (starts.unsqueeze(-1) + steps).clamp(max=length - 1)
        rows = torch.arange(len(attention), device=attention.device).view(-1, 1, 1)
        of_tokens = attention[rows, places].masked_fill(~inside, 0).nan_to_num(0.0, 0.0, 0.0)
        unit = embeddings[rows, places].float()
        unit = unit.masked_fill(~(inside & unit.isfinite().all(dim=-1)).unsqueeze(-1), 0)
        unit = unit / (unit.norm(dim=-1, keepdim=True) + _EPSILON)
        cosine = product(unit, unit.transpose(-1, -2)).masked_fill(torch.eye(len(steps), device=unit.device).bool(), 0)
        others = (sizes - 1).clamp(min=1)[..., None]
        mean = cosine.sum(dim=-1) / others
        between = inside.unsqueeze(-1) & inside.unsqueeze(-2)
        varies = ((cosine - mean.unsqueeze(-1)) ** 2).masked_fill(~between, 0).sum(dim=-1) / others
        count = sizes.clamp(min=1)
        mean_attention, mean_variance = of_tokens.sum(dim=-1) / count, varies.sum(dim=-1) / count
        if self.scale == "crop":
            scale = mean_attention / (mean_variance + _EPSILON)
        else:
            total = sizes.sum(dim=1, keepdim=True).clamp(min=1)
            of_image, varies_in_image = (x.sum(dim=(1, 2)).unsqueeze(1) / total for x in (of_tokens, varies))
            scale = of_image / (varies_in_image + _EPSILON)
        weights: torch.Tensor = mean_attention + self.diversity * mean_variance * scale
        return weights


def crops_of(counts: torch.Tensor, crops: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut units of `counts` tokens, int64 `[U, 1]`, into crops: their sizes and starts, int64 `[U, crops]`."""
    number = torch.arange(crops, device=counts.device)
    sizes = counts // crops + (number < counts % crops).long()
    return sizes, sizes.cumsum(dim=1) - sizes


def shares(weights: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """Divide a budget in proportion to weights, rounded down; what remains goes one by one to the largest weights.

    Args:
        weights: float32 `[U, crops]`, at least 0.
        budget: int64 `[U, 1]`.

    Returns:
        int64 `[U, crops]`, which add up to the budget or, where all weights are 0, to less.
    """
    exact = weights.double()
    # the release adds 1e-6 to a thousand times the sum, so that no share is rounded up
    exact = exact / (exact.sum(dim=1, keepdim=True) + _EPSILON / 1000)
    whole = torch.floor(exact * budget).long()
    place = rank(order_key(weights, None))
    return whole + (place < budget - whole.sum(dim=1, keepdim=True)).long()
