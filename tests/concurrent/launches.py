"""Launches of all kernels that are small and yet reach every phase.

They share counters and a workspace, as launches of one stream do, and find there what the launch before has left. All
other memory that they allocate is poisoned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from hawk_kernels.layer import Layer

PACKAGE = "hawk_kernels.backends.kernels"
_POISON = -7


class Launch(NamedTuple):
    """A call of a kernel's host function, which returns its outputs; `is_long` says how its rows are selected."""

    name: str
    call: Callable[[], Any]
    is_long: bool = False


class Device:
    """What the launches of a stream share, and what the current one has allocated."""

    def __init__(self) -> None:
        self.counters = torch.zeros(1024, dtype=torch.int32)
        self.floats = torch.full((2**13,), torch.nan)
        self.words = torch.full((2**14,), _POISON, dtype=torch.int32)
        self.allocated: list[torch.Tensor] = []

    def scratch(self) -> tuple[torch.Tensor, ...]:
        """Return the memory in which a launch may read only what it has written itself."""
        fresh, self.allocated = self.allocated, []
        return self.floats, self.words, *fresh


class Kernels:
    """The modules of the kernels that are imported at the moment, which may be a mutant's."""

    def __init__(self) -> None:
        kernels = "attention_column_mean compact greedy score_and_select score_hidden score_peaks select_topk"
        names = [*kernels.split(), "configs", "finish", "launch", "prepared"]
        self.modules: dict[str, ModuleType] = {name: import_module(f"{PACKAGE}.{name}") for name in names}

    def __getattr__(self, name: str) -> ModuleType:
        return self.modules[name]

    @contextmanager
    def on(self, device: Device, launch: Launch) -> Iterator[None]:
        """Cut the work into many small programs, and take memory from the device."""
        empty = torch.empty

        def poisoned(*size: Any, **options: Any) -> torch.Tensor:
            tensor = empty(*size, **options)
            tensor.fill_(torch.nan if tensor.is_floating_point() else True if tensor.dtype == torch.bool else _POISON)
            device.allocated.append(tensor)
            return tensor

        def workspace(num_floats: int, num_words: int, _: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
            assert num_floats <= device.floats.numel()
            assert num_words <= device.words.numel()
            return device.floats, device.words

        def counters(count: int, _: torch.device) -> torch.Tensor:
            assert count <= device.counters.numel()
            return device.counters

        score = self.configs.ScoreConfig(block_keys=16, num_programs=8, query_elements=16, sum_block=32)
        hidden = self.configs.HiddenConfig(
            block_tokens=16, block_channels=16, num_programs=8, text_parts=2, text_channels=16, mean_channels=16,
            block_outputs=16, project_channels=16, fold_dims=16, sum_block=32,
        )  # fmt: skip
        longest, block = (8, 16) if launch.is_long else (2048, 1024)
        rows_and_heads = {"HEADS_PER_PROGRAM": 2, "ROWS_PER_PROJECTION": 2, "_HEADS_PER_SCORING": 2}
        memory = {"workspace": workspace, "launch_counters": counters}
        replaced: list[tuple[Any, dict[str, Any]]] = [
            (torch, {"empty": poisoned}),
            (self.finish, {"MAX_ROW_IN_REGISTERS": longest, "SELECT_BLOCK": block}),
            (self.prepared, memory),
            (self.score_and_select, {"HEADS_PER_PROGRAM": 2, "score_config": lambda *shape: score}),
            (self.score_hidden, {**rows_and_heads, "hidden_config": lambda *shape: hidden}),
            (self.score_peaks, {"_SUM_BLOCK": 32}),
            (self.compact, {"_BLOCK_BYTES": 64, "_BLOCK_RANKS": 16, "_BLOCK_TOKENS": 32}),
        ]
        with ExitStack() as stack:
            for module, values in replaced:
                stack.enter_context(patch.multiple(module, **values))
            self._forget_plans()
            stack.callback(self._forget_plans)
            yield

    def _forget_plans(self) -> None:
        for module in self.modules.values():
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def make_launches(kernels: Kernels) -> list[Launch]:
    launches = [Launch(f"select {masked=} {is_long=}", _select(kernels, masked), is_long)
                for masked, is_long in ((True, True), (False, True), (True, False))]  # fmt: skip
    for seed, mode in enumerate((None, "l2", "softmax", "minmax")):
        launches += [
            Launch(f"score_and_select {mode} short", _score_and_select(kernels, mode, 2, True, seed)),
            Launch(
                f"score_and_select {mode} split long", _score_and_select(kernels, mode, 5, seed % 2 > 0, seed), True
            ),
            Launch(f"score_hidden {mode} long", _score_hidden(kernels, mode, seed), True),
        ]
    launches += [
        Launch(f"score_peaks {mode}", _score_peaks(kernels, mode, seed))
        for seed, mode in enumerate((None, "l2", "softmax", "minmax"))
    ]
    launches += [
        Launch("score_and_select scores only", _score_and_select(kernels, "l2", 2, False, 1, selects=False)),
        Launch("score_hidden scores only", _score_hidden(kernels, "l2", 1, selects=False)),
        Launch("score_hidden short", _score_hidden(kernels, "softmax", 3)),
        Launch("compact 16 columns", _compact(kernels, with_positions=True)),
        Launch("compact source", _compact(kernels, with_positions=False)),
        Launch("compact merging", _merge(kernels)),
        Launch("greedy max-min", _max_min(kernels, masked=False)),
        Launch("greedy max-min masked", _max_min(kernels, masked=True)),
        Launch("greedy dpp", _dpp(kernels)),
    ]
    kinds = ("dense", "causal", "segments", "rows weights", "causal max")
    return launches + [Launch(f"column mean {kind}", _column_mean(kernels, kind)) for kind in kinds]


def _numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return few different numbers, so that scores tie."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def _flags(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return flags of which the last of several rows has none."""
    flags = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    flags[0, :2] = True
    flags[1:][-1:] = False
    return flags


def _select(kernels: Kernels, masked: bool) -> Callable[[], Any]:
    scores, mask = _numbers(2, 37), _flags(2, 37) if masked else None
    return lambda: kernels.select_topk.select_topk(scores, 0.4, mask, "floor")


def _score_and_select(
    kernels: Kernels, mode: str | None, num_queries: int, masked: bool, seed: int, selects: bool = True
) -> Callable[[], Any]:
    batch, num_keys = 2, 33 + 2 * seed
    q, k = _numbers(batch, 3, num_queries, 16, seed=seed), _numbers(batch, 1, num_keys, 16, seed=seed + 1)
    w = torch.tensor([0.5, 0.25, 1.0])
    masks = (_flags(batch, num_queries), _flags(batch, num_keys, seed=seed)) if masked else (None, None)
    ratio, rounding = ((0.3, "floor"), (5, "floor"), (0.5, "ceil"), (0.05, "floor"))[seed]
    module = kernels.score_and_select
    if selects:
        return lambda: module.score_and_select(q, k, w, ratio, *masks, mode, 0.25, rounding)
    return lambda: (module.score_tokens(q, k, w, *masks, mode, 0.25),)


def _score_hidden(kernels: Kernels, mode: str | None, seed: int, selects: bool = True) -> Callable[[], Any]:
    dtype = (torch.float32, torch.bfloat16, torch.float16, torch.float32)[seed]
    # Three rows are two groups of rows that are projected together, two rows are one.
    batch, num_tokens, size, heads, head_dim = 3 - seed % 2, 19, 24, 3, 8
    x = _numbers(batch, num_tokens, size, seed=seed).to(dtype)
    wq, wk = (_numbers(rows * head_dim, size, seed=rows).to(dtype) for rows in (heads, 1))
    bq, bk, norm_weight = (_numbers(n, seed=n).to(dtype) for n in (heads * head_dim, head_dim, size))
    layer = Layer(norm_weight, 1e-6, wq, bq, wk, bk, 1)
    w = torch.tensor([0.5, 0.25, 1.0])
    text, vision = _flags(batch, num_tokens, seed=seed), _flags(batch, num_tokens, seed=seed + 9)
    text[-1] = False
    module = kernels.score_hidden
    if selects:
        return lambda: module.score_hidden_and_select(x, layer, w, 0.3, text, vision, mode, 0.3, "floor")
    return lambda: (module.score_hidden(x, layer, w, text, vision, mode, 0.3),)


def _score_peaks(kernels: Kernels, mode: str | None, seed: int) -> Callable[[], Any]:
    batch, num_keys = 2, 70 + seed
    q, k = _numbers(batch, 2, 18, 16, seed=seed), _numbers(batch, 1, num_keys, 16, seed=seed + 1)
    masks = (_flags(batch, 18), _flags(batch, num_keys, seed=seed)) if seed % 2 else (None, None)
    w = torch.tensor([0.5, 0.25])
    return lambda: (kernels.score_peaks.score_peaks(q, k, w, *masks, mode, 0.25),)


def _column_mean(kernels: Kernels, kind: str) -> Callable[[], Any]:
    q, k = _numbers(1, 2, 40, 24), _numbers(1, 1, 40, 24, seed=1)
    segments = torch.tensor([0, 17, 40], dtype=torch.int32) if kind == "segments" else None
    rows, weights = (_flags(1, 40), torch.tensor([0.5, 1.0])) if "rows" in kind else (None, None)
    reduction = "max" if "max" in kind else "mean"
    arguments = (q, k, segments, "causal" in kind, rows, weights, kind != "dense", reduction, 0.2)
    return lambda: (kernels.attention_column_mean.attention_column_mean(*arguments),)


def _compact(kernels: Kernels, with_positions: bool) -> Callable[[], Any]:
    embeds, keep = _numbers(2, 50, 40), _flags(2, 50)
    positions = torch.arange(100).view(1, 2, 50) if with_positions else None
    return lambda: kernels.compact.compact(embeds, keep, positions, int(keep.sum(1).max()) + 5)


def _merge(kernels: Kernels) -> Callable[[], Any]:
    embeds, keep = _numbers(2, 50, 40), _flags(2, 50)
    generator = torch.Generator().manual_seed(2)
    target, source = torch.randint(0, 50, (2, 2, 60), generator=generator)
    merge = target.sort(dim=1).values, source, _numbers(2, 60, seed=3)
    return lambda: kernels.compact.compact(embeds, keep, None, int(keep.sum(1).max()) + 5, merge)


def _max_min(kernels: Kernels, masked: bool) -> Callable[[], Any]:
    features, mask = _numbers(2, 30, 8), _flags(2, 30) if masked else None
    return lambda: kernels.greedy.greedy_max_min(features, 0.3, mask, "floor")


def _dpp(kernels: Kernels) -> Callable[[], Any]:
    features, quality = _numbers(2, 30, 8), torch.rand(2, 30, generator=torch.Generator().manual_seed(1))
    return lambda: kernels.greedy.greedy_dpp(features, quality, 0.3, _flags(2, 30), "floor")
