"""Helpers that all hooks share: arguments by name, watched methods, uploads, and code that would skip hooks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import nn

_F = TypeVar("_F", bound=Callable[..., Any])
# where transformers' `generate` keeps the compiled call of a model, and the settings it was made with
_COMPILED_BY_GENERATE = ("_compiled_call", "_last_compile_config")
# torch does not annotate it
_disable_compiler: Any = torch.compiler.disable


class Handle(Protocol):
    """A hook that can be taken off again."""

    def remove(self) -> None:
        """Take it off."""


class WatchedMethod:
    """Replaces a method of one object, which has no hooks of its own, by one that tells of its calls, until removed.

    Args:
        owner: the object; its class stays as it is.
        name: of the method.
        watch: gets the arguments of each call by name and returns a context manager around that call; what this
            yields is called with the result.
    """

    def __init__(
        self,
        owner: Any,
        name: str,
        watch: Callable[[dict[str, Any]], AbstractContextManager[Callable[[Any], None]]],
    ) -> None:
        self._owner, self._name = owner, name
        self._earlier = vars(owner).get(name)
        method = getattr(owner, name)
        parameters = tuple(inspect.signature(method).parameters)

        @functools.wraps(method)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with watch({**dict(zip(parameters, args, strict=False)), **kwargs}) as tell:
                result = method(*args, **kwargs)
                tell(result)
            return result

        setattr(owner, name, watched)

    def remove(self) -> None:
        """Put back what was there."""
        if self._earlier is None:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._earlier)


def named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call of `module` by name."""
    if not args:
        return kwargs
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


def call_length(kwargs: dict[str, Any]) -> int:
    """Count the tokens of a call, `T`."""
    tokens = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    return 0 if tokens is None else int(tokens.shape[1])


def visual_features(kwargs: dict[str, Any], names: tuple[str, ...]) -> tuple[Any, ...]:
    """Return the images and videos of a call: pixels, or what `generate` has encoded beforehand."""
    encoded = (kwargs.get("mm_encoder_outputs") or {}).values()
    return tuple(feature for feature in (*(kwargs.get(name) for name in names), *encoded) if feature is not None)


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy a host array to `device`, without waiting for the device."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


def outside_graphs(function: _F) -> _F:
    """Decorate a function that the compiler must not trace."""
    disabled: _F = _disable_compiler(function)
    return disabled


def check_hooks_run(model: Any) -> None:
    """Refuse a model that is compiled as a whole, or whose decoding `generate` compiled outside a `prune` block.

    Raises:
        ValueError: torch would run that code inside the block as well, without the block's hooks.
    """
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(
            "cannot prune after model.compile(): compiled code does not know how many tokens of a prompt stay; set "
            "model._compiled_call_impl = None and compile decoding alone, which generate does for "
            "cache_implementation='static'"
        )
    if "_compiled_call" not in vars(model):
        return
    import torch._dynamo

    if torch._dynamo.config.skip_nnmodule_hook_guards:
        raise ValueError(
            "cannot prune a model that generate has already compiled (it does so for a static cache): torch would "
            "reuse that code without the hooks that prune. Generate inside the block first; or set "
            "torch._dynamo.config.skip_nnmodule_hook_guards = False before the first generate; or call "
            "torch.compiler.reset() and `del model._compiled_call` now"
        )


def forget_compiled_call(model: Any) -> None:
    """Delete the compiled call that `generate` made inside the block."""
    for name in _COMPILED_BY_GENERATE:
        vars(model).pop(name, None)
