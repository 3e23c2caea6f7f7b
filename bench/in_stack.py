"""Time every method, before the first layer and inside the stack, side by side at equal average cost.

    python -m bench.in_stack [--device cuda] [--rounds 5] [--mean 0.35] [--methods NAME ...] [--json FILE]

A Qwen2.5-VL of 16 layers with random weights reads a prompt with an image of 1296 tokens. Each method keeps so much
that a layer reads the same number of visual tokens on average over the layers, `--mean` of them. `fastv` runs twice:
dropping tokens, and hiding them, which computes the same and saves nothing. What drops inside the stack is first
compared with hiding: the logits of the last token have to agree. Then prefills take turns, and after them generations.
A prefill includes the vision encoder and whatever a method reads there.
This is about speed: random weights say nothing about quality.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from bench import cli
from bench.decode_overhead import prompt as make_prompt
from bench.decode_overhead import small_model
from bench.environment import environment, write_json
from bench.prefill import cache_bytes, decode_rate
from bench.timing import rotate, spread, synchronize
from hawk_kernels import prune
from hawk_kernels.methods import METHODS, Method, resolve_method

# float32 logits of a model whose layers add up in another order
TOLERANCE = 1e-3
_DECODING_ROUNDS = 3
HIDING = "fastv hide"


def mean_share(stages: Mapping[int, Any], depth: int) -> float:
    """Return the share of the visual tokens that a layer reads on average over the layers."""
    shares = [1.0] * depth
    for layer, keep in sorted(stages.items()):
        shares[layer:] = [keep] * (depth - layer)
    return sum(shares) / depth


def keep_for(method: Method, mean: float, depth: int) -> float:
    """Find the keep ratio at which a layer reads `mean` of the visual tokens on average.

    Raises:
        ValueError: the method's first stage comes too late for that.
    """
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_share(method.stages(middle, depth), depth) < mean else (low, middle)
    if abs(mean_share(method.stages(high, depth), depth) - mean) > 1e-3:
        least = mean_share(method.stages(1e-9, depth), depth)
        raise ValueError(f"mean: expected more than {least:.3f} for {method.name}, got {mean}; pass --mean")
    return high


@torch.no_grad()
def first_logits(model: Any, prompt: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
    """Compute the logits of the last token, and the cache."""
    output = model(**prompt, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1], output.past_key_values


def measure(
    model: Any,
    methods: Sequence[str],
    side: int,
    mean: float,
    rounds: int,
    seconds: float,
    new_tokens: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Measure a row for each method and for the unpruned model."""
    prompt = make_prompt(side, (40,), device)
    depth = model.config.get_text_config().num_hidden_layers
    ways: dict[str, Callable[[], Any]] = {"unpruned": nullcontext}
    keeps: dict[str, float] = {"unpruned": 1.0}
    for name in methods:
        options: dict[str, Any] = {"head_weights": "uniform"} if METHODS[name].uses_head_weights else {}
        keeps[name] = keep_for(resolve_method(name, {}), mean, depth)
        ways[name] = partial(prune, model, keeps[name], method=name, **options)
    if "fastv" in methods:
        keeps[HIDING] = keeps["fastv"]
        ways[HIDING] = partial(prune, model, keeps["fastv"], method="fastv", mode="hide")
    inside = [name for name in methods if any(resolve_method(name, {}).stages(keeps[name], depth))]
    differences = {name: check_parity(model, prompt, name, keeps[name]) for name in inside}

    def sampler(way: str) -> Callable[[], float]:
        def sample() -> float:
            with ways[way]():
                synchronize(device)
                start = time.perf_counter()
                first_logits(model, prompt)
                synchronize(device)
                return (time.perf_counter() - start) * 1e6

        return sample

    samples = rotate({way: sampler(way) for way in ways}, rounds, seconds)
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(_DECODING_ROUNDS):
        for way, block in ways.items():
            with block():
                rates[way].append(decode_rate(model, prompt, new_tokens))
    unpruned = spread(samples["unpruned"])["median"]
    rows = []
    for way, block in ways.items():
        with block() as pruning:
            _, cache = first_logits(model, prompt)
            row: dict[str, Any] = {"way": way, "keep_ratio": round(keeps[way], 4), "kv_bytes": cache_bytes(cache)}
            del cache
        if pruning is not None:
            by_layer = pruning.stats.samples[0].visual_tokens_by_layer
            row["visual_tokens_by_layer"] = list(by_layer)
            row["mean_visual_tokens"] = sum(by_layer) / depth
        row["prefill_microseconds"] = spread(samples[way])
        row["decode_tokens_per_second"] = statistics.median(rates[way])
        row["speed_up"] = unpruned / row["prefill_microseconds"]["median"]
        if way in differences:
            row["largest_difference_from_hiding"] = differences[way]
        rows.append(row)
    return rows


def check_parity(model: Any, prompt: dict[str, torch.Tensor], method: str, keep: float) -> float:
    """Return by how much the logits differ between dropping tokens and hiding them.

    Raises:
        AssertionError: by more than float32 explains.
    """
    logits = []
    for mode in ("drop", "hide"):
        with prune(model, keep, method=method, mode=mode):
            logits.append(first_logits(model, prompt)[0])
    difference = float((logits[0] - logits[1]).abs().max())
    if difference > TOLERANCE:
        raise AssertionError(f"{method}: dropping and hiding give logits that differ by {difference}")
    return difference


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a line for each method, and write JSON."""
    parser = cli.parser(
        "bench.in_stack",
        __doc__,
        device=cli.default_device(),
        rounds=5,
        seconds=(120.0, "for the prefills; at least 5 rounds (default: %(default)s)"),
        json="none is written",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(METHODS),
        choices=sorted(METHODS),
        metavar="NAME",
        help=f"any of {', '.join(sorted(METHODS))} (default: all)",
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--side", type=int, default=36, help="the image has the square of this many tokens")
    parser.add_argument("--mean", type=float, default=0.35, help="visual tokens that a layer reads on average")
    parser.add_argument("--new-tokens", type=int, default=16)
    options = parser.parse_args(arguments)
    device = options.device
    model = small_model(options.hidden, options.layers, device)
    methods = list(dict.fromkeys(options.methods))
    rows = measure(
        model, methods, options.side, options.mean, options.rounds, options.seconds, options.new_tokens, device
    )
    results = {
        "environment": environment(device),
        "model": {
            "hidden": options.hidden,
            "layers": options.layers,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
        "visual_tokens": options.side**2,
        "mean": options.mean,
        "rows": rows,
    }
    if options.json:
        write_json(options.json, results)
    for row in rows:
        prefill = row["prefill_microseconds"]["median"] / 1e6
        print(
            f"{row['way']:12} keeps {row['keep_ratio']:.3f}: prefill {prefill:.3f} s "
            f"({row['speed_up']:.2f} x), decode {row['decode_tokens_per_second']:.1f} tokens/s, "
            f"cache {row['kv_bytes'] / 2**20:.1f} MiB",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
