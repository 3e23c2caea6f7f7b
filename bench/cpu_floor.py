"""The PyTorch path on a CPU against the plain lines that anybody would write, and against reading the keys once.

    python -m bench.cpu_floor [--threads 1 2] [--rounds 200] [--json FILE]

The plain lines average the queries, multiply them with the keys in float32, divide by the L2 norm of each head, add up
with the weights, take `torch.topk` and sort its indices. Both are compared with float64 before they are timed. Every
round runs each contestant once, in a random order, right after a read of the keys, so that nobody meets a cache that
somebody else has emptied. The speed-up is the time of the plain lines over ours, of medians and of minima. Each row
names the speed-up that is required of it (1.0x in float32, 1.2x from 5120 keys on, 0.8x in half precision), and says
whether the medians meet it; on a busy machine the minima say more. `backend` is our time without the look-up of the
prepared call.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import hawk_kernels
from bench import cli
from bench.cases import KEEP_RATIO, LLAVA, QWEN_7B, Case
from bench.contenders import top_k_sorted
from bench.environment import environment, write_json
from bench.inputs import QueriesAndKeys, make_inputs
from bench.parity import FLOAT32_ERROR, check_kept, check_selection
from hawk_kernels.backends.eager import score_and_select as eager

_OURS, _BACKEND, _PLAIN, _READ = "ours", "backend", "plain lines", "keys read once"
_WARM_UPS = 5
_LONG = 5120

CASES = (
    *(Case("queries", QWEN_7B, n, m, dtype) for n, m in ((20, 1296), (64, 1296)) for dtype in ("bf16", "fp32")),
    *(Case("queries", LLAVA, 64, 576, dtype) for dtype in ("bf16", "fp32")),
    *(Case("queries", QWEN_7B, 64, m, dtype) for m in (4096, _LONG, 16384) for dtype in ("bf16", "fp32")),
    # neither a multiple of 16 nor a long row
    *(Case("queries", QWEN_7B, 20, m, "fp32") for m in (333, 1301)),
    *(Case("queries", QWEN_7B, 64, m, "fp32", normalize=None) for m in (1296, 16384)),
)


def required(case: Case) -> float:
    """Return the speed-up over the plain lines that is required of the PyTorch path."""
    if case.dtype != "fp32":
        return 0.8
    return 1.2 if case.num_keys >= _LONG else 1.0


def plain_lines(q: torch.Tensor, k: torch.Tensor, w: torch.Tensor, r: float, normalize: str | None) -> torch.Tensor:
    """Indices `[B, K]` in float32 throughout, without a guard against what is not finite or a rule for ties."""
    batch, num_heads, _, head_dim = q.shape
    mean = q.float().mean(dim=2).view(batch, k.shape[1], -1, head_dim) * head_dim**-0.5
    c = torch.matmul(mean, k.float().transpose(-1, -2)).view(batch, num_heads, -1)
    if normalize == "l2":
        c = c / c.norm(dim=-1, keepdim=True)
    return top_k_sorted((w[:, None] * c).sum(dim=1), r)


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Measure one row: microseconds of each contestant, and the ratios of medians and of minima."""
    inputs = make_inputs(case, torch.device("cpu"))
    assert isinstance(inputs, QueriesAndKeys)
    q, k, w = inputs.q, inputs.k, inputs.w.float()
    prepared = eager.PreparedCall(q, k, w, KEEP_RATIO, None, None, case.normalize, q.shape[3] ** -0.5, "floor")
    runs: dict[str, Callable[[], object]] = {
        _OURS: lambda: hawk_kernels.score_and_select(q, k, w, KEEP_RATIO, normalize=case.normalize, backend="torch"),
        _BACKEND: lambda: prepared(q, k, w, None, None),
        _PLAIN: lambda: plain_lines(q, k, w, KEEP_RATIO, case.normalize),
        _READ: k.sum,
    }
    expected = replace(inputs, w=w).expected(case)
    check_selection(hawk_kernels.score_and_select(q, k, w, KEEP_RATIO, normalize=case.normalize), expected, KEEP_RATIO)
    check_kept(plain_lines(q, k, w, KEEP_RATIO, case.normalize), expected, FLOAT32_ERROR)

    samples: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    shuffle = random.Random(0).shuffle
    for number in range(_WARM_UPS + rounds):
        shuffle(order)
        for name in order:
            k.sum()
            start = time.perf_counter()
            runs[name]()
            elapsed = (time.perf_counter() - start) * 1e6
            if number >= _WARM_UPS:
                samples[name].append(elapsed)
    medians = {name: statistics.median(times) for name, times in samples.items()}
    minima = {name: min(times) for name, times in samples.items()}
    speedup = {kind: times[_PLAIN] / times[_OURS] for kind, times in (("medians", medians), ("minima", minima))}
    return {
        "case": case.to_dict(),
        "title": str(case),
        "threads": torch.get_num_threads(),
        "medians": medians,
        "minima": minima,
        "speedup": speedup,
        "required": required(case),
        "met": {kind: ratio >= required(case) for kind, ratio in speedup.items()},
    }


def _line(row: dict[str, Any]) -> str:
    speedup = row["speedup"]
    threads = "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
    verdict = "met" if row["met"]["medians"] else "NOT MET"
    times = ", ".join(f"{name} {median:.0f} (min {row['minima'][name]:.0f})" for name, median in row["medians"].items())
    return (
        f"{threads}, {row['title']}: {speedup['medians']:.2f}x, required {row['required']}x: {verdict} "
        f"(minima {speedup['minima']:.2f}x); us: {times}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure and print a line for each case."""
    parser = cli.parser("bench.cpu_floor", __doc__, rounds=200)
    parser.add_argument("--threads", type=cli.whole_number(1), nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {"environment": environment(torch.device("cpu")), "unit": "microseconds", "rows": []}
    threads_before = torch.get_num_threads()
    try:
        for threads in options.threads:
            torch.set_num_threads(threads)
            for case in CASES:
                row = measure(case, options.rounds if case.num_keys < 16384 else -(-options.rounds // 4))
                results["rows"].append(row)
                print(_line(row), flush=True)
    finally:
        torch.set_num_threads(threads_before)
    if options.json:
        write_json(options.json, results)
    rows = results["rows"]
    met = {kind: sum(row["met"][kind] for row in rows) for kind in ("medians", "minima")}
    print(f"{met['medians']} of {len(rows)} rows meet what is required of them by medians, {met['minima']} by minima")
    return 0


if __name__ == "__main__":
    sys.exit(main())
