"""The questions as tasks that a model is calibrated on: `hawk-kernels calibrate --data tinyvqa`.

The second miniature takes `--data bench.tinyvqa.tasks:llava_tasks`, which has pictures of the one size it knows.

Each kind of question is a benchmark of its own, painted with training digits, so that head weights measured on it may
be evaluated on the held-out ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np

from bench.tinyvqa.batches import Batch, draw_batch
from bench.tinyvqa.llava import LLAVA
from bench.tinyvqa.make import Make
from bench.tinyvqa.painting import to_image
from bench.tinyvqa.questions import KINDS, kinds_of
from bench.tinyvqa.qwen import QWEN
from hawk_kernels.calibration import Sample

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


def draw_tasks(split: str, seed: int, questions: int, make: Make = QWEN) -> list[TinyVQATask]:
    """A task for each kind of question.

    Args:
        split: "train" or "held_out" digits.
        seed: the same seed gives the same tasks.
        questions: how many of each kind, one a prompt.
        make: whose `calibration_layouts` take turns.
    """
    samples: dict[str, list[list[Sample]]] = {kind: [] for kind in KINDS}
    layouts = make.calibration_layouts
    # Some kinds can be asked about single pages alone.
    prompts = math.ceil(questions / min(sum(kind in kinds_of(layout.pages) for layout in layouts) for kind in KINDS))
    for number, layout in enumerate(layouts):
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


def calibration_tasks(make: Make = QWEN) -> list[TinyVQATask]:
    """Draw the tasks that the head weights of a miniature are calibrated on; those of the first one are shipped."""
    return draw_tasks("train", SEED, QUESTIONS_A_KIND, make)


def llava_tasks() -> list[TinyVQATask]:
    """Draw the tasks of the second miniature."""
    return calibration_tasks(LLAVA)
