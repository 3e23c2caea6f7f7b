"""The questions as tasks that a model is calibrated on: `hawk-kernels calibrate --data tinyvqa`.

Each kind of question is a benchmark of its own, painted with training digits, so that head weights measured on it may
be evaluated on the held-out ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np

from bench.tinyvqa.batches import Batch, draw_batch
from bench.tinyvqa.painting import to_image
from bench.tinyvqa.questions import KINDS, kinds_of
from bench.tinyvqa.scenes import Layout
from hawk_kernels.calibration import Sample

# Pictures only: transformers reads videos with torchvision, which a machine that calibrates need not have.
LAYOUTS = (Layout(6, 6), Layout(8, 8), Layout(6, 9), Layout(5, 5, 2, "images"))
QUESTIONS_A_KIND = 160
SEED = 5


@dataclass
class TinyVQATask:
    """Questions of one kind; an answer counts when it is the one right word."""

    name: str
    samples: list[Sample]
    max_new_tokens: int = 2

    def prompt(self, sample: Sample) -> str:
        """Return the question itself: the model was trained on nothing else."""
        return sample.question

    def score(self, sample: Sample, answer: str) -> float:
        """Return 1.0 for the right word, upper or lower case, else 0.0."""
        return float(answer.strip().lower() in sample.answers)


def draw_tasks(split: str, seed: int, questions: int) -> list[TinyVQATask]:
    """A task for each kind of question.

    Args:
        split: "train" or "held_out" digits.
        seed: the same seed gives the same tasks.
        questions: how many of each kind, one a prompt.
    """
    samples: dict[str, list[list[Sample]]] = {kind: [] for kind in KINDS}
    # One layout has several pages, where one kind cannot be asked.
    prompts = math.ceil(questions / (len(LAYOUTS) - 1))
    for number, layout in enumerate(LAYOUTS):
        batch = draw_batch(np.random.default_rng([seed, number]), split, prompts, layout, 1)
        for kind in kinds_of(layout.pages):
            samples[kind].append([_sample(batch, prompt, kind) for prompt in range(prompts)])
    # Layouts take turns, so that any beginning of the list has all of them.
    turns = {kind: [sample for row in zip(*lists, strict=True) for sample in row] for kind, lists in samples.items()}
    return [TinyVQATask(kind, found[:questions]) for kind, found in turns.items()]


def _sample(batch: Batch, prompt: int, kind: str) -> Sample:
    question = next(q for q in batch.questions[prompt] if q.kind == kind)
    images = tuple(partial(to_image, page) for page in batch.pages_of(prompt))
    return Sample(f"{batch.layout}/{prompt}", question.text, (question.answer,), images)


def calibration_tasks() -> list[TinyVQATask]:
    """Draw the tasks that the shipped head weights were calibrated on."""
    return draw_tasks("train", SEED, QUESTIONS_A_KIND)
