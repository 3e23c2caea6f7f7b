"""Describes what a launch takes from shapes alone, and holds what the two scoring kernels cut alike."""

from __future__ import annotations

from typing import Any, NamedTuple

# tl.dot takes at least 16 columns, and more heads in a program would not fit beside a tile of keys.
HEADS_PER_PROGRAM = 16


class Plan(NamedTuple):
    """Everything that a launch takes from shapes alone; one plan is made for each shape.

    Attributes:
        grid: number of programs.
        num_floats: float32 words of workspace.
        num_words: int32 words of workspace.
        sizes: the kernel's integer arguments, in its order.
        static: what the kernel is compiled for, its argument `STATIC`.
        options: what Triton's compiler is told.
    """

    grid: tuple[int]
    num_floats: int
    num_words: int
    sizes: tuple[int, ...]
    static: Any
    options: dict[str, Any]
