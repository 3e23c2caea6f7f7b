"""Queries and keys of vLLM's first decoder layer before RoPE: all heads, on every rank of tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather

from hawk_kernels.hf.projections import LayerProjections


class PackedProjections(LayerProjections):
    """Calls the layer's input norm and its `qkv_proj`, whose weights vLLM packs, quantises and shards.

    A rank computes some of the heads. All of them are gathered, so that every method sees what it would see without
    tensor parallelism, and every rank ranks the tokens alike.

    Args:
        layer: a decoder layer of Qwen2 or Qwen3.
    """

    def __init__(self, layer: Any) -> None:
        self._norm = layer.input_layernorm
        self._attention: Any = layer.self_attn
        self.num_heads: int = layer.self_attn.total_num_heads
        self.affine_queries = not self._has_head_norms

    @property
    def _has_head_norms(self) -> bool:
        return hasattr(self._attention, "q_norm")

    def device(self, default: torch.device) -> torch.device:
        return default

    def normalize(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normalized: torch.Tensor = self._norm(hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous())
        return normalized.view(hidden_states.shape)

    def queries(self, normalized: torch.Tensor) -> torch.Tensor:
        attention = self._attention
        local = self._projected(normalized)[..., : attention.q_size].unflatten(-1, (-1, attention.head_dim))
        if self._has_head_norms:
            local = attention.q_norm(local.contiguous())
        return _gathered(local, 1)

    def keys(self, normalized: torch.Tensor) -> torch.Tensor:
        attention = self._attention
        local = self._projected(normalized)[..., attention.q_size : attention.q_size + attention.kv_size]
        local = local.unflatten(-1, (-1, attention.head_dim))
        if self._has_head_norms:
            local = attention.k_norm(local.contiguous())
        copies = max(1, get_tensor_model_parallel_world_size() // attention.total_num_kv_heads)
        return _gathered(local, copies)

    def _projected(self, normalized: torch.Tensor) -> torch.Tensor:
        projected, _ = self._attention.qkv_proj(normalized.reshape(-1, normalized.shape[-1]))
        return torch.unflatten(projected, 0, normalized.shape[:-1])


def _gathered(local: torch.Tensor, copies: int) -> torch.Tensor:
    """Gather the heads of all ranks, `[..., heads, D]`, where `copies` ranks in succession hold the same ones."""
    if get_tensor_model_parallel_world_size() == 1:
        return local
    everywhere: torch.Tensor = tensor_model_parallel_all_gather(local.contiguous(), dim=-2)
    return everywhere[..., ::copies, :]
