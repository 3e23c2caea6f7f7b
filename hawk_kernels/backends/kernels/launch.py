"""Launches kernels on the current device and stream, with counters that are zero and memory to work in.

Every launch of this package passes through `launch`, directly or as a `PreparedLaunch`, which keeps what follows from
the signature of a call.

*Streams and threads.* Launches of one stream follow each other on the device, so they share counters and workspace,
even when several threads make them; two streams never share. What is kept belongs to its stream, and the allocator
hands memory that a stream gives up to later work of the same stream. So a kept tensor that a larger one replaces may
still be in use by the launch before, and needs no `record_stream`.

*Streams that PyTorch did not make.* Such a stream is known by its handle alone. Its owner may destroy it while a launch
is still running, and CUDA may give the handle to the next stream; the handle of the per-thread default stream even
means another stream in every thread. So a launch on such a handle first waits, on the device, for the launch before it
that used the same handle, and threads do not share. Where the stream is still the same one, the wait costs nothing.

*Graphs.* A captured launch may be replayed on any stream at any time, so it gets counters that no other launch has,
and workspace from the memory of its graph. Those counters are set to zero when a device is first used, which needs a
synchronisation; another thread that captures a graph in global mode at that moment would forbid it, so it happens in a
thread that has left that mode.

*Aborted launches.* A kernel returns its counters to zero as its last act. A launch that fails on the host (out of
memory for an output, an interrupt, a compilation that fails) has not run, so they are as the launch before left them.
A launch that fails on the device takes the CUDA context with it, and every tensor in it. A capture that is abandoned
leaves its counters unused.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch

from hawk_kernels.backends.kernels.compiled import Compiled, any_misaligned, can_launch_directly, variants_of
from hawk_kernels.backends.kernels.phases import LINE

_Made = TypeVar("_Made")

# A mebibyte: enough for the counters of four thousand captured launches of one row.
_CAPTURED_COUNTERS = 2**18
_FEWEST_COUNTERS = 1024
_FEWEST_WORDS = 2**16
# Above this, allocating costs little compared with the work, and memory that is kept would be missed elsewhere.
_LARGEST_KEPT_WORDS = 8 * 2**20
# cudaStreamCaptureModeRelaxed
_RELAXED_CAPTURE_MODE = 2

# The limit of a grid's first dimension, and of int32.
_MOST_PROGRAMS = 2**31 - 1
# A kernel finds the counters of a row by an int32 offset, after the line of the roll.
_MOST_ROWS = _MOST_PROGRAMS // LINE.value - 1
# A program of the selection takes a power of two of columns, and one number of each block of them.
MOST_COLUMNS = 2**30


class _Workspace(NamedTuple):
    num_floats: int
    num_words: int
    floats: torch.Tensor
    words: torch.Tensor


# Device, stream, and thread if the stream is not PyTorch's own.
_Key = tuple[int, int, int]

_lock = threading.Lock()
_eager_counters: dict[_Key, torch.Tensor] = {}
_eager_workspaces: dict[_Key, _Workspace] = {}
_last_external_launches: dict[_Key, torch.cuda.Event] = {}
_captured_slabs: dict[int, tuple[torch.Tensor, int]] = {}
_HERE = nullcontext()


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any], options: dict[str, Any]
) -> Compiled | None:
    """Launch a kernel on the current device and stream; every launch of this package passes here.

    Args:
        kernel: the jitted function.
        grid: number of programs in one or two dimensions.
        arguments: all that are not constants, in the kernel's order.
        constants: the kernel's constants by name, in its order.
        options: what Triton's compiler is told.

    Returns:
        The compiled kernel, which may be launched again where the arguments are of the same kinds; None if it may not.
    """
    if not can_launch_directly(kernel):
        kernel[grid](*arguments, **constants, **options)
        return None
    variants = variants_of(kernel)
    key = variants.key(arguments, constants, options)
    compiled = variants.get(key)
    if compiled is not None and compiled.is_current(kernel):
        compiled.launch(grid, (*arguments, *constants.values()))
        return compiled
    # Triton finds its own compiled kernel or makes it, launches it and returns it.
    owner = kernel[grid](*arguments, **constants, **options)
    is_in_order = [*constants] == kernel.arg_names[len(arguments) :]
    is_loaded = getattr(owner, "module", None) is not None
    return variants.add(key, owner) if is_in_order and is_loaded else None


class PreparedLaunch:
    """A launch of which everything is known but the addresses of its tensors, so that it can be repeated with others.

    Tensors of another launch must have the same dtypes, and whatever follows from their shapes and strides must be
    the same, because it is among the arguments.
    """

    __slots__ = ("_aligned", "_arrange", "_constants", "_grid", "_num_specialized", "_options", "_values")

    def __init__(
        self,
        grid: tuple[int, ...],
        arrange: Callable[..., tuple[Any, ...]],
        constants: dict[str, Any],
        options: dict[str, Any],
        num_specialized: int,
    ) -> None:
        """Prepare a launch.

        Args:
            grid, constants, options: as in `launch`.
            arrange: returns the kernel's arguments, given the tensors or their pointers.
            num_specialized: how many of the tensors Triton specialises by their alignment; they come first.
        """
        self._grid = grid
        self._arrange = arrange
        self._constants = constants
        self._values = tuple(constants.values())
        self._options = options
        self._num_specialized = num_specialized
        self._aligned: Compiled | None = None

    def __call__(self, kernel: Any, *tensors: torch.Tensor) -> None:
        """Launch the kernel, directly if it has been launched with tensors that are as aligned as these."""
        compiled = self._aligned
        if compiled is None or not compiled.is_current(kernel):
            self._launch(kernel, tensors)
            return
        pointers = [tensor.data_ptr() for tensor in tensors]
        if any_misaligned(pointers[: self._num_specialized]):
            self._launch(kernel, tensors)
        else:
            compiled.launch(self._grid, (*self._arrange(*pointers), *self._values))

    def _launch(self, kernel: Any, tensors: tuple[torch.Tensor, ...]) -> None:
        compiled = launch(kernel, self._grid, self._arrange(*tensors), self._constants, self._options)
        if compiled is not None and not any_misaligned(
            [tensor.data_ptr() for tensor in tensors[: self._num_specialized]]
        ):
            self._aligned = compiled


def compiler_options(num_warps: int, max_registers: int) -> dict[str, object]:
    """Return what Triton's compiler is told; 0 registers leave their number to it.

    A limit on registers, even one that limits nothing, keeps ptxas from spilling some of them to fit one more program
    on a multiprocessor; in other kernels it makes it spill. AMD's compiler has no such option.
    """
    options: dict[str, object] = {"num_warps": num_warps, "enable_fp_fusion": True}
    return {**options, "maxnreg": max_registers} if max_registers and not torch.version.hip else options


def check_limits(num_programs: int, num_columns: int, num_offsets: int, num_rows: int) -> None:
    """Raise ValueError if a launch cannot number its programs in one grid, or anything else in int32."""
    for what, count, limit, remedy in (
        ("tokens in a row", num_columns, MOST_COLUMNS, "prune in several parts"),
        ("programs", num_programs, _MOST_PROGRAMS, "split the batch"),
        ("numbers of queries in the workspace", num_offsets, _MOST_PROGRAMS, "split the batch"),
        ("rows", num_rows, _MOST_ROWS, "split the batch"),
    ):
        if count > limit:
            raise ValueError(f"backend='triton': expected at most {limit} {what} in a launch, got {count}; {remedy}")


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make the tensors' device the current one, on which Triton launches; the launch happens in the block."""
    if device.type != "cuda":
        return _HERE
    if _is_external(_current_stream(device)):
        return _after_the_launch_before(device)
    return _HERE if device.index == torch.cuda.current_device() else torch.cuda.device(device)


@contextmanager
def _after_the_launch_before(device: torch.device) -> Iterator[None]:
    """Let the launch in the block wait for the last launch whose stream had the same handle."""
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            yield
            return
        key, stream = _key(device), torch.cuda.current_stream(device)
        event = _last_external_launches.get(key)
        if event is not None:
            stream.wait_event(event)
        try:
            yield
        finally:
            event = torch.cuda.Event()
            event.record(stream)
            _last_external_launches[key] = event


def free_kept_memory() -> int:
    """Do what `hawk_kernels.free_workspaces` does."""
    with _lock:
        counters, workspaces = list(_eager_counters.values()), list(_eager_workspaces.values())
        launches = list(_last_external_launches.values())
        for kept in (_eager_counters, _eager_workspaces, _last_external_launches):
            kept.clear()
    # Their streams may be gone, and then the allocator knows no order in which to hand the memory out again.
    for launch in launches:
        launch.synchronize()
    tensors = [*counters, *(kept.floats for kept in workspaces)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def launch_counters(count: int, device: torch.device) -> torch.Tensor:
    """Return int32 zeros `[>= count]`, which the launch leaves at zero; `device` is the current one."""
    if device.type != "cuda":
        return _zeros(count, device)
    if torch.cuda.is_current_stream_capturing():
        return _captured_counters(count, device)
    key = _key(device)
    counters = _eager_counters.get(key)
    if counters is None or counters.numel() < count:
        counters = _outside_pools(lambda: _zeros(max(count, _FEWEST_COUNTERS), device), device)
        _eager_counters[key] = counters
        if device.index not in _captured_slabs:
            slab = _outside_pools(lambda: _zeros_at_once(_CAPTURED_COUNTERS, device), device)
            with _lock:
                _captured_slabs.setdefault(device.index, (slab, 0))
    return counters


def workspace(num_floats: int, num_words: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return uninitialised float32 `[>= num_floats]` and int32 `[>= num_words]`, the launch's own until it ends."""
    is_kept = device.type == "cuda" and num_floats + num_words <= _LARGEST_KEPT_WORDS
    if not is_kept or torch.cuda.is_current_stream_capturing():
        fresh = _new_workspace(num_floats, num_words, device)
        return fresh.floats, fresh.words
    key = _key(device)
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


def _zeros_at_once(count: int, device: torch.device) -> torch.Tensor:
    """Return counters that are zero on the device already: a graph takes them to whatever stream it is replayed on."""
    zeros = _zeros(count, device)
    torch.cuda.current_stream(device).synchronize()
    return zeros


def _captured_counters(count: int, device: torch.device) -> torch.Tensor:
    """Return a slice that is handed out once; where none is left, fresh zeros at the price of a memset in the graph.

    It starts on a cache line: for pointers that are less aligned Triton would compile the kernel anew, which it cannot
    do while a graph is captured.
    """
    count = -(-count // LINE.value) * LINE.value
    with _lock:
        slab, used = _captured_slabs.get(device.index, (None, 0))
        if slab is None or used + count > slab.numel():
            return _zeros(count, device)
        _captured_slabs[device.index] = (slab, used + count)
        return slab[used : used + count]


def _key(device: torch.device) -> _Key:
    stream = _current_stream(device)
    return device.index, stream, threading.get_ident() if _is_external(stream) else 0


def _current_stream(device: torch.device) -> int:
    """Return PyTorch's number of the current stream, without an object around it where torch allows."""
    read = getattr(torch._C, "_cuda_getCurrentStream", None)
    return int(torch.cuda.current_stream(device).stream_id if read is None else read(device.index)[0])


def _is_external(stream: int) -> bool:
    """Say whether somebody else made a stream: its number is its handle, which is even; PyTorch's own are 0 or odd."""
    return stream != 0 and stream % 2 == 0


def _outside_pools(allocate: Callable[[], _Made], device: torch.device) -> _Made:
    """Return what `allocate` returns, from the device's common memory and on the current stream.

    A caller may be allocating from a pool of its own, as a CUDA graph's warm-up does, which will hand out again what it
    does not know to be in use. Such a pool is bound to the thread, so this allocates in another.
    """
    stream = torch.cuda.current_stream(device)
    made: list[_Made] = []
    failed: list[BaseException] = []

    def run() -> None:
        tolerate_captures()
        try:
            with torch.cuda.stream(stream):
                made.append(allocate())
        except BaseException as error:  # raised again in the thread that asked
            failed.append(error)

    thread = threading.Thread(target=run, name="hawk_kernels workspace")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]


def tolerate_captures() -> None:
    """Let this thread allocate and synchronise while another thread captures a graph in global mode.

    That mode forbids both to every thread that has not left it, and a violation also spoils the capture.
    """
    library, function = "libcuda.so.1", "cuThreadExchangeStreamCaptureMode"
    if torch.version.hip:
        library, function = "libamdhip64.so", "hipThreadExchangeStreamCaptureMode"
    try:
        exchange = getattr(ctypes.CDLL(library), function)
    except (OSError, AttributeError):
        return
    exchange(ctypes.byref(ctypes.c_int(_RELAXED_CAPTURE_MODE)))
