"""The questions as tasks that a model is calibrated on: `hawk-kernels calibrate --data tinyvqa`.

The second miniature takes `--data bench.tinyvqa.tasks:llava_tasks`, which has pictures of the one size it knows.

Each kind of question is a benchmark of its own, painted with training digits, so that head weights measured on it may
be evaluated on the held-out ones: `hawk-kernels evaluate --data tinyvqa`. The very questions of the table are
`--data bench.tinyvqa.tasks:table_tasks`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from torch import Tensor

from bench.tinyvqa.batches import Batch, draw_batch
from bench.tinyvqa.encoder import Encoder
from bench.tinyvqa.evaluate import draw_evaluation, model_inputs
from bench.tinyvqa.llava import LLAVA
from bench.tinyvqa.make import Make
from bench.tinyvqa.makes import MAKES
from bench.tinyvqa.painting import to_image
from bench.tinyvqa.questions import kinds_of
from bench.tinyvqa.qwen import QWEN
from hawk_kernels.checkpoint import load_processor
from hawk_kernels.tasks import Sample

QUESTIONS_A_KIND = 160
SEED = 5
EVALUATION_SEED = 6
TABLE_PROMPTS = 160
TABLE_SEED = 2026


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
    samples: dict[str, list[list[Sample]]] = {kind: [] for kind in make.kinds}
    layouts = make.calibration_layouts
    # Some kinds can be asked about single pages alone.
    prompts = math.ceil(
        questions / min(sum(kind in kinds_of(layout.pages) for layout in layouts) for kind in make.kinds)
    )
    for number, layout in enumerate(layouts):
        batch = draw_batch(np.random.default_rng([seed, number]), split, prompts, layout, 1)
        for kind in (kind for kind in kinds_of(layout.pages) if kind in make.kinds):
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


def evaluation_tasks(make: Make = QWEN) -> list[TinyVQATask]:
    """Draw tasks about held-out digits, on which methods are compared."""
    return draw_tasks("held_out", EVALUATION_SEED, QUESTIONS_A_KIND, make)


@dataclass
class TableTask(TinyVQATask):
    """The table's questions of one kind, about all layouts of a make, videos among them."""

    make: str = QWEN.name

    def encode(self, sample: Sample, processor: Any) -> dict[str, Tensor]:
        """Make the model's inputs as the table does, which needs no video processor."""
        return model_inputs(_encoder(self.make), sample.details["batch"])


def table_tasks(make: Make = QWEN, prompts: int = TABLE_PROMPTS, seed: int = TABLE_SEED) -> list[TableTask]:
    """Draw the questions of a miniature's table, a task for each kind.

    Args:
        make: of the miniature.
        prompts: about how many.
        seed: of the questions.
    """
    samples: dict[str, list[Sample]] = {kind: [] for kind in make.kinds}
    for number, batch in enumerate(draw_evaluation(make, seed, prompts)):
        for prompt, row in enumerate(batch.questions):
            group = f"{batch.layout}/{number}/{prompt}"
            for place, question in enumerate(row):
                alone = Batch(batch.layout, batch.pages_of(prompt), batch.scenes[prompt : prompt + 1], [[question]])
                key, answers, details = f"{group}/{place}", (question.answer,), {"batch": alone}
                sample = Sample(key, question.text, answers, details=details, group=group)
                samples[question.kind].append(sample)
    return [TableTask(kind, found, 1, make.name) for kind, found in samples.items()]


@cache
def _encoder(name: str) -> Encoder:
    """Load what encodes for every model of a make; it reads no parameter of the shipped one."""
    make = MAKES[name]
    return make.encoder(make.load_model(make.shipped), load_processor(str(make.shipped)).tokenizer)


def llava_tasks() -> list[TinyVQATask]:
    """Draw the tasks that the second miniature is calibrated on."""
    return calibration_tasks(LLAVA)


def llava_evaluation_tasks() -> list[TinyVQATask]:
    """Draw the tasks on which methods are compared on the second miniature."""
    return evaluation_tasks(LLAVA)
