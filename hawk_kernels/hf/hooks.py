"""Holds what all hooks share: their lifetime, watched methods, arguments, uploads, and checks for compiled code."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import nn

_F = TypeVar("_F", bound=Callable[..., Any])
# what torch.compile leaves on the function or module that it returns
_COMPILED = "_torchdynamo_orig_callable"
# where transformers' `generate` keeps the compiled call of a model, and the settings it was made with
_COMPILED_BY_GENERATE = ("_compiled_call", "_last_compile_config")
# torch does not annotate it
_disable_compiler: Any = torch.compiler.disable


class Handle(Protocol):
    """A hook that can be taken off again."""

    def remove(self) -> None:
        """Take it off."""


class WatchedMethod:
    """Replaces a method of one object by one that reports its calls, until removed; plain methods have no hooks.

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

        self._watched = watched
        setattr(owner, name, watched)

    def remove(self) -> None:
        """Put back what was there, unless somebody has replaced or deleted the watched method meanwhile."""
        if vars(self._owner).get(self._name) is not self._watched:
            return
        if self._earlier is None:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._earlier)


class Lifetime:
    """Decides for which calls the hooks of a block act: all calls while it is open, then those that began inside it.

    A call that another thread began inside the block would change its meaning halfway if the hooks left with the block.
    They stay for the threads that have such a call, and act in no other thread, until the last of these calls ends.

    Args:
        attach: puts the hooks on the model, those of `generate` excepted.
        watch: watches `generate`.
        ended: is called when the hooks are off.

    Attributes:
        is_open: whether the block is open.
        was_called: whether any call of the model began since it was opened.
    """

    def __init__(
        self, attach: Callable[[], list[Handle]], watch: Callable[[], Handle], ended: Callable[[], None]
    ) -> None:
        self._attach, self._watch, self._ended = attach, watch, ended
        self._lock = threading.RLock()
        self._hooks, self._watches = ExitStack(), ExitStack()
        self._running: set[threading.Thread] = set()
        self._closed_by: threading.Thread | None = None
        self._thread = _Calls()
        self.is_open = False
        self.was_called = False

    def open(self) -> None:
        """Let the hooks act for every call."""
        with self._lock:
            self._put_on()
            self._watches.callback(self._watch().remove)
            self.is_open, self.was_called = True, False

    def close(self) -> bool:
        """Let the hooks act for the calls that other threads have begun; return whether there were none."""
        with self._lock:
            # torch skips hooks after a KeyboardInterrupt, so that a call of this thread may seem to run still
            self._thread.is_in_forward = False
            if not self._thread.generates:
                self._running.discard(threading.current_thread())
            self._running = {thread for thread in self._running if thread.is_alive()}
            self._closed_by = threading.current_thread()
            self.is_open = False
            self._watches.close()
            if not self._running:
                self._take_off()
            return not self._running

    def acts(self) -> bool:
        """Tell whether the hooks act for this thread."""
        return self.is_open or self._thread.generates > 0 or self._thread.is_in_forward

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Surround a call of the watched `generate`.

        Such a call may begin after the block, in a thread that was given `model.generate` inside it.

        Raises:
            ValueError: the block was left by this thread.
        """
        with self._lock:
            self.was_called = True
            if not self.acts():
                if self._closed_by is threading.current_thread():
                    raise ValueError(
                        "cannot call a `generate` that was taken from the model inside prune after leaving the block; "
                        "take model.generate again, after `del model.generate` if you have set it yourself"
                    )
                if not self._running:
                    self._put_on()
            self._running.add(threading.current_thread())
            self._thread.generates += 1
        try:
            yield
        finally:
            self._thread.generates -= 1
            self._end()

    def begin_forward(self) -> None:
        """Note that a call of the model begins in this thread."""
        self.was_called = True
        # a compiled call always runs inside one that is not compiled
        if torch.compiler.is_compiling() or self._thread.generates or self._thread.is_in_forward:
            return
        with self._lock:
            self._thread.is_in_forward = True
            self._running.add(threading.current_thread())

    def end_forward(self) -> None:
        """Note that the call has ended."""
        if torch.compiler.is_compiling() or not self._thread.is_in_forward:
            return
        self._thread.is_in_forward = False
        self._end()

    def _end(self) -> None:
        if self._thread.generates:
            return
        with self._lock:
            self._running.discard(threading.current_thread())
            if not self._running and not self.is_open:
                self._take_off()

    def _put_on(self) -> None:
        for handle in self._attach():
            self._hooks.callback(handle.remove)

    def _take_off(self) -> None:
        # the last one first: of two watches of one method each puts back what it found
        self._hooks.close()
        self._ended()


class _Calls(threading.local):
    generates: int = 0
    is_in_forward: bool = False


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


def is_paged(kwargs: dict[str, Any]) -> bool:
    """Tell whether a call belongs to continuous batching, which puts several requests in one row over a paged cache."""
    return kwargs.get("cache") is not None and "write_index" in kwargs


def check_not_empty(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> None:
    """Refuse a call without any token.

    Raises:
        ValueError: `input_ids` are empty, and no embeddings came instead.
    """
    if input_ids is not None and inputs_embeds is None and 0 in input_ids.shape:
        raise ValueError(
            f"input_ids: expected at least one row and one token, got shape {list(input_ids.shape)}; pass the prompt"
        )


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
    # what `torch.compile(module)` returns runs hooks of its own outside the compiled code
    if hasattr(vars(model).get("forward"), _COMPILED) and not hasattr(model, _COMPILED):
        raise ValueError(
            f"cannot prune a model whose {type(model).__name__}.forward was replaced by torch.compile(...): compiled "
            "code does not know how many tokens of a prompt stay; restore it by `del model.forward` and compile "
            "decoding alone, which generate does for cache_implementation='static'"
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


def check_parts_run(root: nn.Module, name: str, method: str) -> None:
    """Refuse compiled modules inside `root`, which would run without the hooks that a method puts inside them.

    Args:
        root: the modules that get hooks, and those between them.
        name: what `root` is called in the message.
        method: name of the method.

    Raises:
        ValueError: some module was compiled.
    """
    for module in root.modules():
        if (
            getattr(module, "_compiled_call_impl", None) is not None
            or hasattr(module, _COMPILED)
            or hasattr(vars(module).get("forward"), _COMPILED)
        ):
            raise ValueError(
                f"cannot prune by method {method!r} with compiled layers in {name}: the method watches these layers by "
                "hooks, which compiled code skips; load the model without compiling them, or use method='hawk'"
            )


def compiled_before() -> ValueError:
    """Make the error for a call whose code was compiled outside the block, so that hooks inside it did not run."""
    return ValueError(
        "cannot run code inside prune that torch.compile made before the block: it skips the hooks that prune, and "
        "read the whole prompt; call the model itself, or call torch.compiler.reset() on entering"
    )


def forget_compiled_call(model: Any) -> None:
    """Delete the compiled call that `generate` made inside the block."""
    for name in _COMPILED_BY_GENERATE:
        vars(model).pop(name, None)
