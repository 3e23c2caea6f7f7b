"""Argument types of the commands, each of which says what it expected."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence

from hawk_kernels.commands.guard import CommandError


def keep_ratio(text: str) -> float | int:
    """Parse a share written with a point, or a whole number of tokens; as in `prune(model, keep_ratio=...)`."""
    try:
        value: float | int = int(text) if text.strip().lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number; give a share such as 0.2, or a count such as 64."
        ) from None
    if (isinstance(value, int) and value < 1) or (isinstance(value, float) and not 0 < value <= 1):
        raise argparse.ArgumentTypeError(
            f"{text} is out of range; give a share above 0 and up to 1.0, or a whole number of tokens from 1."
        )
    return value


def whole_number(least: int) -> Callable[[str], int]:
    """Return a type that reads a whole number of at least `least`."""

    def parsed(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return value

    return parsed


def words(text: str) -> str:
    """Parse text that is not blank."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected some text, got nothing; leave the option out for the default")
    return text


def named_values(pairs: Sequence[str]) -> dict[str, object]:
    """Read `NAME=VALUE` words; a value that is not JSON is a string, and None is None.

    Raises:
        CommandError: a word that is not such a pair.
    """
    values: dict[str, object] = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not (name and sign):
            raise CommandError(f"--option: expected NAME=VALUE, got {pair!r}; for example normalize=softmax")
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = None if text == "None" else text
    return values
