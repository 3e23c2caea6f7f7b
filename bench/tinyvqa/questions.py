"""Questions about a scene: seven kinds, each with one right word for an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bench.tinyvqa.scenes import COLOUR_NAMES, NUM_DIGITS, SHAPE_NAMES, Scene, extremes

NUMBER_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Question:
    """A sentence about a scene, with the single word that answers it.

    Attributes:
        kind: one of `KINDS`.
        text: the sentence.
        answer: one word.
        cells: where one has to look.
    """

    kind: str
    text: str
    answer: str
    cells: tuple[int, ...]


# Wordings of a kind differ little, so that a question costs few tokens; training also drops words and marks.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "colour->digit": ("Which digit is {colour}?", "What number is {colour}?", "What is the {colour} digit?"),
    "digit->colour": ("What colour is the {digit}?", "Which color is the {digit}?", "What colour has the {digit}?"),
    "shape->colour": ("What colour is the {shape}?", "Which color is the {shape}?", "What colour has the {shape}?"),
    "position->digit": ("Which digit is nearest the {edge}?", "What number is nearest the {edge}?"),
    "relation->digit": ("Which is nearer the {edge}, {colour} or {other}?",),
    "comparison": ("Which is larger, {colour} or {other}?", "What is larger, {colour} or {other}?"),
    "exists": ("Is there a {colour} {digit}?", "Is the {digit} {colour}?"),
}
EDGES = ("top", "bottom", "left", "right")


def _word(rng: np.random.Generator, digit: int) -> str:
    # Written-out digits are rarer in questions, but a person may well type one.
    return NUMBER_NAMES[digit] if rng.random() < 0.1 else str(digit)


def _phrase(rng: np.random.Generator, kind: str, **words: str) -> str:
    templates = TEMPLATES[kind]
    return templates[rng.integers(len(templates))].format(**words)


def _digit_of_colour(rng: np.random.Generator, scene: Scene) -> Question:
    cell = int(rng.choice(scene.digit_cells))
    text = _phrase(rng, "colour->digit", colour=COLOUR_NAMES[scene.colours[cell]])
    return Question("colour->digit", text, str(scene.figures[cell]), (cell,))


def _colour_of_digit(rng: np.random.Generator, scene: Scene) -> Question:
    cell = int(rng.choice(scene.digit_cells))
    text = _phrase(rng, "digit->colour", digit=_word(rng, int(scene.figures[cell])))
    return Question("digit->colour", text, COLOUR_NAMES[scene.colours[cell]], (cell,))


def _colour_of_shape(rng: np.random.Generator, scene: Scene) -> Question:
    cell = scene.landmarks[rng.integers(len(scene.landmarks))]
    text = _phrase(rng, "shape->colour", shape=SHAPE_NAMES[scene.figures[cell] - NUM_DIGITS])
    return Question("shape->colour", text, COLOUR_NAMES[scene.colours[cell]], (cell,))


def _digit_at_edge(rng: np.random.Generator, scene: Scene) -> Question:
    found = extremes(scene.digit_cells, scene.layout)
    edge = str(rng.choice(list(found)))
    text = _phrase(rng, "position->digit", edge=edge)
    return Question("position->digit", text, str(scene.figures[found[edge]]), (found[edge],))


def _nearer_digit(rng: np.random.Generator, scene: Scene) -> Question:
    cells = tuple(int(c) for c in rng.permutation(scene.digit_cells)[:2])
    found = extremes(np.array(cells), scene.layout)
    edge = str(rng.choice(list(found)))
    colour, other = (COLOUR_NAMES[scene.colours[cell]] for cell in cells)
    text = _phrase(rng, "relation->digit", edge=edge, colour=colour, other=other)
    return Question("relation->digit", text, str(scene.figures[found[edge]]), cells)


def _larger(rng: np.random.Generator, scene: Scene) -> Question:
    cells = tuple(int(c) for c in rng.permutation(scene.digit_cells)[:2])
    colour, other = (COLOUR_NAMES[scene.colours[cell]] for cell in cells)
    answer = str(max(int(scene.figures[cell]) for cell in cells))
    return Question("comparison", _phrase(rng, "comparison", colour=colour, other=other), answer, cells)


def _exists(rng: np.random.Generator, scene: Scene) -> Question:
    cell, other = (int(c) for c in rng.permutation(scene.digit_cells)[:2])
    is_there = rng.random() < 0.5
    # A wrong colour is that of another digit: knowing only which digits or which colours there are does not help.
    colour = COLOUR_NAMES[scene.colours[cell if is_there else other]]
    text = _phrase(rng, "exists", colour=colour, digit=_word(rng, int(scene.figures[cell])))
    return Question("exists", text, "yes" if is_there else "no", (cell,) if is_there else (cell, other))


KINDS: dict[str, Callable[[np.random.Generator, Scene], Question]] = {
    "colour->digit": _digit_of_colour,
    "digit->colour": _colour_of_digit,
    "shape->colour": _colour_of_shape,
    "position->digit": _digit_at_edge,
    "relation->digit": _nearer_digit,
    "comparison": _larger,
    "exists": _exists,
}
ONE_PAGE_KINDS = frozenset({"position->digit", "relation->digit"})


def kinds_of(pages: int) -> tuple[str, ...]:
    """The kinds that can be asked about a prompt of so many pages: "nearest the top" needs one."""
    return tuple(kind for kind in KINDS if pages == 1 or kind not in ONE_PAGE_KINDS)


def ask(rng: np.random.Generator, scene: Scene, kind: str) -> Question:
    """Draw a question of one of `KINDS`."""
    return KINDS[kind](rng, scene)


def vocabulary() -> list[str]:
    """List every word of the questions, answers and chat frame, in a fixed order."""
    lines = [text for templates in TEMPLATES.values() for text in templates]
    words: set[str] = set()
    for line in lines:
        words |= {word.strip("?,") for word in line.lower().split() if "{" not in word}
    words |= set(EDGES)
    words |= set(SHAPE_NAMES)
    words |= {"yes", "no", "system", "user", "assistant", "you", "are", "a", "helpful"}
    fixed = [".", ",", "?", "!", *map(str, range(NUM_DIGITS)), *NUMBER_NAMES, *COLOUR_NAMES]
    return [*fixed, *sorted(words - set(fixed))]
