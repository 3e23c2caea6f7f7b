"""Copies a model's modules without their weights, so that shapes, strides and dtypes can be followed without data.

A copy is made of meta tensors. The model itself is neither called nor changed, so other threads may use it, and what
watches its modules, such as the hooks of `prune` or of accelerate, is left out of the copy.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from hawk_kernels.hf.projections import LayerProjections
from hawk_kernels.layer import Layer

_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
# what accelerate puts on a module that it moves
_WRAPPERS = ("forward", "_hf_hook", "_old_forward")
_ALIGNMENT = 16


def without_weights(module: nn.Module) -> Any:
    """Copy a module; its parameters and buffers are meta tensors of the same layout.

    A linear layer whose weight is packed, as quantised ones are, becomes one of plain weights, which returns the same
    shapes.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        held = vars(part)
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None:
                memo[id(tensor)] = _parameter_like(tensor)
        memo |= {id(held[name]): OrderedDict() for name in _HOOKS if name in held}
        memo |= {id(held[name]): None for name in _WRAPPERS if name in held}
    bare = copy.deepcopy(module, memo)
    for part in bare.modules():
        for name in _WRAPPERS:
            vars(part).pop(name, None)
    dtype = next((p.dtype for p in module.parameters() if p.dtype.is_floating_point), torch.get_default_dtype())
    return _unpacked(bare, dtype)


def layout_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a meta tensor of the same dtype, sizes, strides and alignment."""
    misaligned = 0 if tensor.is_meta else tensor.data_ptr() % _ALIGNMENT
    offset = misaligned // tensor.element_size()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = torch.empty(offset + reach + 1, dtype=tensor.dtype, device="meta")
    return memory.as_strided(tensor.shape, tensor.stride(), offset)


class WeightlessProjections(LayerProjections):
    """Does to meta tensors what a layer's projections do to hidden states.

    Args:
        real: the projections of the layer itself, which tell what weights the kernels read.
        bare: the projections of its copy without weights.
    """

    def __init__(self, real: LayerProjections, bare: LayerProjections) -> None:
        self._real, self._bare = real, bare
        self.num_heads = real.num_heads
        self.affine_queries = real.affine_queries

    def device(self, default: torch.device) -> torch.device:
        return default

    def normalize(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self._bare.normalize(hidden_states)

    def queries(self, normalized: torch.Tensor) -> torch.Tensor:
        return self._bare.queries(normalized)

    def keys(self, normalized: torch.Tensor) -> torch.Tensor:
        return self._bare.keys(normalized)

    def plain(self) -> Layer | None:
        layer = self._real.plain()
        if layer is None:
            return None
        tensors: dict[str, Any] = {
            name: layout_of(x) for name, x in layer._asdict().items() if isinstance(x, torch.Tensor)
        }
        return layer._replace(**tensors)


def give_layer_weights(layer: Any) -> None:
    """Give real weights, all of them 0.5, to the attention and the norms of a meta model's layer.

    What a norm computes is found by calling it, which needs values.
    """
    norms = [child for child in layer.children() if all(p.dim() == 1 for p in child.parameters())]
    for module in (layer.self_attn, *norms):
        module.to_empty(device="cpu")
        for parameter in module.parameters():
            nn.init.constant_(parameter, 0.5)


def _parameter_like(tensor: torch.Tensor) -> torch.Tensor:
    like = layout_of(tensor.detach())
    return nn.Parameter(like, requires_grad=False) if isinstance(tensor, nn.Parameter) else like


def _unpacked(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return the module with plain linear layers in place of quantised ones."""
    if _is_packed(module):
        kind: Any = module
        has_bias = getattr(module, "bias", None) is not None
        return nn.Linear(kind.in_features, kind.out_features, bias=has_bias, device="meta", dtype=dtype)
    for name, child in module.named_children():
        setattr(module, name, _unpacked(child, dtype))
    return module


def _is_packed(module: nn.Module) -> bool:
    kind: Any = module
    if not (hasattr(module, "in_features") and hasattr(module, "out_features")) or any(True for _ in module.children()):
        return False
    weight = getattr(module, "weight", None)
    shape = kind.out_features, kind.in_features
    return not (isinstance(weight, torch.Tensor) and weight.dtype.is_floating_point and tuple(weight.shape) == shape)
