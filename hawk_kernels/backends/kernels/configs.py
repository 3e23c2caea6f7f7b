"""Chooses how a launch is cut into programs, by its shape, from a table of the GPU's architecture.

No call ever tries configurations out. A user's own table takes the place of the committed ones where the environment
variable HAWK_KERNELS_CONFIGS, read at the first launch, names its file; shapes that it does not cover still come from
the committed tables. See `config_tables` for the files and for what "nearest" means.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from hawk_kernels.backends.kernels.config_tables import (
    CONFIGS,
    TABLE_VARIABLE,
    Entry,
    HiddenConfig,
    ScoreConfig,
    Shape,
    Table,
    committed_architectures,
    committed_table,
    find_entry,
    load_table,
    nearest_architecture,
    resolve,
)

__all__ = [
    "CONFIGS",
    "TABLE_VARIABLE",
    "Entry",
    "HiddenConfig",
    "ScoreConfig",
    "Shape",
    "Table",
    "architecture_of",
    "committed_architectures",
    "committed_table",
    "config_for",
    "find_entry",
    "hidden_config",
    "load_table",
    "nearest_architecture",
    "planning_for",
    "resolve",
    "score_config",
]


def dtype_class(dtype: torch.dtype) -> str:
    """Return the `Shape.dtype` of a tensor."""
    return "fp32" if dtype == torch.float32 else "half"


def architecture_of(device: torch.device) -> str:
    """Return the architecture of a GPU, as tables are named."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def config_for(architecture: str, kernel: str, shape: Shape, multiprocessors: int | None = None) -> Any:
    """Return the configuration of a launch on an architecture, by default on the device that its table was made for.

    A process is warned once about an architecture without a table, and once about a kernel with shapes that no table
    covers.
    """
    own = _own_table(architecture)
    if own is not None:
        entry, is_covered = find_entry(own, kernel, shape)
        if entry is not None and is_covered:
            return resolve(kernel, entry, multiprocessors or own.multiprocessors)
    nearest = nearest_architecture(architecture)
    if nearest != architecture and own is None:
        _warn_once(
            "architecture",
            f"no launch configurations for {architecture} GPUs, using those for {nearest}: right results, perhaps not "
            "the fastest; python -m hawk_kernels.tune measures a table",
        )
    table = committed_table(nearest)
    entry, is_covered = find_entry(table, kernel, shape)
    assert entry is not None
    if not is_covered:
        _warn_once(
            f"shape {kernel}",
            f"no launch configuration of {kernel} for {shape}, using the nearest, for {entry.shape}: right results, "
            "perhaps not the fastest; python -m hawk_kernels.tune measures a table",
        )
    return resolve(kernel, entry, multiprocessors or table.multiprocessors)


@cache
def _own_table(architecture: str) -> Table | None:
    """Return the user's table, if there is one and it is for this architecture."""
    path = os.environ.get(TABLE_VARIABLE)
    if not path:
        return None
    table = load_table(Path(path).expanduser())
    if table.architecture == architecture:
        return table
    _warn_once(
        "own table",
        f"{TABLE_VARIABLE} names a table for {table.architecture}, this GPU is {architecture}: it is not used here; "
        "python -m hawk_kernels.tune measures one",
    )
    return None


_warned: set[str] = set()
_lock = threading.Lock()


def _warn_once(kind: str, message: str) -> None:
    with _lock:
        if kind in _warned:
            return
        _warned.add(kind)
    warnings.warn(message, RuntimeWarning, stacklevel=2)


@lru_cache(maxsize=4096)
def hidden_config(
    device: torch.device, dtype: torch.dtype, batch: int, num_tokens: int, hidden_size: int
) -> HiddenConfig:
    """Return the configuration of a launch of `score_hidden`."""
    if device.type == "cpu":
        # The interpreter runs programs one after the other, and each takes milliseconds to set up.
        return HiddenConfig(num_programs=16, text_parts=4)
    config: HiddenConfig = _config_on(device, "score_hidden", Shape(dtype_class(dtype), 0, batch, num_tokens))
    return config


@lru_cache(maxsize=4096)
def score_config(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    num_heads: int,
    num_key_value_heads: int,
    num_keys: int,
    head_dim: int,
) -> ScoreConfig:
    """Return the configuration of a launch of `score_and_select`."""
    if device.type == "cpu":
        return ScoreConfig(num_programs=32) if num_keys <= 2048 else ScoreConfig(256, 16, sum_block=1024)
    shape = Shape(dtype_class(dtype), head_dim, batch * num_key_value_heads, num_keys)
    config: ScoreConfig = _config_on(device, "score_and_select", shape)
    return config


@contextmanager
def planning_for(architecture: str, multiprocessors: int | None = None) -> Iterator[None]:
    """Configure the launches of this thread on meta tensors, which belong to no device, for an architecture."""
    before = _planned.gpu
    _planned.gpu = architecture, multiprocessors
    try:
        yield
    finally:
        _planned.gpu = before


class _Planned(threading.local):
    gpu: tuple[str, int | None] | None = None


_planned = _Planned()


def _config_on(device: torch.device, kernel: str, shape: Shape) -> Any:
    if device.type == "meta" and _planned.gpu is not None:
        architecture, planned_multiprocessors = _planned.gpu
        return config_for(architecture, kernel, shape, planned_multiprocessors)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return config_for(architecture_of(device), kernel, shape, multiprocessors)
