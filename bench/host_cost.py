"""Time what a call costs the host before its kernel runs: validation, dispatch, allocation, launch.

    python -m bench.host_cost [--device cuda] [--json FILE]

The parts are differences between the public function, what it calls (its operator, or directly what that runs) and the
backend below that, all on the same arguments with the Triton launch replaced by nothing; the launch itself is the
recorded one repeated, which needs a GPU. Without one the rest is measured on CPU tensors. Shapes are small, so that a
GPU keeps up with the host.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__" and os.environ.pop("TRITON_INTERPRET", ""):
    print("bench.host_cost: the interpreter has a launcher of its own; TRITON_INTERPRET is ignored", file=sys.stderr)

import torch
from triton.runtime.jit import JITFunction

import hawk_kernels
from bench import cli
from bench.cases import QWEN_7B, Case
from bench.environment import environment, write_json
from bench.inputs import HiddenStates, QueriesAndKeys, Scores, make_inputs
from bench.timing import rotate, spread, synchronize
from hawk_kernels.backends.choose import load_backend

# each operator, and the module that defines it, of the same name among the operators and in each backend
OPERATORS = {
    "attention_column_mean": "attention_column_mean",
    "compact": "compact",
    "greedy_dpp": "greedy",
    "greedy_max_min": "greedy",
    "score_and_select": "score_and_select",
    "score_hidden": "score_hidden",
    "score_hidden_and_select": "score_hidden",
    "score_peaks": "score_peaks",
    "score_tokens": "score_and_select",
    "select_topk": "select_topk",
}

# few, so that the median is of samples in which no other process had the processor
_CALLS = 20
_SMALL = {kind: Case(kind, QWEN_7B, 8, 256, "bf16") for kind in ("queries", "hidden", "scores")}


def public_calls(device: torch.device) -> dict[str, Callable[[], object]]:
    """Return the public functions that launch, on small inputs."""
    # a name in the signature where it has one: on a CPU the choice would be PyTorch
    backend: dict[str, Any] = {} if device.type == "cuda" else {"backend": "triton"}
    queries, hidden, scores = (make_inputs(_SMALL[kind], device) for kind in ("queries", "hidden", "scores"))
    assert isinstance(queries, QueriesAndKeys)
    assert isinstance(hidden, HiddenStates)
    assert isinstance(scores, Scores)
    q, k, w = queries.q, queries.k, queries.w
    mask = torch.ones(1, k.shape[2], dtype=torch.bool, device=device)
    calls: dict[str, Callable[[], object]] = {
        "score_and_select": lambda: hawk_kernels.score_and_select(q, k, w, 0.2, normalize="l2", **backend),
        "score_and_select, masked": lambda: hawk_kernels.score_and_select(
            q, k, w, 0.2, k_mask=mask, normalize="l2", **backend
        ),
    }
    if device.type == "cuda":
        of_scores = scores.scores
        calls["select_topk"] = lambda: hawk_kernels.select_topk(of_scores, 0.2)
    arguments = {**hidden.arguments, "r": 0.2, "normalize": "l2", **backend}
    calls["score_hidden_and_select"] = lambda: hawk_kernels.score_hidden_and_select(**arguments)
    return calls


@contextmanager
def launches(replacement: Callable[..., Any]) -> Iterator[None]:
    """Send every Triton launch to `replacement(kernel, *args, **kwargs)`."""
    with mock.patch.object(JITFunction, "run", replacement):
        yield


def no_launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
    """Replace a launch at no cost."""


class Recorder:
    """Stands in for a function: remembers its last call and makes it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.again: Callable[[], Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.again = lambda: self.function(*args, **kwargs)
        return self.function(*args, **kwargs)


def layers(call: Callable[[], object], device: torch.device) -> dict[str, Callable[[], object]]:
    """Return one call entered at each level (public function, operator, backend), its allocations and its launches."""
    modules = {name: import_module(f"hawk_kernels.ops.{stem}") for name, stem in OPERATORS.items()}
    # a public function calls its operator, or directly what the operator runs
    entries = [(module, f"{prefix}{name}") for name, module in modules.items() for prefix in ("_", "_run_")]
    operators = [Recorder(getattr(module, entry)) for module, entry in entries]
    functions = {name: Recorder(getattr(load_backend("triton", stem), name)) for name, stem in OPERATORS.items()}
    kernels: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    allocations: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    empty = torch.empty

    def record_launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        kernels.append((kernel, args, kwargs))

    def record_allocation(*args: Any, **kwargs: Any) -> torch.Tensor:
        allocations.append((args, kwargs))
        return empty(*args, **kwargs)

    # workspaces that are kept must be there already when the allocations of a call are counted
    with launches(no_launch):
        call()
    with (
        ExitStack() as patches,
        mock.patch.object(torch, "empty", record_allocation),
        launches(record_launch),
    ):
        for (module, entry), operator in zip(entries, operators, strict=True):
            patches.enter_context(mock.patch.object(module, entry, operator))
        for name, function in functions.items():
            patches.enter_context(mock.patch.object(load_backend("triton", OPERATORS[name]), name, function))
        call()
    entered = {"call": call}
    for level, recorders in (("operator", operators), ("backend", list(functions.values()))):
        called = [recorder.again for recorder in recorders if recorder.again is not None]
        if len(called) == 1:
            entered[level] = called[0]

    def allocate() -> None:
        for args, kwargs in allocations:
            empty(*args, **kwargs)

    entered["allocation"] = allocate
    if device.type == "cuda":
        run = JITFunction.run

        def launch() -> None:
            for kernel, args, kwargs in kernels:
                run(kernel, *args, **kwargs)

        entered["launch"] = launch
    return entered


def repeated(call: Callable[[], object], device: torch.device, stubbed: bool) -> Callable[[], float]:
    """Make a sampler of the host's microseconds of a call: the mean over many that do not wait for the device."""

    def sample() -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(_CALLS):
            call()
        took = time.perf_counter() - start
        synchronize(device)
        return took / _CALLS * 1e6

    def without_launch() -> float:
        with launches(no_launch):
            return sample()

    return without_launch if stubbed else sample


def measure(call: Callable[[], object], device: torch.device, rounds: int) -> dict[str, Any]:
    """Measure the microseconds of a call and its parts; None for a part that cannot be separated here."""
    entered = layers(call, device)
    samplers = {f"{name} without launch": repeated(run, device, True) for name, run in entered.items()}
    del samplers["allocation without launch"]
    samplers["allocation"] = repeated(entered["allocation"], device, False)
    if device.type == "cuda":
        del samplers["launch without launch"]
        samplers["launch"] = repeated(entered["launch"], device, False)
        samplers["call"] = repeated(call, device, False)
    spreads = {name: spread(values) for name, values in rotate(samplers, rounds).items()}

    def median(name: str) -> float | None:
        return spreads[name]["median"] if name in spreads else None

    def difference(one: str, other: str) -> float | None:
        first, second = median(one), median(other)
        return None if first is None or second is None else first - second

    whole, launch = median("call"), median("launch")
    return {
        "parts": {
            "validation": difference("call without launch", "operator without launch"),
            "dispatch": difference("operator without launch", "backend without launch"),
            "allocation": median("allocation"),
            "plan and arguments": difference("backend without launch", "allocation"),
            "launch": launch,
        },
        "call": whole,
        "call_over_launch": None if whole is None or launch is None else whole / launch,
        "spreads": spreads,
    }


def run(device: torch.device, path: Path | None, rounds: int = 100) -> dict[str, Any]:
    """Measure every public call and write the table as it grows."""
    results: dict[str, Any] = {"environment": environment(device), "unit": "microseconds of host time", "rows": {}}
    if device.type != "cuda":
        # lets CPU tensors through to the backend, whose kernels are compiled ones that are never launched
        for stem in OPERATORS.values():
            load_backend("triton", stem)
        os.environ["TRITON_INTERPRET"] = "1"
    for name, call in public_calls(device).items():
        results["rows"][name] = row = measure(call, device, rounds)
        parts = ", ".join(f"{part} {'-' if took is None else f'{took:.1f}'}" for part, took in row["parts"].items())
        whole = "" if row["call"] is None else f", call {row['call']:.1f} = {row['call_over_launch']:.2f} launches"
        print(f"{name}: {parts}{whole}", flush=True)
        if path is not None:
            write_json(path, results)
    return results


def main() -> None:
    """Measure, print a line a function, write JSON."""
    parser = cli.parser(
        "bench.host_cost",
        __doc__,
        device=cli.default_device(),
        rounds=100,
        json="bench/results/<device>/host_cost.json",
    )
    arguments = parser.parse_args()
    path = cli.results_file(arguments, "host_cost.json")
    run(arguments.device, path, arguments.rounds)
    print(f"written: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
