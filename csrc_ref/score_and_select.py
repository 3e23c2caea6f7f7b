"""HAWK (arXiv 2604.07812), with the per-head norms of the authors' release: score visual tokens, keep the best."""

import torch

from csrc_ref.select_topk import select_topk


def score_tokens(q, k, w, *, q_mask=None, k_mask=None, normalize=None, scale=None, backend=None):
    """Importance `I[b, k]` of every key, computed as it is written in the paper.

    Args:
        q: text queries before RoPE, `[B, H, N, D]` or `[H, N, D]`.
        k: visual keys before RoPE, `[B, Hkv, M, D]` or `[Hkv, M, D]`, `H % Hkv == 0`.
        w: head importance `[H]`.
        q_mask: bool `[B, N]`, True = this query is averaged.
        k_mask: bool `[B, M]`, True = this key is a candidate.
        normalize: per head over the candidates: `None`, "l2", "softmax" or "minmax".
        scale: default `D ** -0.5`.
        backend: only there so that the signature is the package's; the reference has none.

    Returns:
        `[B, M]` (or `[M]`), `-inf` at non-candidates; float64 for float64 input, else float32.
    """
    if backend is not None:
        raise ValueError(f"the reference has no backends: expected backend=None, got {backend!r}")
    if q.dim() == 3:
        row_q_mask = None if q_mask is None else q_mask[None]
        row_k_mask = None if k_mask is None else k_mask[None]
        batched = {"q_mask": row_q_mask, "k_mask": row_k_mask, "normalize": normalize, "scale": scale}
        return score_tokens(q[None], k[None], w, **batched)[0]

    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, w = q.to(dtype), k.to(dtype), w.to(dtype)
    batch, num_heads, _, head_dim = q.shape
    num_keys = k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    k = k.repeat_interleave(num_heads // k.shape[1], dim=1)

    importance = torch.full((batch, num_keys), -torch.inf, dtype=dtype, device=q.device)
    for b in range(batch):
        queries = q[b] if q_mask is None else q[b][:, q_mask[b]]
        candidates = torch.ones(num_keys, dtype=torch.bool, device=q.device) if k_mask is None else k_mask[b]
        keys = k[b][:, candidates]
        if keys.shape[1] == 0:
            continue
        attention = queries @ keys.transpose(1, 2) * scale  # A[i] = Q[i] K[i]^T / sqrt(d)
        c = attention.mean(dim=1)  # c[i,k] = mean over text of A[i,:,k]
        c = torch.where(torch.isfinite(c), c, 0.0)  # the release's guard
        c = torch.stack([_normalize(head, normalize) for head in c])
        importance[b, candidates] = (w[:, None] * c).sum(dim=0)  # I[k] = sum_i w[i] c[i,k]
    return importance


def score_and_select(
    q, k, w, r, *, q_mask=None, k_mask=None, normalize=None, scale=None, rounding="floor", backend=None
):
    """`select_topk(score_tokens(...))`; shapes as there.

    The paper is `normalize=None, rounding="floor"`; the authors' release is `normalize="l2", rounding="ceil"`.
    """
    scores = score_tokens(q, k, w, q_mask=q_mask, k_mask=k_mask, normalize=normalize, scale=scale, backend=backend)
    return select_topk(scores, r, mask=k_mask, rounding=rounding)


def _normalize(c, mode):
    """One head's `c[i, :]` over the candidates; a vector without extent (all zero, all equal) becomes zero."""
    if mode is None:
        return c
    if mode == "l2":
        largest = c.abs().max()
        if largest == 0:
            return torch.zeros_like(c)
        c = c / largest  # so that no square over- or underflows
        return c / c.square().sum().sqrt()
    if mode == "softmax":
        return torch.softmax(c, dim=0)
    if mode == "minmax":
        extent = c.max() - c.min()
        return torch.zeros_like(c) if extent == 0 else (c - c.min()) / extent
    raise ValueError(f"normalize: expected None, 'l2', 'softmax' or 'minmax', got {mode!r}")
