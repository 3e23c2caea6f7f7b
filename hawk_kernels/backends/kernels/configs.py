"""How a kernel is cut into programs: by shape, from a table of the GPU's architecture, never by trying out in a call.

The committed tables are `tables/<architecture>.json`; `python -m hawk_kernels.tune` measures new ones. A table of one's
own is used where the environment variable HAWK_KERNELS_CONFIGS, read at the first launch, names its file; shapes it
does not cover still come from the committed ones.
"""

from __future__ import annotations

import json
import math
import os
import threading
import warnings
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

TABLE_VARIABLE = "HAWK_KERNELS_CONFIGS"
TABLES = Path(__file__).parent / "tables"
PER_MULTIPROCESSOR = "programs_per_multiprocessor"
# Shorter rows take what a launch takes.
_FEWEST_TOKENS = 256
# An entry stands for shapes up to so many times longer and shorter, and for as many times more and fewer rows.
_REACH = 4.0


class ScoreConfig(NamedTuple):
    """What of `score_and_select` may be tuned without a change of its results' meaning.

    Attributes:
        block_keys: keys that a program multiplies at once.
        num_programs: scoring programs wanted in a launch.
        query_elements: elements of queries that an averaging program loads at once.
        sum_block: columns whose heads a program sums.
        num_warps: warps of every program.
        max_registers: of a thread, 0 leaves their number to the compiler; see `launch.compiler_options`.
    """

    block_keys: int = 32
    num_programs: int = 512
    query_elements: int = 8192
    sum_block: int = 256
    num_warps: int = 4
    max_registers: int = 255


class HiddenConfig(NamedTuple):
    """What of `hidden` may be tuned without a change of its results' meaning.

    Attributes:
        block_tokens: tokens that a scoring program multiplies at once.
        block_channels: channels of a chunk of hidden states, and of folded queries.
        num_programs: scoring programs wanted in a launch.
        text_parts: programs that share the text of a row.
        text_channels: channels of the text that a program sums.
        mean_channels: channels whose mean a program takes.
        block_outputs: rows of `W_q` that a program multiplies.
        project_channels: channels of such a row at once.
        fold_dims: rows of `W_k` that a folding program multiplies at once.
        sum_block: columns whose heads a program sums.
        num_warps: warps of every program.
        max_registers: of a thread, 0 leaves their number to the compiler; see `launch.compiler_options`.
    """

    block_tokens: int = 16
    block_channels: int = 128
    num_programs: int = 512
    text_parts: int = 64
    text_channels: int = 1024
    mean_channels: int = 256
    block_outputs: int = 32
    project_channels: int = 128
    fold_dims: int = 32
    sum_block: int = 256
    num_warps: int = 8
    max_registers: int = 0


CONFIGS: dict[str, type[ScoreConfig] | type[HiddenConfig]] = {
    "score_and_select": ScoreConfig,
    "score_hidden": HiddenConfig,
}


class Shape(NamedTuple):
    """What a configuration is chosen by.

    Attributes:
        dtype: "fp32", or "half" for float16 and bfloat16, whose code differs in one instruction.
        head_dim: components of a head; 0 where the kernel takes them a few at a time.
        rows: rows of the batch, times their KV heads where each has tokens of its own.
        tokens: tokens of a row that are scored.
    """

    dtype: str
    head_dim: int
    rows: int
    tokens: int


class Entry(NamedTuple):
    """A line of a table: the shape that it was made for and what to launch there.

    In the shape 0 stands for any; `head_dim` is the largest that fits. In place of `num_programs` the configuration has
    `programs_per_multiprocessor`, so that it also suits a device of the architecture with more or fewer of these.
    """

    shape: Shape
    config: dict[str, int]


class Table(NamedTuple):
    """The configurations of an architecture.

    Attributes:
        architecture: "sm_90", "gfx942", ...
        source: where the entries come from, in words.
        multiprocessors: of the device that they were made for.
        entries: of each kernel.
    """

    architecture: str
    source: str
    multiprocessors: int
    entries: dict[str, tuple[Entry, ...]]


def dtype_class(dtype: torch.dtype) -> str:
    """`Shape.dtype` of a tensor."""
    return "fp32" if dtype == torch.float32 else "half"


def load_table(path: Path) -> Table:
    """A table from its file.

    Raises:
        ValueError: the file is not there, or not such a table.
    """
    try:
        content = json.loads(path.read_text())
        entries = {
            kernel: tuple(
                Entry(Shape(**line["shape"]), _checked_config(kernel, line["config"])) for line in content[kernel]
            )
            for kernel in CONFIGS
        }
        table = Table(content["architecture"], content["source"], int(content["multiprocessors"]), entries)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected a table of launch configurations, got {type(error).__name__}: {error}; make one with "
            f"python -m hawk_kernels.tune, or unset {TABLE_VARIABLE}"
        ) from error
    return table


def _checked_config(kernel: str, config: dict[str, Any]) -> dict[str, int]:
    expected = tuple(PER_MULTIPROCESSOR if name == "num_programs" else name for name in CONFIGS[kernel]._fields)
    if set(config) != set(expected):
        raise ValueError(f"{kernel}: expected the fields {list(expected)}, got {list(config)}")
    for name, value in config.items():
        fewest = 0 if name == "max_registers" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < fewest:
            raise ValueError(f"{kernel}: {name}: expected an int >= {fewest}, got {value!r}")
    return {name: config[name] for name in expected}


def committed_architectures() -> list[str]:
    """Architectures that have a table in the package."""
    return sorted(path.stem for path in TABLES.glob("*.json"))


@cache
def committed_table(architecture: str) -> Table:
    """The package's table of an architecture that has one."""
    return load_table(TABLES / f"{architecture}.json")


def nearest_architecture(architecture: str) -> str:
    """The newest architecture of the same maker with a table that is not newer, else the oldest."""
    family = "sm_" if architecture.startswith("sm_") else "gfx"

    def generation(name: str) -> int:
        return int(name[len(family) :], 16)

    known = sorted((name for name in committed_architectures() if name.startswith(family)), key=generation)
    older = [name for name in known if generation(name) <= generation(architecture)]
    return older[-1] if older else known[0]


def architecture_of(device: torch.device) -> str:
    """The architecture of a GPU, as tables are named."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def find_entry(table: Table, kernel: str, shape: Shape) -> tuple[Entry | None, bool]:
    """The entry nearest to a shape, None in a table without any, and whether it stands for it.

    One for heads at least as large, since code for larger ones fits smaller ones but not the other way round.
    """
    entries = [entry for entry in table.entries[kernel] if entry.shape.dtype == shape.dtype]
    fitting = [entry for entry in entries if entry.shape.head_dim == 0 or entry.shape.head_dim >= shape.head_dim]
    covered = bool(fitting)
    if not covered:
        fitting = entries or list(table.entries[kernel])
    if not fitting:
        return None, False
    head_dims = [entry.shape.head_dim for entry in fitting]
    head_dim = min(head_dims) if covered else max(head_dims)
    fitting = [entry for entry in fitting if entry.shape.head_dim == head_dim]

    def distances(entry: Entry) -> list[float]:
        lengths = entry.shape.tokens and max(entry.shape.tokens, _FEWEST_TOKENS), max(shape.tokens, _FEWEST_TOKENS)
        pairs = (lengths, (entry.shape.rows, shape.rows))
        return [abs(math.log2(wanted / made_for)) if made_for else 0.0 for made_for, wanted in pairs]

    nearest = min(fitting, key=lambda entry: sum(distances(entry)))
    return nearest, covered and max(distances(nearest)) <= math.log2(_REACH)


def resolve(kernel: str, entry: Entry, multiprocessors: int) -> Any:
    """The configuration that an entry stands for on a device of so many multiprocessors."""
    config = dict(entry.config)
    return CONFIGS[kernel](num_programs=config.pop(PER_MULTIPROCESSOR) * multiprocessors, **config)


def config_for(architecture: str, kernel: str, shape: Shape, multiprocessors: int | None = None) -> Any:
    """The configuration of a launch on an architecture, by default on the device that its table was made for.

    Warns once a process of each kind of shape or architecture that no table covers.
    """
    own = _own_table(architecture)
    if own is not None:
        entry, covered = find_entry(own, kernel, shape)
        if entry is not None and covered:
            return resolve(kernel, entry, multiprocessors or own.multiprocessors)
    name = architecture
    if name not in committed_architectures():
        name = nearest_architecture(architecture)
        if own is None:
            _warn_once(
                "architecture",
                f"no launch configurations for {architecture} GPUs, using those for {name}: right results, perhaps not "
                "the fastest; python -m hawk_kernels.tune measures a table",
            )
    table = committed_table(name)
    entry, covered = find_entry(table, kernel, shape)
    assert entry is not None
    if not covered:
        _warn_once(
            f"shape {kernel}",
            f"no launch configuration of {kernel} for {shape}, using the nearest, for {entry.shape}: right results, "
            "perhaps not the fastest; python -m hawk_kernels.tune measures a table",
        )
    return resolve(kernel, entry, multiprocessors or table.multiprocessors)


@cache
def _own_table(architecture: str) -> Table | None:
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


def _on_device(device: torch.device, kernel: str, shape: Shape) -> Any:
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return config_for(architecture_of(device), kernel, shape, multiprocessors)


@lru_cache(maxsize=4096)
def hidden_config(
    device: torch.device, dtype: torch.dtype, batch: int, num_tokens: int, hidden_size: int
) -> HiddenConfig:
    """The configuration of a launch."""
    if device.type == "cpu":
        # The interpreter runs programs one after the other, and each takes milliseconds to set up.
        return HiddenConfig(num_programs=16, text_parts=4)
    return _on_device(device, "score_hidden", Shape(dtype_class(dtype), 0, batch, num_tokens))


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
    """The configuration of a launch."""
    if device.type == "cpu":
        return ScoreConfig(num_programs=32) if num_keys <= 2048 else ScoreConfig(256, 16, sum_block=1024)
    shape = Shape(dtype_class(dtype), head_dim, batch * num_key_value_heads, num_keys)
    return _on_device(device, "score_and_select", shape)
