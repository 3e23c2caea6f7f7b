"""Heed's quality: the most attention and the largest cosine that a visual token gets from a text token."""

import torch


def heed_quality(queries, keys, visual, text, image=slice(None)):
    """Return the quality `g[m]` of the visual tokens of an image; the method is `greedy_dpp(visual[image], g, r)`.

    Args:
        queries: `[H, N, D]` of the text in the first layer, before RoPE.
        keys: `[Hkv, M, D]` of all visual tokens of the row there: attention is shared out among all of them.
        visual: embeddings of the visual tokens, `[M, hidden]`.
        text: embeddings of the text tokens, `[N, hidden]`.
        image: the places among the M of the tokens that share a budget; both signals are scaled over them.
    """
    a, c = attended(queries, keys)[image], named(visual, text)[image]
    w = c.max() - c.mean()
    return (scaled(a) + w * scaled(c)) / (1 + w)


def attended(queries, keys):
    """`a[m] = mean_i max_n softmax_m(q[i, n] . k[i, m] / sqrt(d))`."""
    num_heads, num_queries, head_dim = queries.shape
    total = torch.zeros(keys.shape[1], dtype=queries.dtype)
    for i in range(num_heads):
        of_head = keys[i // (num_heads // len(keys))]
        attention = [torch.softmax(of_head @ queries[i, n] / head_dim**0.5, dim=0) for n in range(num_queries)]
        total += torch.stack(attention).amax(dim=0) / num_heads
    return total


def named(visual, text):
    """`c[m] = max_n cos(v[m], t[n])`."""
    return torch.stack([torch.cosine_similarity(token[None], text, dim=1).max() for token in visual])


def scaled(signal):
    """`s(x) = (x - min x + 1e-6) / (max x - min x + 1e-6)`."""
    return (signal - signal.min() + 1e-6) / (signal.max() - signal.min() + 1e-6)
