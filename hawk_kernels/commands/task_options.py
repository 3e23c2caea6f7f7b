"""What `calibrate` and `evaluate` share: options that name a model and its data, and checks before it is loaded."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hawk_kernels.checkpoint import CheckpointError, find_device
from hawk_kernels.commands.options import whole_number
from hawk_kernels.tasks.processes import is_first_process, launched_alone, local_rank
from hawk_kernels.tasks.sources import FORMS

if TYPE_CHECKING:
    import torch

    from hawk_kernels.tasks.samples import Chosen
    from hawk_kernels.tasks.task import Task


_SEVERAL_GPUS = """\
  accelerate launch --multi_gpu --num_processes 8 -m hawk_kernels {command} ...

(or torchrun; --multi_gpu also where there is none, since without it accelerate starts one process on CPUs)."""


def task_parser(command: str, description: str, how_it_runs: str, *, seeds: str) -> argparse.ArgumentParser:
    """Build the parser of a command that asks benchmarks, with the options that name a model, its data and the device.

    Args:
        command: its name.
        description: what it does.
        how_it_runs: what its help says after the forms of data; ends by introducing the command line for several GPUs.
        seeds: what the seed decides.
    """
    parser = argparse.ArgumentParser(
        prog=f"hawk-kernels {command}",
        description=description,
        epilog=f"data:\n{FORMS}\n\n{how_it_runs}\n{_SEVERAL_GPUS.format(command=command)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="model id on the Hugging Face Hub, or a folder")
    parser.add_argument("--data", required=True, nargs="+", action="extend", metavar="D", help="benchmarks, see below")
    parser.add_argument(
        "--limit", type=whole_number(1), default=None, help="samples of each benchmark at most, drawn at random"
    )
    parser.add_argument("--seed", type=whole_number(0), default=0, help=f"seed of {seeds} (default: 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: this process's GPU if any)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"))
    parser.add_argument("--dry-run", action="store_true", help="check the data and stop; the model is not loaded")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser


@contextmanager
def modules_of_this_folder() -> Iterator[None]:
    """Let tasks be imported from the current folder, where `python -m` finds modules and a console script does not."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def dry_run(args: argparse.Namespace, tasks: Sequence[Task]) -> dict[str, Any]:
    """Check the data, and report how much of it would be asked."""
    from hawk_kernels.tasks.samples import check_pictures, choose_samples

    chosen = choose_samples(tasks, args.limit, args.seed)
    check_pictures(chosen, progress=not args.json)
    _say_prompts(chosen)
    parts = [{"name": part.task.name, "samples": len(part.questions), "total": part.total} for part in chosen]
    return {"dry_run": True, "tasks": parts}


def describe_dry_run(report: dict[str, Any]) -> str:
    """Render the report of a dry run as text."""
    lines = [f"{task['name']}: {task['samples']} of {task['total']} samples" for task in report["tasks"]]
    return "\n".join([*lines, "the data is in order"])


def checked_samples(args: argparse.Namespace, tasks: Sequence[Task]) -> list[Chosen]:
    """Choose the samples and check their pictures; the first process shows the prompts."""
    from hawk_kernels.tasks.samples import check_pictures, choose_samples

    chosen = choose_samples(tasks, args.limit, args.seed)
    check_pictures(chosen, progress=is_first_process())
    if is_first_process():
        _say_prompts(chosen)
    return chosen


def device_of_process(name: str) -> torch.device:
    """Return the device that `--device` names; "auto" gives each process of a machine a GPU of its own."""
    import torch

    if launched_alone():
        print("note: accelerate started one process; on CPUs it takes --multi_gpu to start more", file=sys.stderr)
    if name == "auto" and torch.cuda.is_available():
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return find_device(name)


def refuse(missing_tensors: str) -> None:
    """Refuse a checkpoint that lacks tensors of the model."""
    raise CheckpointError(missing_tensors)


def _say_prompts(chosen: Sequence[Chosen]) -> None:
    """Show the first prompt of each benchmark, since an answer depends on every word of it."""
    from hawk_kernels.tasks.jsonl import LETTER, SHORT

    for part in chosen:
        prompt = part.task.prompt(part.questions[0].sample)
        appended = next((sentence for sentence in (SHORT, LETTER) if prompt.endswith(f"\n{sentence}")), None)
        note = f'; "{appended}" is appended to every question without a "prompt" of its own' if appended else ""
        print(f"{part.task.name}: asks with prompts such as {prompt!r}{note}", file=sys.stderr)
