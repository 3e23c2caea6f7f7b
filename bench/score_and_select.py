"""Time every contender side by side, after parity: kept tokens from scores, queries and keys, or hidden states.

    python -m bench.score_and_select [--device cuda] [--slice gpu] [--seconds 180] [--json FILE]

Every round runs each contender once in each way: eager, and on a GPU as a replayed CUDA graph, with a warm and a cold
last-level cache (bench/timing.py says how). A contender is first compared with float64; one that fails or raises is
reported as such and never timed. Beside them stand an empty launch and the time that reading the keys (or the visual
hidden states) once takes at the copy bandwidth measured in the same run. The results are written case by case.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import cli
from bench.cases import SLICES, Case
from bench.contenders import OURS, Contender, contenders
from bench.environment import environment, write_json
from bench.inputs import Inputs, QueriesAndKeys, Scores, make_inputs
from bench.timing import (
    Flush,
    Replay,
    Sampler,
    calls_in_a_graph,
    copy_bandwidth,
    eager_sampler,
    peak_bytes,
    rotate,
    spread,
)

EMPTY = "empty launch"
_FLUSH = "flush"
# A case may take this long, parity and compiling aside.
_CASE_SECONDS = {"cpu": 6.0, "cuda": 1.0}

Way = tuple[str, str, str]


def bytes_to_read(inputs: Inputs) -> int:
    """Count the bytes that every contender must read: the keys, the visual hidden states, or the scores, once."""
    if isinstance(inputs, Scores):
        tensor = inputs.scores
    elif isinstance(inputs, QueriesAndKeys):
        tensor = inputs.k
    else:
        tensor = inputs.x[:, inputs.visual]
    return tensor.numel() * tensor.element_size()


def check(case: Case, inputs: Inputs, device: torch.device) -> tuple[dict[str, Any], dict[str, Callable[[], object]]]:
    """Return a row with parity and memory of each contender, and the calls of those that passed."""
    row: dict[str, Any] = {"case": case.to_dict(), "title": str(case), "contenders": []}
    runs: dict[str, Callable[[], object]] = {}
    expected = inputs.expected(case)
    for contender in contenders(case, inputs):
        entry = _checked(contender, expected)
        row["contenders"].append(entry)
        if "failed" not in entry:
            entry["peak_bytes"] = peak_bytes(contender.run, device)
            runs[contender.name] = contender.run
    return row, runs


def measure(case: Case, device: torch.device, bandwidth: float, flush: Flush | None, rounds: int) -> dict[str, Any]:
    """Measure one row: parity of each contender, then times and memory."""
    inputs = make_inputs(case, device)
    row, runs = check(case, inputs, device)
    read = bytes_to_read(inputs)
    row["floor"] = {"bytes": read, "microseconds": read / bandwidth * 1e6}
    entries = {entry["name"]: entry for entry in row["contenders"]}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        from bench.empty_launch import empty_launch

        nothing = torch.zeros(1, device=device)
        entries[EMPTY] = {"name": EMPTY}
        row["contenders"].append(entries[EMPTY])
        runs[EMPTY] = lambda: empty_launch(nothing)
    samples = rotate(_samplers(runs, entries, device, flush), rounds, _CASE_SECONDS[device.type])
    flushed = statistics.median(samples.pop((_FLUSH, "graph", "cold"), [0.0]))
    for (name, how, cache), values in samples.items():
        if (how, cache) == ("graph", "cold"):
            values = [value - flushed for value in values]
        entries[name].setdefault(how, {})[cache] = spread(values)
    return row


def _checked(contender: Contender, expected: torch.Tensor) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": contender.name, "tolerance": contender.tolerance}
    try:
        parity = contender.check(expected)
    # code of others may raise anything, and is then reported as failed
    except Exception as error:
        return entry | {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    return entry | {"error": parity.error, "differing": parity.differing}


def _samplers(
    runs: dict[str, Callable[[], object]], entries: dict[str, dict[str, Any]], device: torch.device, flush: Flush | None
) -> dict[Way, Sampler]:
    """Make a sampler for every way of running each contender; entries note what cannot be captured."""
    samplers: dict[Way, Sampler] = {}
    for name, run in runs.items():
        samplers[name, "eager", "warm"] = eager = eager_sampler(run, device)
        if flush is None:
            continue
        samplers[name, "eager", "cold"] = eager_sampler(run, device, flush)
        eager()
        calls = calls_in_a_graph(eager())
        try:
            warm, cold = Replay(run, calls), Replay(run, calls, flush)
        # code of others may refuse to be captured in ways of its own
        except Exception as error:
            entries[name]["no_graph"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            torch.cuda.synchronize(device)
            continue
        samplers[name, "graph", "warm"], samplers[name, "graph", "cold"] = warm, cold
    if flush is not None:
        samplers[_FLUSH, "graph", "cold"] = Replay(None, calls_in_a_graph(1.0), flush)
    return samplers


def run(
    device: torch.device,
    cases: tuple[Case, ...],
    path: Path | None,
    seconds: float | None = None,
    rounds: int = 50,
) -> dict[str, Any]:
    """Measure the cases in order, write what there is after each, and leave out what does not fit in `seconds`."""
    begin = time.perf_counter()
    bandwidth = copy_bandwidth(device)
    flush = Flush(device) if device.type == "cuda" else None
    results: dict[str, Any] = {
        "environment": environment(device),
        "copy_bytes_per_second": bandwidth,
        "unit": "microseconds",
        "rows": [],
        "left_out": [],
    }
    for number, case in enumerate(cases, 1):
        if seconds is not None and time.perf_counter() - begin > seconds:
            results["left_out"] = [str(left_out) for left_out in cases[number - 1 :]]
            print(f"out of time: {len(results['left_out'])} cases left out", file=sys.stderr, flush=True)
            break
        start = time.perf_counter()
        row = _one(case, device, partial(measure, case, device, bandwidth, flush, rounds))
        results["rows"].append(row)
        if path is not None:
            write_json(path, results)
        print(f"[{number}/{len(cases)}] {summary(row)} ({time.perf_counter() - start:.0f} s)", flush=True)
    if path is not None:
        write_json(path, results)
    return results


def run_checks(device: torch.device, cases: tuple[Case, ...]) -> dict[str, Any]:
    """Check parity alone, which also leaves every kernel in the compilers' caches."""
    rows = []
    for number, case in enumerate(cases, 1):
        row = _one(case, device, partial(_parity, case, device))
        rows.append(row)
        print(f"[{number}/{len(cases)}] {summary(row)}", flush=True)
    return {"rows": rows}


def _parity(case: Case, device: torch.device) -> dict[str, Any]:
    return check(case, make_inputs(case, device), device)[0]


def _one(case: Case, device: torch.device, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if case.compiled:
        torch._dynamo.reset()
    try:
        return work()
    except torch.OutOfMemoryError as error:
        return {"case": case.to_dict(), "title": str(case), "failed": str(error).splitlines()[0]}
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def summary(row: dict[str, Any]) -> str:
    """Summarise a row in one line: the median of each contender in microseconds, replayed and cold if there is one."""
    if "failed" in row:
        return f"{row['title']}: {row['failed']}"
    parts = []
    for entry in row["contenders"]:
        if "failed" in entry:
            parts.append(f"{entry['name']} FAILED ({entry['failed']})")
            continue
        timed = entry.get("graph", entry.get("eager"))
        if timed is not None:
            parts.append(f"{entry['name']} {timed.get('cold', timed['warm'])['median']:.1f}")
        else:
            parts.append(f"{entry['name']} error {entry['error']:.0e}")
    if "floor" in row:
        parts.append(f"floor {row['floor']['microseconds']:.1f}")
    return f"{row['title']}: {', '.join(parts)}"


def failures(results: dict[str, Any]) -> list[str]:
    """List the cases in which ours did not reach parity."""
    return [
        f"{row['title']}: {entry['failed']}"
        for row in results["rows"]
        for entry in row.get("contenders", [])
        if entry["name"].startswith(OURS) and "failed" in entry
    ]


def main() -> None:
    """Measure, print a line for each case, and write JSON."""
    parser = cli.parser(
        "bench.score_and_select",
        __doc__,
        device=cli.default_device(),
        rounds=50,
        seconds=(None, "leave out the cases that do not fit"),
        json="bench/results/<device>/score_and_select.json",
    )
    parser.add_argument("--slice", choices=SLICES, help="which cases; default: that of the device")
    parser.add_argument("--check", action="store_true", help="parity alone, nothing is timed or written")
    parser.add_argument("--shard", type=cli.shard, default=(0, 1), help="I/N: the I-th of N parts of the cases")
    arguments = parser.parse_args()
    device = arguments.device
    position, count = arguments.shard
    cases = SLICES[arguments.slice or ("gpu" if device.type == "cuda" else "cpu")][position::count]
    if arguments.check:
        results = run_checks(device, cases)
    else:
        path = cli.results_file(arguments, "score_and_select.json")
        results = run(device, cases, path, arguments.seconds, arguments.rounds)
        print(f"written: {path}", file=sys.stderr)
    if failures(results):
        sys.exit("bench.score_and_select: parity failed: " + "; ".join(failures(results)))


if __name__ == "__main__":
    main()
