"""Time scoring by peaks of attention: ours, `attention_column_mean` and the literal softmax in one run, after parity.

    python -m bench.score_peaks [--device cuda] [--rounds 20] [--json FILE]

Queries and keys are those of Qwen2.5-VL-7B's first layer. Beside them stands `score_tokens`, which averages the text
first, so that it makes one product where the others make one for each text token: what the maximum costs. A row gives
the median time with 20th and 80th percentiles in milliseconds. No time is printed before the scores have been compared
with float64.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

import csrc_ref
from bench import cli
from bench.cases import QWEN_7B, Case
from bench.environment import environment, write_json
from bench.inputs import QueriesAndKeys, make_inputs
from bench.timing import interleaved
from hawk_kernels import attention_column_mean, score_peaks, score_tokens

OURS, MEAN = "ours", "mean over text"
_TOLERANCE = 4e-6


@dataclass(frozen=True)
class Shape:
    """One row of the table."""

    num_queries: int
    num_keys: int

    def inputs(self, device: torch.device) -> QueriesAndKeys:
        """Draw queries, keys and weights; half precision on a GPU."""
        dtype = "bf16" if device.type == "cuda" else "fp32"
        inputs = make_inputs(Case("queries", QWEN_7B, self.num_queries, self.num_keys, dtype), device)
        assert isinstance(inputs, QueriesAndKeys)
        return inputs

    def __str__(self) -> str:
        return f"{self.num_queries} x {self.num_keys}"


SHAPES = (Shape(8, 1296), Shape(20, 1296), Shape(64, 1296), Shape(20, 5120))
GPU_SHAPES = (*SHAPES, Shape(64, 16384))


def literal(inputs: QueriesAndKeys) -> torch.Tensor:
    """Compute the whole `[H, N, M]` softmax, as eager attention makes it."""
    keys = inputs.k.repeat_interleave(inputs.q.shape[1] // inputs.k.shape[1], dim=1)
    logits = inputs.q @ keys.transpose(2, 3) * inputs.q.shape[3] ** -0.5
    attention = torch.softmax(logits, dim=-1, dtype=torch.float32)
    return torch.einsum("h,bhm->bm", inputs.w, attention.amax(dim=2))


def contestants(inputs: QueriesAndKeys) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the calls that make the same scores, ours first."""
    q, k, w = inputs.q, inputs.k, inputs.w
    return {
        OURS: lambda: score_peaks(q, k, w),
        "attention_column_mean": lambda: attention_column_mean(q, k, head_weights=w, reduction="max"),
        "literal": lambda: literal(inputs),
    }


def check_parity(inputs: QueriesAndKeys) -> float:
    """Return the largest error of ours against float64, relative to the largest score.

    Raises:
        SystemExit: it is too large.
    """
    exact: torch.Tensor = csrc_ref.score_peaks(inputs.q.double(), inputs.k.double(), inputs.w.double())
    error = ((contestants(inputs)[OURS]().double() - exact).abs().max() / exact.max()).item()
    if not error <= _TOLERANCE:
        raise SystemExit(f"bench.score_peaks: parity failed with an error of {error:.1e}; nothing was timed")
    return error


def measure(shape: Shape, rounds: int, device: torch.device) -> dict[str, Any]:
    """Measure one row: parity, then times."""
    inputs = shape.inputs(device)
    row: dict[str, Any] = {**asdict(shape), "error": check_parity(inputs)}
    mean = {MEAN: lambda: score_tokens(inputs.q, inputs.k, inputs.w, normalize="l2")}
    for name, values in interleaved({**contestants(inputs), **mean}, rounds, device).items():
        low, *_, high = (value / 1e3 for value in statistics.quantiles(values, n=5))
        row[name] = {"median": statistics.median(values) / 1e3, "p20": low, "p80": high}
    return row


def main() -> None:
    """Measure, print the rows, and write them as JSON if asked, anew after each."""
    parser = cli.parser("bench.score_peaks", __doc__, device=cli.default_device(), rounds=20, json="none is written")
    arguments = parser.parse_args()
    about = environment(arguments.device)
    print(", ".join(f"{name} {value}" for name, value in about.items()), file=sys.stderr)
    print(f"{'text x keys':<14} {'contestant':<22} {'milliseconds':>24} {'ours is':>8}")
    rows = []
    for shape in GPU_SHAPES if arguments.device.type == "cuda" else SHAPES:
        row = measure(shape, arguments.rounds, arguments.device)
        rows.append(row)
        if arguments.json:
            write_json(arguments.json, {"environment": about, "milliseconds": rows})
        for name, entry in row.items():
            if isinstance(entry, dict):
                span = "{median:.2f} ({p20:.2f}-{p80:.2f})".format(**entry)
                print(f"{shape!s:<14} {name:<22} {span:>24} {entry['median'] / row[OURS]['median']:>7.2f}x", flush=True)


if __name__ == "__main__":
    main()
