"""FasterVLM's scores (arXiv 2412.01818, version 1): the CLS row of the softmax, averaged over heads."""

import math


def fastervlm_scores(queries, keys, *, scale):
    """Return the attention that CLS, the first token, pays to each other token, a list of floats.

    Args:
        queries, keys: `[H, N, D]` of one image in one layer of the encoder.
        scale: factor of the logits.
    """
    queries, keys = queries.double().tolist(), keys.double().tolist()
    scores = [0.0] * (len(keys[0]) - 1)
    for of_head, keys_of_head in zip(queries, keys, strict=True):
        logits = [scale * sum(x * y for x, y in zip(of_head[0], key, strict=True)) for key in keys_of_head]
        powers = [math.exp(logit - max(logits)) for logit in logits]
        for token, power in enumerate(powers[1:]):
            scores[token] += power / sum(powers) / len(queries)
    return scores
