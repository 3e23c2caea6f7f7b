"""Choose the backend that a call runs on, and whether PyTorch's dispatcher stands between them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

try:
    from torch._C import _dispatch_keys, _dispatch_tls_local_include_set, _len_torch_function_stack
    from torch._C._autograd import _profiler_enabled
except ImportError:
    # These names are private: a torch without them sends every call through its dispatcher.
    _CAN_SKIP_DISPATCH = False
else:
    _CAN_SKIP_DISPATCH = True

Signature = tuple[Hashable, ...]
"""All of a call's tensors but their values and places: shape, strides, dtype and device of each, None where none is."""

_MOST_PREPARED_CALLS = 1024

BACKENDS = {"triton": ".kernels", "torch": ".eager"}
"""Where each lies, as seen from this package, which a copy may have under another name (`bench.hub`)."""

MAX_TRITON_HEAD_DIM = 256
_NOTHING = nullcontext()


def _bits(*names: str) -> int:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    for name in names:
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return int(keys.raw_repr())


# A thread in which nothing is traced, transformed or intercepted includes these keys, fewer of them in inference mode.
_PLAIN_THREADS = frozenset({_bits("BackendSelect", "ADInplaceOrView"), _bits("BackendSelect")})
# A dense tensor in memory has these; one that was made in inference mode has no autograd.
_PLAIN_TENSORS = frozenset(
    bits
    for device in ("CPU", "CUDA")
    for bits in (
        _bits(device, "ADInplaceOrView", f"Autograd{device}", f"Autocast{device}"),
        _bits(device, f"Autocast{device}"),
    )
)
_PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})


@lru_cache(maxsize=1)
def _triton_is_installed() -> bool:
    try:
        return find_spec("triton") is not None
    except (ImportError, ValueError):
        return False


def _is_interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on")


def choose_backend(requested: str | None, device: torch.device, head_dim: int | None = None) -> str:
    """Return the backend that a call runs on: the requested one or an error, else Triton where it can run, else torch.

    Raises:
        ValueError: the name is unknown, or Triton was asked for where it cannot run.
        ImportError: Triton was asked for and is not installed.
    """
    if requested is None:
        fits = head_dim is None or head_dim <= MAX_TRITON_HEAD_DIM
        is_gpu = device.type == "cuda" or (device.type == "meta" and _planning.is_on)
        return "triton" if is_gpu and fits and _triton_is_installed() else "torch"
    if requested not in tuple(BACKENDS):
        raise ValueError(
            f"backend: expected None, 'triton' or 'torch', got {requested!r}; None chooses by device and installation"
        )
    if requested == "triton":
        if not _triton_is_installed():
            raise ImportError("backend='triton' needs Triton, which is not installed: pip install triton")
        if device.type != "cuda" and not _is_interpreting():
            raise ValueError(
                f"backend='triton': expected tensors on a GPU, got device {str(device)!r}; move them there, use "
                "backend='torch', or set TRITON_INTERPRET=1 before the first import of triton to run the interpreter"
            )
        if head_dim is not None and head_dim > MAX_TRITON_HEAD_DIM:
            raise ValueError(
                f"backend='triton': expected head_dim <= {MAX_TRITON_HEAD_DIM}, got {head_dim}; use backend='torch'"
            )
    return requested


class _Planning(threading.local):
    is_on = False


_planning = _Planning()


@contextmanager
def planning_for_a_gpu() -> Iterator[None]:
    """Choose for the meta tensors of this thread what would be chosen for tensors on a GPU."""
    before, _planning.is_on = _planning.is_on, True
    try:
        yield
    finally:
        _planning.is_on = before


@cache
def load_backend(name: str, operator: str) -> ModuleType:
    """Return the module that computes `operator` on a backend, importing it and nothing else on first use."""
    return import_module(f"{BACKENDS[name]}.{operator}", __package__)


def without_autocast(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Keep autocast off, which would cast the products of float32 scores to half precision."""
    if tensor.is_meta:
        return _NOTHING
    # the name of a device takes ten times as long to read
    device = "cpu" if tensor.is_cpu else "cuda" if tensor.is_cuda else tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _NOTHING


def plain_signature(*tensors: torch.Tensor | None) -> Signature | None:
    """Return the signature of a call that needs no dispatcher, or None where an operator must go through it.

    The dispatcher takes microseconds of every call. It does nothing for a call of plain tensors, so that what the
    operator runs can be called directly, unless something is to see the operator or to handle it:
    `torch.compile`, `export`, `make_fx` and `jit.trace`, modes, `vmap`, `grad` and the other transforms, forward-mode
    gradients, a profiler, a tensor of another type, or one that is not simply values in memory (fake, meta, sparse,
    negated by a bit). Each of them shows in what is read here.
    """
    if (
        not _CAN_SKIP_DISPATCH
        or torch.compiler.is_compiling()
        or _len_torch_function_stack()
        or _dispatch_tls_local_include_set().raw_repr() not in _PLAIN_THREADS
        or _profiler_enabled()
        or forward_ad._current_level >= 0
    ):
        return None
    signature: list[Hashable] = []
    for tensor in tensors:
        if tensor is None:
            signature.append(None)
        elif type(tensor) in _PLAIN_TYPES and _dispatch_keys(tensor).raw_repr() in _PLAIN_TENSORS:
            signature.append((tensor.shape, tensor.stride(), tensor.dtype, tensor.device))
        else:
            return None
    return tuple(signature)


class PreparedCalls:
    """What is left to do in calls of a public function, by all that a call depends on except its tensors' contents.

    A call of plain tensors is checked and prepared once; the next one with the same signature and options only needs
    to be made. What is prepared holds no tensor of a call. Any number of threads may ask and add. When the limit is
    reached, everything is forgotten, and the next calls are prepared once more.
    """

    def __init__(self, limit: int = _MOST_PREPARED_CALLS) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._calls: dict[Hashable, Callable[..., Any]] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def call(
        self,
        signature: Signature | None,
        arguments: tuple[Any, ...],
        options: tuple[Any, ...],
        prepare: Callable[..., Callable[..., Any]],
    ) -> Any:
        """Call what is prepared for these arguments and options, and prepare it if nothing is.

        Args:
            signature: `plain_signature` of the arguments, and what else of them a call depends on.
            arguments: what the prepared call is called with, a tensor first.
            options: the rest of what a call depends on, the name of the backend or None last.
            prepare: checks `(is_plain, *arguments, *options)` and returns the call. Where the signature is None, and
                `is_plain` False, it goes through the dispatcher and is not kept.
        """
        key = None
        if signature is not None:
            backend = options[-1]
            # asking the environment takes a microsecond, which only a call that asks for Triton on a CPU needs to spend
            may_interpret = backend is not None and (type(backend) is not str or backend != "torch")
            is_triton = may_interpret and (arguments[0].is_cuda or _is_interpreting())
            key = signature, options, tuple(map(type, options)), is_triton
        call = self.get(key)
        if call is None:
            call = prepare(key is not None, *arguments, *options)
            if key is not None:
                self.add(key, call)
        return call(*arguments)

    @staticmethod
    def key(signature: Signature | None, tensor: object, *options: object) -> Hashable:
        """Return the key of a call with these options, one of whose tensors is given; None for no signature.

        Options count with their types, because True equals 1, which equals 1.0. Where the tensors are not on a GPU, it
        counts too whether Triton's interpreter may be asked for.
        """
        if signature is None:
            return None
        return signature, options, tuple(map(type, options)), getattr(tensor, "is_cuda", False) or _is_interpreting()

    def get(self, key: Hashable) -> Callable[..., Any] | None:
        """Return the call that was prepared for this key, if there is one."""
        try:
            return self._calls.get(key)
        except TypeError:
            # An option that cannot be hashed is one that the checks refuse.
            return None

    def add(self, key: Hashable, call: Callable[..., Any]) -> None:
        """Keep a call."""
        with self._lock:
            if len(self._calls) >= self._limit:
                self._calls = {}
            self._calls[key] = call


def without_grad(tensor: torch.Tensor, signature: Signature | None) -> torch.Tensor:
    """Return the tensor without grad; only one of a plain signature can say that it has none."""
    return tensor if signature is not None and not tensor.requires_grad else tensor.detach()
