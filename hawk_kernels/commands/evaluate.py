"""`hawk-kernels evaluate`: compares pruning methods and keep ratios on a user's model and data."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hawk_kernels.checkpoint import CheckpointError, load_checkpoint
from hawk_kernels.commands.guard import CommandError, need_packages, run_guarded, stopping_note
from hawk_kernels.commands.options import keep_ratio
from hawk_kernels.commands.task_options import (
    checked_samples,
    describe_dry_run,
    device_of_process,
    dry_run,
    modules_of_this_folder,
    refuse,
    task_parser,
)
from hawk_kernels.tasks.processes import is_first_process
from hawk_kernels.tasks.sources import load_tasks

if TYPE_CHECKING:
    from hawk_kernels.evaluation.contenders import Contender
    from hawk_kernels.hf.prune import KeepRatio

_METHODS = """\
NAME                              a method with its defaults, such as divprune, or a recipe, such as divprune-release
NAME@LAYER                        the same, choosing after this layer, counted from 1, such as cdpruner@2
NAME:OPTION=VALUE[,OPTION=VALUE]  the same with options, such as fastv:layer=2 or hawk@2:head_weights=uniform
NAME:{JSON}                       the same with options as a JSON object, such as 'hawk:{"normalize": null}'

  Options are those of the method and of prune itself, such as head_weights=FILE and budget=per_image."""

_KEEPS = """\
0.2                               a share of the visual tokens
64                                a number of them, from 2 on
LAYER:KEEP[,LAYER:KEEP]           stages, such as 0:0.5,2:0.2: half of the tokens enter the first layer (0), and a fifth
                                  is left after the second
LAYER:METHOD:KEEP                 a stage with a method of its own, such as 0:0.5,2:fastv:0.2"""

_HOW_IT_RUNS = f"""\
methods, separated by spaces or commas:
{_METHODS}

what is kept, separated by spaces:
{_KEEPS}

Every question is answered with nothing pruned and with each method at each keep ratio, one after the other. DIR gets
results.json, results.md, results.png (where matplotlib is installed) and report.html. A killed run continues where it
stopped when the same command is given again: finished questions are in DIR/journal. Several GPUs share the questions:
"""


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = task_parser(
        "evaluate",
        "Compare pruning methods on a model and its data: how much of the score each keeps at each keep ratio, with "
        "paired intervals, and how many tokens, how much memory and time it saves.",
        _HOW_IT_RUNS,
        seeds="that draw",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        action="extend",
        metavar="M",
        help="what is compared, see below; the first is what the others are compared with (default: hawk)",
    )
    parser.add_argument(
        "--keep",
        nargs="+",
        action="extend",
        type=_keep,
        metavar="K",
        help="shares of the visual tokens that are kept, numbers of tokens, or stages, see below; 1 stands for all "
        "tokens, which is always asked (default: 0.4 0.2 0.1)",
    )
    parser.add_argument(
        "--head-weights",
        default=None,
        metavar="FILE",
        help="for methods that use them: a weights file, or uniform (default: those shipped for the model)",
    )
    parser.add_argument("--out", default="evaluation", metavar="DIR", help="folder to write to (default: evaluation)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; 0 on success, 1 with a message on stderr when something has to be put right first."""
    args = build_parser().parse_args(argv)
    try:
        need_packages("evaluate", "torch", "transformers", "PIL")
        contenders, keeps = _compared(args)
        with modules_of_this_folder(), stopping_note(lambda: _how_to_go_on(args)):
            tasks = load_tasks(args.data, held_out=True)
            report = dry_run(args, tasks) if args.dry_run else _evaluate(args, tasks, contenders, keeps)
    except (CheckpointError, CommandError, RuntimeError, TypeError, ValueError) as error:
        if args.traceback:
            raise
        # bad samples are listed one a line
        print(f"error: {error}", file=sys.stderr)
        return 1
    if is_first_process():
        if args.json:
            print(json.dumps({name: value for name, value in report.items() if name != "text"}, indent=2))
        else:
            print(describe_dry_run(report) if args.dry_run else report["text"])
    return 0


def _compared(args: argparse.Namespace) -> tuple[list[Contender], list[KeepRatio]]:
    """Read methods and keep ratios, and check what can be checked without the model."""
    from hawk_kernels.evaluation.contenders import Contender, check_contenders, split_words
    from hawk_kernels.evaluation.run import KEEP, checked_keeps

    contenders = [Contender.from_text(text) for text in split_words(args.methods or ["hawk"])]
    keeps = checked_keeps(args.keep or KEEP)
    check_contenders(contenders, keeps)
    return contenders, keeps


def _evaluate(
    args: argparse.Namespace, tasks: Sequence[Any], contenders: Sequence[Contender], keeps: Sequence[KeepRatio]
) -> dict[str, Any]:
    from hawk_kernels.evaluation.output import PAGE, check_folder
    from hawk_kernels.evaluation.run import evaluate_chosen
    from hawk_kernels.evaluation.text import markdown

    check_folder(args.out)
    device = device_of_process(args.device)
    # a broken picture is reported before gigabytes are loaded
    chosen = checked_samples(args, tasks)
    model, processor = load_checkpoint(args.model, args.dtype, device, report=refuse)
    evaluation = evaluate_chosen(
        model,
        chosen,
        contenders=contenders,
        keep=keeps,
        processor=processor,
        head_weights=args.head_weights,
        out=args.out,
        settings={"seed": args.seed, "limit": args.limit},
        progress=True,
    )
    if is_first_process():
        for doubt in evaluation.doubts():
            print(f"warning: {doubt}", file=sys.stderr)
        if find_spec("matplotlib") is None:
            print("note: no picture was drawn, which needs matplotlib: pip install matplotlib", file=sys.stderr)
    text = f"{markdown(evaluation)}\nwrote {args.out}; open {Path(args.out) / PAGE} in a browser"
    return {"out": args.out, **evaluation.to_dict(), "text": text}


def _how_to_go_on(args: argparse.Namespace) -> str:
    journal = Path(args.out) / "journal"
    return f"the same command goes on from {journal}" if not args.dry_run and journal.is_dir() else ""


def _keep(text: str) -> KeepRatio:
    """Parse stages, a keep ratio or a number of tokens; 1 stands for all tokens here."""
    if ":" in text:
        from hawk_kernels.evaluation.stages import stages_from_text

        try:
            return stages_from_text(text, keep_ratio)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    value = keep_ratio(text)
    return 1.0 if value == 1 else value


if __name__ == "__main__":
    raise SystemExit(run_guarded(main, is_process=True, show_traceback="--traceback" in sys.argv))
