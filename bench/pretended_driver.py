"""A driver for Triton without a GPU: nothing is compiled, and a launch only reaches a function that is given.

Everything that Triton does on the host before a launch runs as it would for the target: specialising arguments, making
keys, looking up kernels, calling hooks. Kernels are objects of Triton's `CompiledKernel` without code, of the variant
that Triton asked its compiler for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

SM_90 = GPUTarget("cuda", 90, 32)


class PretendedDriver:
    """Stands in for Triton's driver of a machine with GPUs.

    Attributes:
        device: the current device.
        streams: the current stream of each device that has another than 0.
        variants: the compiled kernels, in the order in which Triton asked for them.
        on_launch: receives what Triton's launcher would receive: the grid, stream, function and so on.
    """

    def __init__(self, on_launch: Callable[..., None], target: GPUTarget = SM_90) -> None:
        self.device = 0
        self.streams: dict[int, int] = {}
        self.variants: list[CompiledKernel] = []
        self.on_launch = on_launch
        self._target = target
        self.utils = SimpleNamespace(unload_module=lambda module: None)

    def get_current_target(self) -> GPUTarget:
        """Return what kernels are compiled for."""
        return self._target

    def get_current_device(self) -> int:
        """Return the number of the current device."""
        return self.device

    def get_current_stream(self, device: int) -> int:
        """Return the handle of the current stream."""
        return self.streams.get(device, 0)

    def compile(self, source: Any, target: GPUTarget, options: dict[str, Any]) -> CompiledKernel:
        """Return a kernel without code; its function is the number of the variant, counted from 1."""
        compiled = object.__new__(CompiledKernel)
        compiled.src, compiled.name, compiled.hash = source, source.name, ""
        compiled.metadata, compiled.metadata_group = SimpleNamespace(target=target, **options), {}
        self.variants.append(compiled)
        compiled.module, compiled.function = object(), len(self.variants)
        compiled.packed_metadata = (options["num_warps"], 1, 0)
        compiled._run = self.on_launch
        return compiled


@contextmanager
def pretended_driver(
    kernels: list[Any], on_launch: Callable[..., None], target: GPUTarget = SM_90
) -> Iterator[PretendedDriver]:
    """Launch these jitted functions by a pretended driver inside the block, and forget its kernels afterwards."""
    pretended = PretendedDriver(on_launch, target)
    before = driver._active
    driver.set_active(pretended)
    for kernel in kernels:
        kernel.device_caches.clear()
    try:
        with mock.patch.object(triton.compiler, "compile", pretended.compile):
            yield pretended
    finally:
        for kernel in kernels:
            kernel.device_caches.clear()
        for compiled in pretended.variants:
            # there is nothing to unload, which newer releases would ask of the driver of that moment
            compiled.module = None
        driver._active = before
