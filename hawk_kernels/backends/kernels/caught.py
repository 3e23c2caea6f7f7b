"""Catch launches on their way to Triton, and name them as Triton's cache of compiled kernels does.

Backend functions that are called on meta tensors launch for shapes alone: no memory is read and no kernel runs. What
Triton would compile for these launches can be counted, or compiled ahead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from hawk_kernels.backends.kernels import configs, score_and_select, score_hidden

# Triton asks whether an address is a multiple of 16, and on AMD whether a tensor is larger than 2 GiB.
_ALIGNMENT = 16
_lock = threading.RLock()


class Pointer:
    """Stands for a tensor among the arguments of a launch; it has everything that Triton specialises a kernel for.

    Args:
        tensor: any tensor; the address of a meta tensor is its offset in its storage.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self._address = tensor.data_ptr() % _ALIGNMENT
        self._bytes = tensor.untyped_storage().nbytes()

    def data_ptr(self) -> int:
        """Return a multiple of 16 where the tensor's address is one."""
        return self._address

    def ptr_range(self) -> int:
        """Return the bytes of the tensor's storage."""
        return self._bytes


class Launch(NamedTuple):
    """A launch that was caught.

    Attributes:
        kernel: what was to be launched.
        arguments: with pointers in place of tensors.
        options: keyword arguments, those of the compiler among them.
    """

    kernel: JITFunction[Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@contextmanager
def catch_launches(architecture: str, multiprocessors: int | None = None) -> Iterator[list[Launch]]:
    """Catch the launches that this thread makes on meta tensors in the block, instead of running them.

    Launches of other threads run as usual. Launch configurations are those of the architecture. Blocks of two threads
    exclude each other, since plans for meta tensors are kept by shape.

    Args:
        architecture: as tables are named, for example "sm_90".
        multiprocessors: how many the GPU has; None takes the number of the GPU that the table was made for.

    Returns:
        A list that grows with each launch.
    """
    caught: list[Launch] = []
    owner = threading.get_ident()
    with _lock:
        run = JITFunction.run

        def catch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            if threading.get_ident() != owner or warmup:
                return run(kernel, *args, grid=grid, warmup=warmup, **options)
            caught.append(Launch(kernel, tuple(map(_without_tensors, args)), options))
            return None

        _forget_plans()
        JITFunction.run = catch
        try:
            with configs.planning_for(architecture, multiprocessors):
                yield caught
        finally:
            JITFunction.run = run
            _forget_plans()


def distinct(launches: Iterable[Launch], target: GPUTarget) -> dict[tuple[str, str], Launch]:
    """Return one launch of each kernel that Triton would compile for a target, by the kernel's name and Triton's key.

    The key is made as Triton makes it: what it specialises the arguments for, the constants, the compiler's options.
    """
    binders: dict[Any, Callable[..., Any]] = {}
    backend = make_backend(target)
    found: dict[tuple[str, str], Launch] = {}
    for launch in launches:
        kernel = launch.kernel
        if kernel not in binders:
            binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, options = binders[kernel](*launch.arguments, **launch.options)
        found.setdefault((kernel.fn.__name__, str(specialization) + str(options)), launch)
    return found


def _without_tensors(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return Pointer(argument)
    if isinstance(argument, tuple):
        fields = map(_without_tensors, argument)
        return type(argument)(*fields) if hasattr(argument, "_fields") else tuple(fields)
    return argument


def _forget_plans() -> None:
    for planned in (configs.hidden_config, configs.score_config, score_and_select._plan, score_hidden._plan):
        planned.cache_clear()
