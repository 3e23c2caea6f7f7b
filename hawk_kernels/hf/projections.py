"""Queries and keys of a decoder layer before RoPE."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn


class LayerProjections(ABC):
    """Turns hidden states that enter a decoder layer into its queries and keys, position-free.

    Modules are called, not their weights read: a quantised or adapted projection has a forward but no plain weight.

    Attributes:
        num_heads: query heads `H`.
        affine_queries: whether a query is an affine map of the normalised hidden state, so that averaging commutes.
    """

    num_heads: int
    affine_queries: bool

    @abstractmethod
    def device(self, default: torch.device) -> torch.device:
        """Where the layer computes; `default` where its weights do not say."""

    @abstractmethod
    def normalize(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The layer's input norm, `[..., hidden]` to `[..., hidden]`."""

    @abstractmethod
    def queries(self, normalized: torch.Tensor) -> torch.Tensor:
        """`[..., hidden]` to `[..., H, D]`."""

    @abstractmethod
    def keys(self, normalized: torch.Tensor) -> torch.Tensor:
        """`[..., hidden]` to `[..., Hkv, D]`."""


class SeparateProjections(LayerProjections):
    """`input_layernorm`, then `self_attn.q_proj` and `k_proj`, then norms per head where the layer has them."""

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attn
        self._norm: nn.Module = layer.input_layernorm
        self._query_projection: nn.Module = attention.q_proj
        self._key_projection: nn.Module = attention.k_proj
        self._query_norm: nn.Module | None = getattr(attention, "q_norm", None)
        self._key_norm: nn.Module | None = getattr(attention, "k_norm", None)
        self._head_dim: int = attention.head_dim
        self.num_heads = attention.config.num_attention_heads
        self.affine_queries = self._query_norm is None

    def device(self, default: torch.device) -> torch.device:
        weight = next(self._norm.parameters(), None)
        # offloaded weights are on "meta" until the module runs; its own hook then moves the input
        return default if weight is None or weight.device.type == "meta" else weight.device

    def normalize(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self._norm(hidden_states)

    def queries(self, normalized: torch.Tensor) -> torch.Tensor:
        queries = self._query_projection(normalized).unflatten(-1, (-1, self._head_dim))
        return queries if self._query_norm is None else self._query_norm(queries)

    def keys(self, normalized: torch.Tensor) -> torch.Tensor:
        keys = self._key_projection(normalized).unflatten(-1, (-1, self._head_dim))
        return keys if self._key_norm is None else self._key_norm(keys)
