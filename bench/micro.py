"""Queries and keys to kept tokens: ours beside the released steps, in one run, after parity.

    python -m bench.micro [--device cuda] [--rounds 50] [--json FILE]

Every round runs each contestant once, so that all meet the same machine; a row gives medians, 20th and 80th
percentiles in microseconds and the ratio of medians. No time is printed before the selection has been compared with
the float64 reference.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import csrc_ref
from bench.released import released_steps
from hawk_kernels import score_and_select

# (text tokens, visual tokens, dtype, what the project asks of the CPU path); H=28, Hkv=4, D=128 as Qwen2.5-VL-7B.
SHAPES = (
    (20, 1296, torch.bfloat16, 4.0),
    (64, 1296, torch.float32, 8.0),
    (64, 4096, torch.bfloat16, 12.0),
    (64, 16384, torch.float32, 30.0),
)
_RATIO = 0.2


def check_parity(q: torch.Tensor, k: torch.Tensor, w: torch.Tensor) -> float:
    """Largest score error relative to the largest score; raises where it exceeds float32's rounding."""
    selection = score_and_select(q, k, w, _RATIO, normalize="l2")
    expected = csrc_ref.score_tokens(q.double(), k.double(), w.double(), normalize="l2")
    error = ((selection.scores - expected).abs().max() / expected.abs().max()).item()
    exact = csrc_ref.select_topk(selection.scores.cpu(), _RATIO)
    if error > 4e-6 or not torch.equal(selection.mask.cpu(), exact.mask):
        raise SystemExit(f"bench.micro: parity failed with a relative error of {error:.1e}; no time is reported")
    return error


def interleaved(
    contestants: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Microseconds of each contestant's runs, one of each a round, after five rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 5):
        for name, run in contestants.items():
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            times[name].append((time.perf_counter() - start) * 1e6)
    return {name: values[5:] for name, values in times.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(rounds: int, device: torch.device) -> list[dict]:
    """One row a shape."""
    rows = []
    for num_queries, num_keys, dtype, bar in SHAPES:
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(1, 28, num_queries, 128, generator=generator).to(device, dtype)
        k = torch.randn(1, 4, num_keys, 128, generator=generator).to(device, dtype)
        w = torch.rand(28, generator=generator).to(device)
        error = check_parity(q, k, w)
        times = interleaved(
            {
                "released": lambda q=q, k=k, w=w: released_steps(q, k, w, _RATIO),
                "ours": lambda q=q, k=k, w=w: score_and_select(q, k, w, _RATIO, normalize="l2"),
            },
            rounds,
            device,
        )
        row = {"N": num_queries, "M": num_keys, "dtype": str(dtype).removeprefix("torch."), "error": error}
        for name, values in times.items():
            low, *_, high = statistics.quantiles(values, n=5)
            row[name] = {"median": statistics.median(values), "p20": low, "p80": high}
        row["ratio"] = row["released"]["median"] / row["ours"]["median"]
        row["bar"] = bar
        rows.append(row)
    return rows


def environment(device: torch.device) -> dict:
    """What a number depends on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def main() -> None:
    """Measure, print the rows, and write them as JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.micro", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)

    about = environment(device)
    print(", ".join(f"{name} {value}" for name, value in about.items()), file=sys.stderr)
    rows = measure(arguments.rounds, device)
    print(f"{'N':>4} {'M':>6} {'dtype':<9} {'released':>24} {'ours':>24} {'ratio':>7} {'bar (CPU)':>9}")
    for row in rows:
        spans = ["{median:.0f} ({p20:.0f}-{p80:.0f})".format(**row[name]) for name in ("released", "ours")]
        print(
            f"{row['N']:>4} {row['M']:>6} {row['dtype']:<9} {spans[0]:>24} {spans[1]:>24} "
            f"{row['ratio']:>6.1f}x {row['bar']:>8.0f}x"
        )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"environment": about, "microseconds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
