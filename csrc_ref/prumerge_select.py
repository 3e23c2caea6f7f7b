"""PruMerge's choice (arXiv 2403.15388), token by token: what CLS attends to, and the tokens most like each of these."""

import torch

from csrc_ref.select_topk import Selection, _count
from csrc_ref.visionzip_select import cosine


def prumerge_select(attention, keys, r, *, mask, neighbours=32, plus=False, merging="paper", rounding="floor"):
    """Keep what CLS attends to most, and merge into each kept token the tokens whose keys are most similar to its own.

    Args:
        attention: `[B, M]`, attention of CLS.
        keys: `[B, M, C]`.
        r: float in (0, 1] = fraction kept, int >= 1 = budget.
        mask: bool `[B, M]`, True = candidate.
        neighbours: tokens merged into each kept one.
        plus: whether only a quarter of the budget is chosen by attention, and the rest evenly among the others.
        merging: "paper" = average of the token and dropped neighbours by attention; "release" = the token plus its
            neighbours, kept or not, times their attention, which is divided by its sum where that is above 1.
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
        first = min(budget, max(1, budget // 4)) if plus else budget
        kept = sorted(candidates, key=lambda m: -attention[b, m].item())[:first]
        others = [m for m in candidates if m not in kept]
        kept += [others[j * len(others) // (budget - first)] for j in range(budget - first)]
        merged = {}
        for p in kept if budget < len(candidates) else ():
            near = [q for q in candidates if q != p and (merging == "release" or q not in kept)]
            near = sorted(near, key=lambda q, p=p: -cosine(keys[b, p], keys[b, q]))[:neighbours]
            if merging == "release":
                total = max(1.0, sum(attention[b, q].item() for q in candidates))
                merged[p] = {p: 1.0, **{q: attention[b, q].item() / total for q in near}}
            else:
                total = sum(attention[b, q].item() for q in (p, *near))
                merged[p] = {q: attention[b, q].item() / total for q in (p, *near)}
        maps.append(merged)
        keep[b, kept] = True
        indices[b, : len(kept)] = torch.tensor(sorted(kept), dtype=torch.int64)
        scores[b, candidates] = attention[b, candidates]
    return Selection(keep, indices, scores), maps
