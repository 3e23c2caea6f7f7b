"""Time greedy selection, ours and the literal loops in one run, after parity.

    python -m bench.greedy [--device cuda] [--rounds 5] [--kept 576] [--json FILE]

Two spans are timed: the picks alone, from given cosines of all pairs, and the whole call, from features of `hidden`
entries per token. Contestants, for greedy max-min (DivPrune):

    ours      a running nearest distance, one short run of whole-row steps per pick
    literal   the distances to all tokens picked so far, looked up and reduced again for every pick

and for greedy DPP (CDPruner):

    ours        one row of a Cholesky factor per pick, in units of cosines
    literal     what every token adds to the determinant, by a solve with the picked ones' kernel for every pick
    cholesky    the incremental loop of arXiv 1709.05135 over the whole kernel, as CDPruner's release runs it

The literal loop of the latter takes most of a minute per run at the largest shape and is timed on the picks alone.
All contestants read the same cosines. A median is given with the 20th and 80th percentile, in milliseconds; on a GPU
the host waits for the device around every sample. No time is printed before the picks have been compared with those of
a literal loop in float64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from bench import cli
from bench.environment import environment, write_json
from bench.timing import eager_sampler, spread
from hawk_kernels import greedy_dpp, greedy_max_min
from hawk_kernels.backends.eager import greedy as eager_greedy
from hawk_kernels.backends.eager.greedy import Cosines, squared_quality, unit_vectors

METHODS = ("max_min", "dpp")


@dataclass(frozen=True)
class Shape:
    """One row of the table."""

    num_tokens: int
    kept: int
    hidden: int = 4096
    batch: int = 1

    def __str__(self) -> str:
        return f"{self.kept} of {self.num_tokens}" + (f" x {self.batch}" if self.batch > 1 else "")


# one picture of LLaVA-1.5, five tiles of LLaVA-NeXT
SHAPES = (Shape(576, 64), Shape(576, 192), Shape(2880, 160), Shape(2880, 576))


@dataclass(frozen=True)
class Inputs:
    """Tokens around a few centres, as those of a picture are, and their cosines."""

    features: torch.Tensor
    quality: torch.Tensor
    cosines: torch.Tensor

    @classmethod
    def make(cls, shape: Shape, device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        centres = torch.randn(shape.batch, 24, shape.hidden, generator=generator)
        of_centre = torch.randint(24, (shape.batch, shape.num_tokens, 1), generator=generator)
        features = centres.gather(1, of_centre.expand(-1, -1, shape.hidden))
        features = features + torch.randn(features.shape, generator=generator)
        quality = torch.rand(shape.batch, shape.num_tokens, generator=generator) + 0.05
        features, quality = features.to(device), quality.to(device)
        return cls(features, quality, cosines_of(features))


def cosines_of(features: torch.Tensor) -> torch.Tensor:
    """Return the cosine similarity of every pair of tokens, `[B, M, M]`."""
    unit = torch.nn.functional.normalize(features, dim=-1)
    return unit @ unit.transpose(1, 2)


def literal_max_min(cosines: torch.Tensor, kept: int) -> torch.Tensor:
    """Pick `[B, K]` from cosines `[B, M, M]`."""
    rows = []
    for of_row in cosines:
        distance = 1 - of_row
        picked = torch.empty(kept, dtype=torch.int64, device=cosines.device)
        for place in range(kept):
            if place == 0:
                nearest = distance.topk(2, dim=0, largest=False).values[1]
            else:
                nearest = distance[picked[:place]].amin(dim=0)
                nearest[picked[:place]] = -torch.inf
            picked[place] = nearest.argmax()
        rows.append(picked)
    return torch.stack(rows)


def literal_dpp(cosines: torch.Tensor, quality: torch.Tensor, kept: int) -> torch.Tensor:
    """Pick `[B, K]` by `det L[S + i] / det L[S] = L[i, i] - L[i, S] L[S, S]^-1 L[S, i]`, anew for each pick."""
    rows = []
    for kernel in quality.unsqueeze(2) * cosines * quality.unsqueeze(1):
        picked = torch.empty(kept, dtype=torch.int64, device=cosines.device)
        for place in range(kept):
            before = picked[:place]
            of_picked = kernel[before]
            solved = torch.linalg.solve(of_picked[:, before], of_picked)
            gain = kernel.diagonal() - (of_picked * solved).sum(dim=0)
            gain[before] = -torch.inf
            picked[place] = gain.argmax()
        rows.append(picked)
    return torch.stack(rows)


def cholesky_dpp(cosines: torch.Tensor, quality: torch.Tensor, kept: int) -> torch.Tensor:
    """Pick `[B, K]` by algorithm 1 of arXiv 1709.05135."""
    kernel = quality.unsqueeze(2) * cosines * quality.unsqueeze(1)
    batch, num_tokens, _ = kernel.shape
    row = torch.arange(batch, device=kernel.device)
    factor = kernel.new_zeros(kept, batch, num_tokens)
    gain = kernel.diagonal(dim1=1, dim2=2).clone()
    picked = torch.empty(batch, kept, dtype=torch.int64, device=kernel.device)
    for place in range(kept):
        best = gain.argmax(dim=1)
        picked[:, place] = best
        taken = torch.einsum("tb,tbm->bm", factor[:place, row, best], factor[:place])
        factor[place] = (kernel[row, best] - taken) / gain[row, best].sqrt().unsqueeze(1)
        gain -= factor[place].square()
        gain[row, best] = -torch.inf
    return picked


def our_picks(method: str, inputs: Inputs, kept: int) -> Callable[[], object]:
    """Return the call that picks from given cosines, in the backend of the device."""
    backend: Any = eager_greedy
    if inputs.features.device.type == "cuda":
        from hawk_kernels.backends.kernels import greedy as backend
    unit, candidates, finite = unit_vectors(inputs.features, None)
    if method == "max_min":
        apart = Cosines(unit, candidates & finite, itself=torch.inf)
        return lambda: backend.max_min_picks(apart, candidates, finite, None, kept)
    cosines = Cosines(unit)
    weight = squared_quality(inputs.quality, candidates, finite)
    length = unit.square().sum(dim=2).round_()
    return lambda: backend.dpp_picks(cosines, length, weight, None, kept)


def contestants(method: str, span: str, inputs: Inputs, kept: int) -> dict[str, Callable[[], object]]:
    """Return the calls of all contestants, ours first."""
    features, quality = inputs.features, inputs.quality

    def cosines() -> torch.Tensor:
        return inputs.cosines if span == "picks" else cosines_of(features)

    ours: Callable[[], object]
    if method == "max_min":
        ours = partial(greedy_max_min, features, kept)
        runs: dict[str, Callable[[], object]] = {"literal": lambda: literal_max_min(cosines(), kept)}
    else:
        ours = partial(greedy_dpp, features, quality, kept)
        runs = {"cholesky": lambda: cholesky_dpp(cosines(), quality, kept)}
        if span == "picks":
            runs["literal"] = lambda: literal_dpp(inputs.cosines, quality, kept)
    return {"ours": our_picks(method, inputs, kept) if span == "picks" else ours, **runs}


def check_parity(method: str, inputs: Inputs, kept: int) -> None:
    """Check that the tokens are those of the literal loop in float64."""
    exact = cosines_of(inputs.features.double())
    if method == "max_min":
        expected, found = literal_max_min(exact, kept), greedy_max_min(inputs.features, kept)
    else:
        # one float64 run of the literal loop would take longer than all that is timed
        expected = cholesky_dpp(exact, inputs.quality.double(), kept)
        found = greedy_dpp(inputs.features, inputs.quality, kept)
    if not torch.equal(found.indices, expected.sort(dim=1).values):
        differ = int((found.indices != expected.sort(dim=1).values).sum())
        raise SystemExit(
            f"bench.greedy: {method} picked {differ} of {kept} tokens that the reference does not; nothing was timed"
        )


def interleaved(
    contestants: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Measure the milliseconds of each contestant, one sample of each in a round, after one that does not count."""
    samplers = {name: eager_sampler(run, device) for name, run in contestants.items()}
    for sample in samplers.values():
        sample()
    times: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(rounds):
        for name, sample in samplers.items():
            times[name].append(sample() / 1e3)
    return times


def main() -> None:
    """Measure, print the rows, and write them as JSON if asked."""
    parser = cli.parser("bench.greedy", __doc__, device=torch.device("cpu"), rounds=5, json="none is written")
    parser.add_argument("--method", choices=METHODS, action="append", help="default: both")
    parser.add_argument("--kept", type=int, action="append", help="only shapes that keep so many tokens")
    arguments = parser.parse_args()
    device = arguments.device

    about = environment(device)
    print(", ".join(f"{name} {value}" for name, value in about.items()), file=sys.stderr)
    print(f"{'method':<8} {'span':<6} {'kept':<12} {'contestant':<10} {'milliseconds':>28} {'ours is':>9}")
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        if arguments.kept and shape.kept not in arguments.kept:
            continue
        inputs = Inputs.make(shape, device)
        for method in arguments.method or METHODS:
            check_parity(method, inputs, shape.kept)
            for span in ("picks", "whole"):
                times = interleaved(contestants(method, span, inputs, shape.kept), arguments.rounds, device)
                row = {"method": method, "span": span, **asdict(shape)}
                row |= {name: spread(values) for name, values in times.items()}
                rows.append(row)
                for name in times:
                    shown = "{median:.2f} ({p20:.2f}-{p80:.2f})".format(**row[name])
                    ratio = row[name]["median"] / row["ours"]["median"]
                    print(f"{method:<8} {span:<6} {shape!s:<12} {name:<10} {shown:>28} {ratio:>8.1f}x", flush=True)
                if arguments.json:
                    write_json(arguments.json, {"environment": about, "milliseconds": rows})


if __name__ == "__main__":
    main()
