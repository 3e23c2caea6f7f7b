"""What every pruning method has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from hawk_kernels.methods.view import PrefillView, Segments
from hawk_kernels.ops.select_topk import select_topk
from hawk_kernels.selection import Selection, kept_count


class Method(ABC):
    """Scores the visual tokens of a prompt and chooses those that stay.

    A method keeps exactly `kept_count(r, M_b)` tokens of a row (or of each image, with segments): the shapes that
    follow are computed from that number on the host, without waiting for the device.

    Attributes:
        name: what `prune(method=...)` calls it.
        uses_head_weights: whether `PrefillView.head_weights` must be there.
        uses_text: whether a row with visual tokens must have text queries.
        uses_encoder_attention: whether `PrefillView.encoder_attention` must be there; the layer is `object_layer`.
        uses_grids: whether `PrefillView.frames` must be there.
        uses_positions: whether the view must tell queries and keys after RoPE.
        hidden_from_layer: None where dropped tokens are removed before the first layer. Else layers 1 to this one see
            every token, the last of them ranks the visual ones, and the layers behind it do not see the dropped ones,
            which stay in the sequence. `view` then is that of the ranking layer.
        rounding: "floor" or "ceil", how a keep ratio becomes a number of tokens.
    """

    name: str
    uses_head_weights: bool = False
    uses_text: bool = False
    uses_encoder_attention: bool = False
    object_layer: int | None = None
    uses_grids: bool = False
    uses_positions: bool = False
    hidden_from_layer: int | None = None
    rounding: str = "floor"

    @abstractmethod
    def score(self, view: PrefillView) -> torch.Tensor:
        """Importance of each visual token, float32 `[B, M]`; `-inf` where `view.candidates` is False."""

    def select(self, view: PrefillView, r: float | int) -> Selection:
        """The tokens that stay: the highest scores of each row, or of each of its images."""
        scores = self.score(view)
        if view.segments is not None:
            return select_in_segments(scores, r, view.segments, self.rounding)
        return select_topk(scores, r, mask=view.candidates, rounding=self.rounding)

    def kept_count(self, r: float | int, num_candidates: int) -> int:
        """How many of `num_candidates` tokens `select` keeps."""
        return kept_count(r, num_candidates, self.rounding)

    def options(self) -> dict[str, object]:
        """The options this method was made with, for statistics; what JSON cannot hold is described."""
        plain = (str, int, float, bool, type(None))
        public = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {name: value if isinstance(value, plain) else repr(value) for name, value in public.items()}


class JointMethod(Method):
    """A method that chooses tokens together: what one of them is worth depends on the others and on the budget."""

    def score(self, view: PrefillView) -> torch.Tensor:
        raise NotImplementedError(
            f"method {self.name!r} has no scores before it has chosen; use select(view, r).scores"
        )

    @abstractmethod
    def select(self, view: PrefillView, r: float | int) -> Selection:
        """The tokens that stay, and what each was worth in that choice."""


def select_in_segments(scores: torch.Tensor, r: float | int, segments: Segments, rounding: str) -> Selection:
    """`select_topk` with `r` applied to each segment instead of each row.

    Args:
        scores: float32 `[B, M]`.
        r: fraction kept of each segment, or its budget.
        segments: which tokens make up an image.
        rounding: "floor" or "ceil".
    """
    of_segment = scores.reshape(-1)[segments.index]
    kept = select_topk(of_segment, r, mask=segments.mask, rounding=rounding).mask
    return merged_segments(kept, scores, segments)


def merged_segments(kept: torch.Tensor, scores: torch.Tensor, segments: Segments) -> Selection:
    """The rows' selection from that of their segments.

    Args:
        kept: bool `[S, L]`, the tokens of each segment that stay.
        scores: float32 `[B, M]`.
        segments: which tokens make up an image.
    """
    batch, num_tokens = scores.shape
    # padding of shorter segments lands in one cell behind the end
    target = torch.where(segments.mask, segments.index, batch * num_tokens)
    mask = kept.new_zeros(batch * num_tokens + 1).scatter_(0, target.reshape(-1), kept.reshape(-1))
    mask = mask[:-1].view(batch, num_tokens)
    order = torch.arange(num_tokens, device=scores.device).expand(batch, -1)
    slot = torch.where(mask, mask.cumsum(1) - 1, segments.kept_per_row)
    indices = slot.new_full((batch, segments.kept_per_row + 1), -1).scatter_(1, slot, order)
    return Selection(mask, indices[:, :-1], scores)


def of_units(tensor: torch.Tensor, view: PrefillView) -> torch.Tensor:
    """`[B, M, ...]` as `[U, L, ...]`, one row for each unit that has a budget: a row of the batch, or an image."""
    return tensor if view.segments is None else tensor.flatten(0, 1)[view.segments.index]


def candidates_of_units(view: PrefillView) -> torch.Tensor:
    """Which tokens of the units are no padding, bool `[U, L]`."""
    return view.candidates if view.segments is None else view.segments.mask


def of_rows(selection: Selection, view: PrefillView) -> Selection:
    """The rows' selection from that of their units, scores included."""
    if view.segments is None:
        return selection
    shape, mask = view.candidates.shape, view.segments.mask
    target = torch.where(mask, view.segments.index, shape.numel())
    scores = selection.scores.new_full((shape.numel() + 1,), -torch.inf)
    scores = scores.scatter_(0, target.reshape(-1), selection.scores.reshape(-1))[:-1].view(shape)
    return merged_segments(selection.mask, scores, view.segments)
