"""`hawk-kernels weights`: list the weights files of the package, or show one as text and as a picture."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hawk_kernels.calibration.command import weights_table
from hawk_kernels.calibration.content import check_content
from hawk_kernels.head_weights import read_weights_file, shipped_weights


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="hawk-kernels weights", description=__doc__.split(": ", 1)[1])
    actions = parser.add_subparsers(dest="action", required=True)
    listing = actions.add_parser("list", help="the weights files that come with the package")
    listing.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    show = actions.add_parser("show", help="a weights file as text, and as a bar chart with a heat map of dS")
    show.add_argument("file", help="a weights file, or the name of a shipped one")
    show.add_argument("--out", default=None, help="the picture (default: the file's name with .png, in this folder)")
    show.add_argument("--no-picture", action="store_true", help="text only; needs no matplotlib")
    show.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """List or show; 0 on success, 1 with a message on stderr when something has to be put right first."""
    args = build_parser().parse_args(argv)
    try:
        report, text = _list() if args.action == "list" else _show(args)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=2) if args.json else text)
    return 0


def _list() -> tuple[dict[str, Any], str]:
    found: dict[str, Any] = {}
    for name, path in shipped_weights().items():
        content = read_weights_file(path)
        found[name] = {key: content.get(key) for key in ("model", "layers", "source", "date")}
        found[name] |= {"num_heads": len(content["weights"]), "path": str(path)}
    lines = [f"{name}: {entry['model']}, {entry['num_heads']} heads, {entry['date']}" for name, entry in found.items()]
    return found, "\n".join(lines)


def _show(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    path = shipped_weights().get(args.file, Path(args.file))
    if not path.is_file():
        raise ValueError(
            f"expected a weights file or one of {', '.join(shipped_weights())}, got {args.file!r}; "
            "`hawk-kernels calibrate` writes one"
        )
    content = read_weights_file(path)
    check_content(content, str(path))
    lines = weights_table(content)
    picture = None
    if not args.no_picture:
        from hawk_kernels.calibration.plots import draw_weights

        picture = args.out or f"{path.stem}.png"
        if Path(picture).is_dir():
            raise ValueError(f"--out: expected a picture to write, got the folder {picture!r}; name a file in it")
        draw_weights(content, picture)
        lines += ["", f"drew {picture}"]
    return {**content, "picture": picture}, "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
