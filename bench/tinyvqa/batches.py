"""Prompts of one layout with several questions each: what a training step or an evaluation works on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bench.tinyvqa.digits import load_digits
from bench.tinyvqa.painting import render
from bench.tinyvqa.questions import Question, ask, kinds_of
from bench.tinyvqa.scenes import Layout, Scene, draw_scene


@dataclass(frozen=True)
class Batch:
    """Pages (uint8 `[B * pages, 3, H, W]`), the scene of each prompt, and the questions on each, as many on all."""

    layout: Layout
    pages: Tensor
    scenes: list[Scene]
    questions: list[list[Question]]

    def pages_of(self, prompt: int) -> Tensor:
        """Return the pages of one prompt, uint8 `[pages, 3, H, W]`."""
        return self.pages[prompt * self.layout.pages : (prompt + 1) * self.layout.pages]


def draw_batch(
    rng: np.random.Generator, split: str, prompts: int, layout: Layout, questions: int | Mapping[str, int] = 2
) -> Batch:
    """`prompts` random prompts of one layout.

    Args:
        rng: decides everything; the same state gives the same batch.
        split: which digits are painted, "train" or "held_out".
        prompts: how many.
        layout: of each.
        questions: how many of each kind are asked about each prompt; kinds that a layout has no room for are left out.
    """
    pool = load_digits(split)
    kinds = kinds_of(layout.pages)
    times = {kind: questions if isinstance(questions, int) else questions.get(kind, 0) for kind in kinds}
    scenes = [draw_scene(rng, pool, layout) for _ in range(prompts)]
    asked = [[ask(rng, scene, kind) for kind in kinds for _ in range(times[kind])] for scene in scenes]
    return Batch(layout, render(scenes, pool, rng), scenes, asked)
