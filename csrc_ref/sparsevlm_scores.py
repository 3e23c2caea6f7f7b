"""SparseVLM (arXiv 2410.04417): its raters and its scores, one row, one head and one word at a time."""

import torch


def sparsevlm_raters(visual, text):
    """Mark the words that are closer to the visual tokens than words are on average.

    Args:
        visual: `[M, hidden]`, embeddings of the visual tokens.
        text: `[N, hidden]`, embeddings of the words.

    Returns:
        bool `[N]`.
    """
    relevance = torch.zeros(len(text), dtype=text.dtype)
    for token in visual:
        relevance += torch.softmax(text @ token, dim=0) / len(visual)
    return relevance >= relevance.mean() * (1 - 1e-6)


def sparsevlm_scores(queries, keys, *, raters, visual, scale):
    """Return the attention that each visual token receives from the raters, averaged over them and over heads.

    Args:
        queries: `[H, T, D]` of one prompt, after RoPE.
        keys: `[Hkv, T, D]`, after RoPE.
        raters: positions of the raters.
        visual: positions of the visual tokens, all before the raters.
        scale: of the products.

    Returns:
        `[M]`.
    """
    num_heads = len(queries)
    received = torch.zeros(len(visual), dtype=queries.dtype)
    for head in range(num_heads):
        of_head = keys[head // (num_heads // len(keys))]
        for rater in raters:
            attention = torch.softmax(of_head[: rater + 1] @ queries[head, rater] * scale, dim=0)
            received += attention[visual] / (num_heads * len(raters))
    return received
