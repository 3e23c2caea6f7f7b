"""`hawk-kernels serve`: transformers' OpenAI-compatible server, with the visual tokens of every prompt pruned."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any
from unittest import mock

from hawk_kernels.checkpoint import load_processor
from hawk_kernels.commands.guard import CommandError, need_packages
from hawk_kernels.commands.options import keep_ratio, named_values, whole_number


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C; the caller reports what it raises, as `hawk-kernels` does."""
    parser = argparse.ArgumentParser(prog="hawk-kernels serve", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("model", help="model id on the Hugging Face Hub, or a folder")
    parser.add_argument("--keep-ratio", type=keep_ratio, default=0.2, help="as in prune (default: %(default)s)")
    parser.add_argument("--method", default="hawk", help="method of prune (default: hawk)")
    option = "an option of the method or of prune, such as head_weights=uniform; may be given several times"
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help=option)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"))
    parser.add_argument("--host", default="localhost", help="address to listen on (default: localhost)")
    parser.add_argument("--port", type=whole_number(0), default=8000, help="port to listen on (default: 8000)")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    args = parser.parse_args(argv)
    try:
        need_packages("serve", "torch", "transformers", "fastapi", "uvicorn", "openai", "pydantic", "accelerate")
    except CommandError as error:
        raise CommandError(f"{error}, or everything at once: pip install 'transformers[serving]'") from None
    _serve(args)
    return 0


def _serve(args: argparse.Namespace) -> None:
    from transformers.cli.serve import Serve
    from transformers.cli.serving.model_manager import ModelManager

    from hawk_kernels.evaluation.contenders import Contender, check_contenders

    contender = Contender(args.method, args.method, named_values(args.option))
    check_contenders([contender])
    load_whole: Any = ModelManager._load_model

    def load_pruned(*names: Any, **settings: Any) -> Any:
        model = load_whole(*names, **settings)
        # never left: the block ends with the model, which the server may drop (POST /reset) and load again
        contender.block(model, args.keep_ratio).__enter__()
        return model

    def load_inputs(_: Any, name: str, **__: Any) -> Any:
        return load_processor(name.partition("@")[0], revision=name.partition("@")[2])

    with mock.patch.multiple(ModelManager, _load_model=load_pruned, _load_processor=load_inputs):
        Serve(args.model, host=args.host, port=args.port, device=args.device, dtype=args.dtype)
