"""Greedy max-min cosine distance: DivPrune (arXiv 2503.02175), pick by pick, token by token."""

import math

import torch

from csrc_ref.select_topk import Selection, _count


def greedy_max_min(features, r, *, mask=None, rounding="floor", backend=None):
    """Keep tokens that are far from each other.

    Args:
        features: `[B, M, D]` or `[M, D]`.
        r: float in (0, 1] = fraction kept, int >= 1 = budget (clamped to the candidates).
        mask: bool `[B, M]`, True = candidate.
        rounding: "floor" or "ceil".
        backend: only there so that the signature is the package's; the reference has none.

    Returns:
        `Selection(mask, indices, scores)`: bool `[B, M]`; int64 `[B, Kmax]` ascending, padded with -1; the distance of
        a token to those picked before it (3 for the first) or, if it was not picked, to all that were.
    """
    if backend is not None:
        raise ValueError(f"the reference has no backends: expected backend=None, got {backend!r}")
    if features.dim() == 2:
        row = greedy_max_min(features[None], r, mask=None if mask is None else mask[None], rounding=rounding)
        return Selection(*(field[0] for field in row))
    batch, num_tokens, _ = features.shape
    keep = torch.zeros(batch, num_tokens, dtype=torch.bool)
    indices = torch.full((batch, _count(r, num_tokens, rounding)), -1, dtype=torch.int64)
    scores = torch.full((batch, num_tokens), -torch.inf, dtype=features.dtype)
    for b in range(batch):
        candidates = [token for token in range(num_tokens) if mask is None or mask[b, token]]
        distance = _distances(features[b])
        picked = []
        while len(picked) < _count(r, len(candidates), rounding):
            others = picked or candidates  # argmax_i min_j d(i, j): over all tokens at first, then over those picked
            rest = [token for token in candidates if token not in picked]
            far = [_nearest(distance, token, others) for token in rest]
            best = next(token for token, distant in zip(rest, far, strict=True) if distant >= max(far) - 1e-9)
            scores[b, best] = max(far) if picked else 3.0
            picked.append(best)
        for token in candidates:
            if token not in picked:
                scores[b, token] = _nearest(distance, token, picked)
        keep[b, picked] = True
        indices[b, : len(picked)] = torch.tensor(sorted(picked), dtype=torch.int64)
    return Selection(keep, indices, scores)


def _distances(features):
    """`1 - cos` of every pair, 0 below 1e-6; a zero vector has cosine 0, a token that is not finite is at -3."""
    tokens = features.tolist()
    finite = [all(math.isfinite(x) for x in token) for token in tokens]
    norms = [math.sqrt(sum(x * x for x in token)) for token in tokens]
    distance = []
    for i, one in enumerate(tokens):
        row = []
        for j, other in enumerate(tokens):
            if not finite[i]:
                row.append(-3.0)
            elif not finite[j]:
                row.append(math.inf)
            elif norms[i] == 0 or norms[j] == 0:
                row.append(1.0)
            else:
                cosine = sum(x * y for x, y in zip(one, other, strict=True)) / (norms[i] * norms[j])
                row.append(0.0 if cosine > 1 - 1e-6 else 1 - cosine)
        distance.append(row)
    return distance


def _nearest(distance, token, others):
    return min((distance[token][other] for other in others if other != token), default=math.inf)
