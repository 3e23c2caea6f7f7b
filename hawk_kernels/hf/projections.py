"""Projects hidden states to the queries and keys of a decoder layer, before RoPE."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from hawk_kernels.layer import Layer, is_plain_linear, recognised_rms_norm, runs_hooks


class LayerProjections(ABC):
    """Turns the hidden states that enter a decoder layer into its queries and keys, before RoPE.

    It calls the layer's modules instead of reading their weights, because a quantised or adapted projection has a
    forward but no plain weight.

    Attributes:
        num_heads: query heads `H`.
        affine_queries: whether a query is an affine map of the normalised hidden state, so that averaging commutes.
        keys_are_equally_long: whether the last thing that happens to a key is a norm without learned weights.
    """

    num_heads: int
    affine_queries: bool
    keys_are_equally_long: bool = False

    @abstractmethod
    def device(self, default: torch.device) -> torch.device:
        """Tell where the layer computes; `default` where its weights do not say."""

    @abstractmethod
    def normalize(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the layer's input norm, `[..., hidden]` to `[..., hidden]`."""

    @abstractmethod
    def queries(self, normalized: torch.Tensor) -> torch.Tensor:
        """Project normalised hidden states `[..., hidden]` to queries `[..., H, D]`."""

    @abstractmethod
    def keys(self, normalized: torch.Tensor) -> torch.Tensor:
        """Project normalised hidden states `[..., hidden]` to keys `[..., Hkv, D]`."""

    def plain(self) -> Layer | None:
        """Return the layer's weights where its modules only multiply by them and add biases; else None."""
        return None

    def gathered(self, inside: bool = False) -> LayerProjections:
        """Return the same projections with whole weights, where each process holds a part of them.

        All processes have to call this together.

        Args:
            inside: whether the layer is about to run.
        """
        return self


class SeparateProjections(LayerProjections):
    """Applies the layer's norm, then `self_attn.q_proj` and `k_proj`, then the norms of heads where there are some.

    Args:
        layer: a decoder layer.
        norm: attribute of the layer's input norm, or None where attention reads the hidden states as they are.
        head_norms: attributes of the attention with the norms of a query head and a key head.
    """

    def __init__(
        self, layer: Any, norm: str | None = "input_layernorm", head_norms: tuple[str, str] = ("q_norm", "k_norm")
    ) -> None:
        attention = layer.self_attn
        self._layer: nn.Module = layer
        self._norm: nn.Module = nn.Identity() if norm is None else getattr(layer, norm)
        self._query_projection: nn.Module = attention.q_proj
        self._key_projection: nn.Module = attention.k_proj
        self._query_norm: nn.Module | None = getattr(attention, head_norms[0], None)
        self._key_norm: nn.Module | None = getattr(attention, head_norms[1], None)
        self._head_dim: int = attention.head_dim
        self.num_heads = attention.config.num_attention_heads
        self.affine_queries = self._query_norm is None
        # with learned weights, which stretch some directions, lengths still differ
        self.keys_are_equally_long = self._key_norm is not None and not any(True for _ in self._key_norm.parameters())
        is_plain = self.affine_queries and self._key_norm is None and not self._is_sharded()
        self._rms_norm = recognised_rms_norm(self._norm) if is_plain else None

    def device(self, default: torch.device) -> torch.device:
        return _device_of(default, self._norm, self._query_projection)

    def plain(self) -> Layer | None:
        _check_whole(self._is_sharded())
        query: Any = self._query_projection
        key: Any = self._key_projection
        if self._rms_norm is None or runs_hooks(self._norm) or not (is_plain_linear(query) and is_plain_linear(key)):
            return None
        # gated attention projects the gate of a head after its query
        if query.weight.shape[0] != self.num_heads * self._head_dim:
            return None
        factor, epsilon = self._rms_norm.factor(self._norm), self._rms_norm.epsilon
        return Layer(factor, epsilon, query.weight, query.bias, key.weight, key.bias)

    def gathered(self, inside: bool = False) -> LayerProjections:
        if not self._is_sharded():
            return self
        from hawk_kernels.hf.sharded import whole_modules

        own = [self._norm, self._query_projection, self._key_projection, self._query_norm, self._key_norm]
        modules: Any = whole_modules(self._layer, own, inside)
        if modules is None:
            return self
        whole = copy.copy(self)
        whole._norm, whole._query_projection, whole._key_projection, whole._query_norm, whole._key_norm = modules
        # the layer itself stays sharded
        whole._layer = whole._norm
        return whole

    def normalize(self, hidden_states: torch.Tensor) -> torch.Tensor:
        _check_whole(self._is_sharded())
        return _normed(self._norm, hidden_states)

    def _is_sharded(self) -> bool:
        return _is_sharded(self._layer, self._norm, self._query_projection, self._key_projection)

    def queries(self, normalized: torch.Tensor) -> torch.Tensor:
        # gated attention projects the gate of a head after its query
        projected: torch.Tensor = self._query_projection(normalized)
        queries = torch.unflatten(projected, -1, (self.num_heads, -1))[..., : self._head_dim]
        return _normed(self._query_norm, queries)

    def keys(self, normalized: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self._key_projection(normalized)
        return _normed(self._key_norm, torch.unflatten(projected, -1, (-1, self._head_dim)))


class LatentProjections(LayerProjections):
    """Projects as multi-head latent attention does: from a compressed state, with rotary keys that heads share."""

    def __init__(self, layer: Any) -> None:
        self._layer: nn.Module = layer
        self._norm: nn.Module = layer.input_layernorm
        self._attention = layer.self_attn
        self.num_heads = self._attention.num_heads
        self.affine_queries = self._attention.q_lora_rank is None

    def device(self, default: torch.device) -> torch.device:
        return _device_of(default, self._norm)

    def normalize(self, hidden_states: torch.Tensor) -> torch.Tensor:
        _check_whole(_is_sharded(self._layer, self._norm, *self._attention.children()))
        return _normed(self._norm, hidden_states)

    def queries(self, normalized: torch.Tensor) -> torch.Tensor:
        attention = self._attention
        projected: torch.Tensor
        if attention.q_lora_rank is None:
            projected = attention.q_proj(normalized)
        else:
            projected = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(normalized)))
        return torch.unflatten(projected, -1, (self.num_heads, -1))

    def keys(self, normalized: torch.Tensor) -> torch.Tensor:
        attention = self._attention
        latent, rotary = attention.kv_a_proj_with_mqa(normalized).split(
            [attention.kv_lora_rank, attention.qk_rope_head_dim], dim=-1
        )
        keys = attention.kv_b_proj(attention.kv_a_layernorm(latent)).unflatten(-1, (self.num_heads, -1))
        keys = keys[..., : attention.qk_nope_head_dim]
        return torch.cat([keys, rotary.unsqueeze(-2).expand(*keys.shape[:-1], -1)], dim=-1)


def check_key_lengths(projections: LayerProjections, model_type: str, method: str) -> None:
    """Refuse a layer whose keys are all equally long, for a method that ranks by their lengths.

    Raises:
        TypeError: the lengths differ by rounding alone.
    """
    if projections.keys_are_equally_long:
        raise TypeError(
            f"method: expected one that does not rank by the lengths of keys, since a {model_type} normalises its keys "
            f"to one length, got {method!r}; use 'divprune', or 'dart', which ranks by directions"
        )


def _is_sharded(layer: nn.Module, *modules: nn.Module) -> bool:
    """Tell whether this process holds only a part of what a layer ranks tokens by."""
    if any(kind.__name__ in ("FullyShardedDataParallel", "FSDPModule") for kind in type(layer).__mro__):
        return True
    if any(hasattr(weight, "placements") for module in modules for weight in module.parameters()):
        return True
    linear = [module for module in modules if type(module) is nn.Linear]
    return any(tuple(module.weight.shape) != (module.out_features, module.in_features) for module in linear)


def _check_whole(is_sharded: bool) -> None:
    if is_sharded:
        raise ValueError(
            "cannot rank visual tokens by the sharded weights of this layer, since each rank would keep other tokens; "
            "ranks gather the plain weights of the first layer, and of later ones under fully_shard and DTensor tensor "
            "parallelism, so use these, or load the model whole on each rank, or spread its layers with device_map, or "
            "use a method that reads no layer, such as 'divprune'"
        )


def _normed(norm: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    if norm is None:
        return x
    normed: torch.Tensor = norm(x)
    return normed


def _device_of(default: torch.device, *modules: nn.Module) -> torch.device:
    """Tell where the first module that has weights computes; `default` where none says."""
    weight = next((weight for module in modules for weight in module.parameters()), None)
    # offloaded weights are on "meta" until the module runs; its own hook then moves the input
    return default if weight is None or weight.device.type == "meta" else weight.device
