"""Measure launch configurations on this machine's GPU and write them as a table.

    python -m hawk_kernels.tune [--out FILE] [--kernel score_and_select|score_hidden] [--quick] [--fresh]
    python -m hawk_kernels.tune --dry-run [--json]

Every candidate must first select what the PyTorch backend selects. One that fails, does not compile or spills registers
is not timed. Times come from `triton.testing.do_bench_cudagraph` with a cold L2 cache. Results are written as they come
to a partial table beside the table, so that a run that was killed can be repeated and continues where it stopped.
Kernels use the table where HAWK_KERNELS_CONFIGS names its file.
`--dry-run` needs no GPU: it lists the candidates and checks some of them at tiny sizes in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hawk_kernels.layer import Layer

if TYPE_CHECKING:
    from hawk_kernels.backends.kernels.configs import Shape
    from hawk_kernels.selection import Selection

PER_MULTIPROCESSOR = "programs_per_multiprocessor"
# The same in every candidate.
_SCORE = {"query_elements": 8192, "sum_block": 256, "max_registers": 255}
_HIDDEN = {
    "text_parts": 64,
    "text_channels": 1024,
    "mean_channels": 256,
    "block_outputs": 32,
    "fold_dims": 32,
    "sum_block": 256,
    "max_registers": 0,
}
_KERNELS = ("score_and_select", "score_hidden")
_KEEP_RATIO = 0.2
# Relative to the largest score, because float32 sums are taken in another order.
_TOLERANCE = 2e-5
_QUANTILES = {"median": 0.5, "p20": 0.2, "p80": 0.8}
# Rows of more tokens than this are measured one at a time; inputs that take a larger share of the memory are left out.
_LONGEST_IN_A_BATCH = 16384
_MEMORY_SHARE = 0.4


@dataclass(frozen=True)
class Model:
    """Sizes of the first decoder layer that shapes are measured with."""

    num_heads: int
    num_key_value_heads: int
    hidden_size: int
    num_queries: int


_QWEN_7B = Model(28, 4, 3584, 64)
_TINY = Model(4, 2, 64, 3)


def candidates(kernel: str, dtype: str, quick: bool = False) -> list[dict[str, int]]:
    """List the configurations that are worth a try, in the form that tables have."""
    programs = (1, 2, 4) if quick else (1, 2, 3, 4, 6)
    if kernel == "score_and_select":
        return [
            {**_SCORE, "block_keys": keys, "num_warps": warps, PER_MULTIPROCESSOR: count}
            for keys in ((32, 64) if quick else (16, 32, 64, 128))
            for warps in ((4,) if quick else (4, 8))
            for count in programs
        ]
    return [
        {
            **_HIDDEN,
            "block_tokens": tokens,
            "block_channels": width,
            "project_channels": width,
            "num_warps": warps,
            PER_MULTIPROCESSOR: count,
        }
        for tokens in ((16, 64) if quick else (16, 32, 64, 128))
        for width in ((64,) if dtype == "fp32" else (64, 128))
        for warps in ((8,) if quick else (4, 8))
        for count in programs
    ]


def shapes(kernel: str, quick: bool = False) -> list[Shape]:
    """List the shapes that a table is measured at."""
    from hawk_kernels.backends.kernels.configs import Shape

    head_dims = (0,) if kernel == "score_hidden" else (128,) if quick else (128, 256)
    fewest = _QWEN_7B.num_key_value_heads if kernel == "score_and_select" else 1
    rows = (fewest,) if quick else (fewest, 8 * fewest)
    lengths = (1280, 16384, 131072) if quick else (512, 1280, 5120, 16384, 65536, 262144)
    every = product(("half",) if quick else ("half", "fp32"), head_dims, rows, lengths)
    return [Shape(*shape) for shape in every if shape[2] == fewest or shape[3] <= _LONGEST_IN_A_BATCH]


@dataclass(frozen=True)
class Problem:
    """One shape with its inputs: `run` launches a configuration; `check` says why its result is wrong, or None."""

    run: Callable[[Any], Selection]
    check: Callable[[Selection], str | None]


def problem(kernel: str, shape: Shape, device: torch.device, model: Model) -> Problem:
    """Make random inputs of a shape, and compute on them what the PyTorch backend selects."""
    from hawk_kernels.backends.choose import load_backend

    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.float32 if shape.dtype == "fp32" else torch.bfloat16

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(size, generator=generator, device=device) * scale).to(dtype)

    w = torch.rand(model.num_heads, generator=generator, device=device)
    head_dim = shape.head_dim or 128
    arguments: tuple[Any, ...]
    if kernel == "score_and_select":
        batch = max(1, shape.rows // model.num_key_value_heads)
        q = normal(batch, model.num_heads, model.num_queries, head_dim)
        k = normal(batch, model.num_key_value_heads, shape.tokens, head_dim)
        arguments = (q, k, w, _KEEP_RATIO, None, None, "l2", head_dim**-0.5, "floor")
    else:
        num_tokens = shape.tokens + model.num_queries
        x = normal(shape.rows, num_tokens, model.hidden_size)
        outputs = model.num_heads * head_dim, model.num_key_value_heads * head_dim
        wq, wk = (normal(count, model.hidden_size, scale=model.hidden_size**-0.5) for count in outputs)
        visual = (torch.arange(num_tokens, device=device) < shape.tokens).expand(shape.rows, -1)
        gamma = normal(model.hidden_size)
        layer = Layer(gamma, 1e-6, wq, normal(outputs[0]), wk, normal(outputs[1]))
        arguments = (x, layer, w, _KEEP_RATIO, ~visual, visual, "l2", head_dim**-0.5, "floor")
    name = "score_and_select" if kernel == "score_and_select" else "score_hidden_and_select"
    reference, backend = load_backend("torch", kernel), load_backend("triton", kernel)
    expected = getattr(reference, name)(*arguments).scores
    finite = torch.isfinite(expected)
    largest = expected[finite].abs().max()

    def check(selection: Selection) -> str | None:
        if not torch.equal(torch.isfinite(selection.scores), finite):
            return "scores are finite where they should not be, or the other way round"
        error = ((selection.scores - expected)[finite].abs().max() / largest).item()
        if not error <= _TOLERANCE:
            return f"scores are off by {error:.1e} of the largest"
        exact = load_backend("torch", "select_topk").select_topk(selection.scores, _KEEP_RATIO, finite, "floor")
        if not (torch.equal(exact.mask, selection.mask) and torch.equal(exact.indices, selection.indices)):
            return "mask or indices are not those of the scores"
        return None

    return Problem(lambda config: getattr(backend, name)(*arguments, config=config), check)


def refusal(kernel: str, config: dict[str, int], given: Problem, device: torch.device) -> str | None:
    """Say why a candidate is not timed: it does not compile, spills, or selects something else. None if it may be."""
    try:
        with launched(kernel) as codes:
            wrong = given.check(given.run(_resolved(kernel, config, device)))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers and drivers fail in many ways, and each only rules the candidate out
        return " ".join(f"does not run: {type(error).__name__}: {error}".split())[:300]
    if wrong is not None:
        return wrong
    spills = max((getattr(code, "n_spills", None) or 0 for code in codes), default=0)
    return f"spills {spills} bytes" if spills else None


@contextmanager
def launched(kernel: str) -> Iterator[list[Any]]:
    """Collect what Triton compiles for the launches of a kernel inside the block; nothing in the interpreter."""
    from hawk_kernels.backends.kernels import score_and_select, score_hidden

    module: Any = score_and_select if kernel == "score_and_select" else score_hidden
    name = "_score_and_select_kernel" if kernel == "score_and_select" else "_score_hidden_kernel"
    jitted = getattr(module, name)
    codes: list[Any] = []

    class Recording:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda *arguments, **constants: codes.append(jitted[grid](*arguments, **constants))

    setattr(module, name, Recording())
    try:
        yield codes
    finally:
        setattr(module, name, jitted)


def _resolved(kernel: str, config: dict[str, int], device: torch.device) -> Any:
    from hawk_kernels.backends.kernels.configs import Entry, Shape, resolve

    count = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return resolve(kernel, Entry(Shape("", 0, 0, 0), config), count)


def microseconds(run: Callable[[], object], flush: Callable[[], object]) -> dict[str, float]:
    """Measure what a call takes on the GPU after `flush`, without `flush`: median, 20th and 80th percentile."""
    from triton.testing import do_bench_cudagraph

    def flush_and_run() -> None:
        flush()
        run()

    base = do_bench_cudagraph(flush, return_mode="median")
    times = do_bench_cudagraph(flush_and_run, quantiles=list(_QUANTILES.values()))
    return {name: (time - base) * 1e3 for name, time in zip(_QUANTILES, times, strict=True)}


def measure(kernel: str, shape: Shape, device: torch.device, tried: list[dict[str, int]]) -> dict[str, Any]:
    """Find the fastest candidate of a shape.

    Args:
        kernel: its name.
        shape: what is measured.
        device: a GPU.
        tried: the candidates, of which the first is what the table in use has.

    Returns:
        `config` and its `microseconds`, and `in_use`, the microseconds of the first candidate; without these where no
        candidate may be used. `refused` says which may not, and why.
    """
    given = problem(kernel, shape, device, _QWEN_7B)
    refused, allowed = [], {}
    for number, config in enumerate(tried):
        why = refusal(kernel, config, given, device)
        if why is None:
            allowed[number] = config
        else:
            refused.append({"config": config, "why": why})
    if not allowed:
        return {"refused": refused}
    size = torch.cuda.get_device_properties(device).L2_cache_size
    buffer = torch.ones(size, dtype=torch.float32, device=device)
    total = torch.empty((), dtype=torch.float32, device=device)

    def flush() -> None:
        torch.sum(buffer, dim=0, out=total)

    times = {
        number: microseconds(partial(given.run, _resolved(kernel, config, device)), flush)
        for number, config in allowed.items()
    }
    best = min(times, key=lambda number: times[number]["median"])
    return {"config": tried[best], "microseconds": times[best], "in_use": times.get(0), "refused": refused}


def in_use(kernel: str, shape: Shape, architecture: str) -> dict[str, int] | None:
    """Look up what a launch of this shape uses now, from the package's tables."""
    from hawk_kernels.backends.kernels.configs import committed_table, find_entry, nearest_architecture

    entry, _ = find_entry(committed_table(nearest_architecture(architecture)), kernel, shape)
    return None if entry is None else entry.config


def bytes_of(kernel: str, shape: Shape) -> int:
    """Estimate the bytes of a shape's inputs and of their reference."""
    wide = 4 if shape.dtype == "fp32" else 2
    if kernel == "score_and_select":
        return shape.rows * shape.tokens * shape.head_dim * (wide + 4)
    return shape.rows * shape.tokens * _QWEN_7B.hidden_size * (wide + 8)


def tune(kernels: Sequence[str], out: Path, quick: bool, fresh: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure all shapes on the current GPU, write the table to `out` and return it.

    Args:
        kernels: their names.
        out: where the table goes.
        quick: measure few shapes and candidates.
        fresh: forget what a run that was killed had measured.
        say: takes a line about each shape.
    """
    from hawk_kernels.backends.kernels.configs import load_table

    device = torch.device("cuda", torch.cuda.current_device())
    memory = torch.cuda.get_device_properties(device).total_memory
    partial_out = out.with_suffix(".partial.json")
    table = _empty_table(device, quick)
    measured = {} if fresh else _measured_before(partial_out, table)
    wanted = [(kernel, shape) for kernel in kernels for shape in shapes(kernel, quick)]
    for number, (kernel, shape) in enumerate(wanted, 1):
        about_shape = " ".join(f"{name}={value}" for name, value in shape._asdict().items())
        label = f"[{number}/{len(wanted)}] {kernel} {about_shape}"
        key = (kernel, *shape)
        if key in measured:
            table[kernel].append(measured[key])
            say(f"{label}: measured before")
            continue
        if bytes_of(kernel, shape) > memory * _MEMORY_SHARE:
            say(f"{label}: left out, does not fit this GPU's memory")
            continue
        start = time.perf_counter()
        tried = candidates(kernel, shape.dtype, quick)
        now = in_use(kernel, shape, table["architecture"])
        tried = [] if now is None else [now, *(config for config in tried if config != now)]
        try:
            found = measure(kernel, shape, device, tried)
        except torch.OutOfMemoryError:
            say(f"{label}: left out, does not fit this GPU's memory")
            continue
        if "config" in found:
            entry = {"shape": shape._asdict(), **{name: found[name] for name in ("config", "microseconds", "in_use")}}
            table[kernel].append(entry)
            _write(partial_out, table)
        say(f"{label}: {_summary(found)} ({time.perf_counter() - start:.0f} s)")
    _write(partial_out, table)
    load_table(partial_out)
    partial_out.replace(out)
    return table


def _empty_table(device: torch.device, quick: bool) -> dict[str, Any]:
    import triton

    from hawk_kernels.backends.kernels.configs import architecture_of

    return {
        "architecture": architecture_of(device),
        "source": f"measured by python -m hawk_kernels.tune{' --quick' if quick else ''}, cold L2, graph replay",
        "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count,
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": _digest(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **{kernel: [] for kernel in _KERNELS},
    }


def _measured_before(path: Path, table: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Read the entries of a partial table, by kernel and shape; none if the machine, version or code is another."""
    before = json.loads(path.read_text()) if path.exists() else {}
    if any(before.get(name) != value for name, value in table.items() if name not in ("date", *_KERNELS)):
        return {}
    return {(kernel, *entry["shape"].values()): entry for kernel in _KERNELS for entry in before[kernel]}


def _write(path: Path, table: dict[str, Any]) -> None:
    """Write a table whole: whoever reads the file finds the table before or this one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".tmp")
    written.write_text(json.dumps(table, indent=1) + "\n")
    written.replace(path)


def _summary(line: dict[str, Any]) -> str:
    refused = f", {len(line['refused'])} refused" if line["refused"] else ""
    if "config" not in line:
        return f"no candidate may be used{refused}: {line['refused'][0]['why']}"
    now = f"{line['in_use']['median']:.1f} us" if line["in_use"] else "slower, or refused"
    return f"{line['microseconds']['median']:.1f} us, table in use: {now}{refused}"


def _digest() -> str:
    """Hash the kernels' code, because times of other code say nothing about it."""
    sources = sorted((Path(__file__).parent / "backends" / "kernels").glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def rehearse(kernels: Sequence[str], device: torch.device) -> Iterator[dict[str, Any]]:
    """Check a few candidates of each kernel at tiny sizes: `{"kernel", "config", "refused"}`."""
    from hawk_kernels.backends.kernels.configs import Shape

    for kernel in kernels:
        rows = _TINY.num_key_value_heads if kernel == "score_and_select" else 1
        given = problem(kernel, Shape("half", 16, rows, 40), device, _TINY)
        tried = candidates(kernel, "half", quick=True)
        for config in (tried[0], tried[-1]):
            yield {"kernel": kernel, "config": config, "refused": refusal(kernel, config, given, device)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m hawk_kernels.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="the table; default: ~/.cache/hawk_kernels/ARCHITECTURE.json")
    parser.add_argument("--kernel", choices=_KERNELS, action="append", help="default: all")
    parser.add_argument("--quick", action="store_true", help="the shapes that matter most, few candidates: minutes")
    parser.add_argument("--fresh", action="store_true", help="forget what a run that was killed had measured")
    parser.add_argument("--dry-run", action="store_true", help="list and check candidates, measure nothing")
    parser.add_argument("--json", action="store_true", help="print the result as JSON; progress goes to stderr")
    options = parser.parse_args(arguments)
    kernels = options.kernel or list(_KERNELS)

    def say(line: str) -> None:
        print(line, file=sys.stderr if options.json else sys.stdout, flush=True)

    has_gpu = torch.cuda.is_available()
    if options.dry_run:
        if not has_gpu and "triton" not in sys.modules:
            os.environ["TRITON_INTERPRET"] = "1"
        return _dry_run(
            kernels, options.quick, torch.device("cuda", 0) if has_gpu else torch.device("cpu"), options.json, say
        )
    if not has_gpu:
        print(
            "hawk_kernels.tune: expected a CUDA or ROCm device, found none; run it on the GPU that the table is for, "
            "or with --dry-run",
            file=sys.stderr,
        )
        return 1
    from hawk_kernels.backends.kernels.configs import TABLE_VARIABLE, architecture_of

    architecture = architecture_of(torch.device("cuda", torch.cuda.current_device()))
    out = options.out or Path.home() / ".cache" / "hawk_kernels" / f"{architecture}.json"
    table = tune(kernels, out, options.quick, options.fresh, say)
    say(f"written: {out}\nto use it: export {TABLE_VARIABLE}={out}")
    if options.json:
        print(json.dumps(table))
    return 0


def _dry_run(
    kernels: Sequence[str], quick: bool, device: torch.device, as_json: bool, say: Callable[[str], None]
) -> int:
    listed: dict[str, dict[str, Any]] = {
        kernel: {
            "shapes": [shape._asdict() for shape in shapes(kernel, quick)],
            "candidates": {dtype: candidates(kernel, dtype, quick) for dtype in ("half", "fp32")},
        }
        for kernel in kernels
    }
    for kernel, plan in listed.items():
        counts = ", ".join(f"{len(tried)} candidates for {dtype}" for dtype, tried in plan["candidates"].items())
        say(f"{kernel}: {len(plan['shapes'])} shapes, {counts}")
        for dtype, tried in plan["candidates"].items():
            for config in tried:
                say(f"  {dtype} " + " ".join(f"{name}={value}" for name, value in config.items()))
    checked = []
    for result in rehearse(kernels, device):
        checked.append(result)
        say(f"{result['kernel']} {result['config']}: {result['refused'] or 'selects the same as PyTorch'}")
    if as_json:
        print(json.dumps({"listed": listed, "checked": checked}))
    return int(any(result["refused"] for result in checked))


if __name__ == "__main__":
    raise SystemExit(main())
