"""Time a decoding step inside a prune block and one outside, over caches with the same tokens: the cost of the hooks.

    python -m bench.decode_overhead [--device cuda] [--rounds 200] [--json FILE]

A small Qwen2.5-VL with random weights reads a prompt with an image inside a block. Its pruned cache is copied, and the
copy goes on without the block. Steps of the two take turns, in changing order, with the masks and position ids that
`generate` would pass. Logits are compared first. `ratio` is the median inside over that outside; the aim is 1.02.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench import cli
from bench.environment import environment, write_json
from bench.timing import spread, synchronize
from hawk_kernels import prune
from hawk_kernels.hf.pruned_cache import CachedPrompt, CacheRecords, forget, unguard

AIM = 1.02
_IMAGE, _VIDEO, _START, _END, _FIRST_WORD, _VOCABULARY = 0, 1, 2, 3, 10, 8192
_CASES = ("one row", "left-padded rows", "without position ids")


def small_model(hidden: int, layers: int, device: torch.device) -> Any:
    """Make a Qwen2.5-VL with random weights: heads of 64, four query heads for each key head."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": _VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 256),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision: dict[str, Any] = {"depth": 1, "num_heads": 2, "hidden_size": 32, "intermediate_size": 48, "patch_size": 4}
    vision |= {"out_hidden_size": hidden, "window_size": 16, "fullatt_block_indexes": [0]}
    ids: dict[str, Any] = {"image_token_id": _IMAGE, "video_token_id": _VIDEO}
    ids |= {"vision_start_token_id": _START, "vision_end_token_id": _END}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config).eval().to(device)


def prompt(side: int, questions: tuple[int, ...], device: torch.device) -> dict[str, torch.Tensor]:
    """Make left-padded rows: an image of `side` x `side` tokens, then as many words as `questions` says."""
    generator = torch.Generator().manual_seed(0)
    longest = side**2 + 2 + max(questions)
    input_ids = torch.full((len(questions), longest), _VOCABULARY - 1)
    mask = torch.zeros_like(input_ids)
    for row, count in enumerate(questions):
        words = torch.randint(_FIRST_WORD, _VOCABULARY - 1, (count,), generator=generator)
        tokens = torch.cat([torch.tensor([_START, *[_IMAGE] * side**2, _END]), words])
        input_ids[row, longest - len(tokens) :] = tokens
        mask[row, longest - len(tokens) :] = 1
    patches = len(questions) * side**2 * 4
    inputs = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "mm_token_type_ids": (input_ids == _IMAGE).int(),
        "pixel_values": torch.randn(patches, 3 * 2 * 16, generator=generator),
        "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]] * len(questions)),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@torch.inference_mode()
def measure(model: Any, case: str, side: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Measure one row: microseconds of a step inside and outside, and their ratio."""
    inputs = prompt(side, (40, 23) if case == "left-padded rows" else (40,), device)
    pruning = prune(model, 0.2, head_weights="uniform")
    with pruning:
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    cached = CacheRecords(CachedPrompt, pruning._anatomy.text).of(cache)
    assert cached is not None
    packed, following = cached.mask, cached.next_position
    outside = copy.deepcopy(cache)
    forget(outside)
    unguard(outside)
    token = torch.full((len(inputs["input_ids"]), 1), _FIRST_WORD, device=device)
    padded = case == "left-padded rows"

    def step(cache: Any, mask: torch.Tensor | None, position: torch.Tensor | None, block: Any) -> tuple[Any, float]:
        with block:
            synchronize(device)
            start = time.perf_counter()
            output = model(
                input_ids=token,
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            synchronize(device)
            return output.logits, (time.perf_counter() - start) * 1e6

    samples: dict[str, list[float]] = {"inside": [], "outside": []}
    for number in range(rounds + 3):
        grown = [torch.nn.functional.pad(mask, (0, number + 1), value=1) for mask in (inputs["attention_mask"], packed)]
        position = following + number
        given = position if case != "without position ids" else None
        ways: dict[str, Callable[[], tuple[Any, float]]] = {
            "inside": partial(step, cache, grown[0] if padded else None, given, pruning),
            "outside": partial(step, outside, grown[1] if padded else None, position, contextlib.nullcontext()),
        }
        order = ("inside", "outside") if number % 2 else ("outside", "inside")
        results = {way: ways[way]() for way in order}
        if not torch.allclose(results["inside"][0], results["outside"][0], atol=1e-3):
            raise AssertionError(f"{case}: the steps inside and outside give other logits in round {number}")
        if number >= 3:
            for way, (_, microseconds) in results.items():
                samples[way].append(microseconds)
    ratio = statistics.median(samples["inside"]) / statistics.median(samples["outside"])
    return {
        "case": case,
        "cached_tokens": int(packed.shape[1]),
        "prompt_tokens": int(inputs["input_ids"].shape[1]),
        **{way: spread(values) for way, values in samples.items()},
        "ratio": round(ratio, 4),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a line for each case, and write JSON."""
    parser = cli.parser(
        "bench.decode_overhead", __doc__, device=cli.default_device(), rounds=200, json="none is written"
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--side", type=int, default=32, help="the image has the square of this many tokens")
    options = parser.parse_args(arguments)
    device = options.device
    model = small_model(options.hidden, options.layers, device)
    results: dict[str, Any] = {
        "environment": environment(device),
        "model": {
            "hidden": options.hidden,
            "layers": options.layers,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
        "unit": "microseconds",
        "aim": AIM,
        "rows": [],
    }
    for case in _CASES:
        row = measure(model, case, options.side, options.rounds, device)
        results["rows"].append(row)
        if options.json:
            write_json(options.json, results)
        print(
            f"{case}: {row['cached_tokens']} cached tokens, inside {row['inside']['median']:.0f} us, "
            f"outside {row['outside']['median']:.0f} us, ratio {row['ratio']:.3f} (aim {AIM})",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
