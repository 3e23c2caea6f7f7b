"""HAWK from the hidden states before the first layer: normalise, project, then as ever."""

import torch

from csrc_ref.score_and_select import score_and_select


def score_hidden_and_select(
    x,
    norm_weight,
    norm_eps,
    wq,
    bq,
    wk,
    bk,
    w,
    r,
    *,
    num_key_value_heads,
    q_mask,
    k_mask,
    normalize=None,
    scale=None,
    rounding="floor",
    backend=None,
):
    """Queries and keys of every token by the layer's own projections, without RoPE, then `score_and_select`.

    Args:
        x: hidden states before the layer, `[B, T, C]` or `[T, C]`.
        norm_weight: gamma of the layer's RMSNorm, `[C]`, or None for ones.
        norm_eps: its epsilon.
        wq, bq: query projection `[H * D, C]` and its bias `[H * D]` or None.
        wk, bk: key projection `[Hkv * D, C]` and its bias `[Hkv * D]` or None.
        w, r, q_mask, k_mask, normalize, scale, rounding: as in `score_and_select`; both masks are over T.

    Returns:
        `Selection(mask, indices, scores)` over T.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    gamma = torch.ones(x.shape[-1]) if norm_weight is None else norm_weight
    x, gamma, wq, wk = (tensor.to(x.device, dtype) for tensor in (x, gamma, wq, wk))
    h = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + norm_eps) * gamma  # RMSNorm
    q, k = h @ wq.T, h @ wk.T
    if bq is not None:
        q = q + bq.to(dtype)
    if bk is not None:
        k = k + bk.to(dtype)
    q = q.unflatten(-1, (w.shape[0], -1)).transpose(-3, -2)  # [B, H, T, D]
    k = k.unflatten(-1, (num_key_value_heads, -1)).transpose(-3, -2)  # [B, Hkv, T, D]
    options = {"q_mask": q_mask, "k_mask": k_mask, "normalize": normalize, "scale": scale, "rounding": rounding}
    return score_and_select(q, k, w, r, backend=backend, **options)
