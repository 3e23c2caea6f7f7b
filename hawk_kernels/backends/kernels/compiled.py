"""Kernels that Triton has compiled, kept so that they can be launched again without asking Triton which one it is.

`kernel[grid](...)` specialises every argument, writes the options into a string and looks the kernel up before it
launches anything, which takes longer than the launch. Here a compiled kernel is kept by what Triton's own key holds,
and is launched by Triton's launcher with the arguments that Triton would pass. This is done only where Triton would
launch the same compiled kernel:

- The key of a kept kernel says all that Triton distinguishes: the type of each argument; of those that are specialised
  also the alignment of a pointer, and whether an integer is 1 or a multiple of 16; constants and options; the device.
  A kernel enters the store only when Triton itself has just chosen it for such a key.
- The stream and the current device are asked of Triton's driver at every launch.
- Whoever watches launches sees them: with a hook set, in debug mode, or with another function in place of
  `JITFunction.run`, every launch takes Triton's ordinary way.
- The Triton releases are those whose launcher has been read. With any other, on AMD and in the interpreter every
  launch takes the ordinary way.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_KNOWN_RELEASES = ("3.6.", "3.7.", "3.8.")
_IS_KNOWN = triton.__version__.startswith(_KNOWN_RELEASES) and torch.version.hip is None
_ORDINARY_RUN = JITFunction.run
# Triton takes a pointer or an integer for aligned if it is a multiple of this.
_ALIGNMENT = 16
_INT32_MIN, _INT32_MAX = -(2**31), 2**31 - 1
# Few variants of a kernel are compiled for one model. There are this many only if something is wrong with the key.
_MOST_VARIANTS = 1024

Key = tuple[Any, ...]


class Compiled(NamedTuple):
    """A compiled kernel, with what Triton would look up to launch it.

    Attributes:
        kernel: the jitted function that it was compiled from.
        owner: Triton's object of it, which must live as long as the kernel may be launched.
        run: Triton's launcher of its signature.
        function: the driver's handle.
        metadata: warps, blocks in a cluster and shared memory, as the launcher takes them.
        driver: Triton's driver at that time.
        device: the driver's number of the device that it is loaded on.
    """

    kernel: Any
    owner: Any
    run: Any
    function: Any
    metadata: Any
    driver: Any
    device: Any

    def launch(self, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        """Launch it on the current stream; tensors among the arguments may be given as pointers."""
        stream = self.driver.get_current_stream(self.device)
        columns = grid[1] if len(grid) > 1 else 1
        self.run(grid[0], columns, 1, stream, self.function, self.metadata, None, None, None, *arguments)

    def is_current(self, kernel: Any) -> bool:
        """Say whether Triton would choose this kernel now for arguments of the same key."""
        return (
            self.kernel is kernel
            and can_launch_directly(kernel)
            and driver.active is self.driver
            and self.driver.get_current_device() == self.device
        )


def can_launch_directly(kernel: Any) -> bool:
    """Say whether a launch of this kernel may bypass Triton's ordinary way."""
    if not _IS_KNOWN or type(kernel) is not JITFunction or JITFunction.run is not _ORDINARY_RUN:
        return False
    runtime = triton.knobs.runtime
    return not (
        runtime.debug
        or kernel.debug
        or kernel.pre_run_hooks
        or runtime.add_stages_inspection_hook is not None
        or triton.knobs.compilation.instrumentation_mode
        or _calls_something(runtime.launch_enter_hook)
        or _calls_something(runtime.launch_exit_hook)
    )


def _calls_something(hook: Any) -> bool:
    """Say whether a hook does anything: None does not, nor does a chain of hooks that is empty."""
    return hook is not None and bool(getattr(hook, "calls", True))


class _Variants:
    """The compiled kernels of one jitted function, by key."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.is_specialized = tuple(not parameter.do_not_specialize for parameter in kernel.params)
        self._lock = threading.Lock()
        self._compiled: dict[Key, Compiled] = {}

    def key(self, arguments: tuple[Any, ...], constants: dict[str, Any], options: dict[str, Any]) -> Key:
        """Return what Triton distinguishes in a launch on the current device."""
        active = driver.active
        # the parameters after the arguments are the constants
        kinds = map(_kind, arguments, self.is_specialized)
        return active.get_current_device(), *kinds, *constants.items(), *options.items()

    def get(self, key: Key) -> Compiled | None:
        return self._compiled.get(key)

    def add(self, key: Key, owner: Any) -> Compiled:
        compiled = Compiled(self.kernel, owner, owner.run, owner.function, owner.packed_metadata, driver.active, key[0])
        with self._lock:
            if len(self._compiled) >= _MOST_VARIANTS:
                self._compiled = {}
            self._compiled[key] = compiled
        return compiled


def _kind(argument: Any, is_specialized: bool) -> Any:
    """Return what Triton distinguishes in an argument; a tuple's members are always specialised."""
    if type(argument) is int:
        is_short = _INT32_MIN <= argument <= _INT32_MAX
        return (is_short, argument == 1, argument % _ALIGNMENT == 0) if is_specialized else is_short
    if isinstance(argument, torch.Tensor):
        return (argument.dtype, argument.data_ptr() % _ALIGNMENT == 0) if is_specialized else argument.dtype
    if isinstance(argument, tuple):
        return tuple(_kind(member, True) for member in argument)
    return type(argument)


def any_misaligned(pointers: list[int]) -> bool:
    """Say whether one of these pointers is not aligned as Triton wants them."""
    bits = 0
    for pointer in pointers:
        bits |= pointer
    return bits % _ALIGNMENT != 0


_lock = threading.Lock()
# The function stands beside its number, so that the number cannot become another function's.
_variants: dict[int, _Variants] = {}


def variants_of(kernel: Any) -> _Variants:
    """Return what is kept of a jitted function."""
    kept = _variants.get(id(kernel))
    if kept is None:
        with _lock:
            kept = _variants.setdefault(id(kernel), _Variants(kernel))
    return kept
