"""Time the attention received by each key: ours, the literal softmax and flash-colreduce in one run, after parity.

    python -m bench.attention_column_mean [--device cuda] [--rounds 10] [--json FILE]

A row gives the median time with 20th and 80th percentiles in milliseconds, and the memory beyond the inputs at its
peak (on a CPU that of a fresh process, as Linux counts it). flash-colreduce (`pip install flash-colreduce`) runs on
CUDA only and has no segments; it is left out if it is not installed, and rounds its result to the dtype of the
queries. No time is printed before the statistic has been compared with float64; a contestant other than ours that fails
this, or raises, is reported as failed and not timed.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench import cli
from bench.environment import environment, write_json
from bench.timing import interleaved
from hawk_kernels import attention_column_mean

OURS = "ours"
_HEADS, _HEAD_DIM = 16, 64
_TOLERANCE = 4e-6
# bfloat16 has 8 bits, and the matrix of others passes through it
_TOLERANCE_OF_OTHERS = 2e-2


@dataclass(frozen=True)
class Shape:
    """One row of the table; with segments, each has `num_queries` rows and as many keys."""

    num_queries: int
    num_keys: int
    causal: bool = False
    segments: int = 0

    def inputs(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Draw queries, keys and `cu_seqlens`; half precision on a GPU, as encoders run there."""
        generator = torch.Generator().manual_seed(0)
        copies = max(1, self.segments)
        q, k = (
            torch.randn(1, _HEADS, length * copies, _HEAD_DIM, generator=generator)
            for length in (self.num_queries, self.num_keys)
        )
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        cu_seqlens = torch.arange(0, self.num_keys * copies + 1, self.num_keys, dtype=torch.int32, device=device)
        return q.to(device, dtype), k.to(device, dtype), cu_seqlens if self.segments else None

    def __str__(self) -> str:
        windows = f" x {self.segments}" if self.segments else ""
        return f"{self.num_queries} x {self.num_keys}{windows}{' causal' if self.causal else ''}"


SQUARES = (Shape(576, 576), Shape(1024, 1024), Shape(4096, 4096))
SHAPES = (*SQUARES, Shape(64, 16384, causal=True), Shape(64, 64, segments=100))
# Its literal softmax takes 17 GB.
GPU_SHAPES = (*SHAPES, Shape(16384, 16384))


def literal(q: torch.Tensor, k: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Compute the whole matrix, as eager attention makes it, segment by segment."""
    segments = zip(q.split(shape.num_queries, dim=2), k.split(shape.num_keys, dim=2), strict=True)
    return torch.cat([_literal(queries, keys, shape.causal) for queries, keys in segments], dim=1)


def _literal(q: torch.Tensor, k: torch.Tensor, causal: bool) -> torch.Tensor:
    num_queries, num_keys = q.shape[2], k.shape[2]
    logits = q @ k.transpose(2, 3) * _HEAD_DIM**-0.5
    if not causal:
        return torch.softmax(logits, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).mean(dim=(1, 2))
    hidden = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).triu(num_keys - num_queries + 1)
    attention = torch.softmax(logits.masked_fill(hidden, -torch.inf), dim=-1)
    return attention.mean(dim=1).sum(dim=1) / (~hidden).sum(dim=0)


def ours(q: torch.Tensor, k: torch.Tensor, shape: Shape, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """Compute the same statistic without the matrix."""
    return attention_column_mean(q, k, cu_seqlens=cu_seqlens, causal=shape.causal)


def contestants(shape: Shape, device: torch.device) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the calls of all that can run this shape, ours first."""
    q, k, cu_seqlens = shape.inputs(device)
    runs: dict[str, Callable[[], torch.Tensor]] = {OURS: lambda: ours(q, k, shape, cu_seqlens)}
    if _literal_bytes(shape) < 2**33:
        runs["literal"] = lambda: literal(q, k, shape)
    if device.type == "cuda" and cu_seqlens is None and find_spec("flash_colreduce") is not None:
        from flash_colreduce import flash_colreduce

        runs["flash-colreduce"] = lambda: flash_colreduce(q, k, reduction="mean", is_causal=shape.causal).mean(dim=1)
    return runs


def _literal_bytes(shape: Shape) -> int:
    return 4 * _HEADS * shape.num_queries * shape.num_keys


def check_parity(shape: Shape, device: torch.device) -> dict[str, dict[str, Any]]:
    """By contestant its largest error against float64 relative to the largest value, or why it is not timed.

    Raises:
        SystemExit: ours fails.
    """
    q, k, _ = shape.inputs(device)
    heads = [literal(q[:, i : i + 1].double(), k[:, i : i + 1].double(), shape) for i in range(_HEADS)]
    expected = torch.stack(heads).mean(dim=0)
    found: dict[str, dict[str, Any]] = {}
    for name, run in contestants(shape, device).items():
        try:
            error = ((run().double() - expected).abs().max() / expected.max()).item()
        # code of others may raise anything, and is then reported as failed
        except Exception as problem:
            if name == OURS:
                raise
            found[name] = {"failed": f"{type(problem).__name__}: {problem}".splitlines()[0]}
            continue
        found[name] = {"error": error}
        if not error <= (_TOLERANCE if name == OURS else _TOLERANCE_OF_OTHERS):
            found[name]["failed"] = f"an error of {error:.1e}"
    if "failed" in found[OURS]:
        raise SystemExit(
            f"bench.attention_column_mean: parity failed at {shape} with {found[OURS]['failed']}; nothing was timed"
        )
    return found


def peak_memory(shape: Shape, name: str, device: torch.device) -> float:
    """Measure the MiB at the peak of a call beyond its inputs."""
    if device.type == "cuda":
        run = contestants(shape, device)[name]
        run()
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_resident_growth, (shape, name, torch.get_num_threads()))


def _resident_growth(shape: Shape, name: str, threads: int) -> float:
    torch.set_num_threads(threads)
    small = Shape(8, 8, shape.causal, min(shape.segments, 2))
    contestants(small, torch.device("cpu"))[name]()
    run = contestants(shape, torch.device("cpu"))[name]
    before = _peak_resident()
    run()
    return (_peak_resident() - before) / 2**10


def _peak_resident() -> int:
    """Return the peak in KiB; unlike `ru_maxrss`, it does not begin at the peak of the parent process."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def measure(shape: Shape, rounds: int, device: torch.device) -> dict[str, Any]:
    """Measure one row: parity, then times, then memory."""
    parity = check_parity(shape, device)
    timed = {name: run for name, run in contestants(shape, device).items() if "failed" not in parity[name]}
    for name, values in interleaved(timed, rounds, device).items():
        low, *_, high = (value / 1e3 for value in statistics.quantiles(values, n=5))
        median = statistics.median(values) / 1e3
        parity[name] |= {"median": median, "p20": low, "p80": high, "peak_mib": peak_memory(shape, name, device)}
    return {**asdict(shape), **parity}


def main() -> None:
    """Measure, print the rows, and write them as JSON if asked, anew after each."""
    parser = cli.parser(
        "bench.attention_column_mean", __doc__, device=cli.default_device(), rounds=10, json="none is written"
    )
    arguments = parser.parse_args()
    device = arguments.device

    about = environment(device)
    print(", ".join(f"{name} {value}" for name, value in about.items()), file=sys.stderr)
    print(f"{'rows x keys':<20} {'contestant':<16} {'milliseconds':>24} {'peak MiB':>9} {'ours is':>8}")
    rows = []
    for shape in GPU_SHAPES if device.type == "cuda" else SHAPES:
        row = measure(shape, arguments.rounds, device)
        rows.append(row)
        if arguments.json:
            write_json(arguments.json, {"environment": about, "milliseconds": rows})
        for name in (OURS, "literal", "flash-colreduce"):
            if "failed" in row.get(name, ()):
                print(f"{shape!s:<20} {name:<16} failed: {row[name]['failed']}", flush=True)
            elif name in row:
                span = "{median:.2f} ({p20:.2f}-{p80:.2f})".format(**row[name])
                ratio = row[name]["median"] / row[OURS]["median"]
                print(f"{shape!s:<20} {name:<16} {span:>24} {row[name]['peak_mib']:>9.1f} {ratio:>7.1f}x", flush=True)


if __name__ == "__main__":
    main()
