"""The questions that both engines answer: held-out TinyVQA digits, 24 of each of its seven kinds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.tinyvqa.tasks import draw_tasks

SEED = 14
OF_EACH_KIND = 24


@dataclass(frozen=True)
class Asked:
    """A question about pictures.

    Attributes:
        pictures: PIL images, in the order of the prompt.
        text: the question.
        answer: the right word.
    """

    pictures: list[Any]
    text: str
    answer: str

    def messages(self) -> list[dict[str, Any]]:
        """Write it as a chat."""
        return [
            {
                "role": "user",
                "content": [*[{"type": "image"}] * len(self.pictures), {"type": "text", "text": self.text}],
            }
        ]


def questions(of_each_kind: int = OF_EACH_KIND) -> list[Asked]:
    """Draw the questions, the same ones each time."""
    tasks = draw_tasks("held_out", SEED, of_each_kind)
    samples = [sample for task in tasks for sample in task.samples]
    return [Asked([picture() for picture in sample.images], sample.question, sample.answers[0]) for sample in samples]
