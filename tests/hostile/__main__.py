"""Run random cases of pruning until the time is up: what is removed must equal what is hidden, or be refused clearly.

    python -m tests.hostile [--minutes 5] [--cases N] [--seed 0] [--only FAMILY...] [--method NAME...] [--mode MODE...]
    python -m tests.hostile --replay CASE

Needs no GPU. Each failure is printed as one line that `--replay` runs again, after it was made as simple as it still
fails. The last line counts what was done, and the exit status is 1 where a case failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import transformers

from hawk_kernels.methods import METHODS
from tests.family_checks import SUPPORTED, VERSION
from tests.hostile.cases import MODES, from_line
from tests.hostile.explore import Explorer
from tests.hostile.oracle import verdict_of
from tests.tiny_families import BY_NAME


def main(argv: list[str] | None = None) -> int:
    """Explore, print what was found, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="stop after so many; 60 and more is hours")
    parser.add_argument("--cases", type=int, help="stop after so many cases")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other cases")
    parser.add_argument("--only", nargs="+", default=None, metavar="FAMILY", help="families; all by default")
    parser.add_argument("--method", nargs="+", default=None, metavar="NAME", help="methods; all by default")
    parser.add_argument("--mode", nargs="+", default=None, metavar="MODE", help=f"some of {', '.join(MODES)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts and the failures there")
    parser.add_argument("--replay", metavar="CASE", help="run this case alone, a line that an earlier run printed")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if arguments.replay is not None:
        try:
            case = from_line(arguments.replay)
        except ValueError as error:
            parser.error(str(error))
        verdict = verdict_of(case)
        print(f"{verdict.kind}: {verdict.what}" if verdict.what else verdict.kind)
        return 1 if verdict.kind == "failed" else 0
    known = [name for name in BY_NAME if tuple(map(int, SUPPORTED[name].since.split("."))) <= VERSION]
    for option, given, expected in (
        ("--only", arguments.only, known),
        ("--method", arguments.method, METHODS),
        ("--mode", arguments.mode, MODES),
    ):
        unknown = sorted(set(given or ()) - set(expected))
        if unknown:
            parser.error(f"{option}: expected some of {', '.join(expected)}, got {', '.join(unknown)}")
    explorer = Explorer(
        arguments.seed, arguments.only or known, arguments.method or sorted(METHODS), arguments.mode or list(MODES)
    )
    explorer.run(60 * arguments.minutes, arguments.cases, print_progress=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(explorer.to_dict(), indent=1) + "\n")
    for line in explorer.report():
        print(line)
    return 1 if explorer.failures else 0


if __name__ == "__main__":
    sys.exit(main())
