"""HAWK from the hidden states before the first layer: normalise, project, then score as the paper does."""

import torch

from csrc_ref.score_and_select import score_tokens
from csrc_ref.select_topk import select_topk


def score_hidden(x, layer, w, *, q_mask, k_mask, normalize=None, scale=None, backend=None):
    """Compute queries and keys of every token by the layer's own projections, without RoPE, then `score_tokens`.

    Args:
        x: hidden states before the layer, `[B, T, C]` or `[T, C]`.
        layer: anything with the fields of `hawk_kernels.Layer`: gamma of the RMSNorm `norm_weight` `[C]` or None for
            ones, its epsilon `norm_eps`, the query projection `wq` `[H * D, C]` and its bias `bq` `[H * D]` or None,
            the key projection `wk` `[Hkv * D, C]` and its bias `bk` `[Hkv * D]` or None.
        w, normalize, scale, backend: as in `score_tokens`.
        q_mask: bool over T, True = this token's query is averaged.
        k_mask: bool over T, True = this token is a candidate.

    Returns:
        `[B, T]` (or `[T]`), `-inf` at non-candidates; float64 for float64 input, else float32.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    gamma = torch.ones(x.shape[-1]) if layer.norm_weight is None else layer.norm_weight
    x, gamma, wq, wk = (tensor.to(x.device, dtype) for tensor in (x, gamma, layer.wq, layer.wk))
    h = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + layer.norm_eps) * gamma  # RMSNorm
    q, k = h @ wq.T, h @ wk.T
    if layer.bq is not None:
        q = q + layer.bq.to(dtype)
    if layer.bk is not None:
        k = k + layer.bk.to(dtype)
    head_dim = wq.shape[0] // w.shape[0]
    q = q.unflatten(-1, (-1, head_dim)).transpose(-3, -2)  # [B, H, T, D]
    k = k.unflatten(-1, (-1, head_dim)).transpose(-3, -2)  # [B, Hkv, T, D]
    return score_tokens(q, k, w, q_mask=q_mask, k_mask=k_mask, normalize=normalize, scale=scale, backend=backend)


def score_hidden_and_select(
    x, layer, w, r, *, q_mask, k_mask, normalize=None, scale=None, rounding="floor", backend=None
):
    """`select_topk(score_hidden(...))`; shapes as there.

    Returns:
        `Selection(mask, indices, scores)` over T.
    """
    options = {"q_mask": q_mask, "k_mask": k_mask, "normalize": normalize, "scale": scale, "backend": backend}
    return select_topk(score_hidden(x, layer, w, **options), r, mask=k_mask, rounding=rounding)
