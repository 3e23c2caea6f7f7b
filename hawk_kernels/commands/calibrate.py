"""`hawk-kernels calibrate`: measures the head importance of a model on benchmarks and writes a weights file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hawk_kernels.calibration.result import Calibration, check_target
from hawk_kernels.checkpoint import CheckpointError, load_checkpoint
from hawk_kernels.commands.guard import CommandError, need_packages, run_guarded, stopping_note
from hawk_kernels.commands.options import whole_number
from hawk_kernels.commands.task_options import (
    checked_samples,
    describe_dry_run,
    device_of_process,
    dry_run,
    modules_of_this_folder,
    refuse,
    task_parser,
)
from hawk_kernels.commands.weights import weights_table
from hawk_kernels.tasks.processes import is_first_process
from hawk_kernels.tasks.sources import load_tasks

_HOW_IT_RUNS = """\
Every sample is answered once as it is and once for each head. A killed run goes on where it ended when the same command
is given again: what is finished lies in OUT.journal. OUT replaces nothing but an earlier weights file of the same
model. Several GPUs share the samples:
"""


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = task_parser(
        "calibrate",
        "Measure how much each attention head matters for looking (HAWK, arXiv 2604.07812): the score of each "
        "benchmark with the visual tokens masked from one head after the other.",
        _HOW_IT_RUNS,
        seeds="that draw and of the standard errors",
    )
    parser.add_argument("--out", default="weights.json", help="weights file to write (default: weights.json)")
    parser.add_argument(
        "--layers",
        default="first",
        choices=("first", "all", "both"),
        help="mask a head of the first layer, which scores the tokens, or the heads of that number in all layers; "
        "both: measure both and take the weights of the first (default: first)",
    )
    parser.add_argument(
        "--batch-size",
        type=whole_number(1),
        default=8,
        help="answers to one sample that are generated together (default: 8)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate; 0 on success, 1 with a message on stderr when something has to be put right first."""
    args = build_parser().parse_args(argv)
    try:
        need_packages("calibrate", "torch", "transformers", "PIL")
        _check_out(args)
        with modules_of_this_folder(), stopping_note(lambda: _how_to_go_on(args)):
            report = dry_run(args, load_tasks(args.data)) if args.dry_run else _calibrate(args)
    except (CheckpointError, CommandError, RuntimeError, TypeError, ValueError) as error:
        if args.traceback:
            raise
        # bad samples are listed one per line
        print(f"error: {error}", file=sys.stderr)
        return 1
    if is_first_process():
        print(json.dumps(report, indent=2) if args.json else _described(report))
    return 0


def _how_to_go_on(args: argparse.Namespace) -> str:
    journal = Path(f"{args.out}.journal")
    return f"the same command goes on from {journal}" if not args.dry_run and journal.is_dir() else ""


def _calibrate(args: argparse.Namespace) -> dict[str, Any]:
    from hawk_kernels.calibration.run import calibrate_chosen

    device = device_of_process(args.device)
    # a broken picture is reported before gigabytes are loaded
    chosen = checked_samples(args, load_tasks(args.data))
    model, processor = load_checkpoint(args.model, args.dtype, device, report=refuse)
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


def _check_out(args: argparse.Namespace) -> None:
    out = Path(args.out)
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out: expected a file in a folder that exists, got {out}; make the folder first")
    check_target(args.out)
    journal = Path(f"{args.out}.journal")
    if journal.exists() and not journal.is_dir():
        raise ValueError(f"--out: expected a folder for the journal, got the file {journal}; choose another name")


def _described(report: dict[str, Any]) -> str:
    if report.get("dry_run"):
        return describe_dry_run(report)
    table = weights_table(Calibration.from_dict(report, report["out"]))
    return "\n".join([*table, "", f"wrote {report['out']}", _next_steps(report["out"])])


def _next_steps(path: str) -> str:
    return f"use it: prune(model, 0.2, head_weights={path!r}); draw it: hawk-kernels weights show {path}"


if __name__ == "__main__":
    raise SystemExit(run_guarded(main, is_process=True, show_traceback="--traceback" in sys.argv))
