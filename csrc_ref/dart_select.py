"""DART's choice (arXiv 2502.11494), pivot by pivot: pivots by key norm, then the tokens least similar to each."""

import math

import torch

from csrc_ref.select_topk import Selection, _count


def dart_select(
    visual,
    visual_norm,
    text,
    text_norm,
    r,
    *,
    mask,
    text_mask,
    pivots=4,
    text_pivots=4,
    rounding="floor",
):
    """Keep visual pivots, and for each pivot of either kind the visual tokens with the smallest cosine to it.

    Args:
        visual: `[B, M, hidden]`.
        visual_norm: `[B, M]`, `|k|_1`.
        text: `[B, N, hidden]`.
        text_norm: `[B, N]`.
        r: float in (0, 1] = fraction kept, int >= 1 = budget.
        mask: bool `[B, M]`, True = candidate.
        text_mask: bool `[B, N]`, True = text.
        pivots: visual pivots.
        text_pivots: text pivots.
        rounding: "floor", "ceil" or "nearest" (half to even).

    Returns:
        `Selection(mask, indices, scores)`; scores are `1 - cos` to the nearest pivot, 2 for visual pivots.
    """
    batch, num_tokens, _ = visual.shape
    keep = torch.zeros(batch, num_tokens, dtype=torch.bool)
    indices = torch.full((batch, _count(r, num_tokens, rounding)), -1, dtype=torch.int64)
    scores = torch.full((batch, num_tokens), -torch.inf, dtype=visual.dtype)
    for b in range(batch):
        candidates, words = (where[b].nonzero().flatten().tolist() for where in (mask, text_mask))
        budget = _count(r, len(candidates), rounding)
        first = sorted(candidates, key=lambda m: -visual_norm[b, m].item())[: min(pivots, budget)]
        others = sorted(words, key=lambda n: -text_norm[b, n].item())[:text_pivots]
        vectors = [visual[b, m].tolist() for m in first] + [text[b, n].tolist() for n in others]
        kept = list(first)
        for place, vector in enumerate(vectors):
            remaining = budget - len(first)
            share = (place + 1) * remaining // len(vectors) - place * remaining // len(vectors)
            rest = [m for m in candidates if m not in kept]
            kept += sorted(rest, key=lambda m: _cosine(visual[b, m].tolist(), vector))[:share]
        for m in candidates:
            nearest = max(_cosine(visual[b, m].tolist(), vector) for vector in vectors)
            scores[b, m] = 2.0 if m in first else 1 - nearest
        keep[b, kept] = True
        indices[b, : len(kept)] = torch.tensor(sorted(kept), dtype=torch.int64)
    return Selection(keep, indices, scores)


def _cosine(one, other):
    norms = math.hypot(*one) * math.hypot(*other)
    return sum(x * y for x, y in zip(one, other, strict=True)) / norms if norms else 0.0
