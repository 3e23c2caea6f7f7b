"""Reads tables of launch configurations, and finds the entry of a table that is nearest to a shape.

The committed tables are `tables/<architecture>.json`; `python -m hawk_kernels.tune` measures new ones.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

TABLE_VARIABLE = "HAWK_KERNELS_CONFIGS"
TABLES = Path(__file__).parent / "tables"
PER_MULTIPROCESSOR = "programs_per_multiprocessor"
# Shorter rows cost no more than a launch, so they are all treated alike.
_FEWEST_TOKENS = 256
# An entry stands for rows up to this many times longer or shorter, and for this many times more or fewer rows.
_REACH = 4.0


class ScoreConfig(NamedTuple):
    """The parameters of `score_and_select` that can be tuned without changing what its results mean.

    Attributes:
        block_keys: keys that a program multiplies at once.
        num_programs: scoring programs wanted in a launch.
        query_elements: elements of queries that an averaging program loads at once.
        sum_block: columns whose heads a program sums.
        num_warps: warps of every program.
        max_registers: of a thread; 0 leaves their number to the compiler, see `launch.compiler_options`.
    """

    block_keys: int = 32
    num_programs: int = 512
    query_elements: int = 8192
    sum_block: int = 256
    num_warps: int = 4
    max_registers: int = 255


class HiddenConfig(NamedTuple):
    """The parameters of `score_hidden` that can be tuned without changing what its results mean.

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
        max_registers: of a thread; 0 leaves their number to the compiler, see `launch.compiler_options`.
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

    In the shape, 0 stands for any, and `head_dim` is the largest that fits. Instead of `num_programs` the configuration
    has `programs_per_multiprocessor`, so that it suits every device of the architecture.
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


def load_table(path: Path) -> Table:
    """Read a table from its file.

    Raises:
        ValueError: the file is not there, or not such a table.
    """
    try:
        content = json.loads(path.read_text())
        entries = {
            kernel: tuple(
                Entry(Shape(**line["shape"]), checked_config(kernel, line["config"])) for line in content[kernel]
            )
            for kernel in CONFIGS
        }
        return Table(content["architecture"], content["source"], int(content["multiprocessors"]), entries)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected a table of launch configurations, got {type(error).__name__}: {error}; make one with "
            f"python -m hawk_kernels.tune, or unset {TABLE_VARIABLE}"
        ) from error


def checked_config(kernel: str, config: dict[str, Any]) -> dict[str, int]:
    """Return the configuration of an entry with its fields in order; raise ValueError if a field is wrong."""
    fields = [PER_MULTIPROCESSOR if name == "num_programs" else name for name in CONFIGS[kernel]._fields]
    if set(config) != set(fields):
        raise ValueError(f"{kernel}: expected the fields {fields}, got {list(config)}")
    for name, value in config.items():
        fewest = 0 if name == "max_registers" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < fewest:
            raise ValueError(f"{kernel}: {name}: expected an int >= {fewest}, got {value!r}")
    return {name: config[name] for name in fields}


def committed_architectures() -> list[str]:
    """List the architectures that have a table in the package."""
    return sorted(path.stem for path in TABLES.glob("*.json"))


@cache
def committed_table(architecture: str) -> Table:
    """Return the package's table of an architecture that has one."""
    return load_table(TABLES / f"{architecture}.json")


def nearest_architecture(architecture: str) -> str:
    """Return the newest architecture of the same maker with a table that is not newer, else the oldest."""
    maker = "sm_" if architecture.startswith("sm_") else "gfx"

    def generation(name: str) -> int:
        return int(name.removeprefix(maker), 16)

    known = sorted((name for name in committed_architectures() if name.startswith(maker)), key=generation)
    not_newer = [name for name in known if generation(name) <= generation(architecture)]
    return not_newer[-1] if not_newer else known[0]


def find_entry(table: Table, kernel: str, shape: Shape) -> tuple[Entry | None, bool]:
    """Return the entry that is nearest to a shape, and whether it stands for it; None in a table without any.

    Code for larger heads fits smaller ones but not the other way round, so an entry for smaller heads is never near.
    """
    entries = table.entries[kernel]
    of_dtype = [entry for entry in entries if entry.shape.dtype == shape.dtype]
    fitting = [entry for entry in of_dtype if entry.shape.head_dim == 0 or entry.shape.head_dim >= shape.head_dim]
    candidates = fitting or of_dtype or entries
    if not candidates:
        return None, False
    head_dim = (min if fitting else max)(entry.shape.head_dim for entry in candidates)
    nearest = min(
        (entry for entry in candidates if entry.shape.head_dim == head_dim),
        key=lambda entry: sum(_distances(entry.shape, shape)),
    )
    return nearest, bool(fitting) and max(_distances(nearest.shape, shape)) <= math.log2(_REACH)


def _distances(made_for: Shape, wanted: Shape) -> tuple[float, float]:
    """Return how far apart two shapes are in tokens and in rows, in powers of two."""
    tokens = made_for.tokens and max(made_for.tokens, _FEWEST_TOKENS)
    return _distance(tokens, max(wanted.tokens, _FEWEST_TOKENS)), _distance(made_for.rows, wanted.rows)


def _distance(made_for: int, wanted: int) -> float:
    return abs(math.log2(wanted / made_for)) if made_for else 0.0


def resolve(kernel: str, entry: Entry, multiprocessors: int) -> Any:
    """Return the configuration that an entry stands for on a device with this many multiprocessors."""
    config = dict(entry.config)
    return CONFIGS[kernel](num_programs=config.pop(PER_MULTIPROCESSOR) * multiprocessors, **config)
