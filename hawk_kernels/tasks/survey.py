"""Goes through the questions of a run once: takes known results from a journal and asks the model for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hawk_kernels.tasks.journal import Journal, Key
from hawk_kernels.tasks.processes import Processes
from hawk_kernels.tasks.samples import Question

Add = Callable[[Key, Mapping[str, Any]], None]
"""Keeps what was measured under a key."""


@dataclass(frozen=True)
class Survey:
    """A run over questions, shared by processes and kept in a journal.

    Attributes:
        work: "calibration" or "evaluation", for messages; the progress bar shows `verb`.
        verb: what the progress bar says.
        plan: what identifies the run, ready for JSON; a journal with another plan is refused.
        folder: the folder of the journal; None keeps nothing, and works for one process only.
        processes: the processes that share the work.
        shows_progress: whether this process shows a progress bar.
    """

    work: str
    verb: str
    plan: Mapping[str, Any]
    folder: Path | None
    processes: Processes
    shows_progress: bool

    def collect(
        self,
        questions: Sequence[Question],
        keys_of: Callable[[Question], Sequence[Key]],
        measure: Callable[[Question, Sequence[Key], Add], None],
        check: Callable[[], None] | None = None,
    ) -> dict[Key, dict[str, Any]]:
        """Return what is known under all keys, from the journal or from the model; the same in every process.

        Args:
            questions: what is asked, in order.
            keys_of: the keys under which a question's records are kept.
            measure: measures the given keys of a question, and adds a record for each.
            check: is called once the journal is known to be that of this run, before anything is measured.

        Raises:
            ValueError: a journal of another run, or the journals of some process are not here.
        """
        journal = None if self.folder is None else Journal(self.folder, self.plan, self.processes.rank, self.work)
        finished = {} if journal is None else journal.read()
        if check is not None:
            check()
        wanted = [(question, [key for key in keys_of(question) if key not in finished]) for question in questions]
        left = [(question, keys) for question, keys in wanted if keys]
        if journal is None:
            self._measure(left, measure, _adding_to(finished), len(questions))
            return finished
        # what all processes read is the same only as long as none of them adds to it
        self.processes.wait()
        with journal:
            mine = left[self.processes.rank :: self.processes.count]
            self._measure(mine, measure, journal.add, len(mine) + (len(questions) - len(left)) // self.processes.count)
        self.processes.wait()
        found = journal.read()
        missing = [question.place for question in questions if any(key not in found for key in keys_of(question))]
        if missing:
            raise ValueError(
                f"out: expected the journals of all processes in {self.folder}, but {len(missing)} samples are missing "
                f"({missing[0]}, ...); write to a folder that all machines share"
            )
        return found

    def _measure(
        self,
        left: Sequence[tuple[Question, Sequence[Key]]],
        measure: Callable[[Question, Sequence[Key], Add], None],
        add: Add,
        total: int,
    ) -> None:
        from tqdm import tqdm

        done, is_hidden = total - len(left), not self.shows_progress
        for question, keys in tqdm(left, desc=self.verb, unit="sample", initial=done, total=total, disable=is_hidden):
            measure(question, keys, add)


def _adding_to(found: dict[Key, dict[str, Any]]) -> Add:
    """Return a function that keeps records in a dict, for runs without a journal."""

    def add(key: Key, record: Mapping[str, Any]) -> None:
        found[key] = dict(record)

    return add


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block, the model is in eval mode."""
    were_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in were_training:
            module.training = True


@contextmanager
def naming(place: str, trouble: str) -> Iterator[None]:
    """Name the sample in an error that it causes, perhaps after hours."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model or a task raises, perhaps after hours
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise kind(f"{place}: {trouble}: {reason}") from error


def checked_score(score: Any) -> float:
    """Return what a scorer gave, if it is a number from 0 to 1.

    Raises:
        ValueError: it is something else.
    """
    try:
        value = float(score)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value <= 1:
        raise ValueError(f"expected a score from 0 to 1, got {score!r}; look at the task's scorer")
    return value
