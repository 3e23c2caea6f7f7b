"""Score visual tokens by the text token that attends to each most: the matrix of one head after the other."""

import torch

from csrc_ref.score_and_select import _normalize


def score_peaks(q, k, w, *, q_mask=None, k_mask=None, normalize="softmax", scale=None, backend=None):
    """Importance `I[b, k] = sum_i w[i] max_n norm_k(q[i, n] . k[i, k] * scale)` of every key.

    Args:
        q: text queries before RoPE, `[B, H, N, D]` or `[H, N, D]`.
        k: visual keys before RoPE, `[B, Hkv, M, D]` or `[Hkv, M, D]`, `H % Hkv == 0`.
        w: head importance `[H]`.
        q_mask: bool `[B, N]`, True = this query counts.
        k_mask: bool `[B, M]`, True = this key is a candidate.
        normalize: per head and query over the candidates: "softmax", "l2", "minmax" or `None`.
        scale: default `D ** -0.5`.
        backend: only there so that the signature is the package's; the reference has none.

    Returns:
        `[B, M]` (or `[M]`), `-inf` at non-candidates and 0 at the candidates of a row without text; float64 for float64
        input, else float32.
    """
    if backend is not None:
        raise ValueError(f"the reference has no backends: expected backend=None, got {backend!r}")
    if q.dim() == 3:
        row_q_mask = None if q_mask is None else q_mask[None]
        row_k_mask = None if k_mask is None else k_mask[None]
        options = {"q_mask": row_q_mask, "k_mask": row_k_mask, "normalize": normalize, "scale": scale}
        return score_peaks(q[None], k[None], w, **options)[0]

    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, w = q.to(dtype), k.to(dtype), w.to(dtype)
    batch, num_heads, num_queries, head_dim = q.shape
    num_keys = k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    k = k.repeat_interleave(num_heads // k.shape[1], dim=1)

    importance = torch.full((batch, num_keys), -torch.inf, dtype=dtype, device=q.device)
    for b in range(batch):
        candidates = torch.ones(num_keys, dtype=torch.bool, device=q.device) if k_mask is None else k_mask[b]
        if not candidates.any():
            continue
        total = torch.zeros(int(candidates.sum()), dtype=dtype, device=q.device)
        for i in range(num_heads):
            normalized = []
            for n in range(num_queries):
                if q_mask is None or q_mask[b, n]:
                    logits = k[b, i][candidates] @ q[b, i, n] * scale  # A[i,n,k] = q[i,n] . k[i,k] / sqrt(d)
                    logits = torch.where(torch.isfinite(logits), logits, 0.0)
                    normalized.append(_normalize(logits, normalize))
            if normalized:
                total += w[i] * torch.stack(normalized).amax(dim=0)  # P[i,k] = max_n norm_k(A[i,n,k])
        importance[b, candidates] = total
    return importance
