"""Times side by side: eager calls by the host's clock, CUDA graphs by the device's, caches warm or cold.

An eager sample is one call with the device idle before and after it, seen from the host: all that a caller waits for.
A replay sample is the mean over the calls in a CUDA graph, so the gaps between kernels count and the host does not.
Before each call of a cold sample a buffer four times the size of the last-level cache is read; in a graph that reading
is timed by itself and subtracted. It is read, not written: dirty lines would have to be written back while the clock
runs.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch

from bench.environment import l2_bytes

Sampler = Callable[[], float]
Key = TypeVar("Key", bound=Hashable)

_WARM_UPS = 3
_GRAPH_MICROSECONDS = 1000
# The backend hands out counters to captured launches for good, about a thousand in a process.
_MOST_CALLS_IN_A_GRAPH = 5
_REPLAYS_OF_A_SHORT_GRAPH = 6


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Flush:
    """Reads a buffer that leaves nothing else in the last-level cache."""

    def __init__(self, device: torch.device) -> None:
        # of four bytes each
        self._buffer = torch.ones(l2_bytes(device), dtype=torch.float32, device=device)
        self._sum = torch.empty((), dtype=torch.float32, device=device)

    def __call__(self) -> None:
        torch.sum(self._buffer, dim=0, out=self._sum)


def eager_sampler(run: Callable[[], object], device: torch.device, flush: Flush | None = None) -> Sampler:
    """Make a sampler of the microseconds of one call, from an idle device to an idle device."""

    def sample() -> float:
        if flush is not None:
            flush()
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        return (time.perf_counter() - start) * 1e6

    return sample


class Replay:
    """Microseconds of a call, as the mean over several in a CUDA graph; of the flush alone where there is no call.

    Short calls are replayed in a row, so that starting the first graph is little beside them.

    Raises whatever capturing raises, such as a RuntimeError at a host sync.
    """

    def __init__(self, run: Callable[[], object] | None, calls: int, flush: Flush | None = None) -> None:
        self._replays = 1 if calls == 1 else _REPLAYS_OF_A_SHORT_GRAPH
        self._calls = calls * self._replays
        self._graph = torch.cuda.CUDAGraph()
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph):
            for _ in range(calls):
                if flush is not None:
                    flush()
                if run is not None:
                    run()

    def __call__(self) -> float:
        self._begin.record()
        for _ in range(self._replays):
            self._graph.replay()
        self._end.record()
        self._end.synchronize()
        milliseconds: float = self._begin.elapsed_time(self._end)
        return milliseconds * 1e3 / self._calls


def calls_in_a_graph(eager_microseconds: float) -> int:
    """Return how many calls fit a graph of about a millisecond, at most a few."""
    return max(1, min(_MOST_CALLS_IN_A_GRAPH, int(_GRAPH_MICROSECONDS / eager_microseconds)))


def rotate(samplers: Mapping[Key, Sampler], rounds: int = 50, seconds: float | None = None) -> dict[Key, list[float]]:
    """Samples of each, one of each a round so that all meet the same machine, after rounds that do not count.

    With `seconds`, fewer rounds where they would take longer, but at least 5.
    """
    if not samplers:
        return {}
    for _ in range(_WARM_UPS):
        start = time.perf_counter()
        for sample in samplers.values():
            sample()
        took = time.perf_counter() - start
    if seconds is not None:
        rounds = min(rounds, max(5, int(seconds / took) - _WARM_UPS))
    samples: dict[Key, list[float]] = {key: [] for key in samplers}
    for _ in range(rounds):
        for key, sample in samplers.items():
            samples[key].append(sample())
    return samples


def interleaved(
    contestants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Measure the microseconds of eager calls, one of each contestant in each round."""
    samplers = {name: eager_sampler(run, device) for name, run in contestants.items()}
    return rotate(samplers, rounds)


def spread(samples: list[float]) -> dict[str, float]:
    """Return the median, the 20th and 80th percentile, and the number of samples."""
    low, *_, high = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else samples * 2
    return {"median": statistics.median(samples), "p20": low, "p80": high, "samples": len(samples)}


def copy_bandwidth(device: torch.device) -> float:
    """Measure the bytes per second, read and written, of a copy far larger than the caches."""
    count = 2**30 if device.type == "cuda" else 2**27
    source = torch.rand(count // 4, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    sampler = Replay(copy, 4) if device.type == "cuda" else eager_sampler(copy, device)
    return 2 * count / (statistics.median(rotate({"copy": sampler}, 20)["copy"]) * 1e-6)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that a call holds at once beyond what was there, its outputs included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _no_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        most = max(most, held)
    return most


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Silence stderr, to which the profiler writes past Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
