"""Ask a vision-language model about a picture, with all visual tokens and with a fifth of them.

`python -m hawk_kernels.demo` needs no network: it uses the tiny model that ships with the package. With `--model` it
takes any checkpoint that `hawk_kernels.prune` supports, such as Qwen/Qwen2.5-VL-7B-Instruct.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hawk_kernels.argument_types import whole_number
from hawk_kernels.checkpoint import TINY_MODEL, CheckpointError, ask_about, find_device, first_line, load_checkpoint

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from hawk_kernels.methods import Method

SAMPLE_IMAGE = TINY_MODEL / "samples" / "digits_8x8.png"
SAMPLE_PROMPT = "Which digit is red?"
REAL_MODEL_PROMPT = "Describe this image in one sentence."

# At the paper's 0.1 a fifth of 64 tokens is too few for a single anchor.
_TINY_ALPHA = 0.5
_ROUNDS_AT_MOST = 9
_ROUNDS_SECONDS = 2.0


class DemoError(Exception):
    """Something a user can put right; the message says what happened and what to do."""


@dataclass(frozen=True)
class Answer:
    """What the model said, and what it took."""

    text: str
    visual_tokens: int
    prompt_tokens: int
    seconds: float


def build_parser() -> argparse.ArgumentParser:
    """The command line of the demo."""
    parser = argparse.ArgumentParser(
        prog="python -m hawk_kernels.demo",
        description="Answer a question about a picture with all visual tokens and with a part of them, and draw what "
        "was kept. Without options: the tiny model and a sample picture that ship with the package.",
    )
    parser.add_argument(
        "--model", default=None, help="model id on the Hugging Face Hub or a folder (default: the shipped tiny model)"
    )
    parser.add_argument("--image", default=None, help="picture to ask about (default: a shipped sample)")
    parser.add_argument("--prompt", default=None, help=f"the question (default with the sample: {SAMPLE_PROMPT!r})")
    parser.add_argument(
        "--keep-ratio",
        type=_keep_ratio,
        default=0.2,
        help="share of the visual tokens that stays, above 0 and up to 1.0; a whole number is a count of tokens "
        "(default: 0.2)",
    )
    parser.add_argument(
        "--method", default="hawk", help="pruning method, such as hawk, hiprune or fastv (default: hawk)"
    )
    parser.add_argument(
        "--head-weights",
        default=None,
        help="'uniform', or a JSON file of head weights (default: the registry's; 'uniform' for a model it lacks)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: a GPU if there is one)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"))
    parser.add_argument("--max-new-tokens", type=whole_number(1), default=64, help="longest answer (default: 64)")
    parser.add_argument("--output", default=None, help="where the overlay goes (default: overlay_METHOD.png here)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 on success, 1 with one line on stderr when something has to be put right first."""
    args = build_parser().parse_args(argv)
    try:
        report = run(args)
    except (DemoError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print(describe(report))
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load, ask both ways, draw; everything that happened as one JSON-ready dict.

    Raises:
        DemoError: a dependency, the picture, the question or an option is not as it must be.
        CheckpointError: the device cannot be used, or the model does not load.
    """
    _need_packages()
    is_tiny = args.model is None or Path(args.model).resolve() == TINY_MODEL.resolve()
    image_path = Path(args.image) if args.image is not None else SAMPLE_IMAGE
    prompt = args.prompt or (SAMPLE_PROMPT if is_tiny else REAL_MODEL_PROMPT)
    method, roles = _watched(args.method, _TINY_ALPHA if is_tiny else 0.1)
    output = Path(args.output or f"overlay_{args.method}.png")
    _check_output(output)
    image = _open_image(image_path)
    device = find_device(args.device)

    _quieten()
    seconds: dict[str, float] = {}
    with _Timer(seconds, "load"), _memory_in_words(device):
        model, processor = load_checkpoint(str(TINY_MODEL) if is_tiny else args.model, args.dtype, device)
    head_weights = _head_weights(args.head_weights, args.method, model)
    with _Timer(seconds, "preprocess"):
        try:
            inputs = ask_about(processor, image, prompt).to(device=device, dtype=model.dtype)
        except ValueError as error:
            raise DemoError(
                f"the processor of {args.model or 'the shipped model'} does not take this picture and question: "
                f"{first_line(error)}"
            ) from error

    budget = {"max_new_tokens": args.max_new_tokens, "do_sample": False}
    with _memory_in_words(device), _one_thread(is_tiny):
        plain, pruned, keep_mask, scores, stats, rounds = _answer_both_ways(
            model, processor, inputs, budget, args.keep_ratio, method, head_weights, device
        )
    seconds["generate_all"], seconds["generate_pruned"] = plain.seconds, pruned.seconds

    overlay: str | None = None
    with _Timer(seconds, "overlay"):
        grid = _token_grid(inputs, model.config, plain.visual_tokens)
        if grid is not None:
            from hawk_kernels.viz import draw_overlay

            words = {"title": _shortened(prompt), "subtitle": _outcome(plain, pruned)}
            try:
                draw_overlay(image, keep_mask, scores, grid, roles=roles(), **words).save(output)
            except OSError as error:
                raise DemoError(f"cannot write the overlay to {output}: {error}") from error
            overlay = str(output.resolve())
    return {
        "model": "tinyvqa" if is_tiny else args.model,
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": str(device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "image": str(image_path),
        "image_size": list(image.size),
        "grid": list(grid) if grid is not None else None,
        "prompt": prompt,
        "method": args.method,
        "keep_ratio": args.keep_ratio,
        "head_weights": head_weights or ("registry" if stats["head_weights"] else None),
        "all_tokens": _answer_dict(plain),
        "pruned": _answer_dict(pruned),
        "same_answer": plain.text == pruned.text,
        "stats": stats,
        "seconds": {part: round(value, 6) for part, value in seconds.items()},
        "timed_rounds": rounds,
        "overlay": overlay,
    }


def describe(report: dict[str, Any]) -> str:
    """The report as text for a person."""
    plain, pruned, seconds = report["all_tokens"], report["pruned"], report["seconds"]
    width, height = report["image_size"]
    grid = f", {report['grid'][0]} x {report['grid'][1]} visual tokens" if report["grid"] else ""
    heads = {
        "uniform": ", uniform head weights",
        "registry": ", head weights from the registry",
        None: "",
    }.get(report["head_weights"], f", head weights from {report['head_weights']}")
    size = _count(report["parameters"])
    parts = ", ".join(f"{part} {_time(seconds[part])}" for part in ("load", "preprocess", "overlay"))
    lines = [
        f"model     {report['model']} ({size} parameters, {report['dtype']}, {report['device']})",
        f"image     {report['image']} ({width} x {height} pixels{grid})",
        f"question  {report['prompt']}",
        f"pruning   {report['method']}, keep {_share(report['keep_ratio'])}{heads}",
        "",
        f"{'':<16}{'visual tokens':>14}{'prompt tokens':>15}{'generate':>12}   answer",
        _row("all tokens", plain),
        _row("pruned", pruned),
        "",
        f"{parts}; generate: {_rounds(report['timed_rounds'])} after one warm-up each way",
        _verdict(plain, pruned),
    ]
    if report["head_weights"] == "uniform":
        lines.append("Every head counts the same here: no published HAWK head weights are known, or none were wanted.")
    if report["overlay"]:
        lines.append(f"overlay   {report['overlay']}")
    else:
        lines.append("No overlay: this model's visual tokens do not lie on one grid that the demo knows.")
    return "\n".join(lines)


def _verdict(plain: dict[str, Any], pruned: dict[str, Any]) -> str:
    ratio = pruned["seconds"] / plain["seconds"]
    if ratio <= 1:
        return f"Pruned generation took {ratio:.0%} of the time."
    verdict = f"Pruning made generation {ratio:.2f} times as long here"
    if plain["visual_tokens"] >= 1000:
        return verdict + "."
    return (
        f"{verdict}: {plain['visual_tokens']} visual tokens are nothing, so scoring and selecting costs more than the\n"
        "shorter prompt saves. It pays with thousands of visual tokens in a model of billions of parameters."
    )


def _share(keep_ratio: float | int) -> str:
    if isinstance(keep_ratio, int):
        return f"{keep_ratio} visual tokens"
    return f"{keep_ratio:.4g} of the visual tokens"


def _outcome(plain: Answer, pruned: Answer) -> str:
    return (
        f"answer with all {plain.visual_tokens} visual tokens: {_shortened(plain.text)}"
        f"      with {pruned.visual_tokens} of them: {_shortened(pruned.text)}"
    )


def _shortened(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 70 else flat[:67] + "..."


def _row(name: str, answer: dict[str, Any]) -> str:
    return (
        f"{name:<16}{answer['visual_tokens']:>14}{answer['prompt_tokens']:>15}{_time(answer['seconds']):>12}   "
        f"{answer['text']}"
    )


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _rounds(count: int) -> str:
    return f"median of {count} interleaved rounds" if count > 1 else "one round"


def _answer_dict(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "visual_tokens": answer.visual_tokens,
        "prompt_tokens": answer.prompt_tokens,
        "seconds": round(answer.seconds, 6),
    }


def _keep_ratio(text: str) -> float | int:
    """A share written with a point, or a whole number of tokens; as in `prune(model, keep_ratio=...)`."""
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


def _need_packages() -> None:
    missing = []
    for module, package in (("torch", "torch"), ("transformers", "transformers"), ("PIL", "pillow")):
        try:
            __import__(module)
        except ImportError:
            missing.append(package)
    if missing:
        raise DemoError(f"the demo needs {' and '.join(missing)}, not installed here: pip install {' '.join(missing)}")


def _quieten() -> None:
    """Loading bars and generation hints would bury the answer, and spoil `--json`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _open_image(path: Path) -> Image.Image:
    from PIL import Image

    from hawk_kernels.calibration.encoding import open_image

    if not path.is_file():
        raise DemoError(f"there is no picture at {path}; give the path of a PNG or JPEG file with --image.")
    try:
        return open_image(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DemoError(f"{path} is not a picture that Pillow can read ({error}); give a PNG or JPEG file.") from error


def _check_output(path: Path) -> None:
    """Before the work, not after it."""
    from PIL import Image

    if not path.parent.is_dir():
        raise DemoError(f"the folder of --output {path} does not exist; make it first or choose another.")
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise DemoError(f"--output {path} does not end like a picture file; use a name such as overlay.png.")


@contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    """A second thread gains a tiny model nothing, and on a busy machine waiting for it drowns what is timed."""
    import torch

    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _memory_in_words(device: torch.device) -> Iterator[None]:
    import torch

    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        raise DemoError(
            f"{device} ran out of memory ({first_line(error)}); try --dtype bfloat16, a smaller picture, fewer "
            "--max-new-tokens, or another --device."
        ) from error


def _head_weights(wanted: str | None, method: str, model: Any) -> str | None:
    """What `prune` gets: what was asked for, else the registry's, else uniform ones, which the demo then says."""
    from hawk_kernels.methods import METHODS

    if wanted is not None or method not in METHODS or not METHODS[method].uses_head_weights:
        return wanted
    from hawk_kernels.head_weights import resolve_head_weights
    from hawk_kernels.hf.anatomy import dissect

    try:
        resolve_head_weights(None, model.config, dissect(model).projections.num_heads)
    except (TypeError, ValueError):
        # what cannot be pruned at all is refused by prune, in words
        return "uniform"
    return None


def _watched(name: str, alpha: float) -> tuple[str | Method, Callable[[], Any]]:
    """The method to run, and a function that tells why each visual token stayed, or `None` where it cannot."""
    if name != "hiprune":
        return name, lambda: None
    from hawk_kernels.methods import HiPrune

    latest: dict[str, Any] = {}

    class Watched(HiPrune):
        def choose(self, *arguments: Any) -> Any:
            choice = super().choose(*arguments)
            latest["roles"] = choice.roles[0]
            return choice

    return Watched(alpha), lambda: latest["roles"]


def _answer_both_ways(
    model: Any,
    processor: Any,
    inputs: Any,
    budget: dict[str, Any],
    keep_ratio: float | int,
    method: str | Method,
    head_weights: str | None,
    device: torch.device,
) -> tuple[Answer, Answer, Any, Any, Any, int]:
    """Both answers with their median times; mask and scores of the visual tokens; statistics; rounds timed.

    Each way runs once untimed first. Then they take turns, so that a busy moment of the machine hits both.
    """
    import torch

    from hawk_kernels import prune

    is_visual = inputs["input_ids"][0] == model.config.image_token_id
    prompt_tokens = inputs["input_ids"].shape[1]
    visual_tokens = int(is_visual.sum())

    def timed(generate: Callable[[], Any]) -> tuple[str, float]:
        _finish(device)
        started = time.perf_counter()
        out = generate()
        _finish(device)
        elapsed = time.perf_counter() - started
        return processor.batch_decode(out[:, prompt_tokens:], skip_special_tokens=True)[0].strip(), elapsed

    def whole() -> Any:
        return model.generate(**inputs, **budget)

    def pruned() -> tuple[str, float, Any]:
        with ExitStack() as stack:
            # Only what prune() refuses is the user's to put right; an error while generating is a bug and stays one.
            try:
                pruning = stack.enter_context(
                    prune(model, keep_ratio=keep_ratio, method=method, head_weights=head_weights)
                )
            except (ValueError, TypeError, ImportError, OSError) as error:
                hint = " (on this command line: --head-weights uniform)" if "head_weights" in str(error) else ""
                raise DemoError(f"{error}{hint}") from error
            text, elapsed = timed(whole)
        return text, elapsed, pruning

    with torch.inference_mode():
        plain_text, _ = timed(whole)
        pruned_text, _, pruning = pruned()
        plain_times: list[float] = []
        pruned_times: list[float] = []
        while len(plain_times) < _ROUNDS_AT_MOST and sum(plain_times + pruned_times) < _ROUNDS_SECONDS:
            plain_times.append(timed(whole)[1])
            pruned_times.append(pruned()[1])
    kept = pruning.keep_mask[0].to(is_visual.device)
    kept_visual = int((kept & is_visual).sum())
    return (
        Answer(plain_text, visual_tokens, prompt_tokens, statistics.median(plain_times)),
        Answer(pruned_text, kept_visual, prompt_tokens - visual_tokens + kept_visual, statistics.median(pruned_times)),
        kept[is_visual].cpu(),
        pruning.scores[0].to(is_visual.device)[is_visual].float().cpu(),
        pruning.stats.to_dict(),
        len(plain_times),
    )


def _finish(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _token_grid(inputs: Any, config: Any, count: int) -> tuple[int, int] | None:
    """Rows and columns of the image's visual tokens, or `None` where they cannot be told."""
    if "image_grid_thw" in inputs:
        merge = config.vision_config.spatial_merge_size
        _, height, width = (int(x) for x in inputs["image_grid_thw"][0])
        return height // merge, width // merge
    side = round(count**0.5)
    return (side, side) if side * side == count else None


class _Timer:
    """Adds the wall time of a block to `seconds[part]`."""

    def __init__(self, seconds: dict[str, float], part: str) -> None:
        self.seconds, self.part = seconds, part

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.part] = time.perf_counter() - self.started


if __name__ == "__main__":
    raise SystemExit(main())
