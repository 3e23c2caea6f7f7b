"""Runs launches by many random schedules, and compares each with one program after the other."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator

import torch

from tests.concurrent.launches import Device, Kernels, Launch, make_launches
from tests.concurrent.scheduler import Schedule, interleaved, language_patched
from tests.concurrent.weak_memory import Races


class ExpectedOutputs:
    """What launches return by Triton's own interpreter, which runs one program after the other."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.launches = {launch.name: launch for launch in make_launches(kernels)}
        self.outputs: dict[str, list[torch.Tensor]] = {}

    def __getitem__(self, name: str) -> list[torch.Tensor]:
        if name not in self.outputs:
            launch = self.launches[name]
            with language_patched(), self.kernels.on(Device(), launch):
                self.outputs[name] = [output.clone() for output in launch.call()]
        return self.outputs[name]


class Explorer:
    """Explores launches; all that happens follows from the seed.

    Attributes:
        races: what the detector has found.
        wrong: what else went wrong, in words.
        schedules: how many have run, by launch.
        reached: the jitted functions that have run.
    """

    def __init__(self, kernels: Kernels, launches: list[Launch], expected: ExpectedOutputs, seed: int) -> None:
        self.kernels, self.launches, self.expected, self.seed = kernels, launches, expected, seed
        self.races, self.wrong = Races(), []
        self.schedules: Counter[str] = Counter()
        self.reached: set[str] = set()
        self.device = Device()
        self.rng = random.Random(seed)
        self.seeds = self._schedule_seeds()

    def _schedule_seeds(self) -> Iterator[Schedule]:
        number = self.seed * 10**9
        while True:
            yield Schedule(number, self.races, self.device.scratch())
            number += 1

    def run(self, num_schedules: int, until: float = float("inf"), stops_at_first: bool = False) -> None:
        """Run so many schedules, each launch as often as the others, or as many as there is time for."""
        while True:
            for launch in self.rng.sample(self.launches, len(self.launches)):
                found = self.races.counts or self.wrong
                if self.schedules.total() >= num_schedules or time.monotonic() > until or (stops_at_first and found):
                    return
                self._run_once(launch)

    def _run_once(self, launch: Launch) -> None:
        self.schedules[launch.name] += 1
        problem = ""
        try:
            with interleaved(self.seeds, self.reached), self.kernels.on(self.device, launch):
                outputs = launch.call()
            if not all(map(_are_equal, outputs, self.expected[launch.name])):
                problem = "the outputs differ"
            elif self.device.counters.any():
                problem = f"counters are left at {self.device.counters.nonzero().flatten().tolist()}"
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            self.wrong.append(f"{launch.name}, schedule {self.schedules.total()} of seed {self.seed}: {problem}")
            self.device.counters.zero_()

    def report(self) -> list[str]:
        """Return a line for each finding."""
        races = [f"RACE {count} times, {self.races.describe(race)}" for race, count in self.races.counts.items()]
        return races + [f"WRONG {problem}" for problem in self.wrong]


def _are_equal(output: torch.Tensor, expected: torch.Tensor) -> bool:
    return output.shape == expected.shape and output.numpy().tobytes() == expected.numpy().tobytes()
