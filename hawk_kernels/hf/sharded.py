"""Gathers the weights by which tokens are ranked where tensor parallelism or FSDP shards them over processes.

Every process gathers the same few weights and so makes the same choice. Gathering is a collective call: all processes
have to make it, whatever their prompts hold.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@torch.no_grad()
def whole_modules(layer: Any, modules: list[nn.Module | None], inside: bool) -> list[nn.Module | None] | None:
    """Copy modules of a layer, with whole weights and without hooks.

    Args:
        layer: the decoder layer, which FSDP may wrap.
        modules: modules of that layer; None stands for one that it does not have.
        inside: whether the layer is about to run. FSDP2 has gathered its weights by then; FSDP1 has not, and they
            cannot be gathered here, where only the processes that choose tokens would take part.

    Returns:
        The copies in order, or None where the weights cannot be gathered.
    """
    is_wrapped = any(kind.__name__ == "FullyShardedDataParallel" for kind in type(layer).__mro__)
    if is_wrapped and inside:
        return None
    with _unsharded(layer) if is_wrapped else nullcontext():
        copies = [None if module is None else _whole(module, is_wrapped) for module in modules]
    is_known = all((module is None) == (made is None) for module, made in zip(modules, copies, strict=True))
    return copies if is_known else None


def _unsharded(layer: Any) -> AbstractContextManager[None]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    unsharded: AbstractContextManager[None] = FullyShardedDataParallel.summon_full_params(
        layer, recurse=False, writeback=False
    )
    return unsharded


def _whole(module: nn.Module, is_lent: bool) -> nn.Module | None:
    """Copy a module; None if it contains other modules, such as an adapter, or weights that cannot be gathered."""
    if any(True for _ in module.children()):
        return None
    whole = copy.copy(module)
    vars(whole).update({name: OrderedDict() for name in _HOOKS})
    # tensor parallelism sets a `forward` of its own, which shards inputs and outputs
    vars(whole).pop("forward", None)
    parameters: dict[str, Any] = {}
    for name, weight in module._parameters.items():
        tensor: Any = weight
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.full_tensor()
        elif is_lent and tensor is not None:
            tensor = tensor.clone()
        parameters[name] = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
    vars(whole)["_parameters"] = parameters
    if isinstance(whole, nn.Linear) and tuple(whole.weight.shape) != (whole.out_features, whole.in_features):
        return None
    return whole
