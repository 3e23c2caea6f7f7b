"""Time what a call costs the host, beside a bare launch of the same kernels.

    python -m bench.host_cost [--device cuda] [--json FILE] [--check]

Three things are timed on the same arguments, in turn: the public function; the bare launch, `kernel[grid](...)` with
arguments that are ready, once for each kernel of the call; and the direct launch, which passes the same arguments to
the compiled kernel without asking Triton which one it is. `--check` fails unless a call takes at most 1.5 bare
launches. Beside the call stands what it takes where nothing is kept from one call to the next: no checked signature, no
prepared call, no compiled kernel.

Without a GPU, the tensors are on the CPU and Triton has a pretended driver whose launcher does nothing. The real one
packs the arguments and calls CUDA, which adds about as much to a call as to a bare and to a direct launch. On a GPU an
output costs more to allocate, while workspace and counters, which a call on a CPU allocates anew, are kept. The check
of a CPU's `compact` that reads the mask is left out, because on a GPU there is none. Shapes are small, so that a GPU
keeps up with the host.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
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
from bench.pretended_driver import pretended_driver
from bench.timing import rotate, spread, synchronize
from hawk_kernels.backends.choose import PreparedCalls, load_backend
from hawk_kernels.backends.kernels import compiled
from hawk_kernels.validation import Passed

MOST_LAUNCHES = 1.5
"""What a call may take, in bare launches."""

# of both the public functions and their kernels
_MODULES = ("attention_column_mean", "compact", "score_and_select", "score_hidden", "score_peaks", "select_topk")
# few, so that the median is of samples in which no other process had the processor
_CALLS = 20
_SMALL = {kind: Case(kind, QWEN_7B, 8, 256, "bf16") for kind in ("queries", "hidden", "scores")}


def public_calls(device: torch.device) -> dict[str, Callable[[], object]]:
    """Return the public functions that do little more than launch, on small inputs."""
    # on a CPU the choice would be PyTorch
    backend: dict[str, Any] = {} if device.type == "cuda" else {"backend": "triton"}
    queries, hidden, scores = (make_inputs(_SMALL[kind], device) for kind in ("queries", "hidden", "scores"))
    assert isinstance(queries, QueriesAndKeys)
    assert isinstance(hidden, HiddenStates)
    assert isinstance(scores, Scores)
    q, k, w, of_scores = queries.q, queries.k, queries.w, scores.scores
    mask = torch.ones(1, k.shape[2], dtype=torch.bool, device=device)
    options = {"normalize": "l2", **backend}
    x, keep = hidden.x, torch.ones(hidden.x.shape[:2], dtype=torch.bool, device=device)
    return {
        "score_and_select": lambda: hawk_kernels.score_and_select(q, k, w, 0.2, **options),
        "score_and_select, masked": lambda: hawk_kernels.score_and_select(q, k, w, 0.2, k_mask=mask, **options),
        "score_tokens": lambda: hawk_kernels.score_tokens(q, k, w, **options),
        "score_peaks": lambda: hawk_kernels.score_peaks(q, k, w, **backend),
        "select_topk": lambda: hawk_kernels.select_topk(of_scores, 0.2),
        "score_hidden_and_select": partial(hawk_kernels.score_hidden_and_select, **hidden.arguments, r=0.2, **options),
        "score_hidden": partial(hawk_kernels.score_hidden, **hidden.arguments, **options),
        "compact": lambda: hawk_kernels.compact(x, keep, length=x.shape[1], **backend),
        "attention_column_mean": lambda: hawk_kernels.attention_column_mean(q, k, **backend),
    }


def jitted_kernels() -> list[JITFunction[Any]]:
    """Return the kernels of these functions."""
    return [
        value
        for stem in _MODULES
        for value in vars(load_backend("triton", stem)).values()
        if isinstance(value, JITFunction) and value.fn.__module__.endswith(stem)
    ]


def _choose_triton(*_: object) -> str:
    return "triton"


def _do_nothing(*_: object) -> None:
    """Stand in for what is left out."""


@contextmanager
def launching(device: torch.device) -> Iterator[None]:
    """Let the kernels be launched on CPU tensors, where the launcher does nothing; change nothing for a GPU."""
    if device.type == "cuda":
        yield
        return
    for kernel in jitted_kernels():
        # Compiling would do this: every bare launch checks that the constants that a kernel has seen are the same.
        assert kernel.cache_key
    with (
        pretended_driver(jitted_kernels(), lambda *_: None),
        # lets CPU tensors through to the backend, whose kernels are imported already, as compiled ones
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),
        mock.patch.object(import_module("hawk_kernels.ops.select_topk"), "choose_backend", _choose_triton),
        mock.patch.object(import_module("hawk_kernels.ops.compact"), "_check_fits", _do_nothing),
    ):
        yield


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Check, prepare and look up everything in every call."""
    with (
        mock.patch.object(PreparedCalls, "get", _do_nothing),
        mock.patch.object(PreparedCalls, "add", _do_nothing),
        mock.patch.object(Passed, "add", _do_nothing),
        mock.patch.object(compiled, "_IS_KNOWN", False),
    ):
        yield


def parts_of(call: Callable[[], object]) -> dict[str, Callable[[], object]]:
    """Return what a call does, each part ready to be done again: launches, allocations, the prepared call."""
    launches: list[Callable[[], object]] = []
    direct: list[Callable[[], object]] = []
    allocations: list[Callable[[], object]] = []
    prepared: list[Callable[[], object]] = []
    empty, get, launch = torch.empty, PreparedCalls.get, compiled.Compiled.launch

    def record_run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(lambda: kernel[grid](*arguments, **options))

    def record_direct(kept: Any, grid: Any, arguments: Any) -> None:
        direct.append(lambda: launch(kept, grid, arguments))

    def record_allocation(*arguments: Any, **options: Any) -> torch.Tensor:
        allocations.append(lambda: empty(*arguments, **options))
        return empty(*arguments, **options)

    def record_prepared(calls: Any, key: Any) -> Any:
        found = get(calls, key)
        if found is None:
            return None

        def recorded(*tensors: Any) -> Any:
            prepared.append(lambda: found(*tensors))
            return found(*tensors)

        return recorded

    # kernels, workspaces and prepared calls must be there already
    for _ in range(3):
        call()
    with mock.patch.object(JITFunction, "run", record_run):
        call()
    with (
        mock.patch.object(compiled.Compiled, "launch", record_direct),
        mock.patch.object(torch, "empty", record_allocation),
        mock.patch.object(PreparedCalls, "get", record_prepared),
    ):
        call()
    found = {"bare launch": launches, "direct launch": direct, "allocation": allocations, "prepared": prepared}
    return {name: _all_of(made) for name, made in found.items() if made}


def _all_of(calls: list[Callable[[], object]]) -> Callable[[], object]:
    def run() -> None:
        for call in calls:
            call()

    return calls[0] if len(calls) == 1 else run


def repeated(call: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Make a sampler of the host's microseconds of a call: the mean over many that do not wait for the device."""

    def sample() -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(_CALLS):
            call()
        took = time.perf_counter() - start
        synchronize(device)
        return took / _CALLS * 1e6

    return sample


def measure(call: Callable[[], object], device: torch.device, rounds: int) -> dict[str, Any]:
    """Measure the microseconds of a call, of its parts and of its bare launches; None for what it has not."""
    samplers = {"call": repeated(call, device)}
    samplers |= {name: repeated(part, device) for name, part in parts_of(call).items()}
    sample = samplers["call"]

    def sample_without_keeping() -> float:
        with nothing_kept():
            return sample()

    samplers["call, nothing kept"] = sample_without_keeping
    samples = rotate(samplers, rounds)
    spreads = {name: spread(values) for name, values in samples.items()}
    median = {name: values["median"] for name, values in spreads.items()}

    def over(one: str, other: str) -> float | None:
        """Return the median ratio within a round, in which all meet the same machine."""
        if other not in samples:
            return None
        return statistics.median(a / b for a, b in zip(samples[one], samples[other], strict=True))

    prepared, allocation, direct = (median.get(name) for name in ("prepared", "allocation", "direct launch"))
    arguments = None
    if prepared is not None and direct is not None:
        arguments = prepared - (allocation or 0.0) - direct
    return {
        "parts": {
            "signature and options": median["call"] - prepared if prepared is not None else None,
            "allocation": allocation,
            "arguments": arguments,
            "direct launch": direct,
        },
        "call": median["call"],
        "bare_launch": median["bare launch"],
        "call_over_launch": over("call", "bare launch"),
        "call_over_direct_launch": over("call", "direct launch"),
        "call_with_nothing_kept": median["call, nothing kept"],
        "call_with_nothing_kept_over_launch": over("call, nothing kept", "bare launch"),
        "spreads": spreads,
    }


def line_of(row: dict[str, Any]) -> str:
    """Say what was measured of one function."""
    parts = ", ".join(f"{part} {_short(took)}" for part, took in row["parts"].items())
    return (
        f"call {_short(row['call'])} = {row['call_over_launch']:.2f} bare launches of {_short(row['bare_launch'])}"
        f" = {_short(row['call_over_direct_launch'])} direct launches"
        f" (nothing kept: {_short(row['call_with_nothing_kept'])} ="
        f" {row['call_with_nothing_kept_over_launch']:.2f} bare launches); {parts}"
    )


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def run(device: torch.device, path: Path | None, rounds: int = 100) -> dict[str, Any]:
    """Measure every public call and write the table as it grows."""
    results: dict[str, Any] = {
        "environment": environment(device),
        "unit": "microseconds of host time",
        "launcher": "CUDA's" if device.type == "cuda" else "does nothing",
        "rows": {},
    }
    with launching(device):
        for name, call in public_calls(device).items():
            results["rows"][name] = row = measure(call, device, rounds)
            print(f"{name}: {line_of(row)}", flush=True)
            if path is not None:
                write_json(path, results)
    return results


def slower_calls(results: dict[str, Any]) -> list[str]:
    """Return the functions that take more than the limit."""
    return [name for name, row in results["rows"].items() if row["call_over_launch"] > MOST_LAUNCHES]


def main() -> None:
    """Measure, print a line a function, write JSON."""
    parser = cli.parser(
        "bench.host_cost",
        __doc__,
        device=cli.default_device(),
        rounds=100,
        json="bench/results/<device>/host_cost.json",
    )
    parser.add_argument(
        "--check", action="store_true", help=f"fail if a call takes more than {MOST_LAUNCHES} bare launches"
    )
    arguments = parser.parse_args()
    path = cli.results_file(arguments, "host_cost.json")
    results = run(arguments.device, path, arguments.rounds)
    print(f"written: {path}", file=sys.stderr)
    slow = slower_calls(results)
    if arguments.check and slow:
        sys.exit(f"bench.host_cost: more than {MOST_LAUNCHES} bare launches: {', '.join(slow)}")


if __name__ == "__main__":
    main()
