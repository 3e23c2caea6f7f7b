"""`hawk-kernels warm-up`: compile ahead every kernel that a pruned model can need, into Triton's cache on disk."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hawk_kernels.checkpoint import CheckpointError
from hawk_kernels.commands.guard import CommandError, need_packages, one_line, run_guarded
from hawk_kernels.commands.options import keep_ratio, named_values, whole_number

if TYPE_CHECKING:
    import torch

    from hawk_kernels.compile_ahead import WarmUp

_OLDEST_CAPABILITY = 80
_EPILOG = """\
Only the config of the model is read, so no weights are needed. Triton keeps what it compiles in ~/.triton/cache, or
where TRITON_CACHE_DIR says. A process with the same versions of hawk-kernels, Triton and Python code finds it there,
so that an image can be built with its kernels on a machine without a GPU:

  hawk-kernels warm-up Qwen/Qwen2.5-VL-7B-Instruct --target cuda:90

A process still loads each kernel from the disk at its first launch; hawk_kernels.warm_up(model, ...) does that ahead as
well."""


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="hawk-kernels warm-up",
        description="Compile ahead every kernel that prompts of a model can need under prune, whatever their length.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="model id on the Hugging Face Hub, or a folder; its config is enough")
    parser.add_argument("--method", default="hawk", help="method of prune (default: hawk)")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the method, such as normalize=softmax; may be given several times",
    )
    parser.add_argument(
        "--keep-ratio", type=keep_ratio, default=0.2, help="as in prune; the kernels of all ratios are the same"
    )
    parser.add_argument("--budget", default="shared", choices=("shared", "per_image"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"))
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="cuda:CAPABILITY",
        help="a GPU that need not be here, such as cuda:90 for an H100; may be given several times (default: the GPU "
        "of this machine)",
    )
    parser.add_argument("--max-tokens", type=whole_number(1), default=262144, help="in a row (default: %(default)s)")
    parser.add_argument("--max-batch", type=whole_number(1), default=64, help="rows (default: %(default)s)")
    parser.add_argument(
        "--jobs", type=whole_number(1), default=None, help="threads (default: the processors, at most 8)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Compile; 0 on success, 1 with a message on stderr when something has to be put right first."""
    args = build_parser().parse_args(argv)
    try:
        need_packages("warm-up", "torch", "transformers", "triton")
        reports = _warm_up(args)
    except (CheckpointError, CommandError, OSError, RuntimeError, TypeError, ValueError) as error:
        if args.traceback:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps({"model": args.model, "method": args.method, "warm_ups": [asdict(each) for each in reports]}))
    else:
        print("\n".join(map(str, reports)))
    return 0


def _warm_up(args: argparse.Namespace) -> list[WarmUp]:
    import torch

    from hawk_kernels.checkpoint import load_config
    from hawk_kernels.compile_ahead import (
        WarmUp,
        architecture_and_size,
        architecture_name,
        compile_launches,
        compile_launches_for,
        why_nothing_compiles,
    )
    from hawk_kernels.hf.warm_up import launches_of_config
    from hawk_kernels.methods import resolve_method

    targets = [_target(name) for name in args.target]
    has_gpu = torch.cuda.is_available()
    reason = why_nothing_compiles([torch.device("cuda" if targets or has_gpu else "cpu")])
    if reason is not None:
        remedy = "" if targets or has_gpu else "; --target cuda:90 compiles for an H100 all the same"
        return [WarmUp(notes=(f"{reason}{remedy}",))]
    config = load_config(args.model)
    dtype = _dtype(args.dtype, config)
    method = resolve_method(args.method, named_values(args.option))
    arguments = {"keep_ratio": args.keep_ratio, "method": method, "budget": args.budget}
    reach, progress = (args.max_tokens, args.max_batch), not args.json
    reports = []
    for target in targets or [None]:
        if target is None:
            device = torch.device("cuda", torch.cuda.current_device())
            architecture, _ = architecture_and_size(device)
        else:
            architecture = architecture_name(target)
        launches, notes = launches_of_config(config, dtype, architecture, arguments, reach=reach)
        if target is None:
            report = compile_launches(launches, [device], progress=progress, jobs=args.jobs)
        else:
            report = compile_launches_for(launches, target, progress=progress, jobs=args.jobs)
        reports.append(WarmUp(**{**vars(report), "notes": notes}))
    return reports


def _target(name: str) -> Any:
    from triton.backends.compiler import GPUTarget

    kind, _, capability = name.partition(":")
    if kind != "cuda" or not capability.isdigit() or int(capability) < _OLDEST_CAPABILITY:
        raise CommandError(
            f"--target: expected cuda: and a compute capability from {_OLDEST_CAPABILITY} on, got {name!r}; an H100 is "
            "cuda:90, an A100 cuda:80"
        )
    return GPUTarget("cuda", int(capability), 32)


def _dtype(name: str, config: Any) -> torch.dtype:
    import torch

    wanted = getattr(config, "dtype", None) if name == "auto" else name
    dtype = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if not isinstance(dtype, torch.dtype):
        raise CommandError(
            "--dtype: expected a dtype, since the config of this model names none; pass --dtype bfloat16"
        )
    return dtype


if __name__ == "__main__":
    raise SystemExit(run_guarded(main, is_process=True, show_traceback="--traceback" in sys.argv))
