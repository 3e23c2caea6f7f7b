"""FastV's score (arXiv 2403.06764): the softmax of the last token's query, one row and one head at a time."""

import torch


def fastv_scores(query, keys, *, visible, scale=None):
    """Return the attention of the last token to each token, averaged over heads.

    Args:
        query: `[B, H, D]`, after RoPE.
        keys: `[B, Hkv, T, D]`, after RoPE.
        visible: bool `[B, T]`, the tokens that the last one sees.
        scale: default `D ** -0.5`.

    Returns:
        `[B, T]`, 0 at tokens that are not visible.
    """
    batch, num_heads, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else scale
    received = torch.zeros(batch, keys.shape[2], dtype=query.dtype)
    for b in range(batch):
        for h in range(num_heads):
            of_head = keys[b, h // (num_heads // keys.shape[1]), visible[b]]
            received[b, visible[b]] += torch.softmax(of_head @ query[b, h] * scale, dim=0) / num_heads
    return received
