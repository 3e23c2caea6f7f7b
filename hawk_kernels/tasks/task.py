"""What a run asks a model: a task is samples, a prompt for each, and a scorer of answers.

A benchmark of your own is a class with these five names, and needs no base class:

    class Digits:
        name = "digits"                   # names the benchmark in results; unique in a run
        max_new_tokens = 4                # the longest answer that is generated
        samples = [Sample("0", "Which digit is red?", ("7",), images=("red.png",)), ...]

        def prompt(self, sample): return sample.question
        def score(self, sample, answer): return float(answer.strip() in sample.answers)

    hawk_kernels.calibrate(model, [Digits()], processor=processor, out="weights.json")
    hawk_kernels.evaluation.evaluate(model, [Digits()], methods=["hawk", "divprune"], processor=processor)

From a command line it is named `module:function`, where the function (or class) returns a task or a list of tasks:
`hawk-kernels calibrate --data my_tasks:Digits --data chartqa.jsonl`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from PIL import Image

ImageSource: TypeAlias = "str | Path | Image.Image | Callable[[], Image.Image]"
"""A file, a picture, or a function that makes the picture when it is needed (and the same one each time)."""

VideoSource: TypeAlias = "str | Path | Sequence[Image.Image] | Callable[[], Sequence[Image.Image]]"
"""A file that the processor can decode, the frames, or a function that makes them when they are needed."""


@dataclass(frozen=True)
class Sample:
    """One question about pictures.

    Attributes:
        key: names the sample within its task, the same in every run: a journal finds its score by it.
        question: what is asked, without instructions about the form of the answer, which the task's `prompt` adds.
        answers: every answer that counts as right; tasks whose scorer needs none leave it empty.
        images: in the order in which the model sees them, all before the question.
        videos: likewise, after the images.
        origin: where it stands ("chartqa.jsonl:17"), for messages.
        details: what else the task's prompt and scorer need, say the choices of a multiple-choice question.
        group: names the pictures where they are made by functions: intervals draw questions about the same ones
            together. Files need no name.
    """

    key: str
    question: str
    answers: tuple[str, ...] = ()
    images: tuple[ImageSource, ...] = ()
    videos: tuple[VideoSource, ...] = ()
    origin: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""


@runtime_checkable
class Task(Protocol):
    """A benchmark: what is asked and what an answer is worth.

    A task may also have

    - `encode(sample, processor)`: the model's inputs of one sample as a mapping of tensors with batch size 1, where the
      chat template of the processor (images, videos, then the prompt, in one user turn) is not what the model wants;
    - `metric`: what names the scorer, if it can be another one; samples are asked again when it changes;
    - `problems()`: strings that name what is wrong with the data ("chartqa.jsonl:17: ..."). A run with any stops before
      the model does anything.

    Attributes:
        name: of the benchmark; unique in a run, and part of the results.
        max_new_tokens: the longest answer that is generated, greedily.
    """

    name: str
    max_new_tokens: int

    @property
    def samples(self) -> Sequence[Sample]:
        """All samples, in an order that never changes. Pictures may be made lazily."""

    def prompt(self, sample: Sample) -> str:
        """Return the text that follows the pictures in the user's turn."""

    def score(self, sample: Sample, answer: str) -> float:
        """Say what `answer`, the decoded text without special tokens, is worth: 0 (wrong) to 1 (right)."""
