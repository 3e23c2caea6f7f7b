"""The steps of HAWK's public release, as eager PyTorch: what the project is measured against.

Written from the method's description: repeat the KV heads, multiply, mean over text, zero what is not finite, L2 per
head, weighted sum, top-k, sort; everything in the dtype of the input, as there.
"""

from __future__ import annotations

import math

import torch


def released_steps(q: torch.Tensor, k: torch.Tensor, w: torch.Tensor, keep_ratio: float) -> torch.Tensor:
    """Ascending indices `[B, K]` of the kept keys of `q [B, H, N, D]` and `k [B, Hkv, M, D]`."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    attention = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    c = torch.nan_to_num(attention.mean(dim=2), nan=0.0, posinf=0.0, neginf=0.0)
    c = c / (c.norm(dim=-1, keepdim=True) + 1e-6)
    importance = (c * w.to(c.dtype)[None, :, None]).sum(dim=1)
    kept = max(1, math.ceil(keep_ratio * importance.shape[-1]))
    return importance.topk(kept, dim=-1).indices.sort(dim=-1).values
