"""Times a prefill and the tokens after it, unpruned beside pruned, at a fixed number of new tokens.

The shipped model is too small to be slow, so the demo times a Qwen2.5-VL of about 50 million parameters with random
weights instead. How long a prefill takes does not depend on what the weights are, and what this model answers is never
shown.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hawk_kernels.timed_generation import timed_generation

if TYPE_CHECKING:
    import torch

SIDE = 36
"""Rows and columns of visual tokens of the random model's picture: 1296 tokens, those of a 1008 x 1008 pixel photo."""

_NEW_TOKENS = 16
_ROUNDS_AT_MOST = 5
_ROUNDS_SECONDS = 22.0
STEPS = 2 + 2 * _ROUNDS_AT_MOST
"""Generations that `measure` does at most."""

_PATCH, _MERGE, _FRAMES = 14, 2, 2
_VISION_START, _VISION_END, _IMAGE, _VIDEO = 1, 2, 3, 4
_FIRST_WORD, _WORDS, _VOCABULARY = 10, 24, 1024


@dataclass(frozen=True)
class Run:
    """What one `generate` of a fixed number of new tokens took.

    Attributes:
        first_token: seconds until the first token, the vision encoder included.
        next_token: seconds for each token after it.
        cache_bytes: of the keys and values that the cache holds at the end.
        peak_bytes: most memory above what was held before the call; None where it cannot be measured.
    """

    first_token: float
    next_token: float
    cache_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True)
class Speed:
    """Medians over interleaved rounds, unpruned and pruned."""

    model: str
    parameters: int
    visual_tokens: int
    new_tokens: int
    rounds: int
    threads: int | None
    unpruned: Run
    pruned: Run

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return asdict(self)

    @property
    def first_token_ratio(self) -> float:
        """How many times sooner the first token of the pruned model comes."""
        return self.unpruned.first_token / self.pruned.first_token


def random_model(device: torch.device) -> tuple[Any, dict[str, torch.Tensor]]:
    """Build a Qwen2.5-VL of 50 M random parameters (hidden size 768, 8 layers) and its inputs of 1296 visual tokens."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": _VOCABULARY,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 128,
        "out_hidden_size": 768,
        "intermediate_size": 256,
        "depth": 2,
        "num_heads": 4,
        "patch_size": _PATCH,
        "spatial_merge_size": _MERGE,
        "temporal_patch_size": _FRAMES,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=_IMAGE,
        video_token_id=_VIDEO,
        vision_start_token_id=_VISION_START,
        vision_end_token_id=_VISION_END,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = Qwen2_5_VLForConditionalGeneration(config)
        model.eval().to(device, dtype)
        pixels = torch.randn(SIDE**2 * _MERGE**2, 3 * _FRAMES * _PATCH**2)
    model.generation_config.pad_token_id = 0
    words = list(range(_FIRST_WORD, _FIRST_WORD + _WORDS))
    ids = torch.tensor([[_VISION_START, *[_IMAGE] * SIDE**2, _VISION_END, *words]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == _IMAGE).int(),
        "pixel_values": pixels.to(dtype),
        "image_grid_thw": torch.tensor([[1, SIDE * _MERGE, SIDE * _MERGE]]),
    }
    return model, {name: value.to(device) for name, value in inputs.items()}


def measure(
    model: Any,
    inputs: Mapping[str, Any],
    pruned: Callable[[], AbstractContextManager[Any]],
    *,
    name: str,
    visual_tokens: int,
    threads: int | None,
    progress: Callable[[str], object],
) -> Speed:
    """Time unpruned and pruned generations of the same number of new tokens in turn.

    Each way runs once untimed first. Then they take turns, so that a busy moment of the machine hits both.

    Args:
        model: in eval mode.
        inputs: of one prompt, on the model's device.
        pruned: makes the `prune` block.
        name: of the model, for the report.
        visual_tokens: of the prompt.
        threads: that torch uses on a CPU, for the report.
        progress: is told what happens next.
    """
    import torch

    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {"all tokens": nullcontext, "pruned": pruned}
    runs: dict[str, list[Run]] = {way: [] for way in ways}
    started = time.perf_counter()
    with torch.inference_mode():
        for way, block in ways.items():
            progress(f"warming up, {way}")
            _run(model, inputs, block)
        for number in range(1, _ROUNDS_AT_MOST + 1):
            for way, block in ways.items():
                progress(f"round {number}, {way}")
                runs[way].append(_run(model, inputs, block))
            if time.perf_counter() - started > _ROUNDS_SECONDS:
                break
    return Speed(
        model=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        visual_tokens=visual_tokens,
        new_tokens=_NEW_TOKENS,
        rounds=len(runs["pruned"]),
        threads=threads,
        unpruned=_median(runs["all tokens"]),
        pruned=_median(runs["pruned"]),
    )


def describe(speed: Speed) -> str:
    """Render the report as text."""
    before, after = speed.unpruned, speed.pruned
    lines = [
        f"{'':<22}{'all tokens':>12}{'pruned':>12}",
        _row("time to first token", before.first_token, after.first_token, _milliseconds, "x sooner"),
        _row("time per next token", before.next_token, after.next_token, _milliseconds, "x as fast"),
        _row("keys and values", before.cache_bytes, after.cache_bytes, _megabytes, "x smaller"),
    ]
    if before.peak_bytes and after.peak_bytes:
        lines.append(_row("peak memory on top", before.peak_bytes, after.peak_bytes, _megabytes, "x smaller"))
    threads = "" if speed.threads is None else f" on {speed.threads} thread{'s' * (speed.threads > 1)}"
    rounds = "one round" if speed.rounds == 1 else f"medians of {speed.rounds} interleaved rounds"
    lines.append(
        f"{rounds}{threads}, {speed.new_tokens} new tokens each way; the first token includes the vision encoder"
    )
    return "\n".join(lines)


def _row(title: str, before: float, after: float, text: Callable[[float], str], verdict: str) -> str:
    ratio = f"{before / after:.2f}{verdict}" if after else ""
    return f"{title:<22}{text(before):>12}{text(after):>12}   {ratio}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def _run(model: Any, inputs: Mapping[str, Any], block: Callable[[], AbstractContextManager[Any]]) -> Run:
    """Time one generation of exactly `_NEW_TOKENS` tokens."""
    with block():
        memory = _PeakMemory(inputs["input_ids"].device)
        timed = timed_generation(model, inputs, min_new_tokens=_NEW_TOKENS, max_new_tokens=_NEW_TOKENS)
        peak = memory.above_start()
    assert timed.next_token is not None
    return Run(timed.first_token, timed.next_token, timed.cache_bytes, peak)


def _median(runs: list[Run]) -> Run:
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    return Run(
        first_token=statistics.median(run.first_token for run in runs),
        next_token=statistics.median(run.next_token for run in runs),
        cache_bytes=runs[-1].cache_bytes,
        peak_bytes=round(statistics.median(peaks)) if peaks else None,
    )


class _PeakMemory:
    """The peak of a stretch of work above its start: torch's on a GPU, the process's resident memory on Linux."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        self._start: int | None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._start = torch.cuda.memory_allocated(device)
        else:
            self._start = _resident("VmRSS") if device.type == "cpu" and _reset_resident_peak() else None

    def above_start(self) -> int | None:
        """Return the peak in bytes above the start."""
        import torch

        if self._start is None:
            return None
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device)) - self._start
        peak = _resident("VmHWM")
        return None if peak is None else max(0, peak - self._start)


def _reset_resident_peak() -> bool:
    try:
        # 5 resets the high-water mark, see proc(5)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
