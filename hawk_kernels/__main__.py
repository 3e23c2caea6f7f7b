"""`python -m hawk_kernels COMMAND`: the commands of the package under one name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {"demo": "answer a question about a picture with all and with a fifth of the visual tokens"}


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the rest of the command line to the command named first; 2 when there is none of that name."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        return int(import_module(f"hawk_kernels.{words[0]}").main(words[1:]))
    wants_help = bool(words) and words[0] in ("-h", "--help")
    out = sys.stdout if wants_help else sys.stderr
    if words and not wants_help:
        print(f"error: there is no command {words[0]!r}.", file=out)
    print("usage: python -m hawk_kernels COMMAND [options]\n\ncommands:", file=out)
    for name, purpose in COMMANDS.items():
        print(f"  {name:<8}{purpose}", file=out)
    return 0 if wants_help else 2


if __name__ == "__main__":
    raise SystemExit(main())
