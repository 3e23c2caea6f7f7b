"""`hawk-kernels calibrate`: measures the head importance of a model on benchmarks and writes a weights file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hawk_kernels.calibration.result import Calibration, check_target
from hawk_kernels.checkpoint import CheckpointError, find_device, load_checkpoint
from hawk_kernels.commands.guard import CommandError, need_packages, run_guarded, stopping_note
from hawk_kernels.commands.options import whole_number
from hawk_kernels.commands.weights import weights_table
from hawk_kernels.tasks.processes import is_first_process, launched_alone, local_rank
from hawk_kernels.tasks.sources import FORMS, load_tasks

if TYPE_CHECKING:
    import torch

    from hawk_kernels.tasks.samples import Chosen


_EPILOG = f"""\
data:
{FORMS}

Every sample is answered once as it is and once for each head. A killed run goes on where it ended when the same command
is given again: what is finished lies in OUT.journal. OUT replaces nothing but an earlier weights file of the same
model. Several GPUs share the samples:

  accelerate launch --multi_gpu --num_processes 8 -m hawk_kernels calibrate ...

(or torchrun; --multi_gpu also where there is none, since without it accelerate starts one process on CPUs)."""


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="hawk-kernels calibrate",
        description="Measure how much each attention head matters for looking (HAWK, arXiv 2604.07812): the score of "
        "each benchmark with the visual tokens masked from one head after the other.",
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
        help="mask a head of the first layer, which scores the tokens, or the heads of that number in all layers; "
        "both: measure both and take the weights of the first (default: first)",
    )
    parser.add_argument(
        "--limit", type=whole_number(1), default=None, help="samples of each benchmark at most, drawn at random"
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="seed of that draw and of the standard errors (default: 0)"
    )
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
        need_packages("calibrate", "torch", "transformers", "PIL")
        _check_out(args)
        with _modules_of_this_folder(), stopping_note(lambda: _how_to_go_on(args)):
            report = _check(args) if args.dry_run else _calibrate(args)
    except (CheckpointError, CommandError, RuntimeError, TypeError, ValueError) as error:
        if args.traceback:
            raise
        # bad samples are listed one a line
        print(f"error: {error}", file=sys.stderr)
        return 1
    if is_first_process():
        print(json.dumps(report, indent=2) if args.json else _described(report))
    return 0


def _how_to_go_on(args: argparse.Namespace) -> str:
    journal = Path(f"{args.out}.journal")
    return f"the same command goes on from {journal}" if not args.dry_run and journal.is_dir() else ""


@contextmanager
def _modules_of_this_folder() -> Iterator[None]:
    """Let tasks be imported from the current folder, in which a console script does not look as `python -m` does."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _check(args: argparse.Namespace) -> dict[str, Any]:
    from hawk_kernels.tasks.samples import check_pictures, choose_samples

    chosen = choose_samples(load_tasks(args.data), args.limit, args.seed)
    check_pictures(chosen, progress=not args.json)
    _say_prompts(chosen)
    tasks = [{"name": part.task.name, "samples": len(part.questions), "total": part.total} for part in chosen]
    return {"dry_run": True, "tasks": tasks}


def _calibrate(args: argparse.Namespace) -> dict[str, Any]:
    from hawk_kernels.calibration.run import calibrate_chosen
    from hawk_kernels.tasks.samples import check_pictures, choose_samples

    if launched_alone():
        print(
            "note: accelerate started one process; on CPUs it takes --multi_gpu to start more",
            file=sys.stderr,
        )
    device = _device(args.device)
    chosen = choose_samples(load_tasks(args.data), args.limit, args.seed)
    # a broken picture is reported before gigabytes are loaded
    check_pictures(chosen, progress=is_first_process())
    if is_first_process():
        _say_prompts(chosen)
    model, processor = load_checkpoint(args.model, args.dtype, device, report=_refuse)
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
    if is_first_process():
        for doubt in calibration.doubts():
            print(f"warning: {doubt}", file=sys.stderr)
    return {"out": args.out, **calibration.to_dict()}


def _refuse(missing_tensors: str) -> None:
    raise CheckpointError(missing_tensors)


def _say_prompts(chosen: Sequence[Chosen]) -> None:
    """Show the first prompt of each benchmark, since an answer depends on every word of it."""
    from hawk_kernels.tasks.jsonl import LETTER, SHORT

    for part in chosen:
        prompt = part.task.prompt(part.questions[0].sample)
        appended = next((sentence for sentence in (SHORT, LETTER) if prompt.endswith(f"\n{sentence}")), None)
        note = f'; "{appended}" is appended to every question without a "prompt" of its own' if appended else ""
        print(f"{part.task.name}: asks with prompts such as {prompt!r}{note}", file=sys.stderr)


def _check_out(args: argparse.Namespace) -> None:
    out = Path(args.out)
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out: expected a file in a folder that exists, got {out}; make the folder first")
    check_target(args.out)
    journal = Path(f"{args.out}.journal")
    if journal.exists() and not journal.is_dir():
        raise ValueError(f"--out: expected a folder for the journal, got the file {journal}; choose another name")


def _device(name: str) -> torch.device:
    import torch

    if name == "auto" and torch.cuda.is_available():
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return find_device(name)


def _described(report: dict[str, Any]) -> str:
    if report.get("dry_run"):
        lines = [f"{task['name']}: {task['samples']} of {task['total']} samples" for task in report["tasks"]]
        return "\n".join([*lines, "the data is in order"])
    table = weights_table(Calibration.from_dict(report, report["out"]))
    return "\n".join([*table, "", f"wrote {report['out']}", _next_steps(report["out"])])


def _next_steps(path: str) -> str:
    return f"use it: prune(model, 0.2, head_weights={path!r}); draw it: hawk-kernels weights show {path}"


if __name__ == "__main__":
    raise SystemExit(run_guarded(main, is_process=True, show_traceback="--traceback" in sys.argv))
