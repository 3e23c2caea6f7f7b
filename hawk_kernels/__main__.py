"""`hawk-kernels COMMAND`, or `python -m hawk_kernels COMMAND`: the commands of the package under one name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "calibrate": (
        "hawk_kernels.calibration.command",
        "measure the head importance of a model and write a weights file",
    ),
    "demo": ("hawk_kernels.demo", "answer a question about a picture with all and with a fifth of the visual tokens"),
    "tune": ("hawk_kernels.tune", "measure launch configurations on this machine's GPU and write them as a table"),
    "weights": ("hawk_kernels.calibration.weights_command", "list the shipped weights files, or draw one"),
}
"""By name: the module whose `main` takes the rest of the command line, and what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the rest of the command line to the command named first; 2 when there is none of that name."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        module, _ = COMMANDS[words[0]]
        return int(import_module(module).main(words[1:]))
    wants_help = bool(words) and words[0] in ("-h", "--help")
    out = sys.stdout if wants_help else sys.stderr
    if words and not wants_help:
        print(f"error: there is no command {words[0]!r}.", file=out)
    print("usage: hawk-kernels COMMAND [options]\n\ncommands (each with --help):", file=out)
    width = max(map(len, COMMANDS)) + 2
    for name, (_, purpose) in COMMANDS.items():
        print(f"  {name:<{width}}{purpose}", file=out)
    return 0 if wants_help else 2


if __name__ == "__main__":
    raise SystemExit(main())
