"""Count how many times Triton would compile each kernel over a random stream of prompts for one model.

    python -m bench.few_kernels [--target sm_90 ...] [--model NAME ...] [--seed 0 ...] [--prompts 1000] [--json FILE]

Every launch is caught on its way to Triton and keyed exactly as Triton keys its cache of compiled kernels: by what it
specialises the arguments for, by the constants and by the compiler's options. No kernel runs and no memory is read, so
no device is needed. Must run without TRITON_INTERPRET, which replaces Triton's launches.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from bench import cli
from hawk_kernels.backends.kernels import (
    attention_column_mean,
    compact,
    configs,
    greedy,
    score_and_select,
    score_hidden,
    score_peaks,
    select_topk,
)
from hawk_kernels.layer import Layer

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MOST_TOKENS = 262144
MOST_BATCH = 64


class Model(NamedTuple):
    """The shapes of a language model's layers, and of its vision encoder's attention.

    Its queries are contiguous `[B, H, N, D]`, or as a projection leaves them.
    """

    hidden_size: int = 3584
    num_heads: int = 28
    num_key_value_heads: int = 4
    head_dim: int = 128
    encoder_heads: int = 16
    encoder_head_dim: int = 80
    dtype: torch.dtype = torch.bfloat16
    is_contiguous: bool = False


MODELS = {
    "qwen2.5-vl-7b": Model(),
    "heads of 72": Model(1152, 16, 16, 72, 16, 72, is_contiguous=True),
    "fp32": Model(2560, 8, 4, 256, 16, 80, torch.float32),
}


class Prompt(NamedTuple):
    """The shape of a batch of prompts, and what to keep of it."""

    batch: int
    num_text: int
    num_visual: int
    keep: float | int

    @property
    def num_tokens(self) -> int:
        """Return the length of a row."""
        return min(MOST_TOKENS, self.num_text + self.num_visual)


def prompts(draw: random.Random, count: int) -> Iterator[Prompt]:
    """Yield prompts: ordinary single photos, batches, and any length from 1 to 262144 tokens; always the same."""
    edges = [1, 2, 16, 1024, 1025, 2047, 2048, 2049, 4096, 4097, 16384, 131072, MOST_TOKENS]
    for index in range(count):
        keep = draw.choice([draw.uniform(0.01, 1.0), 1.0, 0.2, draw.randint(1, 2000), 1, 2**40])
        text = draw.randint(5, 500)
        kind = index % 4
        if kind in (0, 1):
            yield Prompt(1, text, draw.randint(100, 4000), keep)
        elif kind == 2:
            yield Prompt(draw.randint(1, MOST_BATCH), text, round(2 ** draw.uniform(0, 14)), keep)
        else:
            tokens = draw.choice([draw.choice(edges), round(2 ** draw.uniform(0, 18)), draw.randint(1, MOST_TOKENS)])
            yield Prompt(draw.choice([1, draw.randint(1, MOST_BATCH)]), text, tokens, keep)


def _mask(draw: random.Random, batch: int, length: int) -> torch.Tensor:
    """Return a bool mask as callers have them: contiguous, cut out of a longer one, with gaps, one row for all."""
    kind = draw.randrange(5)
    if kind == 0:
        offset = draw.randint(1, 20)
        return torch.empty((batch, length + offset), dtype=torch.bool, device="meta")[:, offset:]
    if kind == 1:
        return torch.empty((batch, length, 3), dtype=torch.bool, device="meta")[:, :, 1]
    if kind == 2:
        return torch.empty((1, length), dtype=torch.bool, device="meta").expand(batch, -1)
    return torch.empty((batch, length), dtype=torch.bool, device="meta")


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _heads_of(model: Model, batch: int, heads: int, length: int, head_dim: int) -> torch.Tensor:
    """Return `[B, H, N, D]`, contiguous or as a projection leaves it."""
    if model.is_contiguous:
        return _empty(batch, heads, length, head_dim, dtype=model.dtype)
    return _empty(batch, length, heads, head_dim, dtype=model.dtype).transpose(1, 2)


def calls(model: Model, prompt: Prompt, draw: random.Random) -> dict[str, Callable[[], object]]:
    """Return, by the name of what is called, calls of every kernel on tensors of a prompt's shape."""
    batch, num_text, num_visual, keep = prompt
    num_tokens = prompt.num_tokens
    heads, group, head_dim, hidden_size = (
        model.num_heads,
        model.num_key_value_heads,
        model.head_dim,
        model.hidden_size,
    )
    q = _empty(batch, heads, num_text, head_dim, dtype=model.dtype)
    k = _empty(batch, group, num_visual, head_dim, dtype=model.dtype)
    w = _empty(heads)
    masks = [_mask(draw, batch, length) for length in (num_text, num_visual, num_tokens, num_tokens, num_tokens)]
    bias = [_empty(heads * head_dim, dtype=model.dtype), _empty(group * head_dim, dtype=model.dtype)]
    weights = [_empty(count * head_dim, hidden_size, dtype=model.dtype) for count in (heads, group)]
    layer = Layer(_empty(hidden_size, dtype=model.dtype), 1e-6, weights[0], bias[0], weights[1], bias[1])
    x = _empty(batch, num_tokens + 3, hidden_size, dtype=model.dtype)[:, draw.randrange(4) :][:, :num_tokens]
    scores = _empty(batch + 1, num_visual)[1:]
    length = draw.randint(1, num_tokens)
    positions = _empty(3, batch, num_tokens + 1, dtype=torch.int64)[:, :, draw.randrange(2) :][:, :, :num_tokens]
    places, weights_of_entries = (_empty(batch, num_visual, dtype=dtype) for dtype in (torch.int64, torch.float32))
    merge = (places, places, weights_of_entries)
    encoder_q, encoder_k = (
        _heads_of(model, 1, model.encoder_heads, num_visual, model.encoder_head_dim) for _ in range(2)
    )
    text_q = _heads_of(model, batch, heads, num_text, head_dim)
    # for longer rows the cosines of all pairs do not fit in memory, and PyTorch picks
    few = min(num_visual, 16384)
    cosines: Any = SimpleNamespace(matrix=_empty(batch, few, few), nearest=lambda: _empty(batch, few))
    candidates = _empty(batch, few, dtype=torch.bool)
    picks = draw.randint(1, few)
    columns = attention_column_mean.attention_column_mean
    return {
        "score_and_select": lambda: score_and_select.score_and_select(
            q, k, w, keep, masks[0], masks[1], "l2", 0.1, "floor"
        ),
        "score_tokens": lambda: score_and_select.score_tokens(q, k, w, None, masks[1], "l2", 0.1),
        "score_hidden_and_select": lambda: score_hidden.score_hidden_and_select(
            x, layer, w, keep, masks[2], masks[3], "l2", 0.1, "floor"
        ),
        "score_hidden": lambda: score_hidden.score_hidden(x, layer, w, masks[2], masks[3], "l2", 0.1),
        "score_peaks": lambda: score_peaks.score_peaks(text_q, k, w, masks[0], masks[1], "softmax", 0.1),
        "select_topk": lambda: select_topk.select_topk(scores, keep, masks[1], "floor"),
        "compact": lambda: compact.compact(x, masks[4], positions, length),
        "compact, merging": lambda: compact.compact(x, masks[4], positions, length, merge),
        "columns of an encoder": lambda: columns(encoder_q, encoder_k, None, False, None, None, True, "mean", 0.1),
        "columns of text": lambda: columns(text_q, k, None, False, masks[0], w, True, "max", 0.1),
        "greedy_max_min": lambda: greedy.max_min_picks(cosines, candidates, candidates, None, picks),
        "greedy_dpp": lambda: greedy.dpp_picks(cosines, _empty(batch, few), _empty(batch, few), None, picks),
    }


@contextmanager
def launching_on(architecture: str) -> Iterator[list[tuple[str, str]]]:
    """Catch launches, cut as on a GPU of this architecture; yields names and keys of the kernels as they come."""
    backend = make_backend(TARGETS[architecture])
    binders: dict[str, Any] = {}
    keys: list[tuple[str, str]] = []

    def catch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        name = kernel.fn.__name__
        if name not in binders:
            binders[name] = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, given = binders[name](*args, **options)
        keys.append((name, str(specialization) + str(given)))

    cached = (configs.hidden_config, configs.score_config, score_and_select._plan, score_hidden._plan)
    for function in cached:
        function.cache_clear()
    try:
        with (
            mock.patch.object(JITFunction, "run", catch),
            mock.patch.object(configs, "_config_on", lambda _, *wanted: configs.config_for(architecture, *wanted)),
        ):
            yield keys
    finally:
        for function in cached:
            function.cache_clear()


def count(architecture: str, seed: int, num_prompts: int, model: Model) -> dict[str, int]:
    """Return how many variants of each kernel a stream of prompts needs, by what is called."""
    draw = random.Random(seed)
    found: dict[str, set[str]] = {}
    with launching_on(architecture) as keys:
        for prompt in prompts(draw, num_prompts):
            for use, call in calls(model, prompt, draw).items():
                keys.clear()
                call()
                for kernel, key in keys:
                    found.setdefault(f"{use}: {kernel}", set()).add(key)
    return {name: len(variants) for name, variants in sorted(found.items())}


def main() -> None:
    """Print the variants of each kernel for every target and seed, and write them as JSON if asked."""
    parser = cli.parser("bench.few_kernels", __doc__)
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all of them")
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all of them")
    parser.add_argument("--seed", type=int, action="append", help="of a stream; default: 0")
    parser.add_argument("--prompts", type=int, default=1000, help="in a stream; default: %(default)s")
    parser.add_argument("--json", type=Path, help="also write the counts to this file")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("bench.few_kernels: TRITON_INTERPRET=1 replaces Triton's launches; unset it")
    rows = []
    for target in arguments.target or TARGETS:
        for name, seed in product(arguments.model or MODELS, arguments.seed or [0]):
            counts = count(target, seed, arguments.prompts, MODELS[name])
            stream = {"target": target, "model": name, "seed": seed, "prompts": arguments.prompts}
            rows.append({**stream, "variants": counts})
            print(f"{target}, {name}, seed {seed}:")
            for use, number in counts.items():
                print(f"  {number:>3}  {use}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
