"""Time a whole prefill of Qwen2.5-VL-7B's exact shape, with random weights, with and without pruning.

    python -m bench.prefill [--device cuda] [--tokens 1296 5120 16384] [--json FILE]

Time to first token (a forward pass that wants one row of logits, from an idle device until the token is on the host),
decode tokens a second, bytes of the KV cache, peak memory beyond the weights, and the share of the prefill that
pruning takes, between events before and after our hooks: prompt reading, scoring, selection, compaction. Beside it
the release's way of pruning and the unpruned model, both with SDPA, and the limit that the operations saved set on the
speed-up. Decoding after the release's pruning is that of ours, with as many keys, and is not measured again.

The vision encoder is left out: images come as the embeddings that it would make, so shares and speed-ups are those of
the decoder's prefill. On a CPU a miniature stands in, and says so.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import cli
from bench.environment import environment, write_json
from bench.model import prefill_flops
from bench.released import released_pruning
from bench.timing import rotate, spread, synchronize
from hawk_kernels import prune

# Fraction of the visual tokens that is dropped.
PRUNED = (0.0, 0.6, 0.8, 0.9)
# Visual tokens as an image's grid, height and width.
GRIDS = {36: (6, 6), 256: (16, 16), 1296: (36, 36), 5120: (64, 80), 16384: (128, 128)}
_BEFORE, _QUESTION, _AFTER = 15, 64, 5
_TEXT_ID, _IM_END, _VISION_START, _VISION_END, _IMAGE = 1000, 151645, 151652, 151653, 151655
_NEW_TOKENS = 32

_TEXT_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "mrope_section",
)
SHAPES = {
    "7b": dict(zip(_TEXT_SIZES, (3584, 18944, 28, 28, 4, [16, 24, 24]), strict=True)),
    "miniature": dict(zip(_TEXT_SIZES, (512, 1408, 6, 8, 2, [8, 12, 12]), strict=True)),
    "tiny": dict(zip(_TEXT_SIZES, (64, 96, 2, 4, 2, [2, 3, 3]), strict=True)),
}
_DESCRIPTIONS = {
    "7b": "Qwen2.5-VL-7B's decoder, random weights",
    "miniature": "a miniature, not the 7B",
    "tiny": "a toy that proves the script, not the 7B",
}
_VOCABULARY = 152064


_LEVELS = ("head", "multimodal", "text")


class EncodedImages(nn.Module):
    """Stands in for the vision encoder: what comes as pixels is already encoded, `[M, hidden]`."""

    spatial_merge_size = 2

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(last_hidden_state=pixel_values, pooler_output=pixel_values)


def make_model(shape: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """Make a Qwen2.5-VL with random weights on the device, without its vision encoder."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = dict(shape)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": text.pop("mrope_section")}
    text |= {"rope_parameters": rope, "max_position_embeddings": 128000, "vocab_size": _VOCABULARY}
    text |= {"bos_token_id": 151643, "eos_token_id": _IM_END, "pad_token_id": 151643, "rms_norm_eps": 1e-6}
    vision = {"depth": 0, "hidden_size": 64, "num_heads": 4, "out_hidden_size": text["hidden_size"]}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=_IMAGE,
        video_token_id=151656,
        vision_start_token_id=_VISION_START,
        vision_end_token_id=_VISION_END,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model: Any = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    model.model.visual = EncodedImages(dtype)
    # random weights may say at any time that they are done
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 151643
    return model.eval()


def make_prompt(model: Any, num_visual: int) -> dict[str, torch.Tensor]:
    """Make a prompt: text, an image of so many tokens, a question, the end of the turn, the header of the reply."""
    embeddings = model.get_input_embeddings().weight
    device = embeddings.device
    height, width = GRIDS[num_visual]
    placeholders = [_VISION_START, *[_IMAGE] * num_visual, _VISION_END]
    question = range(_TEXT_ID, _TEXT_ID + _QUESTION)
    ids = torch.tensor([[*range(_BEFORE), *placeholders, *question, _IM_END, *range(_AFTER)]], device=device)
    generator = torch.Generator(device).manual_seed(0)
    image = torch.randn(num_visual, embeddings.shape[1], generator=generator, device=device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == _IMAGE).int(),
        # as large as the embeddings of text
        "pixel_values": embeddings.std().detach() * image.to(embeddings.dtype),
        "image_grid_thw": torch.tensor([[1, 2 * height, 2 * width]], device=device),
    }


class Watch:
    """Time that passes between the moments before and after the hooks of a `prune` block, on the device's clock.

    Enter `outside` before and `inside` after the block: hooks run in the order of their registration.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self._modules = (model, model.model, model.model.language_model)
        self._device = device
        self._marks: dict[tuple[int, str, str], Any] = {}

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Mark the moments before our hooks."""
        with self._marking("before"):
            yield

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Mark the moments after our hooks."""
        with self._marking("after"):
            yield

    @contextmanager
    def _marking(self, side: str) -> Iterator[None]:
        handles = []
        for level, module in enumerate(self._modules):
            handles += [
                module.register_forward_pre_hook(lambda *_, level=level: self._mark(level, "in", side)),
                module.register_forward_hook(lambda *_, level=level: self._mark(level, "out", side)),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _mark(self, level: int, way: str, side: str) -> None:
        if self._device.type != "cuda":
            self._marks[level, way, side] = time.perf_counter()
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks[level, way, side] = event

    def microseconds(self) -> dict[str, float]:
        """Of the last forward pass, by hook ("in multimodal", "in text", ...); the device must be idle."""
        parts = {}
        for (level, way, side), begin in self._marks.items():
            if side == "before":
                end = self._marks[level, way, "after"]
                took = (end - begin) * 1e6 if self._device.type != "cuda" else begin.elapsed_time(end) * 1e3
                parts[f"{way} {_LEVELS[level]}"] = took
        return parts


@torch.no_grad()
def first_token(model: Any, prompt: dict[str, torch.Tensor]) -> tuple[int, Any]:
    """Compute the first token, brought to the host, and the cache."""
    output = model(**prompt, use_cache=True, logits_to_keep=1)
    return int(output.logits[0, -1].argmax()), output.past_key_values


class Stopwatch:
    """A streamer that notes when each token is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: there is nothing to flush."""


def decode_rate(model: Any, prompt: dict[str, torch.Tensor], new_tokens: int) -> float:
    """Measure the tokens per second after the first one, greedily, by `generate`."""
    stopwatch = Stopwatch()
    model.generate(**prompt, max_new_tokens=new_tokens, do_sample=False, streamer=stopwatch)
    # the prompt comes first, then the first token; the second may still pay for warming up
    times = stopwatch.times[2:]
    return (len(times) - 1) / (times[-1] - times[0])


def cache_bytes(cache: Any) -> int:
    """Count the bytes of all keys and values."""
    tensors = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(
    model: Any,
    num_visual: int,
    device: torch.device,
    pruned: tuple[float, ...],
    rounds: int,
    seconds: float,
    new_tokens: int,
) -> list[dict[str, Any]]:
    """Measure a row for the unpruned model, then one of ours and one of the release for each fraction dropped."""
    prompt = make_prompt(model, num_visual)
    length = prompt["input_ids"].shape[1]
    visual = (prompt["input_ids"][0] == _IMAGE).nonzero().squeeze(1)
    queries = torch.arange(_QUESTION, device=device) + int(visual[-1]) + 2
    config = model.config.get_text_config()
    uniform = torch.full((config.num_attention_heads,), 1 / config.num_attention_heads, device=device)
    watch = Watch(model, device)

    def ours(keep: float) -> Any:
        return prune(model, keep_ratio=keep, head_weights="uniform")

    def release(keep: float) -> Any:
        return released_pruning(model, keep, uniform, queries, visual)

    ways: dict[tuple[str, float], Callable[[], Any]] = {("unpruned", 0.0): nullcontext}
    for dropped in pruned:
        if dropped > 0:
            keep = round(1 - dropped, 10)
            ways["ours", dropped] = partial(ours, keep)
            ways["released", dropped] = partial(release, keep)

    # libraries take their workspaces at the first call
    first_token(model, prompt)
    rows = []
    # microseconds of a forward pass, and of pruning by hook
    passes: dict[tuple[str, float], list[tuple[float, dict[str, float]]]] = {way: [] for way in ways}
    for (name, dropped), block in ways.items():
        row: dict[str, Any] = {"way": name, "pruned": dropped, "visual_tokens": num_visual, "prompt_tokens": length}
        with block() as pruning:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            _, cache = first_token(model, prompt)
            if device.type == "cuda":
                row["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
            row["kv_bytes"] = cache_bytes(cache)
            row["kept_tokens"] = int(cache.layers[0].keys.shape[-2])
            del cache
            if name == "ours":
                assert int(pruning.keep_mask.sum()) == row["kept_tokens"]
            if name != "released":
                row["decode_tokens_per_second"] = decode_rate(model, prompt, new_tokens)
        flops = prefill_flops(config, length) / prefill_flops(config, row["kept_tokens"])
        row["flop_limit"] = flops
        rows.append(row)

    def sampler(way: tuple[str, float]) -> Callable[[], float]:
        def sample() -> float:
            with watch.outside(), ways[way](), watch.inside():
                synchronize(device)
                start = time.perf_counter()
                first_token(model, prompt)
                took = (time.perf_counter() - start) * 1e6
                synchronize(device)
                passes[way].append((took, watch.microseconds()))
            return took

        return sample

    samples = rotate({way: sampler(way) for way in ways}, rounds, seconds)
    unpruned = spread(samples["unpruned", 0.0])["median"]
    for row in rows:
        way = (row["way"], row["pruned"])
        row["first_token_microseconds"] = spread(samples[way])
        row["speed_up"] = unpruned / row["first_token_microseconds"]["median"]
        if row["way"] != "unpruned":
            # rounds that do not count came first
            counted = passes[way][-len(samples[way]) :]
            row["pruning_microseconds"] = spread([sum(parts.values()) for _, parts in counted])
            row["pruning_share"] = spread([sum(parts.values()) / took for took, parts in counted])
            row["pruning_parts"] = {part: spread([parts[part] for _, parts in counted]) for part in counted[0][1]}
            row["speed_up_of_limit"] = row["speed_up"] / row["flop_limit"]
    return rows


def run(
    device: torch.device,
    path: Path | None,
    tokens: tuple[int, ...] | None = None,
    *,
    shape: str | None = None,
    pruned: tuple[float, ...] = PRUNED,
    rounds: int = 10,
    seconds: float = 10.0,
    new_tokens: int = _NEW_TOKENS,
) -> dict[str, Any]:
    """Measure every number of visual tokens and write after each."""
    shape = shape or ("7b" if device.type == "cuda" else "miniature")
    tokens = tokens or ((1296, 5120, 16384) if shape == "7b" else (256, 1296))
    dtype = torch.bfloat16 if shape == "7b" else torch.float32
    results: dict[str, Any] = {
        "environment": environment(device),
        "model": _DESCRIPTIONS[shape],
        "shape": {**SHAPES[shape], "vocab_size": _VOCABULARY},
        "dtype": str(dtype).removeprefix("torch."),
        "vision_encoder": "left out",
        "rows": [],
    }
    model = make_model(SHAPES[shape], device, dtype)
    if device.type == "cuda":
        results["weight_bytes"] = torch.cuda.memory_allocated(device)
    for num_visual in tokens:
        rows = measure(model, num_visual, device, pruned, rounds, seconds, new_tokens)
        results["rows"] += rows
        for row in rows:
            print(summary(row), flush=True)
        if path is not None:
            write_json(path, results)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def summary(row: dict[str, Any]) -> str:
    """Summarise a row in one line."""
    text = f"{row['visual_tokens']} visual tokens, {row['way']}"
    if row["way"] == "unpruned":
        return f"{text}: first token {row['first_token_microseconds']['median'] / 1e3:.1f} ms"
    share = row["pruning_share"]["median"]
    return (
        f"{text} {row['pruned']:.0%} pruned: first token {row['first_token_microseconds']['median'] / 1e3:.1f} ms, "
        f"{row['speed_up']:.2f}x ({row['speed_up_of_limit']:.0%} of the limit), pruning {share:.2%}"
    )


def main() -> None:
    """Measure, print a line for each row, and write JSON."""
    parser = cli.parser(
        "bench.prefill",
        __doc__,
        device=cli.default_device(),
        rounds=10,
        seconds=(10.0, "for each number of tokens (default: %(default)s)"),
        json="bench/results/<device>/prefill.json",
    )
    parser.add_argument("--tokens", type=int, nargs="+", choices=sorted(GRIDS), help="visual tokens")
    parser.add_argument("--new-tokens", type=int, default=_NEW_TOKENS, help="to measure decoding by")
    parser.add_argument("--shape", choices=SHAPES, help="default: 7b on a GPU, miniature elsewhere")
    arguments = parser.parse_args()
    path = cli.results_file(arguments, "prefill.json")
    tokens = None if arguments.tokens is None else tuple(arguments.tokens)
    run(
        arguments.device,
        path,
        tokens,
        shape=arguments.shape,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        new_tokens=arguments.new_tokens,
    )
    print(f"written: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
