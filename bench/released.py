"""HAWK's public release, as eager PyTorch: what the project is measured against.

Written from the method's description: repeat the KV heads, multiply, mean over text, zero what is not finite, norm per
head (L2 unless told otherwise), weighted sum, top-k, sort; everything in the dtype of the input, as there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bench.inputs import projected
from hawk_kernels import Layer


def released_steps(
    q: torch.Tensor, k: torch.Tensor, w: torch.Tensor, keep_ratio: float, normalize: str | None = "l2"
) -> torch.Tensor:
    """Return ascending indices `[B, K]` of the kept keys of `q [B, H, N, D]` and `k [B, Hkv, M, D]`."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    attention = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    c = torch.nan_to_num(attention.mean(dim=2), nan=0.0, posinf=0.0, neginf=0.0)
    if normalize == "l2":
        c = c / (c.norm(dim=-1, keepdim=True) + 1e-6)
    elif normalize == "softmax":
        c = c.softmax(dim=-1)
    elif normalize == "minmax":
        lowest, highest = c.amin(dim=-1, keepdim=True), c.amax(dim=-1, keepdim=True)
        c = (c - lowest) / (highest - lowest + 1e-6)
    importance = (c * w.to(c.dtype)[None, :, None]).sum(dim=1)
    kept = max(1, math.ceil(keep_ratio * importance.shape[-1]))
    return importance.topk(kept, dim=-1).indices.sort(dim=-1).values


def released_steps_from_hidden(
    x: torch.Tensor,
    layer: Layer,
    w: torch.Tensor,
    queries: slice,
    visual: slice,
    keep_ratio: float,
    normalize: str | None = "l2",
) -> torch.Tensor:
    """Return ascending indices `[B, K]` among the visual tokens of `x [B, T, C]`; all tokens are projected."""
    normalized = torch.nn.functional.rms_norm(x, x.shape[-1:], layer.norm_weight, layer.norm_eps)
    head_dim = layer.wq.shape[0] // w.shape[0]
    q = projected(normalized, layer.wq, layer.bq, head_dim)
    k = projected(normalized, layer.wk, layer.bk, head_dim)
    return released_steps(q[:, :, queries], k[:, :, visual], w, keep_ratio, normalize)


@contextmanager
def released_pruning(
    model: Any, keep_ratio: float, w: torch.Tensor, queries: torch.Tensor, visual: torch.Tensor
) -> Iterator[None]:
    """Prune the prefill of a Qwen2.5-VL as the release does: one sample, every token projected, the prompt shortened.

    Args:
        model: the conditional generation model.
        keep_ratio: fraction of the visual tokens that is kept.
        w: head importance `[H]`.
        queries: positions of the text that ranks, `[N]`.
        visual: positions of the visual tokens, `[M]`.
    """
    text = model.model.language_model
    layer = text.layers[0]
    attention = layer.self_attn

    @torch.no_grad()
    def shorten(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        embeds, positions = kwargs["inputs_embeds"], kwargs["position_ids"]
        if embeds.shape[1] == 1:
            return None
        normalized = layer.input_layernorm(embeds)
        q, k = (
            projection(normalized).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj)
        )
        kept = visual[released_steps(q[:, :, queries], k[:, :, visual], w, keep_ratio)[0]]
        stays = torch.ones(embeds.shape[1], dtype=torch.bool, device=embeds.device)
        stays[visual] = False
        stays[kept] = True
        stays = stays.nonzero().squeeze(1)
        return args, {
            **kwargs,
            "inputs_embeds": embeds[:, stays],
            "position_ids": positions[..., stays],
            "attention_mask": torch.ones(1, len(stays), dtype=torch.long, device=embeds.device),
        }

    handle = text.register_forward_pre_hook(shorten, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
