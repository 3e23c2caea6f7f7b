"""CDPruner's relevance (arXiv 2506.10967): the mean cosine with the text, min-max scaled over a row's candidates."""

import torch


def cdpruner_quality(visual, text, *, mask, text_mask, negate=False):
    """Return the quality `q[b, m]`, 0 outside the candidates; the method is `greedy_dpp(visual, q, r)`.

    Args:
        visual: `[B, M, hidden]`.
        text: `[B, N, hidden]`.
        mask: bool `[B, M]`, True = candidate.
        text_mask: bool `[B, N]`, True = text.
        negate: whether the least similar tokens count most.
    """
    quality = torch.zeros(visual.shape[:2], dtype=visual.dtype)
    for b in range(len(visual)):
        candidates, words = (where[b].nonzero().flatten().tolist() for where in (mask, text_mask))
        similarity = {}
        for m in candidates:
            cosines = [torch.cosine_similarity(visual[b, m], text[b, n], dim=0).item() for n in words]
            similarity[m] = (-1 if negate else 1) * sum(cosines) / len(cosines)
        for m, value in similarity.items():
            lowest, highest = min(similarity.values()), max(similarity.values())
            quality[b, m] = (value - lowest + 1e-6) / (highest - lowest + 1e-6)
    return quality
