"""Ask a vision-language model about a picture, with all visual tokens and with a fifth of them, then time it.

`python -m hawk_kernels.demo` needs no network: it uses the tiny model that ships with the package. With `--model` it
takes any checkpoint that `hawk_kernels.prune` supports, such as Qwen/Qwen2.5-VL-7B-Instruct. The two answers may differ
in length, so speed is timed apart from them, at a fixed number of new tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hawk_kernels.checkpoint import TINY_MODEL, CheckpointError, ask_about, find_device, first_line, load_checkpoint
from hawk_kernels.commands.guard import CommandError, need_packages, run_guarded, say_error, say_warning
from hawk_kernels.commands.options import keep_ratio, whole_number, words
from hawk_kernels.output_files import OutputFileError, check_output, picture_kind, write_whole

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from hawk_kernels.demo_speed import Speed
    from hawk_kernels.methods import Method

SAMPLE_IMAGE = TINY_MODEL / "samples" / "digits_8x8.png"
SAMPLE_PROMPT = "Which digit is red?"
REAL_MODEL_PROMPT = "Describe this image in one sentence."

# with the paper's 0.1, a fifth of 64 tokens leaves no room for a single anchor
_TINY_ALPHA = 0.5


class DemoError(CommandError):
    """Something a user can put right; the message says what happened and what to do."""


@dataclass(frozen=True)
class Answer:
    """What the model said, and what it took."""

    text: str
    visual_tokens: int
    prompt_tokens: int
    seconds: float


@dataclass(frozen=True)
class Asked:
    """A loaded model with its prompt, which the speed is measured on."""

    model: Any
    inputs: Any
    method: str | Method
    head_weights: str | None
    visual_tokens: int
    is_tiny: bool


def build_parser() -> argparse.ArgumentParser:
    """Build the command line of the demo."""
    parser = argparse.ArgumentParser(
        prog="hawk-kernels demo",
        description="Answer a question about a picture with all visual tokens and with a part of them, draw what was "
        "kept, and time a model at a fixed number of new tokens. Without options: the tiny model and a sample picture "
        "that ship with the package.",
    )
    parser.add_argument(
        "--model",
        type=words,
        default=None,
        help="model id on the Hugging Face Hub or a folder (default: the shipped tiny model)",
    )
    parser.add_argument("--image", type=words, default=None, help="picture to ask about (default: a shipped sample)")
    parser.add_argument(
        "--prompt", type=words, default=None, help=f"the question (default with the sample: {SAMPLE_PROMPT!r})"
    )
    parser.add_argument(
        "--keep-ratio",
        type=keep_ratio,
        default=0.2,
        help="share of the visual tokens that stays, above 0 and up to 1.0; a whole number is a count of tokens "
        "(default: 0.2)",
    )
    parser.add_argument(
        "--method", default="hawk", help="pruning method, such as hawk, hiprune or fastv (default: hawk)"
    )
    parser.add_argument(
        "--head-weights",
        type=words,
        default=None,
        help="'uniform', a name that `hawk-kernels weights list` shows, or a JSON file of head weights (default: the "
        "registry's; 'uniform' for a model it lacks)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: a GPU if there is one)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"))
    parser.add_argument("--max-new-tokens", type=whole_number(1), default=64, help="longest answer (default: 64)")
    parser.add_argument(
        "--output", type=words, default=None, help="where the overlay goes (default: overlay_METHOD.png here)"
    )
    parser.add_argument(
        "--speed",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="time the first token and those after it, pruned and not: of a larger model with random weights, or of "
        "--model itself where one is given (default: yes, but not with --json)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 on success, 1 with one line on stderr when something has to be put right first."""
    args = build_parser().parse_args(argv)
    wants_speed = not args.json if args.speed is None else args.speed
    try:
        report, asked = run(args)
        if not args.json:
            print(describe(report), flush=True)
        if wants_speed:
            speed = _measure_speed(asked, args)
            report["speed"] = speed.to_dict()
            if not args.json:
                print(f"\n{_describe_speed(speed, asked.is_tiny)}")
    except (CommandError, CheckpointError, OutputFileError) as error:
        say_error(str(error))
        return 1
    if args.json:
        print(json.dumps(report, indent=2))
    if report["overlay_error"]:
        say_error(report["overlay_error"])
        return 1
    return 0


def run(args: argparse.Namespace) -> tuple[dict[str, Any], Asked]:
    """Load, ask both ways, draw; return everything that happened as one JSON-ready dict, and what was asked.

    Raises:
        DemoError: a dependency, the picture, the question or an option is not as it must be.
        CheckpointError: the device cannot be used, or the model does not load.
        OutputFileError: the overlay must not be written where it was asked for.
    """
    need_packages("the demo", "torch", "transformers", "PIL")
    is_tiny = args.model is None or Path(args.model).resolve() == TINY_MODEL.resolve()
    image_path = SAMPLE_IMAGE if args.image is None else _picture_path(args.image)
    prompt = args.prompt or (SAMPLE_PROMPT if is_tiny else REAL_MODEL_PROMPT)
    _check_method(args.method)
    _check_head_weights(args.head_weights)
    output = Path(args.output or f"overlay_{args.method}.png")
    _check_output(output, [image_path, *([] if args.head_weights is None else [args.head_weights])])
    image = _open_image(image_path)
    device = find_device(args.device)
    method, roles = _watched(args.method, _TINY_ALPHA if is_tiny else 0.1)

    _quieten()
    seconds: dict[str, float] = {}
    with _Timer(seconds, "load"), _memory_in_words(device):
        name = str(TINY_MODEL) if is_tiny else args.model
        model, processor = load_checkpoint(name, args.dtype, device, report=say_warning)
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
        plain, pruned, keep_mask, scores, stats = _answer_both_ways(
            model, processor, inputs, budget, args.keep_ratio, method, head_weights, device
        )
    seconds["generate_all"], seconds["generate_pruned"] = plain.seconds, pruned.seconds

    overlay: str | None = None
    overlay_error: str | None = None
    with _Timer(seconds, "overlay"):
        grid = _token_grid(inputs, model.config, plain.visual_tokens)
        if grid is not None:
            from hawk_kernels.viz import draw_overlay

            texts = {"title": _shortened(prompt), "subtitle": _outcome(plain, pruned)}
            picture = draw_overlay(image, keep_mask, scores, grid, roles=roles(), **texts)
            try:
                _save(picture, output)
                overlay = str(output.resolve())
            except OutputFileError as error:
                # the answer is still worth printing
                overlay_error = str(error)
    report = {
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
        "overlay": overlay,
        "overlay_error": overlay_error,
        "speed": None,
    }
    return report, Asked(model, inputs, method, head_weights, plain.visual_tokens, is_tiny)


def _measure_speed(asked: Asked, args: argparse.Namespace) -> Speed:
    """Time the model that was asked, or one of 50 M random parameters in place of the tiny one."""
    import torch
    from tqdm import tqdm

    from hawk_kernels import demo_speed, prune

    device = asked.inputs["input_ids"].device
    with _memory_in_words(device), _one_thread(asked.is_tiny):
        if asked.is_tiny:
            model, inputs = demo_speed.random_model(device)
            name, visual_tokens = "Qwen2.5-VL with random weights", demo_speed.SIDE**2
            head_weights: str | None = "uniform"
        else:
            model, inputs = asked.model, asked.inputs
            name, visual_tokens, head_weights = args.model, asked.visual_tokens, asked.head_weights
        with tqdm(
            total=demo_speed.STEPS, bar_format="{desc}: {n_fmt}/{total_fmt} [{elapsed}]", disable=args.json
        ) as bar:

            def show(step: str) -> None:
                bar.set_description_str(f"timing a model of {visual_tokens} visual tokens, {step}")
                bar.update()

            return demo_speed.measure(
                model,
                inputs,
                lambda: prune(
                    model,
                    keep_ratio=args.keep_ratio,
                    method=asked.method,
                    head_weights=head_weights if _uses_head_weights(args.method) else None,
                ),
                name=name,
                visual_tokens=visual_tokens,
                threads=torch.get_num_threads() if device.type == "cpu" else None,
                progress=show,
            )


def describe(report: dict[str, Any]) -> str:
    """Render the report as text."""
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
        f"{'':<16}{'visual tokens':>14}{'prompt tokens':>15}   answer",
        _row("all tokens", plain),
        _row("pruned", pruned),
        "",
        parts,
    ]
    if report["head_weights"] == "uniform":
        lines.append("Every head counts the same here: no published HAWK head weights are known, or none were wanted.")
    if report["overlay"]:
        lines.append(f"overlay   {report['overlay']}")
    elif report["overlay_error"] is None:
        lines.append("No overlay: this model's visual tokens do not lie on one grid that the demo knows.")
    return "\n".join(lines)


def _describe_speed(speed: Speed, is_random: bool) -> str:
    from hawk_kernels import demo_speed

    size = _count(speed.parameters)
    what = f"speed     {speed.model} ({size} parameters), {speed.visual_tokens} visual tokens"
    if is_random:
        what += "\n          (built here, nothing is downloaded; random weights take the same time, and answer nothing)"
    return f"{what}\n\n{demo_speed.describe(speed)}"


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
    return f"{name:<16}{answer['visual_tokens']:>14}{answer['prompt_tokens']:>15}   {answer['text']}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _answer_dict(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "visual_tokens": answer.visual_tokens,
        "prompt_tokens": answer.prompt_tokens,
        "seconds": round(answer.seconds, 6),
    }


def _quieten() -> None:
    """Silence loading bars and generation hints, which would bury the answer and spoil `--json`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _picture_path(text: str) -> Path:
    """Return the path that `--image` names, as far as it can be one."""
    if "://" in text:
        raise DemoError(f"--image takes a file, not the address {text}; download the picture and give its path.")
    path = Path(text)
    if path.is_dir():
        raise DemoError(f"--image {path} is a folder; give the path of a PNG or JPEG file in it.")
    if not path.is_file():
        raise DemoError(f"there is no picture at {path}; give the path of a PNG or JPEG file with --image.")
    return path


def _open_image(path: Path) -> Image.Image:
    from PIL import Image

    from hawk_kernels.tasks.encoding import open_image

    try:
        image: Image.Image = open_image(path)
        return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DemoError(f"{path} is not a picture that Pillow can read ({error}); give a PNG or JPEG file.") from error


def _check_method(name: str) -> None:
    from hawk_kernels.methods import METHODS

    if name not in METHODS:
        raise DemoError(f"--method: expected one of {', '.join(METHODS)}, got {name!r}.")


def _check_head_weights(wanted: str | None) -> None:
    """Check what can be checked without the model; `prune` compares the number of heads."""
    if wanted in (None, "uniform"):
        return
    from hawk_kernels.head_weights import find_weights_file, load_head_weights, read_weights_file

    path = find_weights_file(str(wanted))
    try:
        load_head_weights(path, len(read_weights_file(path)["weights"]) if path.is_file() else 0)
    except (OSError, ValueError) as error:
        raise DemoError(f"--head-weights: {str(error).removeprefix('head_weights: ')}") from error


def _check_output(path: Path, inputs: Sequence[str | Path]) -> None:
    """Refuse an overlay that cannot be written before any work is done."""
    from PIL import Image

    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise DemoError(f"--output {path} does not end like a picture file; use a name such as overlay.png.")
    check_output(path, picture_kind(path), name="--output", inputs=inputs)


def _save(picture: Image.Image, path: Path) -> None:
    from PIL import Image

    form = Image.registered_extensions()[path.suffix.lower()]
    write_whole(path, lambda file: picture.save(file, format=form))


@contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    """Use one thread: a second one gains a small model little, and on a busy machine waiting for it drowns the rest."""
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
    """Return what `prune` gets: what was asked for, else the registry's, else uniform ones, which the report says."""
    if wanted is not None or not _uses_head_weights(method):
        return wanted
    from hawk_kernels.head_weights import resolve_head_weights
    from hawk_kernels.hf.anatomy import dissect

    try:
        resolve_head_weights(None, model.config, dissect(model).projections.num_heads)
    except (TypeError, ValueError):
        # what cannot be pruned at all is refused by prune, in words
        return "uniform"
    return None


def _uses_head_weights(method: str) -> bool:
    from hawk_kernels.methods import METHODS

    return METHODS[method].uses_head_weights


def _watched(name: str, alpha: float) -> tuple[str | Method, Callable[[], Any]]:
    """Return the method to run, and a function that says why each visual token stayed, or `None` if it cannot."""
    if name != "hiprune":
        return name, lambda: None
    from hawk_kernels.methods.hiprune import HiPrune

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
) -> tuple[Answer, Answer, Any, Any, Any]:
    """Return both answers, the mask and scores of the visual tokens, and statistics."""
    import torch

    from hawk_kernels import prune

    is_visual = inputs["input_ids"][0] == model.config.image_token_id
    prompt_tokens = inputs["input_ids"].shape[1]
    visual_tokens = int(is_visual.sum())

    def answer() -> tuple[str, float]:
        _finish(device)
        started = time.perf_counter()
        out = model.generate(**inputs, **budget, return_dict_in_generate=True, output_logits=True)
        _finish(device)
        elapsed = time.perf_counter() - started
        if not all(bool(torch.isfinite(logits.max(-1).values).all()) for logits in out.logits):
            raise DemoError(
                "the model's logits are NaN or infinite, so there is no answer to show; check the checkpoint, or try "
                "--dtype float32 or bfloat16."
            )
        text = processor.batch_decode(out.sequences[:, prompt_tokens:], skip_special_tokens=True)[0].strip()
        return text, elapsed

    with torch.inference_mode():
        plain_text, plain_seconds = answer()
        with ExitStack() as stack:
            # what prune refuses is the user's to put right, unlike an error while generating
            try:
                pruning = stack.enter_context(
                    prune(model, keep_ratio=keep_ratio, method=method, head_weights=head_weights)
                )
            except (ValueError, TypeError, ImportError, OSError) as error:
                hint = " (on this command line: --head-weights uniform)" if "head_weights" in str(error) else ""
                raise DemoError(f"{error}{hint}") from error
            pruned_text, pruned_seconds = answer()
    keep_mask, scores = pruning.keep_mask, pruning.scores
    assert keep_mask is not None
    assert scores is not None
    kept = keep_mask[0].to(is_visual.device)
    kept_visual = int((kept & is_visual).sum())
    return (
        Answer(plain_text, visual_tokens, prompt_tokens, plain_seconds),
        Answer(pruned_text, kept_visual, prompt_tokens - visual_tokens + kept_visual, pruned_seconds),
        kept[is_visual].cpu(),
        scores[0].to(is_visual.device)[is_visual].float().cpu(),
        pruning.stats.to_dict(),
    )


def _finish(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _token_grid(inputs: Any, config: Any, count: int) -> tuple[int, int] | None:
    """Return rows and columns of the image's visual tokens, or `None` where they cannot be told."""
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
    raise SystemExit(run_guarded(main, is_process=True))
