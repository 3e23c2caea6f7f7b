"""VidCom2's choice (arXiv 2505.14454), token by token: likeness to video and frame, then seats by Webster's method."""

import math

from csrc_ref.select_topk import _count


def vidcom2_select(embeddings, frames, r, *, rounding="floor"):
    """Return which tokens of one video stay, a list of their places, and the likeness of each token.

    Args:
        embeddings: `[M, hidden]`, finite.
        frames: the tokens of each frame.
        r: float in (0, 1] = fraction kept, int >= 1 = budget.
        rounding: "floor", "ceil" or "nearest" (half to even).
    """
    tokens = embeddings.double().tolist()
    count, channels = len(tokens), len(tokens[0])
    means = [sum(token[c] for token in tokens) / count for c in range(channels)]
    variance = [sum((token[c] - means[c]) ** 2 for token in tokens) / count for c in range(channels)]
    steady = sorted(range(channels), key=lambda c: variance[c])[: max(1, channels // 2)]
    units = [_unit([token[c] for c in steady]) for token in tokens]
    frame_of = [t for t, size in enumerate(frames) for _ in range(size)]
    center = _mean(units)
    centers = [_mean([x for x, own in zip(units, frame_of, strict=True) if own == t]) for t in range(len(frames))]
    of_video = [_gaussians(x, center) for x in units]
    likeness = [of_video[i] + _gaussians(units[i], centers[t]) for i, t in enumerate(frame_of)]

    unique = [-sum(v for v, own in zip(of_video, frame_of, strict=True) if own == t) / n for t, n in enumerate(frames)]
    powers = [math.exp((u - max(unique)) / 0.01) for u in unique]
    # to 1/65536: the noise of float32 must decide nothing
    shares = [round(65536 * p / sum(powers)) / 65536 for p in powers]
    weights = [n * (1 + p - 1 / len(frames)) for n, p in zip(frames, shares, strict=True)]

    waiting = {
        t: sorted((i for i in range(count) if frame_of[i] == t), key=lambda i: likeness[i]) for t in set(frame_of)
    }
    taken = dict.fromkeys(waiting, 0)
    kept = []
    for _ in range(_count(r, count, rounding)):
        # frames without any come first
        open_frames = [t for t in waiting if waiting[t] and not taken[t]] or [t for t in waiting if waiting[t]]
        quotients = [weights[t] / (taken[t] + 0.5) for t in open_frames]
        best = next(t for t, q in zip(open_frames, quotients, strict=True) if q >= max(quotients) * (1 - 1e-9))
        kept.append(waiting[best].pop(0))
        taken[best] += 1
    return sorted(kept), likeness


def release_counts(weights, r):
    """How many tokens of each frame the release keeps, given `n (1 + p - 1/T)`; they need not add up."""
    return [max(1, round(r * weight)) for weight in weights]


def _unit(vector):
    norm = math.hypot(*vector)
    return [x / norm for x in vector] if norm else vector


def _mean(vectors):
    return [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def _gaussians(one, other):
    squared = sum((x - y) ** 2 for x, y in zip(one, other, strict=True))
    return sum(math.exp(-squared / (2 * 2.0**k)) for k in range(-3, 2))
