"""HAWK: head importance times text-to-visual attention before RoPE (arXiv 2604.07812)."""

from __future__ import annotations

import torch

from hawk_kernels.methods.base import Method, register, select_in_segments
from hawk_kernels.methods.prefill_view import HiddenStates, PrefillView
from hawk_kernels.ops.score_and_select import score_and_select, score_tokens
from hawk_kernels.ops.score_hidden import score_hidden, score_hidden_and_select
from hawk_kernels.ops.score_peaks import score_peaks
from hawk_kernels.selection import Selection
from hawk_kernels.validation import check_normalize, check_rounding

# What `normalize="auto"` means for each `reduce`.
_USUAL_NORMS = {"mean": "l2", "max": "softmax"}


@register
class Hawk(Method):
    """Keeps the visual tokens that the text attends to, each head weighted by its importance.

    With `A[i, n, m] = q[i, n] . k[i, m] / sqrt(d)` before RoPE, the paper scores a visual token by
    `I[m] = sum_i w[i] norm_m(mean_n A[i, n, m])`. In a mean the words that name nothing outvote the one that does.
    `reduce="max"` is ours: `I[m] = sum_i w[i] max_n norm_m(A[i, n, m])`, where each head and text token is normalised
    by itself, so that one word suffices.

    Args:
        normalize: how scores are normalised over the visual tokens: "l2" (the authors' release), None (the paper's
            equation), "softmax" or "minmax"; "auto" is "l2" with the mean and "softmax" with the maximum.
        rounding: "floor" (paper), "ceil" (release) or "nearest" (half to even).
        reduce: "mean" (paper) or "max" over the text. The maximum needs the queries and keys of every token.

    Raises:
        ValueError: an option that is none of these.
    """

    name = "hawk"
    summary = "Keeps what the text attends to in the first layer, before RoPE, each head weighted by its importance."
    paper = "2604.07812"
    signal = "queries of the text and keys of the image in the first layer"
    uses_head_weights = True
    uses_text = True

    def __init__(self, normalize: str | None = "auto", rounding: str = "floor", reduce: str = "mean") -> None:
        if reduce not in _USUAL_NORMS:
            raise ValueError(f"reduce: expected 'mean' (paper) or 'max' over the text, got {reduce!r}")
        self.reduce = reduce
        if normalize == "auto":
            normalize = _USUAL_NORMS[reduce]
        check_normalize(normalize)
        self.normalize = normalize
        check_rounding(rounding)
        self.rounding = rounding

    def options(self) -> dict[str, object]:
        options = super().options()
        if self.reduce == "mean":
            # statistics of the paper's method read as they did when there was no other reduction
            del options["reduce"]
        return options

    def score(self, view: PrefillView) -> torch.Tensor:
        if self.reduce == "max":
            return peaks_of_attention(view, view.head_weights, self.normalize)
        hidden = view.hidden_states()
        if hidden is not None:
            scores = score_hidden(
                hidden.x,
                hidden.layer,
                view.head_weights,
                q_mask=hidden.q_mask,
                k_mask=hidden.k_mask,
                normalize=self.normalize,
            )
            return scores.gather(1, hidden.visual).masked_fill(~view.candidates, -torch.inf)
        queries, keys, query_mask = _projected(view)
        return score_tokens(
            queries, keys, view.head_weights, q_mask=query_mask, k_mask=view.candidates, normalize=self.normalize
        )

    def select(self, view: PrefillView, r: float | int) -> Selection:
        if self.reduce == "max":
            return super().select(view, r)
        if view.segments is not None:
            return select_in_segments(self.score(view), r, view.segments, self.rounding)
        hidden = view.hidden_states()
        if hidden is not None:
            whole = score_hidden_and_select(
                hidden.x,
                hidden.layer,
                view.head_weights,
                r,
                q_mask=hidden.q_mask,
                k_mask=hidden.k_mask,
                normalize=self.normalize,
                rounding=self.rounding,
            )
            return _among_visual(whole, hidden, view.candidates)
        queries, keys, query_mask = _projected(view)
        return score_and_select(
            queries,
            keys,
            view.head_weights,
            r,
            q_mask=query_mask,
            k_mask=view.candidates,
            normalize=self.normalize,
            rounding=self.rounding,
        )


def peaks_of_attention(view: PrefillView, head_weights: torch.Tensor | None, normalize: str | None) -> torch.Tensor:
    """Score each visual token by the text token that attends to it most in the first layer, float32 `[B, M]`.

    Args:
        view: the prompt.
        head_weights: float32 `[H]`; None counts every head the same.
        normalize: as in `score_peaks`.
    """
    queries, query_mask = view.text_queries()
    keys = view.visual_keys()
    if keys.dtype == torch.float64:
        queries, keys = queries.float(), keys.float()
    if head_weights is None:
        head_weights = queries.new_full((queries.shape[1],), 1 / queries.shape[1], dtype=torch.float32)
    return score_peaks(queries, keys, head_weights, q_mask=query_mask, k_mask=view.candidates, normalize=normalize)


def _among_visual(whole: Selection, hidden: HiddenStates, candidates: torch.Tensor) -> Selection:
    """Turn a selection among all tokens of a prompt into one among its visual tokens, `[B, M]`."""
    mask = whole.mask.gather(1, hidden.visual) & candidates
    scores = whole.scores.gather(1, hidden.visual).masked_fill(~candidates, -torch.inf)
    width = min(whole.indices.shape[1], candidates.shape[1])
    places = hidden.k_mask.cumsum(1).sub_(1).gather(1, whole.indices[:, :width].clamp(min=0))
    return Selection(mask, places.masked_fill_(whole.indices[:, :width] < 0, -1), scores)


def _projected(view: PrefillView) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return queries, keys and the queries' mask; a float64 model is scored in float32, as in the kernels."""
    queries, query_mask = view.mean_text_query()
    keys = view.visual_keys()
    if keys.dtype == torch.float64:
        queries, keys = queries.float(), keys.float()
    return queries, keys, query_mask
