"""Scoring in PyTorch: averages the queries first, runs anywhere.

The mean over text commutes with the dot product, so the work is `(N + M) H D` where the literal steps need `N M H D`,
and the repeated KV heads, the `[H, N, M]` logits and the half-precision intermediate results are never made.
"""

from __future__ import annotations

import torch

from hawk_kernels.backends.eager.select_topk import select
from hawk_kernels.selection import Selection

COLUMNS = 16


def score_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    q_mask: torch.Tensor | None,
    k_mask: torch.Tensor | None,
    normalize: str | None,
    scale: float,
) -> torch.Tensor:
    """Importance `[B, M]` float32 of validated `[B, H, N, D]` queries and `[B, Hkv, M, D]` keys."""
    batch, num_heads, _, head_dim = q.shape
    num_key_value_heads, num_keys = k.shape[1:3]
    queries = _mean_query(q, q_mask, scale)
    keys, candidates = _aligned(k, k_mask)
    groups = batch * num_key_value_heads
    # torch.matmul would do the same with twice the host work.
    c = torch.bmm(
        queries.view(groups, num_heads // num_key_value_heads, head_dim),
        keys.reshape(groups, keys.shape[2], head_dim).transpose(1, 2),
    )
    c = c.view(batch, num_heads, keys.shape[2])
    c.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    importance = weighted_sum(c, w.float(), candidates, normalize)
    if candidates is None:
        return importance
    return importance.masked_fill_(~candidates, -torch.inf)[:, :num_keys].contiguous()


def _aligned(k: torch.Tensor, k_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The keys in float32 with zeros behind them up to a multiple of `COLUMNS`, and the candidates among all these.

    A matrix product adds in another order in its last columns, so that equal keys there would get another last bit
    and no longer tie.
    """
    batch, num_key_value_heads, num_keys, head_dim = k.shape
    extra = -num_keys % COLUMNS
    if extra == 0:
        return k.float(), k_mask
    keys = k.new_zeros((batch, num_key_value_heads, num_keys + extra, head_dim), dtype=torch.float32)
    keys[:, :, :num_keys] = k
    if k_mask is None:
        k_mask = torch.ones((batch, num_keys), dtype=torch.bool, device=k.device)
    return keys, torch.nn.functional.pad(k_mask, (0, extra))


def _mean_query(q: torch.Tensor, q_mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Mean over text `[B, H, D]` float32, times the scale; NaN (which scores 0) where there is no text."""
    if q_mask is None:
        num_queries = q.shape[2]
        return q.sum(dim=2, dtype=torch.float32).mul_(scale / num_queries if num_queries else torch.nan)
    # Zeroed, not multiplied by the mask: padding may hold NaN.
    total = torch.where(q_mask[:, None, :, None], q, 0).sum(dim=2, dtype=torch.float32)
    return total.mul_(scale / q_mask.sum(dim=1, dtype=torch.float32)[:, None, None])


def weighted_sum(c: torch.Tensor, w: torch.Tensor, k_mask: torch.Tensor | None, normalize: str | None) -> torch.Tensor:
    """`sum_i w[i] norm(c[i, :])` over the candidates, `[B, M]`; `c [B, H, M]` is finite and may be overwritten."""
    outside = None if k_mask is None else ~k_mask[:, None, :]
    if normalize is None:
        weights = w.expand(c.shape[0], -1)
    elif normalize == "l2":
        if outside is not None:
            c.masked_fill_(outside, 0.0)
        # In float64 no square over- or underflows; below float32's normal range a vector has no direction left.
        norm = torch.linalg.vector_norm(c, dim=-1, dtype=torch.float64)
        weights = (w / norm.masked_fill_(norm < torch.finfo(torch.float32).tiny, torch.inf)).float()
    elif normalize == "softmax":
        if outside is not None:
            c.masked_fill_(outside, -torch.inf)
        c = torch.softmax(c, dim=-1)
        weights = w.expand(c.shape[0], -1)
    elif c.shape[-1] == 0:
        return c.new_empty(c.shape[0], 0)
    else:
        lowest = (c if outside is None else c.masked_fill(outside, torch.inf)).amin(dim=-1)
        highest = (c if outside is None else c.masked_fill(outside, -torch.inf)).amax(dim=-1)
        extent = highest - lowest
        weights = torch.where(extent > 0, w / extent, 0.0)
        c.sub_(lowest[..., None])
        if outside is not None:
            c.masked_fill_(outside, 0.0)
    return torch.bmm(weights[:, None, :], c).squeeze(1)


def score_and_select(
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    r: float | int,
    q_mask: torch.Tensor | None,
    k_mask: torch.Tensor | None,
    normalize: str | None,
    scale: float,
    rounding: str,
) -> Selection:
    """`select_topk(score_tokens(...))` of validated arguments."""
    return select(score_tokens(q, k, w, q_mask, k_mask, normalize, scale), r, k_mask, rounding)
