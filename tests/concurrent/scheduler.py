"""Runs the programs of a launch interleaved, in Triton's interpreter: a thread for each, of which one runs at a time.

Before every load, store and atomic a scheduler chooses which program goes on. Only some programs are started and
unfinished at a time, as on a device, and they start in an order that they cannot know. A program that reads a cell by
the same atomic twice in a row and finds the same value waits until the cell changes; if all programs wait and no store
is left in a buffer, that is a deadlock.
"""

from __future__ import annotations

import inspect
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, TensorHandle

from tests.concurrent.weak_memory import Memory, Races, Region, Site

_ACQUIRES = (ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
_RELEASES = (ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
_PAST_L1 = (ir.CACHE_MODIFIER.CG, ir.CACHE_MODIFIER.CV)
# Many times what the largest launch needs.
_MOST_STEPS = 20_000
_NO_KERNELS = (os.path.dirname(triton.__file__), os.path.dirname(__file__), threading.__file__)


class DeadlockError(Exception):
    """Every program that has started waits, and no other may start."""


class _AbandonedError(BaseException):
    """Ends the thread of a program whose launch has failed."""


class _Program(threading.Thread):
    def __init__(self, schedule: Schedule, number: int, place: tuple[int, ...], body: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.schedule, self.number, self.place, self.body = schedule, number, place, body
        self.may_go = threading.Semaphore(0)
        self.is_finished = self.waits = False
        self.polled: tuple[Region, int, int, Site] | None = None
        self.site: Site = ()

    def run(self) -> None:
        self.may_go.acquire()
        try:
            with np.errstate(all="ignore"):
                self.body()
        except _AbandonedError:
            pass
        except BaseException as error:
            self.schedule.failure = error
        self.is_finished = True
        self.schedule.has_stopped.release()

    def can_go(self) -> bool:
        if self.waits and self.polled is not None:
            region, cell, value, _ = self.polled
            self.waits = region.memory[cell] == value
        return not self.waits


class Schedule:
    """How one launch runs, all of it by the seed."""

    def __init__(self, seed: int, races: Races, scratch: tuple[torch.Tensor, ...]) -> None:
        self.rng = random.Random(seed)
        self.races, self.scratch = races, scratch
        self.num_resident = self.rng.choice((1, 2, 3, 6, 16, 10**9))
        self.order = self.rng.choice(("forward", "reverse", "random", "random"))
        self.policy = self.rng.choice(("uniform", "uniform", "stay", "priority"))
        self.drains = self.rng.choice((0.0, 0.02, 0.3))
        self.has_stopped = threading.Semaphore(0)
        self.failure: BaseException | None = None
        self.current: _Program
        self.is_over = False

    def launch(self, grid: tuple[int, ...], tensors: dict[str, torch.Tensor], body: Callable[[], None]) -> None:
        """Run `body` once for each program."""
        places = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
        regions = _regions(tensors, len(places), self.scratch)
        self.memory = Memory(regions, len(places), self.rng, self.races)
        if self.order == "random":
            self.rng.shuffle(places)
        programs = [_Program(self, number, place, body) for number, place in enumerate(places)]
        not_started = programs if self.order == "reverse" else programs[::-1]
        running: list[_Program] = []
        try:
            self._run(not_started, running)
        finally:
            self.is_over = True
            for program in running:
                program.may_go.release()
                program.join()
        self.memory.drain_all()

    def _run(self, not_started: list[_Program], running: list[_Program]) -> None:
        priorities = {program.number: self.rng.random() for program in not_started}
        chosen: _Program | None = None
        for _ in range(_MOST_STEPS):
            while not_started and len(running) < self.num_resident:
                running.append(not_started.pop())
                running[-1].start()
            if not running:
                return
            ready = [program for program in running if program.can_go()]
            if not ready or self.rng.random() < self.drains:
                if not self.memory.drain_some() and not ready:
                    raise DeadlockError(f"programs wait at {sorted({program.site for program in running})}")
                continue
            if self.policy == "priority":
                chosen = max(ready, key=lambda program: priorities[program.number])
                if self.rng.random() < 0.02:
                    priorities[chosen.number] = self.rng.random() - 1
            elif self.policy == "uniform" or chosen not in ready or self.rng.random() < 0.05:
                chosen = self.rng.choice(ready)
            self.current = chosen
            chosen.may_go.release()
            self.has_stopped.acquire()
            if self.failure is not None:
                raise self.failure
            if chosen.is_finished:
                running.remove(chosen)
        raise DeadlockError(f"the launch has not ended after {_MOST_STEPS} steps")

    def switch(self) -> _Program:
        """Let the scheduler choose who goes on; a program calls this before it touches memory."""
        program = self.current
        program.site = _site()
        self.has_stopped.release()
        program.may_go.acquire()
        if self.is_over:
            raise _AbandonedError
        return program


class _Broadcast(TensorHandle):
    """A scalar atomic's result: before the program uses it, its threads meet at a barrier."""

    meet: Callable[[], None] | None = None

    @property
    def data(self) -> np.ndarray:
        meet, self.meet = self.meet, None
        if meet is not None:
            meet()
        return self._values

    @data.setter
    def data(self, values: np.ndarray) -> None:
        self._values = values


class _Builder(InterpreterBuilder):
    """The interpreter's operations on memory, on the memory of the schedule."""

    schedule: Schedule

    def create_get_program_id(self, axis: int) -> TensorHandle:
        return TensorHandle(np.array([self.schedule.current.place[axis]], np.int32), tl.int32)

    def create_barrier(self) -> None:
        self.schedule.memory.barrier(self.schedule.current.number)

    def create_masked_load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile):
        program = self.schedule.switch()
        program.polled = None
        element = ptrs.get_element_ty()
        dtype = interpreter._get_np_dtype(element)
        loaded = np.zeros(ptrs.data.shape, dtype)
        if other is not None:
            loaded[...] = other.data
        chosen = np.broadcast_to(mask.data != 0, ptrs.data.shape)
        in_l1 = cache_modifier not in _PAST_L1 and not is_volatile
        memory = self.schedule.memory
        loaded[chosen] = memory.load(program.number, ptrs.data, chosen, np.dtype(dtype), program.site, in_l1)
        return TensorHandle(loaded, element)

    def create_masked_store(self, ptrs, value, mask, cache_modifier, eviction_policy):
        program = self.schedule.switch()
        program.polled = None
        chosen = np.broadcast_to(mask.data != 0, ptrs.data.shape)
        dtype = interpreter._get_np_dtype(ptrs.get_element_ty())
        values = np.broadcast_to(value.data, ptrs.data.shape)[chosen].astype(dtype)
        self.schedule.memory.store(program.number, ptrs.data, chosen, values, program.site)

    def create_atomic_rmw(self, operation, ptr, val, mask, sem, scope):
        program, memory = self.schedule.switch(), self.schedule.memory
        is_wide = scope != ir.MEM_SYNC_SCOPE.CTA
        result, kept = memory.atomic(
            program.number, ptr.data, mask.data != 0, val.data.itemsize, program.site,
            is_wide and sem in _ACQUIRES, is_wide and sem in _RELEASES,
            lambda: super(_Builder, self).create_atomic_rmw(operation, ptr, val, mask, sem, scope),
        )  # fmt: skip
        polled = None if kept is None else (*kept, int(kept[0].memory[kept[1]]), program.site)
        program.waits = polled is not None and polled == program.polled
        program.polled = polled
        if ptr.data.size > 1:
            return result
        result = _Broadcast(result.data, result.dtype)
        result.meet = lambda: memory.barrier(program.number)
        return result


def _regions(tensors: dict[str, torch.Tensor], num_programs: int, scratch: tuple[torch.Tensor, ...]) -> list[Region]:
    """Return a region for each storage."""
    sharing: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        sharing.setdefault(tensor.untyped_storage().data_ptr(), {})[name] = tensor
    scratch_bases = {tensor.untyped_storage().data_ptr() for tensor in scratch}
    return [
        Region(
            "/".join(named), base, next(iter(named.values())).untyped_storage().nbytes(),
            min(tensor.element_size() for tensor in named.values()), num_programs, base in scratch_bases,
        )
        for base, named in sharing.items() if base
    ]  # fmt: skip


@cache
def _is_kernel(path: str) -> bool:
    return not path.startswith(_NO_KERNELS)


def _site() -> Site:
    """Return where in the kernels the running program is: up to three lines, the innermost first."""
    frame, places = sys._getframe(3), []
    while frame is not None and len(places) < 3:
        path = frame.f_code.co_filename
        if _is_kernel(path):
            places.append((os.path.basename(path), frame.f_lineno))
        frame = frame.f_back
    return tuple(places)


def _tensors(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors among a kernel's arguments, those in named tuples too."""
    found = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif hasattr(value, "_asdict"):
            found |= _tensors({f"{name}.{field}": leaf for field, leaf in value._asdict().items()})
    return found


class _Lasting:
    def restore(self) -> None:
        """Keep the language patched: other programs still run."""


@contextmanager
def language_patched() -> Iterator[None]:
    """Let the interpreter patch `triton.language` once instead of at every call, which takes half of its time."""
    patch = interpreter._patch_lang
    scope = patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: _Lasting()
    try:
        yield
    finally:
        interpreter._patch_lang = patch
        if scope is not None:
            scope.restore()


@contextmanager
def interleaved(schedules: Iterator[Schedule], reached: set[str]) -> Iterator[None]:
    """Run each launch in the body by the next schedule; `reached` collects the jitted functions that ran."""
    builder = interpreter.interpreter_builder
    saved = GridExecutor.__call__, InterpretedFunction.__call__, builder.__class__, builder.options

    def call_kernel(self: GridExecutor, *args: Any, **options: Any) -> None:
        reached.add(f"{self.fn.__globals__['__name__']}.{self.fn.__name__}")
        names = inspect.getfullargspec(self.fn).args
        arguments = inspect.getcallargs(self.fn, *args, **{key: options[key] for key in options if key in names})
        converted = {
            name: value if name in self.constexprs else interpreter._implicit_cvt(value)
            for name, value in arguments.items()
        }
        grid = (*self.grid, 1, 1)[:3]
        builder.set_grid_dim(*grid)
        builder.schedule = next(schedules)
        builder.schedule.launch(grid, _tensors(arguments), lambda: self.fn(**converted))

    def call_function(self: InterpretedFunction, *args: Any, **options: Any) -> Any:
        reached.add(f"{self.fn.__module__}.{self.fn.__name__}")
        return self.rewrite()(*args, **options)

    GridExecutor.__call__, InterpretedFunction.__call__ = call_kernel, call_function
    builder.__class__, builder.options = _Builder, interpreter.InterpreterOptions(sanitize_overflow=False)
    try:
        with language_patched():
            yield
    finally:
        GridExecutor.__call__, InterpretedFunction.__call__, builder.__class__, builder.options = saved
