"""Time packing the kept tokens into the pruned prompt, ours and plain PyTorch in one run, after parity.

    python -m bench.compact [--device cuda] [--rounds 20] [--seconds 4] [--output FOLDER]

Each contender makes the packed embeddings, three axes of position ids and the left-padded mask. Not a bit may differ
from the reference before anything is timed. On a GPU the last-level cache is cold, as in a prefill that has just made
the embeddings of a whole prompt; a row gives the host's clock around one call, and the device's over CUDA graph
replay for contenders without a host sync. The floor is the time in which a plain copy, measured in the same run, moves
the bytes that must be read and written.

Two contenders merge as well: each dropped visual token goes into the kept one before it, all of them averaged. Their
floor is still that of the copy alone, and their embeddings are compared with a tolerance, because sums of a cluster may
be taken in any order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

import csrc_ref
from bench import cli, model
from bench.environment import environment, write_json
from bench.timing import Flush, Replay, calls_in_a_graph, copy_bandwidth, eager_sampler, peak_bytes, rotate, spread
from hawk_kernels import Compacted, compact
from hawk_kernels.selection import Merge

OURS, ASKING, SELECTING, INDEXING = "compact", "compact, length asked", "cumsum, index_select", "boolean indexing"
MERGING, ADDING = "compact, merging", "cumsum, index_add"
_AXES, _TEXT_BEFORE, _TEXT_AFTER, _KEEP_RATIO = 3, 15, 69, 0.2

Contender = Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Shape:
    """Prompts of so many visual tokens, a fifth of which stay, with text before and after them.

    Of several rows, each has a twentieth less of both than the one before and is padded at its left.
    """

    batch: int
    num_visual: int
    hidden_size: int = 3584

    @property
    def num_tokens(self) -> int:
        """Count the tokens of a row, padding included."""
        return _TEXT_BEFORE + self.num_visual + _TEXT_AFTER

    def __str__(self) -> str:
        return f"B={self.batch} T={self.num_tokens} C={self.hidden_size}"


SHAPES = tuple(Shape(*sizes) for sizes in ((1, 1296), (1, 5120), (4, 1296)))
GPU_SHAPES = tuple(
    Shape(*sizes) for sizes in ((1, 1296), (1, 5120), (1, 16384), (1, 131072), (8, 1296), (1, 5120, 2048))
)


class Prompt:
    """Inputs of one shape, and what the reference makes of them."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)
        size = (shape.batch, shape.num_tokens)
        self.embeds = torch.randn(*size, shape.hidden_size, generator=generator, device=device).to(dtype)
        self.positions = torch.arange(shape.num_tokens, device=device).expand(_AXES, *size).contiguous()
        self.keep_mask = torch.zeros(size, dtype=torch.bool, device=device)
        for row in range(shape.batch):
            num_visual = int(shape.num_visual * (1 - row / 20))
            visual = slice(-_TEXT_AFTER - num_visual, -_TEXT_AFTER)
            scores = torch.rand(num_visual, generator=generator, device=device)
            self.keep_mask[row, -_TEXT_AFTER - num_visual - _TEXT_BEFORE :] = True
            self.keep_mask[row, visual] = scores.argsort() < int(_KEEP_RATIO * num_visual)
        self.counts = self.keep_mask.sum(dim=1).tolist()
        self.length = max(self.counts)
        self.merge = self._merge()
        whole = {"position_ids": self.positions.cpu(), "length": self.length}
        self.expected = csrc_ref.compact(self.embeds.cpu(), self.keep_mask.cpu(), **whole)
        on_host = Merge(*(part.cpu() for part in self.merge))
        wide = self.embeds.cpu().double()
        self.merged = csrc_ref.compact(wide, self.keep_mask.cpu(), merge=on_host, **whole).inputs_embeds

    def _merge(self) -> Merge:
        """Send each dropped visual token to the kept token before it, and average."""
        place = torch.arange(self.keep_mask.shape[1], device=self.keep_mask.device).expand_as(self.keep_mask)
        target = torch.where(self.keep_mask, place, -1).cummax(dim=1).values
        size = torch.zeros_like(target).scatter_add_(1, target.clamp(min=0), torch.ones_like(target))
        return Merge(target, place.contiguous(), 1 / size.gather(1, target.clamp(min=0)).float()).ordered()

    @property
    def cost(self) -> model.Cost:
        """Count the bytes that must be moved."""
        size = self.embeds.element_size()
        return model.compaction(1, sum(self.counts), self.embeds.shape[2], _AXES, size)

    def check(self, found: tuple[torch.Tensor, torch.Tensor, torch.Tensor], merges: bool = False) -> None:
        """Raise an AssertionError if a bit differs from the reference, or a mean by more than its rounding."""
        for name, got, expected in zip(Compacted._fields, found, self.expected, strict=False):
            if merges and name == "inputs_embeds":
                precision = torch.finfo(got.dtype).eps
                same = torch.allclose(got.cpu().double(), self.merged, rtol=4 * precision, atol=4 * precision)
            else:
                same = torch.equal(got.cpu(), expected)
            if not same:
                raise AssertionError(f"{name} differs from the reference")


def contenders(prompt: Prompt) -> dict[str, Contender]:
    """Return all contenders; on a CPU, ours is cumsum, index_select and, where it merges, index_add."""

    def ours(length: int | None, backend: str | None = None, merge: Merge | None = None) -> Contender:
        def run() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            found = compact(
                prompt.embeds,
                prompt.keep_mask,
                position_ids=prompt.positions,
                length=length,
                merge=merge,
                backend=backend,
            )
            return found[:3]

        return run

    found = {OURS: ours(prompt.length), ASKING: ours(None), MERGING: ours(prompt.length, merge=prompt.merge)}
    if prompt.embeds.device.type == "cuda":
        found[SELECTING] = ours(prompt.length, "torch")
        found[ADDING] = ours(prompt.length, "torch", prompt.merge)
    return {**found, INDEXING: lambda: boolean_indexing(prompt.embeds, prompt.keep_mask, prompt.positions)}


def boolean_indexing(
    embeds: torch.Tensor, keep_mask: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pack as pruning code usually does: index each row by its mask, then pad."""
    rows = [embeds[row, keep] for row, keep in enumerate(keep_mask)]
    position_rows = [positions[:, row, keep] for row, keep in enumerate(keep_mask)]
    length = max(len(row) for row in rows)
    pad = torch.nn.functional.pad
    return (
        torch.stack([pad(row, (0, 0, length - len(row), 0)) for row in rows]),
        torch.stack([pad(row, (length - row.shape[1], 0)) for row in position_rows], dim=1),
        torch.stack([pad(keep_mask.new_ones(len(row), dtype=torch.long), (length - len(row), 0)) for row in rows]),
    )


def measure(shape: Shape, rounds: int, seconds: float, device: torch.device, bandwidth: float) -> dict[str, Any]:
    """Measure one row: parity of all, then times, then memory.

    Raises:
        SystemExit: a contender differs from the reference.
    """
    prompt = Prompt(shape, device)
    runs = contenders(prompt)
    for name, run in runs.items():
        try:
            prompt.check(run(), merges=name in (MERGING, ADDING))
        except AssertionError as error:
            raise SystemExit(f"bench.compact: {name} at {shape}: {error}; nothing was timed") from None

    flush = Flush(device) if device.type == "cuda" else None
    samplers = {(name, "eager"): eager_sampler(run, device, flush) for name, run in runs.items()}
    eager = {name: values for (name, _), values in rotate(samplers, rounds, seconds / 2).items()}
    replays: dict[str, list[float]] = {}
    if device.type == "cuda":
        replays = replayed(
            {name: runs[name] for name in (OURS, SELECTING, MERGING, ADDING)}, eager, rounds, seconds / 2, flush
        )

    moved = prompt.cost.read + prompt.cost.written
    row: dict[str, Any] = {
        **asdict(shape),
        "num_tokens": shape.num_tokens,
        "kept": prompt.counts,
        "floor": {"bytes": moved, "microseconds": moved / bandwidth * 1e6},
        "contenders": [],
    }
    for name, run in runs.items():
        entry = {"name": name, "eager": spread(eager[name]), "peak_bytes": peak_bytes(run, device)}
        entry |= {"graph": spread(replays[name])} if name in replays else {}
        row["contenders"].append(entry)
    return row


def replayed(
    runs: dict[str, Contender], eager: dict[str, list[float]], rounds: int, seconds: float, flush: Flush | None
) -> dict[str, list[float]]:
    """Measure the microseconds of a call inside a CUDA graph, without those of the flush."""
    calls = {name: calls_in_a_graph(min(eager[name])) for name in runs}
    samplers = {name: Replay(run, calls[name], flush) for name, run in runs.items()}
    samples = rotate({**samplers, "flush": Replay(None, max(calls.values()), flush)}, rounds, seconds)
    flushes = samples.pop("flush")
    return {
        name: [value - flushed for value, flushed in zip(values, flushes, strict=True)]
        for name, values in samples.items()
    }


def print_row(row: dict[str, Any], shape: Shape) -> None:
    """Print a line for each contender."""
    floor = row["floor"]["microseconds"]
    ours = row["contenders"][0]
    for entry in row["contenders"]:
        span = "{median:.0f} ({p20:.0f}-{p80:.0f})".format(**entry["eager"])
        graph = f"{entry['graph']['median']:.1f}" if "graph" in entry else ""
        best = entry.get("graph", entry["eager"])["median"]
        print(
            f"{shape!s:<24} {entry['name']:<22} {span:>24} {graph:>9} {best / floor:>8.1f}x "
            f"{entry['peak_bytes'] / 2**20:>9.1f} {entry['eager']['median'] / ours['eager']['median']:>8.1f}x",
            flush=True,
        )


def main() -> None:
    """Measure, print a line for each contender, and rewrite the JSON after each shape."""
    parser = cli.parser(
        "bench.compact",
        __doc__,
        device=cli.default_device(),
        rounds=20,
        seconds=(4.0, "at most, for each shape (default: %(default)s)"),
        output="bench/results/<device>",
    )
    arguments = parser.parse_args()
    device = arguments.device
    path = cli.results_file(arguments, "compact.json")

    bandwidth = copy_bandwidth(device)
    found: dict[str, Any] = {
        "environment": environment(device),
        "copy_bytes_per_second": bandwidth,
        "keep_ratio": _KEEP_RATIO,
        "rows": [],
    }
    print(f"a copy moves {bandwidth / 1e9:.0f} GB/s; microseconds of a call, median (p20-p80)", file=sys.stderr)
    print(f"{'shape':<24} {'contender':<22} {'eager':>24} {'graph':>9} {'of floor':>9} {'peak MiB':>9} {'to ours':>9}")
    for shape in GPU_SHAPES if device.type == "cuda" else SHAPES:
        found["rows"].append(measure(shape, arguments.rounds, arguments.seconds, device, bandwidth))
        print_row(found["rows"][-1], shape)
        write_json(path, found)
    print(f"written: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
