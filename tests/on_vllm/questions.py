"""The questions that both engines answer: held-out TinyVQA digits, 24 of each of its seven kinds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.tinyvqa.tasks import draw_tasks

SEED = 14
OF_EACH_KIND = 24


@dataclass(frozen=True)
class Video:
    """A video.

    Attributes:
        frames: uint8 `[frames, height, width, 3]`.
        fps: frames a second.
    """

    frames: NDArray[np.uint8]
    fps: float

    def metadata(self) -> dict[str, Any]:
        """Describe it as vLLM and transformers do."""
        count = len(self.frames)
        return {
            "fps": self.fps,
            "frames_indices": list(range(count)),
            "total_num_frames": count,
            "duration": count / self.fps,
            "video_backend": "none",
        }


@dataclass(frozen=True)
class Asked:
    """A question about pictures and videos.

    Attributes:
        pictures: PIL images, in the order of the prompt.
        text: the question.
        answer: the right word.
        videos: stand after the pictures.
    """

    pictures: list[Any]
    text: str
    answer: str
    videos: tuple[Video, ...] = ()

    def messages(self) -> list[dict[str, Any]]:
        """Write it as a chat."""
        return [
            {
                "role": "user",
                "content": [
                    *[{"type": "image"}] * len(self.pictures),
                    *[{"type": "video"}] * len(self.videos),
                    {"type": "text", "text": self.text},
                ],
            }
        ]


def questions(of_each_kind: int = OF_EACH_KIND) -> list[Asked]:
    """Draw the questions, the same ones each time."""
    tasks = draw_tasks("held_out", SEED, of_each_kind)
    samples = [sample for task in tasks for sample in task.samples]
    return [Asked([picture() for picture in sample.images], sample.question, sample.answers[0]) for sample in samples]


def video_questions(of_each_kind: int = OF_EACH_KIND) -> list[Asked]:
    """Draw the questions about videos: the same questions, in which one picture or all of them have become videos."""
    return [_with_videos(number, asked) for number, asked in enumerate(questions(of_each_kind))]


def _with_videos(number: int, asked: Asked) -> Asked:
    # every third question about two pictures is about a picture and a video
    pictures = asked.pictures[:1] if len(asked.pictures) > 1 and number % 3 == 0 else []
    videos = [_video(number, np.asarray(picture)) for picture in asked.pictures[len(pictures) :]]
    return replace(asked, pictures=pictures, videos=tuple(videos))


def _video(number: int, picture: NDArray[np.uint8]) -> Video:
    """Move the lower half of a picture sideways, with halts; how long it lasts depends on `number`.

    The noise on top makes no two cells of it alike, between which methods would choose by the last bit.
    """
    generator = np.random.default_rng([SEED, number, picture.shape[1]])
    height = picture.shape[0] // 2
    moved = np.cumsum(generator.integers(0, 2, 3 + number % 6) * 28)
    frames = np.stack([np.concatenate([picture[:height], np.roll(picture[height:], by, axis=1)]) for by in moved])
    noisy = frames + generator.integers(-24, 25, frames.shape)
    return Video(noisy.clip(0, 255).astype(np.uint8), [0.3, 1.0, 2.0, 24.0][number % 4])
