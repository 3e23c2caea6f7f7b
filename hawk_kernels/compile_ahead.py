"""Compile kernels before the first call that needs them, in several threads and with progress.

Functions of the backend are followed on tensors without data, so that the launches which a model will make are known
without making one; `backends.kernels.caught` catches them. Triton then compiles each distinct one, or finds it in its
cache on disk. Where the device is at hand, the binary is also loaded there: Triton otherwise loads it at the first
launch, which must not happen while another thread captures a CUDA graph in global mode.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hawk_kernels.backends.choose import MAX_TRITON_HEAD_DIM, _is_interpreting, _triton_is_installed, planning_for_a_gpu
from hawk_kernels.ops.library import NAMESPACE, implementations
from hawk_kernels.validation import FLOATS, check_normalize, check_rounding

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

    from hawk_kernels.backends.kernels.caught import Launch

MOST_TOKENS = 262144
MOST_BATCH = 64
# More threads than this wait for each other: Triton's front end is written in Python.
_MOST_THREADS = 8
_listener_lock = threading.Lock()


@dataclass(frozen=True)
class WarmUp:
    """What was compiled ahead.

    Attributes:
        targets: the GPUs, for example `("sm_90",)`; empty where nothing was to be compiled.
        kernels: number of variants of each kernel, by its name.
        compiled: variants that were compiled now.
        cached: variants that Triton's cache on disk had.
        ready: variants that this process had already.
        seconds: how long it took.
        notes: what could not be followed, or why nothing was to be compiled.
    """

    targets: tuple[str, ...] = ()
    kernels: dict[str, int] | None = None
    compiled: int = 0
    cached: int = 0
    ready: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = list(self.notes)
        if self.kernels:
            found = f"{self.compiled} compiled, {self.cached} from Triton's cache, {self.ready} ready before"
            total = sum(self.kernels.values())
            on = " and ".join(self.targets)
            of_kernels = f"{len(self.kernels)} kernel{'s' * (len(self.kernels) > 1)}"
            lines.insert(0, f"{total} variants of {of_kernels} for {on} in {self.seconds:.1f} s: {found}")
        return "\n".join(lines)


def why_nothing_compiles(devices: Iterable[torch.device]) -> str | None:
    """Say why tensors on these devices need no kernel; None where they do."""
    if not _triton_is_installed():
        return "Triton is not installed, so nothing is to be compiled; calls run on PyTorch"
    if _is_interpreting():
        return "TRITON_INTERPRET is set, so nothing is to be compiled; kernels run in Triton's interpreter"
    if not any(device.type == "cuda" for device in devices):
        return "no GPU is in use, so nothing is to be compiled; calls run on PyTorch"
    return None


class _RunOnMeta(TorchDispatchMode):
    """Run operators of this package on meta tensors as their backend does, so that their launches can be caught."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE and args[0].is_meta and args[place_of_backend(func)] == "triton":
            return implementations[func._opname](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def place_of_backend(operator: Any) -> int:
    """Find the place of the argument that tells an operator of this package which backend was chosen for it."""
    return [argument.name for argument in operator._schema.arguments].index("backend")


@contextmanager
def following(architecture: str, multiprocessors: int | None = None) -> Iterator[list[Launch]]:
    """Catch the launches of calls on meta tensors in the block, as on a GPU of this architecture; see `caught`."""
    from hawk_kernels.backends.kernels.caught import catch_launches

    mode: Any = _RunOnMeta
    with catch_launches(architecture, multiprocessors) as caught, planning_for_a_gpu(), mode(), torch.no_grad():
        yield caught


def lengths_up_to(most: int) -> list[int]:
    """Return the powers of two and the numbers that follow them, up to `most`, ascending.

    What a launch is compiled for changes with the length of a row only between classes that hold several of these.
    """
    powers = [2**power for power in range(most.bit_length())]
    return sorted({length for power in powers for length in (power, power + 1) if length <= most} | {most})


def compile_launches(
    launches: Sequence[Launch], devices: Sequence[torch.device], *, progress: bool = True, jobs: int | None = None
) -> WarmUp:
    """Compile distinct launches for devices that are at hand, and load the binaries there."""
    from triton.runtime.driver import driver

    from hawk_kernels.backends.kernels.caught import distinct
    from hawk_kernels.backends.kernels.configs import architecture_of

    with torch.cuda.device(devices[0]):
        found = distinct(launches, driver.active.get_current_target())
    work = [(launch, device) for device in devices for launch in found.values()]
    return _compiled(
        [partial(_compile_on, device, launch) for launch, device in work],
        [name for name, _ in found] * len(devices),
        tuple(dict.fromkeys(map(architecture_of, devices))),
        progress,
        jobs,
    )


def compile_launches_for(
    launches: Sequence[Launch], target: GPUTarget, *, progress: bool = True, jobs: int | None = None
) -> WarmUp:
    """Compile distinct launches for a GPU that need not be at hand, into Triton's cache on disk.

    Triton keeps one driver for the whole process, so nothing else may launch kernels meanwhile.
    """
    from hawk_kernels.backends.kernels.caught import distinct

    found = distinct(launches, target)
    with _pretending(target):
        return _compiled(
            [partial(_compile, launch) for launch in found.values()],
            [name for name, _ in found],
            (architecture_name(target),),
            progress,
            jobs,
        )


def architecture_name(target: GPUTarget) -> str:
    """Return the architecture of a target, as tables are named."""
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def warm_up_score_and_select(
    num_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    q_mask: bool = False,
    k_mask: bool = False,
    normalize: str | None = None,
    rounding: str = "floor",
    transposed: bool = False,
    device: torch.device | str | int | None = None,
    max_tokens: int = MOST_TOKENS,
    max_batch: int = MOST_BATCH,
    progress: bool = True,
) -> WarmUp:
    """Compile ahead all that `score_and_select` needs for one shape of heads, and load it on the device.

    Afterwards no call with these arguments compiles, whatever the numbers of rows, queries, keys and kept tokens, as
    long as the first element of each tensor lies at a multiple of 16 bytes. Masks may lie anywhere.

    Args:
        num_heads: query heads `H`.
        num_key_value_heads: key heads `Hkv`, a divisor of `H`.
        head_dim: `D`.
        dtype: float32, float16 or bfloat16.
        q_mask, k_mask: whether calls have the mask.
        normalize, rounding: as in `score_and_select`.
        transposed: whether queries and keys are `[B, N, H, D]` in memory, as a projection leaves them, and not
            `[B, H, N, D]`.
        device: a GPU; None means the current one.
        max_tokens: the most keys in a row.
        max_batch: the most rows.
        progress: whether a bar shows how far it is.

    Returns:
        What was compiled. Without a GPU and in Triton's interpreter that is nothing, and the notes say so.

    Raises:
        TypeError: a dtype without a kernel.
        ValueError: a number or a name out of range.
    """
    check_normalize(normalize)
    check_rounding(rounding)
    check_reach(max_tokens, max_batch)
    for name, count in (
        ("num_heads", num_heads),
        ("num_key_value_heads", num_key_value_heads),
        ("head_dim", head_dim),
    ):
        _check_count(name, count, "see the model's config")
    if num_heads % num_key_value_heads:
        raise ValueError(
            f"num_key_value_heads: expected a divisor of the {num_heads} query heads, got {num_key_value_heads}; see "
            "the model's config"
        )
    if dtype not in FLOATS:
        raise TypeError(f"dtype: expected float32, float16 or bfloat16, got {dtype}; use torch.bfloat16")
    device = _current_device() if device is None else torch.device(device)
    reason = why_nothing_compiles([device])
    if reason is None and head_dim > MAX_TRITON_HEAD_DIM:
        reason = f"heads of more than {MAX_TRITON_HEAD_DIM} components have no kernel; calls run on PyTorch"
    if reason is not None:
        return WarmUp(notes=(reason,))
    device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
    launches = launches_of_score_and_select(
        *architecture_and_size(device),
        num_heads,
        num_key_value_heads,
        head_dim,
        dtype,
        masks=(q_mask, k_mask),
        normalize=normalize,
        rounding=rounding,
        transposed=transposed,
        reach=(max_tokens, max_batch),
    )
    return compile_launches(launches, [device], progress=progress)


def launches_of_score_and_select(
    architecture: str,
    multiprocessors: int | None,
    num_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    masks: tuple[bool, bool],
    normalize: str | None,
    rounding: str,
    transposed: bool,
    reach: tuple[int, int],
) -> list[Launch]:
    """Return what calls of `score_and_select` launch, with rows and keys up to `reach`."""
    from hawk_kernels.ops.score_and_select import score_and_select

    def heads(batch: int, count: int, length: int) -> torch.Tensor:
        shape = (batch, length, count, head_dim) if transposed else (batch, count, length, head_dim)
        empty = torch.empty(shape, dtype=dtype, device="meta")
        return empty.transpose(1, 2) if transposed else empty

    w = torch.empty(num_heads, device="meta")
    most_tokens, most_batch = reach
    with following(architecture, multiprocessors) as launches:
        for batch in lengths_up_to(most_batch):
            for num_keys in lengths_up_to(most_tokens):
                for num_queries in (1, 64):
                    given = (
                        torch.empty((batch, length), dtype=torch.bool, device="meta") if is_given else None
                        for is_given, length in zip(masks, (num_queries, num_keys), strict=True)
                    )
                    q = heads(batch, num_heads, num_queries)
                    k = heads(batch, num_key_value_heads, num_keys)
                    q_mask, k_mask = given
                    score_and_select(q, k, w, 0.5, q_mask=q_mask, k_mask=k_mask, normalize=normalize, rounding=rounding)
    return launches


def check_reach(max_tokens: object, max_batch: object) -> None:
    """Check the bounds of what is compiled ahead.

    Raises:
        TypeError, ValueError: not an int of at least 1.
    """
    _check_count("max_tokens", max_tokens, f"the default is {MOST_TOKENS}")
    _check_count("max_batch", max_batch, f"the default is {MOST_BATCH}")


def architecture_and_size(device: torch.device) -> tuple[str, int]:
    """Return the architecture of a GPU, as tables are named, and its multiprocessors."""
    from hawk_kernels.backends.kernels.configs import architecture_of

    return architecture_of(device), torch.cuda.get_device_properties(device).multi_processor_count


def _check_count(name: str, value: object, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int >= 1, got {type(value).__name__}; {remedy}")
    if value < 1:
        raise ValueError(f"{name}: expected an int >= 1, got {value}; {remedy}")


def _current_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _compiled(
    tasks: list[Callable[[], str]], names: list[str], targets: tuple[str, ...], progress: bool, jobs: int | None
) -> WarmUp:
    """Run the tasks in several threads; each says how it came by its kernel."""
    from tqdm import tqdm

    start = time.perf_counter()
    threads = jobs or min(_MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="hawk_kernels warm-up") as pool, _telling_of_hits():
        running = [pool.submit(task) for task in tasks]
        try:
            bar = tqdm(running, desc="compile", unit="kernel", disable=not progress)
            how = [future.result() for future in bar]
        except BaseException:  # after Ctrl-C too, nothing that has not begun is waited for
            pool.shutdown(cancel_futures=True)
            raise
    counts = {name: names.count(name) for name in sorted(set(names))}
    seconds = time.perf_counter() - start
    return WarmUp(targets, counts, how.count("compiled"), how.count("cached"), how.count("ready"), seconds)


_found = threading.local()


@contextmanager
def _telling_of_hits() -> Iterator[None]:
    """Let Triton tell each thread whether its cache on disk had a kernel."""
    from triton import knobs

    def listen(**facts: Any) -> None:
        _found.hit = facts["cache_hit"]
        if before is not None:
            before(**facts)

    with _listener_lock:
        before = knobs.compilation.listener
        knobs.compilation.listener = listen
        try:
            yield
        finally:
            knobs.compilation.listener = before


def _compile(launch: Launch) -> str:
    """Let Triton compile a launch for the current target, and say where the kernel came from."""
    _found.hit = None
    launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.options)
    return "ready" if _found.hit is None else "cached" if _found.hit else "compiled"


def _compile_on(device: torch.device, launch: Launch) -> str:
    """Do what `_compile` does on a device, and load the binary there."""
    from hawk_kernels.backends.kernels.launch import tolerate_captures

    tolerate_captures()
    with torch.cuda.device(device):
        how = _compile(launch)
        compiled: Any = launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.options)
        if compiled is not None:
            compiled._init_handles()
    return how


class _PretendedDriver:
    """Stands for a GPU that is not at hand; kernels for it are kept apart from those of any device."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return f"hawk_kernels warm-up for {architecture_name(self._target)}"

    def get_current_stream(self, device: object) -> int:
        return 0


@contextmanager
def _pretending(target: GPUTarget) -> Iterator[None]:
    """Let Triton believe that the target is at hand."""
    from triton.runtime.driver import driver

    before = driver._active
    driver.set_active(_PretendedDriver(target))
    try:
        yield
    finally:
        driver._active = before
