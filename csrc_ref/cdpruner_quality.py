"""CDPruner's relevance (arXiv 2506.10967): the mean cosine with the text, min-max scaled over a row's candidates."""

import math

import torch


def cdpruner_quality(visual, words, *, mask, text_mask, negate=False, text="mean", theta=None):
    """Return the quality `q[b, m]`, 0 outside the candidates; the method is `greedy_dpp(visual, q, r)`.

    Args:
        visual: `[B, M, hidden]`.
        words: embeddings of the text, `[B, N, hidden]`.
        mask: bool `[B, M]`, True = candidate.
        text_mask: bool `[B, N]`, True = text.
        negate: whether the least similar tokens count most.
        text: "mean" or "max" of the cosines with the words.
        theta: None, or the quality becomes `exp(theta / (2 (1 - theta)) q)`.
    """
    quality = torch.zeros(visual.shape[:2], dtype=visual.dtype)
    for b in range(len(visual)):
        candidates, places = (where[b].nonzero().flatten().tolist() for where in (mask, text_mask))
        similarity = {}
        for m in candidates:
            cosines = [torch.cosine_similarity(visual[b, m], words[b, n], dim=0).item() for n in places]
            similarity[m] = (-1 if negate else 1) * (max(cosines) if text == "max" else sum(cosines) / len(cosines))
        for m, value in similarity.items():
            lowest, highest = min(similarity.values()), max(similarity.values())
            relevance = (value - lowest + 1e-6) / (highest - lowest + 1e-6)
            quality[b, m] = relevance if theta is None else math.exp(theta / (2 * (1 - theta)) * relevance)
    return quality
