"""Greedy selection of tokens that differ, pick by pick and token by token: DivPrune and CDPruner."""

import math

import torch

from csrc_ref.select_topk import Selection, _count


def greedy_max_min(features, r, *, mask=None, rounding="floor", backend=None):
    """Keep tokens that are far from each other (DivPrune, arXiv 2503.02175).

    Args:
        features: `[B, M, D]` or `[M, D]`.
        r: float in (0, 1] = fraction kept, int >= 1 = budget (clamped to the candidates).
        mask: bool `[B, M]`, True = candidate.
        rounding: "floor", "ceil" or "nearest" (half to even).
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


def greedy_dpp(features, quality, r, *, mask=None, rounding="floor", backend=None):
    """Keep the tokens whose kernel `L[i, j] = q[i] cos(x[i], x[j]) q[j]` (CDPruner, arXiv 2506.10967) spans most.

    Greedy MAP of a determinantal point process (arXiv 1709.05135), with every candidate's determinant for every pick.

    Args:
        features: `[B, M, D]` or `[M, D]`.
        quality: `[B, M]` or `[M]`.
        r: float in (0, 1] = fraction kept, int >= 1 = budget (clamped to the candidates).
        mask: bool `[B, M]`, True = candidate.
        rounding: "floor", "ceil" or "nearest" (half to even).
        backend: only there so that the signature is the package's; the reference has none.

    Returns:
        `Selection(mask, indices, scores)`: bool `[B, M]`; int64 `[B, Kmax]` ascending, padded with -1; the factor by
        which a token multiplied the determinant, or would now, with the largest quality scaled to 1.
    """
    if backend is not None:
        raise ValueError(f"the reference has no backends: expected backend=None, got {backend!r}")
    if features.dim() == 2:
        row_mask = None if mask is None else mask[None]
        row = greedy_dpp(features[None], quality[None], r, mask=row_mask, rounding=rounding)
        return Selection(*(field[0] for field in row))
    batch, num_tokens, _ = features.shape
    keep = torch.zeros(batch, num_tokens, dtype=torch.bool)
    indices = torch.full((batch, _count(r, num_tokens, rounding)), -1, dtype=torch.int64)
    scores = torch.full((batch, num_tokens), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        candidates = [token for token in range(num_tokens) if mask is None or mask[b, token]]
        finite = features[b].isfinite().all(dim=1) & quality[b].isfinite()
        unit = torch.where(finite[:, None], features[b].double(), 0.0)
        unit = unit / unit.norm(dim=1, keepdim=True).clamp(min=1e-300)
        cosine = unit @ unit.T
        largest = max((abs(quality[b, token].item()) for token in candidates if finite[token]), default=0) or 1
        weight = [
            max(1e-6, abs(quality[b, token].item()) / largest) ** 2 if finite[token] else 1e-32
            for token in range(num_tokens)
        ]
        picked = []
        while len(picked) < _count(r, len(candidates), rounding):
            rest = [token for token in candidates if token not in picked]
            gains = [_gain(cosine, weight, picked, token) for token in rest]
            best = next(token for token, gain in zip(rest, gains, strict=True) if gain >= max(gains) * (1 - 1e-9))
            scores[b, best] = max(gains)
            picked.append(best)
        for token in candidates:
            if token not in picked:
                scores[b, token] = _gain(cosine, weight, picked, token)
        keep[b, picked] = True
        indices[b, : len(picked)] = torch.tensor(sorted(picked), dtype=torch.int64)
    return Selection(keep, indices, scores.to(features.dtype))


def _gain(cosine, weight, picked, token):
    """`det L[S + token] / det L[S]`, for `L = diag(q) cos diag(q)`: `q^2` times the same ratio of cosines alone.

    A token that the picked ones span has none; such tokens come last, by quality.
    """
    span = []
    for one in picked:  # picks that were spanned themselves are left out, else the determinant below is 0
        if _outside(cosine, span, one) > 1e-5:
            span.append(one)
    outside = _outside(cosine, span, token)
    return weight[token] * (outside if outside > 1e-5 else 2.0**-60)


def _outside(cosine, span, token):
    joined = [*span, token]
    whole, before = (torch.linalg.slogdet(cosine[s][:, s]) for s in (joined, span))
    return 0.0 if whole.sign <= 0 else math.exp(whole.logabsdet - before.logabsdet)
