"""How a miniature is trained: first its vision tower, then questions from small pages to large ones."""

from __future__ import annotations

from dataclasses import dataclass

from bench.tinyvqa.questions import KINDS


@dataclass(frozen=True)
class Stage:
    """A step of the curriculum: sides of single pages are drawn from `sides`; it ends once every kind reaches `good`.

    Attributes:
        sides: least and most cells of a side.
        cells: about how many cells a step has in all.
        most_steps: when it ends at the latest.
        good: accuracy of the slowest kind that ends it.
        kinds: what is asked.
        train_vision: whether the vision tower is trained on.
        mixed: whether several pictures and videos occur.
    """

    sides: tuple[int, int]
    cells: int
    most_steps: int
    good: float
    kinds: tuple[str, ...] = tuple(KINDS)
    train_vision: bool = False
    mixed: bool = False


@dataclass(frozen=True)
class Recipe:
    """Everything about a training run that the seed does not decide.

    Attributes:
        peak_rate: the highest learning rate.
        align_steps: how many steps the vision tower learns alone, before the questions.
        align_cells: about how many cells such a step has.
        curriculum: the stages with questions.
        settle: in what share of the first steps, the last ones, the learning rate falls linearly to 5 %. A tower that
            no later stage trains needs this; one that is trained on settles in the last stage.
    """

    peak_rate: float
    align_steps: int
    align_cells: int
    curriculum: tuple[Stage, ...]
    settle: float = 0.0
