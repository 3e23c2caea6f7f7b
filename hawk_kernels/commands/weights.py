"""`hawk-kernels weights`: list the weights files of the package, show or check some, or measure what one is worth."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hawk_kernels.commands.guard import run_guarded
from hawk_kernels.commands.options import keep_ratio, whole_number
from hawk_kernels.head_weights import find_weights_file, fingerprint, read_weights_file, shipped_weights

if TYPE_CHECKING:
    from hawk_kernels.calibration.result import Calibration


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="hawk-kernels weights",
        description="List the weights files of the package, show one as text and as a picture, check files, or measure "
        "what the weights of one are worth.",
    )
    actions = parser.add_subparsers(dest="action", required=True)
    listing = actions.add_parser("list", help="list the weights files that come with the package")
    show = actions.add_parser("show", help="show a weights file as text, and as a bar chart with a heat map of dS")
    show.add_argument("file", help="a weights file, or the name of a shipped one")
    show.add_argument("--out", default=None, help="the picture (default: the file's name with .png, in this folder)")
    show.add_argument("--no-picture", action="store_true", help="print the text only, which needs no matplotlib")
    check = actions.add_parser(
        "check", help="check that prune can use weights files; 1 where it cannot use one of them"
    )
    check.add_argument("files", nargs="+", metavar="file", help="a weights file, or the name of a shipped one")
    check.add_argument("--model", default=None, help="also check that they are for this model: an id, or a folder")
    worth = actions.add_parser(
        "worth",
        help="answer questions pruned by HAWK with the weights of a file and with uniform heads",
    )
    worth.add_argument("file", help="a weights file, or the name of a shipped one")
    worth.add_argument("--model", required=True, help="model id on the Hugging Face Hub, or a folder")
    worth.add_argument(
        "--data",
        required=True,
        nargs="+",
        action="extend",
        metavar="D",
        help="benchmarks, as `hawk-kernels calibrate` takes them, with other questions than those of the weights",
    )
    worth.add_argument(
        "--keep-ratio", type=keep_ratio, default=0.2, help="share or number of visual tokens kept (default: 0.2)"
    )
    worth.add_argument(
        "--reduce",
        choices=("mean", "max"),
        default="mean",
        help="how the text is reduced: by the paper's mean, or by the maximum, under which weights matter less "
        "(default: mean)",
    )
    worth.add_argument("--limit", type=whole_number(1), default=None, help="samples of each benchmark at most")
    worth.add_argument("--seed", type=whole_number(0), default=0, help="seed of that draw (default: 0)")
    worth.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    worth.add_argument("--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"))
    for action in (listing, show, check, worth):
        action.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Do what is asked; 0 on success, 1 with a message on stderr when something has to be put right first."""
    args = build_parser().parse_args(argv)
    try:
        if args.action == "check":
            return _check(args)
        actions = {"list": lambda _: _list(), "show": _show, "worth": _worth}
        report, text = actions[args.action](args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=2) if args.json else text)
    return 0


def weights_table(calibration: Calibration) -> list[str]:
    """Render a calibration as lines of text: its tasks, then its heads from the heaviest on."""
    layers = calibration.layers or "unknown"
    lines = [f"{calibration.model or 'unknown model'}, visual tokens masked in layers: {layers}"]
    result = calibration.results[calibration.layers]
    for task in calibration.tasks:
        error = "" if task.base_standard_error is None else f" +- {task.base_standard_error:.3f}"
        note = "; all heads equal: counts as uniform" if task.name in result.flat_tasks else ""
        lines.append(f"  {task.name}: score {task.base:.3f}{error}, {task.samples} samples{note}")
    lines += ["", "head  weight"]
    weights, errors = result.weights.tolist(), result.standard_errors
    for head in sorted(range(len(weights)), key=lambda i: -weights[i]):
        error = "" if errors is None else f" +- {errors[head]:.4f}"
        lines.append(f"{head:>4}  {weights[head]:.4f}{error}")
    return lines


def _list() -> tuple[dict[str, Any], str]:
    found: dict[str, Any] = {}
    for name, path in shipped_weights().items():
        content = read_weights_file(path)
        found[name] = {key: content.get(key) for key in ("model", "layers", "source", "date")}
        found[name] |= {"num_heads": len(content["weights"]), "path": str(path)}
    lines = [f"{name}: {entry['model']}, {entry['num_heads']} heads, {entry['date']}" for name, entry in found.items()]
    return found, "\n".join(lines)


def _show(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from hawk_kernels.calibration.result import Calibration
    from hawk_kernels.output_files import check_output, picture_kind

    path = _existing(args.file)
    content = read_weights_file(path)
    calibration = Calibration.from_dict(content, str(path))
    lines = weights_table(calibration)
    picture = None
    if not args.no_picture:
        picture = args.out or f"{path.stem}.png"
        if Path(picture).is_dir():
            raise ValueError(f"--out: expected a picture to write, got the folder {picture!r}; name a file in it")
        check_output(picture, picture_kind(picture), name="--out", inputs=[path])
        from hawk_kernels.calibration.plots import draw_weights

        draw_weights(calibration, picture)
        lines += ["", f"drew {picture}"]
    return {**content, "picture": picture}, "\n".join(lines)


def _worth(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from hawk_kernels.calibration.worth import worth_of_chosen
    from hawk_kernels.checkpoint import find_device, load_checkpoint
    from hawk_kernels.tasks.samples import check_pictures, choose_samples
    from hawk_kernels.tasks.sources import load_tasks

    path = _existing(args.file)
    chosen = choose_samples(load_tasks(args.data), args.limit, args.seed)
    check_pictures(chosen, not args.json)
    model, processor = load_checkpoint(args.model, args.dtype, find_device(args.device))
    worth = worth_of_chosen(
        model,
        chosen,
        path,
        keep_ratio=args.keep_ratio,
        reduce=args.reduce,
        processor=processor,
        progress=not args.json,
    )
    return {"file": args.file, **asdict(worth), "gain": worth.gain}, str(worth)


def _check(args: argparse.Namespace) -> int:
    config = None if args.model is None else _config(args.model)
    found = [_checked(name, config) for name in args.files]
    if args.json:
        print(json.dumps({"ok": all(entry["problem"] is None for entry in found), "files": found}, indent=2))
    else:
        for entry in found:
            print(f"{entry['file']}: {entry['problem'] or 'in order, ' + entry['about']}")
    return int(any(entry["problem"] is not None for entry in found))


def _checked(name: str, config: Any) -> dict[str, Any]:
    """Return what is wrong with a file, or what it holds."""
    from hawk_kernels.calibration.result import Calibration
    from hawk_kernels.head_weights import load_head_weights

    try:
        path = _existing(name)
        content = read_weights_file(path)
        num_heads = len(content["weights"])
        calibration = Calibration.from_dict(content, str(path))
        load_head_weights(path, num_heads)
        problem = None if config is None else _mismatch(content, fingerprint(config))
    except (OSError, ValueError) as error:
        return {"file": name, "problem": str(error).removeprefix(f"{name}: "), "about": None}
    about = f"{num_heads} heads of {calibration.model or 'a model that it does not name'}"
    return {"file": name, "problem": problem, "about": about}


def _mismatch(content: dict[str, Any], marks: dict[str, Any]) -> str | None:
    heads = marks["num_attention_heads"]
    if len(content["weights"]) != heads:
        return f"expected {heads} weights, one for each attention head of the model, got {len(content['weights'])}"
    differing = {name: value for name, value in (content.get("fingerprint") or {}).items() if marks.get(name) != value}
    if not differing:
        return None
    parts = ", ".join(f"{name} {value} instead of {marks.get(name)}" for name, value in differing.items())
    return f"expected head weights of this model, got those of {content.get('model', 'another one')} ({parts})"


def _config(name: str) -> Any:
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ImportError("--model needs transformers, which is not installed: pip install transformers") from error
    return AutoConfig.from_pretrained(name)


def _existing(name: str) -> Path:
    path = find_weights_file(name)
    if not path.is_file():
        raise ValueError(
            f"expected a weights file or one of {', '.join(shipped_weights())}, got {name!r}; "
            "`hawk-kernels calibrate` writes one"
        )
    return path


if __name__ == "__main__":
    raise SystemExit(run_guarded(main, is_process=True))
