"""Check what must hold on a device before anything is measured there: parity, repeatability, graphs, streams, threads.

    python -m bench.verify [parity repeatability graphs streams threads] [--slice gpu] [--shard 0/8] [--json FILE]

Parity is with float64 over sizes, dtypes, norms, head sizes, masks, ties, NaN and strides; the others ask for the same
bits again: 1000 times in a row, by a replayed CUDA graph over changed inputs, from two streams and from many threads at
once. On a CPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1), which has one stream and no graphs.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

import csrc_ref
import hawk_kernels
from bench import cli
from bench.cases import DTYPES, QWEN_7B, Case, Decoder
from bench.environment import environment, write_json
from bench.inputs import HiddenStates, make_inputs
from bench.parity import FLOAT32_ERROR, ParityError, check_selection
from hawk_kernels import Selection

Check = tuple[str, Callable[[], str]]

NORMALIZATIONS = (None, "l2", "softmax", "minmax")
_HIDDEN_ERROR = 1e-5


@dataclass(frozen=True)
class Shape:
    """Inputs of `score_and_select`.

    Attributes:
        values: "random"; "ties", few different scores; or "not finite", NaN and infinities among the keys.
        layout: "contiguous"; "transposed", heads and tokens swapped in memory; or "expanded", one key head for all.
        masked: ragged rows, with NaN at every position that a mask excludes.
    """

    num_keys: int = 1296
    batch: int = 1
    num_heads: int = 28
    num_key_value_heads: int = 4
    num_queries: int = 20
    head_dim: int = 128
    dtype: str = "bf16"
    normalize: str | None = "l2"
    masked: bool = False
    values: str = "random"
    layout: str = "contiguous"
    r: float | int = 0.2
    rounding: str = "floor"

    def __str__(self) -> str:
        changed = (f for f in fields(self) if f.name == "num_keys" or getattr(self, f.name) != f.default)
        return ", ".join(f"{f.name}={getattr(self, f.name)}" for f in changed)


GPU_SHAPES = (
    *(Shape(m) for m in (1296, 16384, 131072, 1, 17, 256, 576, 2048, 2049, 2880, 5120, 16385, 65536, 262144)),
    *(Shape(batch=2, dtype=d, normalize=n, masked=True) for d in DTYPES for n in NORMALIZATIONS),
    *(Shape(m, normalize=n, masked=True) for m in (16384, 65536) for n in NORMALIZATIONS),
    *(Shape(head_dim=d, masked=m) for d, m in ((64, False), (72, True), (80, False), (96, True), (256, False))),
    *(Shape(num_heads=h, num_key_value_heads=g) for h, g in ((1, 1), (4, 1), (8, 1), (32, 32), (64, 8))),
    *(Shape(num_queries=n) for n in (0, 1, 8, 256, 4096)),
    *(Shape(m, values=v, normalize=None) for m in (1296, 16384, 65536) for v in ("ties", "not finite")),
    *(Shape(layout=layout, masked=True) for layout in ("transposed", "expanded")),
    Shape(256, batch=64, masked=True),
    Shape(1296, batch=8, dtype="fp32"),
    Shape(5120, r=7),
    Shape(5120, r=1.0, masked=True),
    Shape(1297, r=0.29, rounding="ceil"),
)
# Every path of the kernels once: what a checker that slows them down a hundredfold can still run.
SMOKE_SHAPES = (
    Shape(1296, batch=2, masked=True),
    Shape(5000, normalize=None),
    Shape(20000, num_heads=7, num_key_value_heads=1, num_queries=200, normalize="softmax"),
    Shape(300, dtype="fp32", normalize="minmax", head_dim=72, values="ties", layout="transposed"),
)
_TINY: dict[str, Any] = {"num_heads": 2, "num_key_value_heads": 1, "num_queries": 3, "head_dim": 16}
TINY_SHAPES = (
    Shape(40, batch=2, masked=True, **_TINY),
    Shape(33, dtype="fp32", normalize=None, values="ties", layout="transposed", **_TINY),
)
SLICES = {"gpu": GPU_SHAPES, "smoke": SMOKE_SHAPES, "tiny": TINY_SHAPES}
HIDDEN_CASES = {
    "gpu": (
        *(Case("hidden", QWEN_7B, 20, m, "bf16") for m in (1296, 5120, 16384)),
        *(Case("hidden", QWEN_7B, 20, 1296, "bf16", normalize=n) for n in (None, "softmax", "minmax")),
        *(Case("hidden", QWEN_7B, 20, 576, d, batch=2) for d in ("fp32", "fp16")),
    ),
    "smoke": (Case("hidden", QWEN_7B, 20, 576, "bf16"),),
    "tiny": (Case("hidden", Decoder("tiny", 2, 1, 16, 32), 3, 40, "fp32"),),
}


@dataclass
class Arguments:
    """Tensors of a `Shape`, and their scores in float64."""

    q: torch.Tensor
    k: torch.Tensor
    w: torch.Tensor
    q_mask: torch.Tensor | None
    k_mask: torch.Tensor | None

    def to(self, device: torch.device) -> Arguments:
        """Copy the numbers to another device."""
        masks = (None if mask is None else mask.to(device) for mask in (self.q_mask, self.k_mask))
        return Arguments(self.q.to(device), self.k.to(device), self.w.to(device), *masks)

    def expected(self, shape: Shape) -> torch.Tensor:
        """float64 `[B, M]`."""
        q, k, w = (tensor.double() for tensor in (self.q, self.k, self.w))
        masks = {"q_mask": self.q_mask, "k_mask": self.k_mask}
        scores: torch.Tensor = csrc_ref.score_tokens(q, k, w, normalize=shape.normalize, **masks)
        return scores

    def select(self, shape: Shape) -> Selection:
        """Call the operator that is checked."""
        return hawk_kernels.score_and_select(
            self.q,
            self.k,
            self.w,
            shape.r,
            q_mask=self.q_mask,
            k_mask=self.k_mask,
            normalize=shape.normalize,
            rounding=shape.rounding,
            backend="triton",
        )


def make_arguments(shape: Shape, device: torch.device, seed: int = 0) -> Arguments:
    """Draw the tensors of a shape."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    batch, num_keys, num_queries = shape.batch, shape.num_keys, shape.num_queries
    q = random(batch, shape.num_heads, num_queries, shape.head_dim)
    k = random(batch, shape.num_key_value_heads, num_keys, shape.head_dim)
    w = torch.rand(shape.num_heads, generator=generator, device=device)
    if shape.values == "ties":
        # eight different keys
        kinds = torch.randint(0, 8, (num_keys,), generator=generator, device=device)
        k = random(batch, shape.num_key_value_heads, 8, shape.head_dim)[:, :, kinds]
    elif shape.values == "not finite":
        k[:, :, ::5, 0] = torch.nan
        k[:, :, 1::7, 1] = torch.inf
    q_mask = k_mask = None
    if shape.masked:
        q_mask = torch.rand(batch, num_queries, generator=generator, device=device) < 0.6
        share = torch.linspace(0.2, 0.9, batch, device=device)[:, None]
        k_mask = torch.rand(batch, num_keys, generator=generator, device=device) < share
        q_mask[:, :1] = True
        q = q.masked_fill(~q_mask[:, None, :, None], torch.nan)
        k = k.masked_fill(~k_mask[:, None, :, None], torch.nan)
    q, k = (tensor.to(DTYPES[shape.dtype]) for tensor in (q, k))
    if shape.layout == "transposed":
        q, k = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (q, k))
    elif shape.layout == "expanded":
        k = k[:, :1].expand(-1, shape.num_key_value_heads, -1, -1)
    return Arguments(q, k, w, q_mask, k_mask)


def parity(device: torch.device, which: str, part: tuple[int, int] = (0, 1)) -> Iterator[Check]:
    """Yield name and check of the shapes of one part; a check returns what it found."""
    position, count = part
    # under a checker that slows the device down, only what is checked runs there
    home = torch.device("cpu") if which == "smoke" else device
    for shape in SLICES[which][position::count]:
        yield f"parity {shape}", partial(_check_shape, shape, device, home)
    for case in HIDDEN_CASES[which][position::count]:
        yield f"parity {case}", partial(_check_hidden, case, device, home)


def _at(device: torch.device, selection: Selection) -> Selection:
    return Selection(*(tensor.to(device) for tensor in selection))


def _check_shape(shape: Shape, device: torch.device, home: torch.device) -> str:
    arguments = make_arguments(shape, home)
    selection, expected = _at(home, arguments.to(device).select(shape)), arguments.expected(shape)
    error = check_selection(
        selection, expected, shape.r, mask=arguments.k_mask, rounding=shape.rounding, tolerance=FLOAT32_ERROR
    )
    return f"error {error:.1e}"


def _check_hidden(case: Case, device: torch.device, home: torch.device) -> str:
    inputs = make_inputs(case, home)
    assert isinstance(inputs, HiddenStates)
    expected = inputs.expected(case)
    selection = _at(home, _hidden_selection(inputs.to(device), case))
    error = check_selection(selection, expected, 0.2, mask=torch.isfinite(expected), tolerance=_HIDDEN_ERROR)
    return f"error {error:.1e}"


def _hidden_selection(inputs: HiddenStates, case: Case) -> Selection:
    arguments = {**inputs.arguments, "r": 0.2, "normalize": case.normalize, "backend": "triton"}
    return hawk_kernels.score_hidden_and_select(**arguments)


@dataclass(frozen=True)
class Subject:
    """Something that is run over and over.

    Attributes:
        name: in messages.
        run: a call on the inputs as they are now.
        changeable: the input that may be overwritten between two calls.
    """

    name: str
    run: Callable[[], Selection]
    changeable: torch.Tensor

    def change(self, seed: int) -> None:
        """Write new numbers into the same memory."""
        generator = torch.Generator(self.changeable.device).manual_seed(seed)
        values = torch.randn(self.changeable.shape, generator=generator, device=self.changeable.device)
        self.changeable.copy_(values)


def subjects(device: torch.device, which: str, seed: int = 0) -> list[Subject]:
    """Return every kernel on a short, a medium and a long row."""
    shapes = TINY_SHAPES[:1] if which == "tiny" else (Shape(1296), Shape(16384, batch=2, masked=True), Shape(131072))
    found = []
    for shape in shapes:
        arguments = make_arguments(shape, device, seed)
        found.append(Subject(str(shape), partial(arguments.select, shape), arguments.k))
    case = HIDDEN_CASES[which][0]
    inputs = make_inputs(case, device)
    assert isinstance(inputs, HiddenStates)
    found.append(Subject(str(case), lambda: _hidden_selection(inputs, case), inputs.x))
    if device.type == "cuda":
        scores = torch.randn(4, 131072, device=device)
        found.append(Subject("select_topk M=131072", lambda: hawk_kernels.select_topk(scores, 0.2), scores))
    return found


def different(one: Selection, other: Selection) -> torch.Tensor:
    """bool `[]` on the device: whether a bit differs."""
    pairs = zip(one, other, strict=True)
    return torch.stack([(_bits(a) != _bits(b)).any() for a, b in pairs]).any()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor


def repeatability(device: torch.device, which: str) -> Iterator[Check]:
    """Check that a thousand runs give the same bits."""
    runs = 2 if which == "tiny" else 1000

    def check(subject: Subject) -> str:
        first = subject.run()
        changed = torch.zeros((), dtype=torch.int64, device=device)
        for _ in range(runs):
            changed += different(subject.run(), first)
        if changed.item():
            raise ParityError(f"{changed.item()} of {runs} runs gave other bits than the first")
        return f"{runs} runs"

    for subject in subjects(device, which):
        yield f"repeatability {subject.name}", partial(check, subject)


def capture(run: Callable[[], Selection], device: torch.device) -> tuple[Selection, Callable[[], None]]:
    """Return the outputs of a captured call and a function that replays it; a CPU repeats the call instead."""
    if device.type != "cuda":
        outputs = run()

        def repeat() -> None:
            for old, new in zip(outputs, run(), strict=True):
                old.copy_(new)

        return outputs, repeat
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return outputs, graph.replay


def graphs(device: torch.device, which: str) -> Iterator[Check]:
    """Check that a captured call follows its inputs, and that replays repeat its bits."""
    replays = 2 if which == "tiny" else 200

    def check(subject: Subject) -> str:
        outputs, replay = capture(subject.run, device)
        for seed in range(2):
            subject.change(seed)
            expected = subject.run()
            changed = torch.zeros((), dtype=torch.int64, device=device)
            for _ in range(replays):
                replay()
                changed += different(outputs, expected)
            if changed.item():
                raise ParityError(f"{changed.item()} of {replays} replays gave other bits than an eager call")
        return f"2 x {replays} replays"

    for subject in subjects(device, which):
        yield f"graph {subject.name}", partial(check, subject)


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def streams(device: torch.device, which: str) -> Iterator[Check]:
    """Check two streams at once, with inputs of their own, eager and replayed."""
    runs = 2 if which == "tiny" else 200

    def check(one: Subject, other: Subject, replayed: bool) -> str:
        runners = []
        for subject in (one, other):
            expected = Selection(*(tensor.clone() for tensor in subject.run()))
            outputs, replay = capture(subject.run, device) if replayed else (None, None)
            changed = torch.zeros((), dtype=torch.int64, device=device)
            runners.append((subject, expected, outputs, replay, changed, _stream(device)))
        _wait(device)
        for _ in range(runs):
            for subject, expected, outputs, replay, changed, stream in runners:
                with _on(stream):
                    if replay is None or outputs is None:
                        changed += different(subject.run(), expected)
                    else:
                        replay()
                        changed += different(outputs, expected)
        _wait(device)
        bad = [int(changed) for *_, changed, _ in runners]
        if any(bad):
            raise ParityError(f"{bad} of {runs} runs in the two streams gave other bits than alone")
        return f"2 x {runs} runs"

    pairs = zip(subjects(device, which), subjects(device, which, seed=1), strict=True)
    for one, other in pairs:
        for replayed in (False, True):
            name = f"streams {'replayed' if replayed else 'eager'} {one.name}"
            yield name, partial(check, one, other, replayed)


def threads(device: torch.device, which: str) -> Iterator[Check]:
    """Run eight threads at once, half of them with a stream of their own."""
    count, runs = (2, 1) if which == "tiny" else (8, 50)

    def check(subject: Subject) -> str:
        expected = subject.run()
        _wait(device)
        problems: list[str] = []
        # the interpreter patches modules while it runs a kernel
        alone = threading.Lock() if device.type == "cpu" else nullcontext()

        def work(stream: torch.cuda.Stream | None) -> None:
            try:
                with _on(stream):
                    changed = torch.zeros((), dtype=torch.int64, device=device)
                    for _ in range(runs):
                        with alone:
                            selection = subject.run()
                        changed += different(selection, expected)
                    if changed.item():
                        problems.append(f"{changed.item()} of {runs} runs gave other bits")
            # a thread must not end without a word
            except Exception as error:
                problems.append(f"{type(error).__name__}: {error}")

        workers = [
            threading.Thread(target=work, args=(_stream(device) if number % 2 else None,)) for number in range(count)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if problems:
            raise ParityError("; ".join(problems))
        return f"{count} threads x {runs} runs"

    for subject in subjects(device, which):
        yield f"threads {subject.name}", partial(check, subject)


STAGES = {"parity": parity, "repeatability": repeatability, "graphs": graphs, "streams": streams, "threads": threads}


def run(
    device: torch.device, stages: list[str], which: str, path: Path | None, part: tuple[int, int] = (0, 1)
) -> dict[str, Any]:
    """Run every check, also after a failed one, and write the results as they come."""
    results: dict[str, Any] = {"environment": environment(device), "checks": []}
    for stage in stages:
        checks = parity(device, which, part) if stage == "parity" else STAGES[stage](device, which)
        for name, check in checks:
            start = time.perf_counter()
            entry: dict[str, Any] = {"stage": stage, "name": name}
            try:
                entry |= {"passed": True, "found": check()}
            # whatever a check raises is its result, and the others go on
            except Exception as error:
                message = str(error).splitlines()[0] if str(error) else ""
                entry |= {"passed": False, "found": f"{type(error).__name__}: {message}"}
            entry["seconds"] = round(time.perf_counter() - start, 2)
            results["checks"].append(entry)
            print(f"{'ok  ' if entry['passed'] else 'FAIL'} {name}: {entry['found']}", flush=True)
            if path is not None:
                write_json(path, results)
    return results


def main() -> None:
    """Check, print a line each, exit with an error where one failed."""
    parser = cli.parser("bench.verify", __doc__, device=cli.default_device(), json="bench/results/<device>/verify.json")
    parser.add_argument("stages", nargs="*", choices=[[], *STAGES], help="default: all of them")
    parser.add_argument("--slice", choices=SLICES, help="default: gpu on a GPU, tiny elsewhere")
    parser.add_argument("--shard", type=cli.shard, default=(0, 1), help="I/N: the I-th of N parts of the parity checks")
    arguments = parser.parse_args()
    device = arguments.device
    path = cli.results_file(arguments, "verify.json")
    which = arguments.slice or ("gpu" if device.type == "cuda" else "tiny")
    start = time.perf_counter()
    results = run(device, arguments.stages or list(STAGES), which, path, arguments.shard)
    failed = [check["name"] for check in results["checks"] if not check["passed"]]
    took = math.ceil(time.perf_counter() - start)
    print(f"{len(results['checks']) - len(failed)} checks passed, {len(failed)} failed in {took} s", file=sys.stderr)
    if failed:
        sys.exit(f"bench.verify: failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
