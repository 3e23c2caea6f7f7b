"""`hawk-kernels calibrate`: head importance of a model from benchmarks, as a weights file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hawk_kernels.argument_types import whole_number
from hawk_kernels.calibration.processes import is_first_process, launched_alone, local_rank
from hawk_kernels.calibration.result import check_target
from hawk_kernels.calibration.sources import FORMS, load_tasks
from hawk_kernels.checkpoint import CheckpointError, find_device, load_checkpoint

if TYPE_CHECKING:
    import torch

_EPILOG = f"""\
data:
{FORMS}

Every sample is answered once as it is and once for each head. A killed run goes on where it ended when the same command
is given again: what is finished lies in OUT.journal. Several GPUs share the samples:

  accelerate launch --multi_gpu --num_processes 8 -m hawk_kernels calibrate ...

(or torchrun; --multi_gpu also where there is none, since without it accelerate starts one process on CPUs)."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="hawk-kernels calibrate",
        description="Measure how much each attention head matters for looking (HAWK, arXiv 2604.07812): the score of "
        "each benchmark with the visual tokens hidden from one head after the other.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="model id on the Hugging Face Hub, or a folder")
    parser.add_argument("--data", required=True, nargs="+", action="extend", metavar="D", help="benchmarks, see below")
    parser.add_argument("--out", default="weights.json", help="weights file to write (default: weights.json)")
    parser.add_argument(
        "--layers",
        default="first",
        choices=("first", "all", "both"),
        help="hide from a head of the first layer, which scores the tokens, or from the heads of that number in all "
        "layers; both: measure both and take the weights of the first (default: first)",
    )
    parser.add_argument(
        "--limit", type=whole_number(1), default=None, help="samples of each benchmark at most, drawn at random"
    )
    parser.add_argument("--seed", type=int, default=0, help="of that draw and of the standard errors (default: 0)")
    parser.add_argument(
        "--batch-size",
        type=whole_number(1),
        default=8,
        help="answers to one sample that are generated together (default: 8)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: this process's GPU if any)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"))
    parser.add_argument("--dry-run", action="store_true", help="check the data and stop; the model is not loaded")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate; 0 on success, 1 with a message on stderr when something has to be put right first."""
    args = build_parser().parse_args(argv)
    try:
        _check_out(args.out)
        with _modules_of_this_folder():
            report = _check(args) if args.dry_run else _calibrate(args)
    except (CheckpointError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        if args.traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        going_on = "" if args.dry_run else f"; the same command goes on from {args.out}.journal"
        print(f"stopped{going_on}", file=sys.stderr)
        return 130
    if is_first_process():
        print(json.dumps(report, indent=2) if args.json else _described(report))
    return 0


@contextmanager
def _modules_of_this_folder() -> Iterator[None]:
    """A console script does not look for modules in the folder it is called in, as `python -m` does."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _check(args: argparse.Namespace) -> dict[str, Any]:
    from hawk_kernels.calibration.plan import check_pictures, choose_samples

    chosen = choose_samples(load_tasks(args.data), args.limit, args.seed)
    check_pictures(chosen, progress=not args.json)
    tasks = [{"name": part.task.name, "samples": len(part.questions), "total": part.total} for part in chosen]
    return {"dry_run": True, "tasks": tasks}


def _calibrate(args: argparse.Namespace) -> dict[str, Any]:
    from hawk_kernels.calibration.plan import check_pictures, choose_samples
    from hawk_kernels.calibration.run import calibrate_chosen

    if launched_alone():
        print(
            "note: accelerate started one process; on CPUs it takes --multi_gpu to start more",
            file=sys.stderr,
        )
    device = _device(args.device)
    chosen = choose_samples(load_tasks(args.data), args.limit, args.seed)
    # a broken picture is told before gigabytes are loaded
    check_pictures(chosen, progress=is_first_process())
    model, processor = load_checkpoint(args.model, args.dtype, device)
    calibration = calibrate_chosen(
        model,
        chosen,
        processor=processor,
        out=args.out,
        layers=args.layers,
        settings={"seed": args.seed, "limit": args.limit},
        batch_size=args.batch_size,
        progress=True,
    )
    return {"out": args.out, **calibration.to_dict()}


def _check_out(out: str) -> None:
    if not Path(out).resolve().parent.is_dir():
        raise ValueError(f"--out: expected a file in a folder that exists, got {out}; make the folder first")
    check_target(out)


def _device(name: str) -> torch.device:
    import torch

    if name == "auto" and torch.cuda.is_available():
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return find_device(name)


def _described(report: dict[str, Any]) -> str:
    if report.get("dry_run"):
        lines = [f"{task['name']}: {task['samples']} of {task['total']} samples" for task in report["tasks"]]
        return "\n".join([*lines, "the data is in order"])
    return "\n".join([*weights_table(report), "", f"wrote {report['out']}", _next_steps(report["out"])])


def _next_steps(path: str) -> str:
    return f"use it: prune(model, 0.2, head_weights={path!r}); draw it: hawk-kernels weights show {path}"


def weights_table(content: dict[str, Any]) -> list[str]:
    """The content of a weights file as lines of text: tasks, then heads from the heaviest on."""
    lines = [
        f"{content.get('model', 'unknown model')}, visual tokens hidden in layers: {content.get('layers', 'unknown')}"
    ]
    flat = content.get("flat_tasks") or []
    for task in content.get("tasks", []):
        error = "" if task["base_standard_error"] is None else f" +- {task['base_standard_error']:.3f}"
        note = "; all heads equal: counts as uniform" if task["name"] in flat else ""
        lines.append(f"  {task['name']}: score {task['base']:.3f}{error}, {task['samples']} samples{note}")
    lines += ["", "head  weight"]
    errors = content.get("standard_errors")
    weights = content["weights"]
    for head in sorted(range(len(weights)), key=lambda i: -weights[i]):
        error = "" if errors is None else f" +- {errors[head]:.4f}"
        lines.append(f"{head:>4}  {weights[head]:.4f}{error}")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
