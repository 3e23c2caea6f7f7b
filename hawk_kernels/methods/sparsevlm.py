"""SparseVLM: the visual tokens that the relevant words attend to, stage by stage (arXiv 2410.04417)."""

from __future__ import annotations

import torch

from hawk_kernels.methods.base import (
    Keep,
    Method,
    candidates_of_units,
    checked_merging,
    checked_scores,
    falling_stages,
    of_rows,
    of_units,
    product,
    register,
    selected,
)
from hawk_kernels.methods.prefill_view import PrefillView
from hawk_kernels.ops.attention_column_mean import attention_column_mean
from hawk_kernels.ranking import order_key, rank
from hawk_kernels.selection import Merge, Selection, kept_counts, max_kept
from hawk_kernels.validation import check_rounding

# percent of the dropped tokens that are clustered, tokens to a cluster, and neighbours that make up a density
_RECYCLED = 30
_PER_CLUSTER = 10
_NEIGHBOURS = 5


@register
class SparseVLM(Method):
    """Drops visual tokens at three depths, by the attention that the words closest to the images pay to them.

    Raters are the text tokens with `R[n] >= mean(R)`, `R = mean over visual tokens of softmax over text of H_v H_q^T`,
    by the embeddings that enter the text model. At each stage `I[m]` is the attention that visual token m receives from
    the raters, averaged over them and over heads (Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient
    Vision-Language Model Inference", ICML 2025, arXiv 2410.04417).

    The paper lets the rank of the raters' attention matrix decide how many tokens a layer drops, as the authors' first
    release did (it keeps `rank * scale + bias`). That rank is the number of raters unless their rows depend on each
    other. Since version 1.5 the release keeps fixed numbers after layers 3, 7 and 16 of 32 (300, 200 and 110 of 576).
    Here the stages stand at these depths, each keeps the same share of what the one before kept, and `keep_ratio` is
    what is left after the last: 0.19 gives 331, 190 and 109 of 576.

    With `recycle=True` the best of what is dropped comes back as a few merged tokens, as in the paper. Of the tokens
    that a stage drops, the 30 % with the highest scores are clustered by density peaks in the states that enter the
    ranking layer, a tenth as many clusters as tokens and one more: with `D` the distance over the square root of the
    width, `rho[i] = exp(-mean D[i, j]^2)` over the 5 nearest of these tokens, `delta[i]` the distance to the nearest
    token with a larger `rho`, or for the largest `rho` the longest distance; those with the largest `rho delta` are the
    centres, and the others join the nearest one. A centre keeps its place and position id and becomes the mean of its
    cluster. The paper writes a sum, which grows with the cluster. Its clusters come on top of the tokens that a stage
    keeps; here they are part of the budget.

    The release, github Gumpest/SparseVLMs, always recycles. Where `k` tokens leave, it clusters `p = floor(0.3 k) + 1`
    of them into `floor(p / 10) + 1` means, and takes for `rho` as many of the nearest as there are clusters, the token
    itself among them; `merging="release"` does so. With it 309, 204 and 113 tokens are the release's 300, 200 and 110
    and its means. The release clusters the states that leave the layer, adds noise of 1e-6 to `rho`, sets the means
    after the other visual tokens and numbers positions anew.

    The release counts as text all that follows the image, where this package takes the question; and it requires
    `R[n] > mean(R)`, which leaves a question of one word without raters. In layers with sliding windows, the attention
    is computed without the windows.

    Args:
        rounding: "floor", "ceil" or "nearest" (half to even).
        recycle: whether the best dropped tokens come back as the means of clusters; only while tokens are dropped, not
            with `mode="hide"`.
        merging: "paper" or "release", which tokens `recycle=True` clusters and how many clusters it makes.

    Raises:
        TypeError, ValueError: an option that is none of these.
    """

    name = "sparsevlm"
    summary = "Keeps what the words closest to the images attend to, fewer tokens at each of three depths."
    paper = "2410.04417"
    signal = "attention of the relevant words at each stage"
    uses_text = True
    uses_positions = True
    ranks_by = "last"
    inside_only = True

    def __init__(self, rounding: str = "floor", recycle: bool = False, merging: str = "paper") -> None:
        self.rounding = check_rounding(rounding)
        if not isinstance(recycle, bool):
            raise TypeError(f"recycle: expected a bool, got {type(recycle).__name__}; True merges dropped tokens")
        self.recycle = recycle
        self.merging = checked_merging(merging)

    def stages(self, keep_ratio: float | int, depth: int) -> dict[int, Keep]:
        return falling_stages(keep_ratio, depth, (3 / 32, 7 / 32, 16 / 32), self.name)

    def score(self, view: PrefillView) -> torch.Tensor:
        layer = view.layer_attention()
        raters = raters_of(view.entered())
        # padding of rows with fewer raters lands in one row after the end
        count = layer.queries.shape[2]
        rows = raters.new_zeros(count + 1)
        rows.scatter_(0, torch.where(raters, layer.text, count).flatten(), raters.flatten())
        queries, keys = layer.queries, layer.keys
        if keys.dtype == torch.float64:
            queries, keys = queries.float(), keys.float()
        received = attention_column_mean(
            queries, keys, cu_seqlens=layer.cu_seqlens, causal=True, q_rows=rows[:count].unsqueeze(0), scale=layer.scale
        )
        return received[0][layer.visual].masked_fill_(~view.candidates, -torch.inf)

    def select(self, view: PrefillView, r: float | int) -> Selection:
        if not self.recycle:
            return super().select(view, r)
        scores = checked_scores(self.name, self.score(view), view.candidates)
        states = of_units(view.visual_embeddings(), view)
        found = recycling(
            of_units(scores, view),
            states,
            r,
            mask=candidates_of_units(view),
            merging=self.merging,
            rounding=self.rounding,
        )
        return of_rows(found, view)


def recycling(
    scores: torch.Tensor,
    states: torch.Tensor,
    r: float | int,
    *,
    mask: torch.Tensor,
    merging: str = "paper",
    rounding: str = "floor",
) -> Selection:
    """Keep the highest scores, and clusters of the best of what is left, as one budget.

    Args:
        scores: float32 `[U, L]`.
        states: `[U, L, hidden]`.
        r: fraction of a unit's candidates that is kept, or the budget.
        mask: bool `[U, L]`, True = candidate.
        merging: "paper" or "release".
        rounding: "floor", "ceil" or "nearest" (half to even).

    Returns:
        `Selection(mask, indices, scores)` with a merge map of one entry for each token of a cluster.
    """
    counts = mask.sum(dim=1)
    budget = kept_counts(r, counts, rounding)
    if merging == "release":
        # the most tokens that leave room for their own clusters: a + floor((3 (n - a) + 10) / 100) + 1 <= budget
        most = torch.div(100 * budget - 3 * counts - 11, 97, rounding_mode="floor")
        clusters = torch.where(counts > budget, budget - most.clamp(min=1), 0).clamp(min=0)
        recycled = (counts - budget + clusters) * _RECYCLED // 100 + 1
        near = clusters - 1
    else:
        recycled = (counts - budget) * _RECYCLED // 100
        clusters = torch.where(recycled > 0, recycled // _PER_CLUSTER + 1, 0).clamp(max=(budget - 1).clamp(min=0))
        near = torch.full_like(clusters, _NEIGHBOURS)
    place = rank(order_key(scores, mask))
    alone = (budget - clusters).unsqueeze(1)
    is_alone = mask & (place < alone)
    pool = mask & ~is_alone & (place < alone + torch.where(clusters > 0, recycled, 0).unsqueeze(1))
    is_centre, nearest = _density_peaks(states, pool, clusters, near, itself=merging == "release")
    kept = is_alone | is_centre
    own = torch.arange(mask.shape[1], device=mask.device).expand_as(nearest)
    target = torch.where(pool, nearest, -1)
    size = torch.zeros_like(scores).scatter_add_(1, target.clamp(min=0), pool.float())
    weight = 1 / size.gather(1, target.clamp(min=0)).clamp(min=1)
    found = selected(kept, scores, max_kept(r, mask.shape[1], rounding))
    return found.merging(Merge(target, own.contiguous(), weight))


def _density_peaks(
    states: torch.Tensor, pool: torch.Tensor, clusters: torch.Tensor, near: torch.Tensor, *, itself: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cluster the tokens of a pool by density peaks.

    Args:
        states: `[U, L, hidden]`.
        pool: bool `[U, L]`, the tokens that are clustered, at least as many as clusters.
        clusters: int64 `[U]`, how many.
        near: int64 `[U]`, how many of the other tokens make up a density.
        itself: whether the token counts in the mean as well, at distance 0.

    Returns:
        Which tokens are centres, bool `[U, L]`, and for each token the centre of its cluster, int64 `[U, L]`.
    """
    states = states.float()
    distance = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist") / states.shape[2] ** 0.5
    both = pool.unsqueeze(1) & pool.unsqueeze(2)
    own = torch.arange(pool.shape[1], device=pool.device)
    among = distance.masked_fill(~both | (own == own.unsqueeze(1)), torch.inf)
    # there are never more clusters than this, nor neighbours where their number is that of the clusters
    most = max(_NEIGHBOURS, pool.shape[1] * _RECYCLED // (100 * _PER_CLUSTER) + 1)
    nearby = among.topk(min(most, pool.shape[1]), dim=2, largest=False).values
    is_near = (nearby < torch.inf) & (own[: nearby.shape[2]] < near.view(-1, 1, 1))
    size = is_near.sum(dim=2) + int(itself)
    density = torch.exp(-(nearby.where(is_near, 0.0) ** 2).sum(dim=2) / size.clamp(min=1))
    # equal densities are ordered by place, so that only one token has no denser one
    order = rank(order_key(density, pool))
    is_denser = both & (order.unsqueeze(1) < order.unsqueeze(2))
    longest = distance.masked_fill(~both, 0.0).amax(dim=(1, 2)).unsqueeze(1)
    to_denser = torch.where(is_denser.any(dim=2), distance.masked_fill(~is_denser, torch.inf).amin(dim=2), longest)
    is_centre = pool & (rank(order_key(density * to_denser, pool)) < clusters.unsqueeze(1))
    nearest = distance.masked_fill(~is_centre.unsqueeze(1), torch.inf).argmin(dim=2)
    return is_centre, torch.where(is_centre, own.expand_as(nearest), nearest)


def raters_of(view: PrefillView) -> torch.Tensor:
    """Mark the text tokens that are closer to the visual tokens than text tokens are on average, bool `[B, N]`.

    Args:
        view: of the prompt as it enters the text model.
    """
    text, is_text = view.text_embeddings()
    logits = product(view.visual_embeddings().float(), text.float().transpose(1, 2))
    logits.masked_fill_(~is_text.unsqueeze(1), torch.finfo(logits.dtype).min)
    shares = logits.softmax(dim=2) * view.candidates.unsqueeze(2)
    relevance = shares.sum(dim=1) / view.candidates.sum(dim=1, keepdim=True).clamp(min=1)
    mean = relevance.sum(dim=1, keepdim=True) / is_text.sum(dim=1, keepdim=True).clamp(min=1)
    # equal relevances may differ from their mean by rounding
    return is_text & (relevance >= mean * (1 - 1e-6))
