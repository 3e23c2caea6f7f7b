"""Run the kernels by random schedules on a weak memory, and look for races and wrong results.

    python -m tests.concurrent [--schedules 3000] [--minutes 30] [--seed 0] [--only TEXT]
    python -m tests.concurrent --mutants [--only TEXT]

Needs no GPU. The last line counts what was found, and the exit status is 1 unless all is well. With `--mutants` the
kernels are broken on purpose, in one way after the other, and all is well if the checker notices each.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

# Triton asks for it when it is imported.
os.environ["TRITON_INTERPRET"] = "1"

import torch

from tests.concurrent.explore import ExpectedOutputs, Explorer
from tests.concurrent.launches import Kernels, make_launches
from tests.concurrent.mutants import QUICK, SLOW, try_mutant


def main() -> int:
    """Explore, print what was found, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.concurrent", description=__doc__.split("\n")[0])
    parser.add_argument("--schedules", type=int, default=3000, help="of all launches together")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other schedules")
    parser.add_argument("--only", default="", help="launches, or mutants, with this in their name")
    parser.add_argument("--mutants", action="store_true", help="break the kernels, and see whether it is noticed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)
    kernels = Kernels()
    if arguments.mutants:
        return _try_mutants(arguments.only, arguments.seed, ExpectedOutputs(kernels))
    launches = [launch for launch in make_launches(kernels) if arguments.only in launch.name]
    if not launches:
        parser.error(f"--only: expected part of the name of a launch, got {arguments.only!r}")
    explorer = Explorer(kernels, launches, ExpectedOutputs(kernels), arguments.seed)
    explorer.run(arguments.schedules, time.monotonic() + 60 * arguments.minutes)
    for finding in explorer.report():
        print(finding)
    races = explorer.races.counts.total()
    print(f"{explorer.schedules.total()} schedules, {races} races, {len(explorer.wrong)} wrong results")
    return 1 if races or explorer.wrong else 0


def _try_mutants(only: str, seed: int, expected: ExpectedOutputs) -> int:
    mutants = [mutant for mutant in QUICK + SLOW if only in mutant.name]
    num_noticed, num_bad = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for mutant in mutants:
            explorer = try_mutant(mutant, Path(folder), expected, seed)
            findings = explorer.report()
            is_bad = bool(findings) == mutant.is_harmless
            num_noticed, num_bad = num_noticed + bool(findings), num_bad + is_bad
            verdict = findings[0].splitlines()[0] if findings else "harmless" if mutant.is_harmless else "NOT NOTICED"
            schedules = explorer.schedules.total()
            print(f"{'BAD' if is_bad else 'ok '} {mutant.name:<40} {schedules:>3}  {verdict[:110]}", flush=True)
    num_harmful = sum(not mutant.is_harmless for mutant in mutants)
    print(f"{len(mutants)} mutants, {num_harmful} harmful, {num_noticed} noticed, {num_bad} not as they should be")
    return 1 if num_bad or not mutants else 0


if __name__ == "__main__":
    sys.exit(main())
