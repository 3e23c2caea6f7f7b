"""MMTok's choice (arXiv 2508.18264), pick by pick: the token that raises the cover of text and picture most."""

import math

from csrc_ref.select_topk import _count


def mmtok_select(
    embeddings, features, text, r, *, alpha=0.5, text_temperature=0.02, vision_temperature=0.2, rounding="floor"
):
    """Return which tokens of one image stay, a sorted list of their places, and the gain of each token.

    Args:
        embeddings: `[M, hidden]` of the visual tokens.
        features: `[M, C]`, what enters the projector.
        text: `[N, hidden]`.
        r: float in (0, 1] = fraction kept, int >= 1 = budget.
        alpha: weight of the cover of the visual tokens.
        text_temperature, vision_temperature: of the softmax over the visual tokens.
        rounding: "floor", "ceil" or "nearest" (half to even).

    Returns:
        The places, and for each token what it added when it was picked or would add in the end.
    """
    embeddings, features, text = (x.double().tolist() for x in (embeddings, features, text))
    count = len(embeddings)
    cover = [[p / len(text) for p in _softmax(word, embeddings, text_temperature)] for word in text]
    cover += [[alpha * q / count for q in _softmax(own, features, vision_temperature)] for own in features]
    best = [0.0] * len(cover)
    kept, gains = [], {}
    for _ in range(_count(r, count, rounding)):
        rest = [i for i in range(count) if i not in kept]
        gains.update({i: _gain(cover, best, i) for i in rest})
        largest = max(gains[i] for i in rest)
        # equal gains, up to what float32 can tell, go to the lower index
        pick = next(i for i in rest if gains[i] >= largest - 1e-9)
        kept.append(pick)
        best = [max(b, row[pick]) for b, row in zip(best, cover, strict=True)]
    gains.update({i: _gain(cover, best, i) for i in range(count) if i not in kept})
    return sorted(kept), [gains[i] for i in range(count)]


def _softmax(one, others, temperature):
    logits = [_cosine(one, other) / temperature for other in others]
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return [power / sum(powers) for power in powers]


def _gain(cover, best, i):
    return sum(max(0.0, row[i] - b) for row, b in zip(cover, best, strict=True))


def _cosine(one, other):
    norms = math.hypot(*one) * math.hypot(*other)
    return sum(x * y for x, y in zip(one, other, strict=True)) / norms if norms else 0.0
