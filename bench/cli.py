"""The command line that all benchmarks share: help from the docstring, common options, and types that check early.

A command builds its parser with `parser("bench.NAME", __doc__, ...)`, naming the common options that it takes, and adds
its own. `results_file` says where the results go.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench.environment import results_folder
from hawk_kernels.commands.options import whole_number as whole_number


def default_device() -> torch.device:
    """Return a GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parser(
    module: str,
    doc: str | None,
    *,
    device: torch.device | None = None,
    rounds: int | None = None,
    seconds: tuple[float | None, str] | None = None,
    json: str | None = None,
    output: str | None = None,
    seed: tuple[int, str] | None = None,
    threads: int | None = None,
) -> argparse.ArgumentParser:
    """Make the parser of `python -m MODULE`; a common option is there if its argument is given.

    Args:
        module: for the usage line.
        doc: the docstring of the module, which becomes the help text.
        device: default of `--device`.
        rounds: default of `--rounds`, the samples of each contender.
        seconds: default of `--seconds`, and its help.
        json: adds `--json FILE`; the help names this default.
        output: adds `--output FOLDER`; the help names this default.
        seed: default of `--seed`, and what is drawn from it.
        threads: default of `--threads` of PyTorch.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m {module}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if device is not None:
        made.add_argument("--device", type=torch.device, default=device, help="default here: %(default)s")
    if rounds is not None:
        help_text = "samples of each contender, at most (default: %(default)s)"
        made.add_argument("--rounds", type=whole_number(1), default=rounds, help=help_text)
    if seconds is not None:
        made.add_argument("--seconds", type=float, default=seconds[0], help=seconds[1])
    if json is not None:
        made.add_argument("--json", type=Path, metavar="FILE", help=f"where the results go; default: {json}")
    if output is not None:
        made.add_argument("--output", type=output_folder, metavar="FOLDER", help=f"for the results; default: {output}")
    if seed is not None:
        help_text = f"of {seed[1]} (default: %(default)s)"
        made.add_argument("--seed", type=whole_number(0), default=seed[0], help=help_text)
    if threads is not None:
        help_text = "of PyTorch (default: %(default)s)"
        made.add_argument("--threads", type=whole_number(1), default=threads, help=help_text)
    return made


def results_file(arguments: argparse.Namespace, name: str) -> Path:
    """Return the file of `--json`, or `name` in the folder of `--output`, or else in that of the device."""
    given: Path | None = getattr(arguments, "json", None)
    return given or results_directory(arguments) / name


def results_directory(arguments: argparse.Namespace) -> Path:
    """Return the folder of `--output`, or else that of the device."""
    given: Path | None = getattr(arguments, "output", None)
    return given or results_folder(arguments.device)


def shard(text: str) -> tuple[int, int]:
    """Parse `I/N`, the I-th of N parts, counted from 0."""
    position, _, count = text.partition("/")
    if not (position.isdecimal() and count.isdecimal() and int(position) < int(count)):
        raise argparse.ArgumentTypeError(f"expected I/N with 0 <= I < N, got {text!r}")
    return int(position), int(count)


def output_folder(text: str) -> Path:
    """Check that a folder is there or can be made."""
    folder = Path(text)
    if folder.exists() and not folder.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got the file {text!r}")
    return folder


def checkpoint_folder(text: str) -> Path:
    """Check that a folder holds a checkpoint."""
    folder = Path(text)
    if not (folder / "config.json").is_file():
        raise argparse.ArgumentTypeError(
            f"expected the folder of a checkpoint, got {text!r}, which has no config.json; "
            "python -m bench.tinyvqa.train --out FOLDER makes one"
        )
    return folder
