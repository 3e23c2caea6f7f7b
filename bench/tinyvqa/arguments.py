"""Types of command-line arguments: a mistake is told before the minutes start."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path


def whole_number(least: int) -> Callable[[str], int]:
    """A whole number of at least `least`."""

    def parsed(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return value

    return parsed


def checkpoint_folder(text: str) -> Path:
    """A folder with a checkpoint in it."""
    folder = Path(text)
    if not (folder / "config.json").is_file():
        raise ArgumentTypeError(
            f"expected the folder of a checkpoint, got {text!r}, which has no config.json; "
            "python -m bench.tinyvqa.train --out FOLDER makes one"
        )
    return folder


def output_folder(text: str) -> Path:
    """A folder that is there or can be made."""
    folder = Path(text)
    if folder.exists() and not folder.is_dir():
        raise ArgumentTypeError(f"expected a folder, got the file {text!r}")
    return folder
