"""Chooses the samples that a run asks, and checks them before the model does anything."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hawk_kernels.tasks.encoding import open_image
from hawk_kernels.tasks.journal import Key
from hawk_kernels.tasks.task import ImageSource, Sample, Task

_SHOWN = 20
_READERS = 8


class BadSamplesError(ValueError):
    """Samples that cannot be asked; the message names each with its file and line."""

    def __init__(self, problems: Sequence[str]) -> None:
        shown = "\n".join(f"  {problem}" for problem in problems[:_SHOWN])
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        super().__init__(
            f"data: {len(problems)} problem{'s' * (len(problems) > 1)}, put right or leave out:\n{shown}{more}"
        )
        self.problems = list(problems)


@dataclass(frozen=True)
class Question:
    """One sample of one task, and what stands for it in a journal.

    Attributes:
        task: the benchmark.
        sample: of the benchmark.
        digest: of what is asked and what is right, to tell whether the data changed between two runs.
        pictures: what tells its pictures from others; empty where that is not known.
    """

    task: Task
    sample: Sample
    digest: str
    pictures: str = ""

    @property
    def key(self) -> Key:
        """The key under which the journal keeps its scores."""
        return self.task.name, self.sample.key, self.digest

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return self.sample.origin or f"{self.task.name}, sample {self.sample.key}"


@dataclass(frozen=True)
class Chosen:
    """One benchmark of a run.

    Attributes:
        task: the benchmark.
        questions: those that are asked, in the task's order.
        total: how many the task has.
    """

    task: Task
    questions: list[Question]
    total: int

    @property
    def digest(self) -> str:
        """Digest of all that is asked."""
        return _digest([question.digest for question in self.questions])


def choose_samples(tasks: Sequence[Task], limit: int | None, seed: int) -> list[Chosen]:
    """Choose the samples of each task, `limit` of them drawn at random where there are more.

    A task's draw depends on the seed and the number of its samples alone, so other tasks in the run do not change it.

    Raises:
        TypeError: something that is no task.
        ValueError: no tasks, tasks of one name, a limit below one, a seed below zero.
        BadSamplesError: what tasks say is wrong with their data, no samples, or two of one key.
    """
    if not tasks:
        raise ValueError("tasks: expected at least one, got none")
    for task in tasks:
        if not isinstance(task, Task):
            raise TypeError(
                f"tasks: expected tasks, got {task!r}; hawk_kernels.tasks.load_tasks(['chartqa.jsonl']) makes "
                "them of names"
            )
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least one sample of each task, or None for all, got {limit}")
    if seed < 0:
        raise ValueError(f"seed: expected a whole number of at least 0, got {seed}")
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"tasks: expected names of their own, got {', '.join(twice)} more than once; rename one")
    problems = [problem for task in tasks for problem in getattr(task, "problems", list)()]
    if problems:
        raise BadSamplesError(problems)
    return [_chosen(task, limit, seed) for task in tasks]


def _chosen(task: Task, limit: int | None, seed: int) -> Chosen:
    samples = task.samples
    total = len(samples)
    if not total:
        raise BadSamplesError([f"{task.name}: expected samples, got none"])
    index = np.arange(total)
    if limit is not None and limit < total:
        index = np.sort(np.random.default_rng([seed, total]).permutation(total)[:limit])
    questions = [_question(task, int(i), samples[int(i)]) for i in index]
    places: dict[str, str] = {}
    for number, question in zip(index, questions, strict=True):
        place = question.sample.origin or f"{task.name}[{number}]"
        first = places.setdefault(question.sample.key, place)
        if first != place:
            raise BadSamplesError([f"{place}: expected a key of its own, got {question.sample.key!r}, that of {first}"])
    return Chosen(task, questions, total)


def _question(task: Task, number: int, sample: Sample) -> Question:
    if not isinstance(sample, Sample):
        raise BadSamplesError([f"{task.name}[{number}]: expected a Sample, got {type(sample).__name__}"])
    try:
        prompt = task.prompt(sample)
    except Exception as error:  # whatever a task of one's own does
        place = sample.origin or f"{task.name}[{number}]"
        raise BadSamplesError([f"{place}: its prompt failed: {type(error).__name__}: {error}"]) from error
    pictures = [*map(_picture_identity, sample.images), *map(_identity, sample.videos)]
    scorer = [task.max_new_tokens, getattr(task, "metric", None)]
    digest = _digest([sample.key, prompt, sample.answers, pictures, scorer])
    return Question(task, sample, digest, _digest(pictures) if pictures and all(pictures) else sample.group)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _picture_identity(source: ImageSource) -> list[Any]:
    if not isinstance(source, (str, Path)):
        return _identity(source)
    try:
        content = Path(source).read_bytes()
    except (OSError, ValueError):
        # named, together with all others, when the pictures are checked
        return [Path(source).name, None]
    return [Path(source).name, hashlib.sha256(content).hexdigest()]


def _identity(source: Any) -> list[Any]:
    """Return what tells a picture from another without decoding it; nothing for a function that makes one."""
    if isinstance(source, (str, Path)):
        path = Path(source)
        return [path.name, path.stat().st_size if path.is_file() else None]
    if hasattr(source, "tobytes"):
        return [hashlib.sha256(source.tobytes()).hexdigest()]
    return []


def check_pictures(chosen: Sequence[Chosen], progress: bool) -> None:
    """Decode the picture files of all chosen samples, several at once.

    Raises:
        BadSamplesError: files that are missing or hold no picture.
    """
    from tqdm import tqdm

    files = list(_files(chosen))
    missing = [
        f"{question.place}: there is no file {video}"
        for part in chosen
        for question in part.questions
        for video in question.sample.videos
        if isinstance(video, (str, Path)) and not Path(video).is_file()
    ]
    with ThreadPoolExecutor(_READERS) as readers:
        found = readers.map(lambda entry: _problem(*entry), files)
        bar = tqdm(found, total=len(files), desc="pictures", disable=not progress or not files)
        problems = missing + [problem for problem in bar if problem]
    if problems:
        raise BadSamplesError(problems)


def _files(chosen: Sequence[Chosen]) -> Iterator[tuple[str, ImageSource]]:
    for question in (question for part in chosen for question in part.questions):
        for image in question.sample.images:
            if isinstance(image, (str, Path)):
                yield question.place, image


def _problem(place: str, source: ImageSource) -> str | None:
    try:
        open_image(source)
    except Exception as error:  # decoders fail in many ways on bytes that are no picture
        return f"{place}: {error}"
    return None
