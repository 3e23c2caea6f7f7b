"""The kernels under concurrency: no schedule races or gives a wrong result, and broken kernels are noticed."""

import importlib
import os
import pkgutil
import threading
from pathlib import Path

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from tests.concurrent.explore import ExpectedOutputs, Explorer
from tests.concurrent.launches import PACKAGE, Kernels, make_launches
from tests.concurrent.mutants import QUICK, SLOW, try_mutant

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

NUM_SCHEDULES = 200


def jitted_functions():
    """Every @triton.jit function of the kernels, by module and name."""
    package = importlib.import_module(PACKAGE)
    modules = [importlib.import_module(f"{PACKAGE}.{found.name}") for found in pkgutil.iter_modules(package.__path__)]
    values = [value for module in modules for value in vars(module).values() if isinstance(value, InterpretedFunction)]
    return {f"{value.fn.__module__}.{value.fn.__name__}" for value in values}


def explorer_of(name, expected, seed=0):
    kernels = Kernels()
    return Explorer(kernels, [launch for launch in make_launches(kernels) if name in launch.name], expected, seed)


@pytest.fixture(scope="module")
def expected():
    return ExpectedOutputs(Kernels())


def test_no_schedule_races_and_every_kernel_is_explored(expected):
    """`make races` runs thousands. A function that no launch of `launches.py` reaches is not proven: it fails here."""
    explorer = explorer_of("", expected)
    explorer.run(NUM_SCHEDULES)
    assert explorer.report() == []
    assert explorer.schedules.total() == NUM_SCHEDULES
    assert jitted_functions() - explorer.reached == set()
    assert len(jitted_functions()) > 40


@pytest.mark.parametrize("mutant", QUICK, ids=lambda mutant: mutant.name)
def test_a_broken_kernel_is_noticed(mutant, expected, tmp_path):
    """`make races ARGS=--mutants` tries all of them."""
    explorer = try_mutant(mutant, tmp_path, expected)
    assert bool(explorer.report()) != mutant.is_harmless


@pytest.mark.parametrize("mutant", SLOW, ids=lambda mutant: mutant.name)
def test_the_code_that_a_mutant_breaks_is_still_there(mutant):
    assert mutant.old in Path(importlib.import_module(PACKAGE).__path__[0], mutant.file).read_text()


def test_a_seed_decides_everything(tmp_path, expected):
    reports = [try_mutant(QUICK[0], tmp_path / str(run), expected, seed=5).report() for run in range(2)]
    assert reports[0]
    assert reports[0] == reports[1]


def test_nothing_stays_patched(expected):
    empty, num_threads = torch.empty, threading.active_count()
    explorer = explorer_of("greedy max-min masked", expected)
    before = {name: dict(vars(module)) for name, module in explorer.kernels.modules.items()}
    explorer.run(1)
    assert torch.empty is empty
    assert threading.active_count() == num_threads
    assert {name: dict(vars(module)) for name, module in explorer.kernels.modules.items()} == before


def test_a_wrong_result_is_reported(expected):
    explorer = explorer_of("greedy dpp", expected)
    right = expected["greedy dpp"]
    explorer.expected = {"greedy dpp": [~right[0], *right[1:]]}
    explorer.run(1)
    assert explorer.report() == ["WRONG greedy dpp, schedule 1 of seed 0: the outputs differ"]
