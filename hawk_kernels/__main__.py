"""`hawk-kernels COMMAND`, or `python -m hawk_kernels COMMAND`: the commands of the package under one name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module

from hawk_kernels import __version__
from hawk_kernels.commands.guard import run_guarded

COMMANDS = {
    "info": ("hawk_kernels.commands.info", "show versions, devices, backend, tuning table, weights and families"),
    "demo": (
        "hawk_kernels.demo",
        "answer a question about a picture from a fifth of its tokens, and time a larger model",
    ),
    "calibrate": ("hawk_kernels.commands.calibrate", "measure the head importance of a model and write a weights file"),
    "evaluate": (
        "hawk_kernels.commands.evaluate",
        "compare pruning methods and keep ratios on a model and its data: score, tokens, memory, time",
    ),
    "serve": ("hawk_kernels.commands.serve", "serve a model by OpenAI's protocol, its visual tokens pruned"),
    "weights": ("hawk_kernels.commands.weights", "list, show or check files of head weights"),
    "warm-up": ("hawk_kernels.commands.warm_up", "compile ahead every kernel that a pruned model can need"),
    "tune": ("hawk_kernels.tune", "measure launch configurations on this machine's GPU and write them as a table"),
}
"""By name: the module whose `main` takes the rest of the command line, and what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the rest of the command line to the command named first; 2 when there is none of that name."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_guarded(partial(_dispatch, words), is_process=argv is None, show_traceback="--traceback" in words)


def _dispatch(words: list[str]) -> int:
    if words and words[0] in COMMANDS:
        module, _ = COMMANDS[words[0]]
        return int(import_module(module).main(words[1:]))
    if words and words[0] in ("-V", "--version"):
        print(f"hawk_kernels {__version__}")
        return 0
    wants_help = bool(words) and words[0] in ("-h", "--help", "help")
    out = sys.stdout if wants_help else sys.stderr
    if words and not wants_help:
        print(f"error: there is no command {words[0]!r}.", file=out)
    print(_usage(), file=out)
    return 0 if wants_help else 2


def _usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(["usage: hawk-kernels [--version] COMMAND [options]", "", "commands (each with --help):", *lines])


if __name__ == "__main__":
    raise SystemExit(main())
