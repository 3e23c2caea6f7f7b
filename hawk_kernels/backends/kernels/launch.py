"""What a launch needs besides its kernel: the current device, counters that are zero, and memory to work in.

*Streams and threads.* Launches of one stream follow each other on the device, so they share counters and workspace,
even when several threads make them; two streams never share. What is kept belongs to its stream, and the allocator
hands memory that a stream gives up to later work of the same stream. So a kept tensor that a larger one replaces may
still be in use by the launch before, and needs no `record_stream`.

*Graphs.* A captured launch may be replayed on any stream at any time, so it gets counters that no other launch has,
and workspace from the memory of its graph.

*Aborted launches.* A kernel returns its counters to zero as its last act. A launch that fails on the host (out of
memory for an output, an interrupt, a compilation that fails) has not run, so they are as the launch before left them.
A launch that fails on the device takes the CUDA context with it, and every tensor in it. A capture that is abandoned
leaves its counters unused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeVar

import torch

from hawk_kernels.backends.kernels.phases import COUNTERS_PER_ROW

_Made = TypeVar("_Made")

# A mebibyte: enough for the counters of eight thousand captured launches of one row.
_CAPTURED_COUNTERS = 2**18
# Captured launches start at multiples of so many counters: for pointers that are less aligned Triton would compile the
# kernel anew, which it cannot do while a graph is captured.
_COUNTERS_ALIGNMENT = 32
_FEWEST_COUNTERS = 1024
_FEWEST_WORDS = 2**16
# Above this, allocating costs little compared with the work, and memory that is kept would be missed elsewhere.
_LARGEST_KEPT_WORDS = 8 * 2**20


# The limit of a grid's first dimension, and of int32.
_MOST_PROGRAMS = 2**31 - 1
# A kernel finds the counters of a row by an int32 offset.
_MOST_ROWS = (_MOST_PROGRAMS - 1) // COUNTERS_PER_ROW.value
# A program of the selection takes a power of two of columns, and one number of each block of them.
_MOST_COLUMNS = 2**30


class _Workspace(NamedTuple):
    num_floats: int
    num_words: int
    floats: torch.Tensor
    words: torch.Tensor


_lock = threading.Lock()
_eager_counters: dict[tuple[int, int], torch.Tensor] = {}
_eager_workspaces: dict[tuple[int, int], _Workspace] = {}
_captured_slabs: dict[int, tuple[torch.Tensor, int]] = {}
_HERE = nullcontext()


def compiler_options(num_warps: int, max_registers: int) -> dict[str, object]:
    """Return what Triton's compiler is told; 0 registers leave their number to it.

    A limit on registers, even one that limits nothing, keeps ptxas from spilling some of them to fit one more program
    on a multiprocessor; in other kernels it makes it spill. AMD's compiler has no such option.
    """
    options: dict[str, object] = {"num_warps": num_warps, "enable_fp_fusion": True}
    return {**options, "maxnreg": max_registers} if max_registers and not torch.version.hip else options


def check_limits(num_programs: int, num_columns: int, num_offsets: int, num_rows: int) -> None:
    """Raise ValueError for what a launch cannot number: programs in a grid, the rest in int32."""
    for what, count, limit, remedy in (
        ("tokens in a row", num_columns, _MOST_COLUMNS, "prune in several parts"),
        ("programs", num_programs, _MOST_PROGRAMS, "split the batch"),
        ("numbers of queries in the workspace", num_offsets, _MOST_PROGRAMS, "split the batch"),
        ("rows", num_rows, _MOST_ROWS, "split the batch"),
    ):
        if count > limit:
            raise ValueError(f"backend='triton': expected at most {limit} {what} in a launch, got {count}; {remedy}")


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make the tensors' device the current one, on which Triton launches."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


def launch_counters(count: int, device: torch.device) -> torch.Tensor:
    """Return int32 zeros `[>= count]`, which the launch leaves at zero; `device` is the current one."""
    if device.type != "cuda":
        return _zeros(count, device)
    if torch.cuda.is_current_stream_capturing():
        return _captured_counters(count, device)
    key = (device.index, _current_stream(device))
    counters = _eager_counters.get(key)
    if counters is None or counters.numel() < count:
        counters = _outside_pools(lambda: _zeros(max(count, _FEWEST_COUNTERS), device), device)
        _eager_counters[key] = counters
        if device.index not in _captured_slabs:
            slab = _outside_pools(lambda: _zeros(_CAPTURED_COUNTERS, device), device)
            # A capture that takes from it, on whatever stream, must find it zeroed.
            torch.cuda.current_stream(device).synchronize()
            with _lock:
                _captured_slabs.setdefault(device.index, (slab, 0))
    return counters


def workspace(num_floats: int, num_words: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return uninitialised float32 `[>= num_floats]` and int32 `[>= num_words]`, the launch's own until it ends."""
    is_kept = device.type == "cuda" and num_floats + num_words <= _LARGEST_KEPT_WORDS
    if not is_kept or torch.cuda.is_current_stream_capturing():
        fresh = _new_workspace(num_floats, num_words, device)
        return fresh.floats, fresh.words
    key = (device.index, _current_stream(device))
    kept = _eager_workspaces.get(key)
    if kept is None or kept.num_floats < num_floats or kept.num_words < num_words:
        floats = max(num_floats, kept.num_floats if kept else _FEWEST_WORDS)
        words = max(num_words, kept.num_words if kept else _FEWEST_WORDS)
        kept = _outside_pools(lambda: _new_workspace(floats, words, device), device)
        _eager_workspaces[key] = kept
    return kept.floats, kept.words


def _new_workspace(num_floats: int, num_words: int, device: torch.device) -> _Workspace:
    start = -(-num_floats // 32) * 32
    both = torch.empty((max(1, start + num_words),), dtype=torch.int32, device=device)
    return _Workspace(num_floats, num_words, both.view(torch.float32), both[start:] if num_words else both)


def _zeros(count: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


def _captured_counters(count: int, device: torch.device) -> torch.Tensor:
    """Return a slice that is handed out once; where none is left, fresh zeros at the price of a memset in the graph."""
    count = -(-count // _COUNTERS_ALIGNMENT) * _COUNTERS_ALIGNMENT
    with _lock:
        slab, used = _captured_slabs.get(device.index, (None, 0))
        if slab is None or used + count > slab.numel():
            return _zeros(count, device)
        _captured_slabs[device.index] = (slab, used + count)
        return slab[used : used + count]


def _current_stream(device: torch.device) -> int:
    """Return the handle of the current stream of the current device, without an object around it where torch allows."""
    read = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return torch.cuda.current_stream(device).cuda_stream if read is None else read(device.index)


def _outside_pools(allocate: Callable[[], _Made], device: torch.device) -> _Made:
    """Return what `allocate` returns, from the device's common memory and on the current stream.

    A caller may be allocating from a pool of its own, as a CUDA graph's warm-up does, which will hand out again what it
    does not know to be in use. Such a pool is bound to the thread, so this allocates in another.
    """
    stream = torch.cuda.current_stream(device)
    made: list[_Made] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with torch.cuda.stream(stream):
                made.append(allocate())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="hawk_kernels workspace")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]
