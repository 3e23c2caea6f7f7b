"""VisionZip's choice (arXiv 2412.04467), token by token: dominant tokens, even targets, others merged into these."""

import math
from fractions import Fraction

import torch

from csrc_ref.select_topk import Selection, _count


def visionzip_select(attention, keys, r, *, mask, contextual=5 / 32, merging="paper", rounding="floor"):
    """Keep what CLS attends to most and evenly spread targets; merge every other token into the most similar target.

    Args:
        attention: `[B, M]`, attention of CLS.
        keys: `[B, M, C]`.
        r: float in (0, 1] = fraction kept, int >= 1 = budget.
        mask: bool `[B, M]`, True = candidate.
        contextual: share of the budget for targets.
        merging: "paper" = mean of the target and what came to it; "release" = target plus the mean of what came.
        rounding: "floor", "ceil" or "nearest" (half to even).

    Returns:
        `Selection(mask, indices, scores)`, and for each row a dict from a kept token to `{token: weight}`.
    """
    batch, num_tokens = attention.shape
    keep = torch.zeros(batch, num_tokens, dtype=torch.bool)
    indices = torch.full((batch, _count(r, num_tokens, rounding)), -1, dtype=torch.int64)
    scores = torch.full((batch, num_tokens), -torch.inf, dtype=attention.dtype)
    maps = []
    for b in range(batch):
        candidates = mask[b].nonzero().flatten().tolist()
        budget = _count(r, len(candidates), rounding)
        num_targets = math.floor(budget * Fraction(contextual).limit_denominator(2**20))
        dominant = sorted(candidates, key=lambda m: -attention[b, m].item())[: budget - num_targets]
        rest = [m for m in candidates if m not in dominant]
        step = max(1, len(rest) // num_targets) if num_targets else 1
        targets = rest[::step][:num_targets]
        clusters = {target: [] for target in targets}
        for token in rest:
            if targets and token not in targets:
                cosines = [cosine(keys[b, token], keys[b, target]) for target in targets]
                clusters[targets[cosines.index(max(cosines))]].append(token)
        merged = {}
        for target, tokens in clusters.items():
            mean = 1 / (len(tokens) + 1)
            own, others = (1.0, 1 / max(1, len(tokens))) if merging == "release" else (mean, mean)
            merged[target] = {target: own, **dict.fromkeys(tokens, others)}
        maps.append(merged)
        kept = sorted(dominant + targets)
        keep[b, kept] = True
        indices[b, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
        scores[b, candidates] = attention[b, candidates]
    return Selection(keep, indices, scores), maps


def cosine(one, other):
    """Return the cosine of two vectors; 0 where one of them is zero."""
    norms = math.hypot(*one.tolist()) * math.hypot(*other.tolist())
    return sum(x * y for x, y in zip(one.tolist(), other.tolist(), strict=True)) / norms if norms else 0.0
