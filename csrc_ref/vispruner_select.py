"""VisPruner's choice (arXiv 2412.01818): important tokens by attention, then the rest thinned out in rounds."""

import math

from csrc_ref.select_topk import _count, _rank


def vispruner_select(attention, features, r, *, important=0.5, step=8, rounding="floor"):
    """Return which tokens of one image stay, a sorted list of their places.

    Args:
        attention: `[M]`, the attention of CLS.
        features: `[M, C]`, what enters the projector.
        r: float in (0, 1] = fraction kept, int >= 1 = budget.
        important: share of the budget that attention takes.
        step: how many tokens go at a time.
        rounding: "floor", "ceil" or "nearest" (half to even).
    """
    attention, features = attention.tolist(), features.double().tolist()
    budget = _count(r, len(attention), rounding)
    order = sorted(range(len(attention)), key=lambda i: _rank(attention[i]))
    first = math.floor(budget * important)
    kept, rest, wanted = order[:first], order[first:], budget - first
    while len(rest) > wanted:
        gone = min(step, len(rest) - wanted)
        evens, odds = rest[::2], rest[1::2]
        likeness = {i: max((_cosine(features[i], features[j]) for j in odds), default=-math.inf) for i in evens}
        evens = sorted(evens, key=lambda i: -likeness[i])
        rest = evens[gone:] + odds
    return sorted(kept + rest)


def _cosine(one, other):
    if not all(math.isfinite(x) for x in (*one, *other)):
        return 0.0
    norms = math.hypot(*one) * math.hypot(*other)
    return sum(x * y for x, y in zip(one, other, strict=True)) / norms if norms else 0.0
