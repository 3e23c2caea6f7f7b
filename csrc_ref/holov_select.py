"""HoloV's choice (arXiv 2510.02912), crop by crop: scores of crops, their shares, the largest attention in each."""

import math

from csrc_ref.select_topk import _count, _rank


def holov_select(attention, embeddings, r, *, crops=16, diversity=0.09, scale="crop", rounding="floor"):
    """Return which tokens of one image stay, a sorted list of their places.

    Args:
        attention: `[M]`, the attention of CLS.
        embeddings: `[M, hidden]`.
        r: float in (0, 1] = fraction kept, int >= 1 = budget.
        crops: number of crops.
        diversity: weight of the variance of cosines.
        scale: "crop" or "image", what attention and variance are averaged over to scale one to the other.
        rounding: "floor", "ceil" or "nearest" (half to even).
    """
    attention, embeddings = attention.tolist(), embeddings.double().tolist()
    count = len(attention)
    budget = _count(r, count, rounding)
    sizes = [count // crops + (p < count % crops) for p in range(crops)]
    inside = [range(sum(sizes[:p]), sum(sizes[: p + 1])) for p in range(crops)]

    # the release multiplies attention by 1000, which changes nothing but its epsilon
    known = [a if math.isfinite(a) else 0.0 for a in attention]
    variances = [[_variance(embeddings, i, crop) for i in crop] for crop in inside]
    mean_attention = [_mean([known[i] for i in crop]) for crop in inside]
    mean_variance = [_mean(of_crop) for of_crop in variances]
    if scale == "image":
        whole = _mean(known) / (_mean([v for of_crop in variances for v in of_crop]) + 1e-6)
        scales = [whole] * crops
    else:
        scales = [a / (v + 1e-6) for a, v in zip(mean_attention, mean_variance, strict=True)]
    weights = [a + diversity * v * s for a, v, s in zip(mean_attention, mean_variance, scales, strict=True)]

    wanted = [math.floor(weight / (sum(weights) + 1e-9) * budget) for weight in weights]
    largest = sorted(range(crops), key=lambda p: -weights[p])
    for p in largest[: budget - sum(wanted)]:
        wanted[p] += 1

    kept = []
    for crop, share in zip(inside, wanted, strict=True):
        kept += sorted(crop, key=lambda i: _rank(attention[i]))[:share]
    # crops that are smaller than their share leave room for others
    rest = sorted((i for i in range(count) if i not in kept), key=lambda i: _rank(attention[i]))
    return sorted(kept + rest[: budget - len(kept)])


def _variance(embeddings, i, crop):
    """The variance of the cosines of token `i` with the others of its crop; its own entry counts as cosine 0."""
    if len(crop) < 2:
        return 0.0
    cosines = [0.0 if i == j else _cosine(embeddings[i], embeddings[j]) for j in crop]
    mean = sum(cosines) / (len(crop) - 1)
    return sum((c - mean) ** 2 for c in cosines) / (len(crop) - 1)


def _cosine(one, other):
    if not all(math.isfinite(x) for x in (*one, *other)):
        return 0.0
    return sum(x * y for x, y in zip(one, other, strict=True)) / (
        (math.hypot(*one) + 1e-6) * (math.hypot(*other) + 1e-6)
    )


def _mean(values):
    return sum(values) / len(values) if values else 0.0
