"""Tasks of lmms-eval, where it is installed: its documents, prompts and scorers, one document at a time."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from hawk_kernels.tasks.task import Sample

_INSTALL = "pip install git+https://github.com/EvolvingLMMs-Lab/lmms-eval"
_LONGEST = 128


def lmms_tasks(name: str) -> list[LmmsTask]:
    """Return the tasks that lmms-eval knows by a name; a group is all of its tasks.

    Args:
        name: as lmms-eval calls it; `TASK@FOLDER` is one that a file in this folder defines, as its own
            `--include_path FOLDER` finds it.

    Raises:
        ImportError: lmms-eval is not installed; the message has the command.
        ValueError: it knows no such task, or there is no such folder.
    """
    name, at, folder = name.partition("@")
    if at and not Path(folder).is_dir():
        raise ValueError(
            f"data: expected lmms:TASK@FOLDER with a folder of tasks, got {folder!r}; there is no such folder"
        )
    try:
        from lmms_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(f"data: lmms:{name} needs lmms-eval, which is not installed: {_INSTALL}") from error
    manager = TaskManager(include_path=folder) if at else TaskManager()
    if name not in manager.all_tasks:
        raise ValueError(
            f"data: expected a task of lmms-eval, got {name!r}; `python -m lmms_eval --tasks list` shows them, and "
            "those of your own are named lmms:TASK@FOLDER"
        )
    return [LmmsTask(task_name, task) for task_name, task in _flat(manager.load_task_or_group([name]))]


def _flat(tasks: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, task in tasks.items():
        if isinstance(task, Mapping):
            yield from _flat(task)
        else:
            # a task stands beside its group in a pair in some versions
            yield str(name), task[-1] if isinstance(task, tuple) else task


class LmmsTask:
    """One task of lmms-eval whose answers are generated.

    An answer ends where the task says (`until`). Its worth is the first number in [0, 1] that the task's
    `process_results` gives one document; a task that only scores documents together cannot be used.

    Args:
        name: as lmms-eval calls it.
        task: its task object.
    """

    def __init__(self, name: str, task: Any) -> None:
        kind = getattr(task, "OUTPUT_TYPE", None) or task.config.output_type
        if kind != "generate_until":
            raise ValueError(f"data: expected a task that generates answers, got lmms:{name}, which does {kind!r}")
        self.name = name
        self._task = task
        settings = dict(task.config.generation_kwargs or {})
        self.max_new_tokens = int(settings.get("max_new_tokens", _LONGEST))
        until = settings.get("until") or []
        self._until = [until] if isinstance(until, str) else [stop for stop in until if stop]

    @cached_property
    def _documents(self) -> Sequence[Any]:
        documents: Sequence[Any] = self._task.eval_docs
        return documents

    @cached_property
    def samples(self) -> Sequence[Sample]:
        """One for each document; its pictures are decoded when they are needed."""
        return _Documents(self.name, self._documents, self._task)

    def prompt(self, sample: Sample) -> str:
        """Return the prompt as the task writes it."""
        return sample.question

    def score(self, sample: Sample, answer: str) -> float:
        """Score an answer as the task does, for this document alone."""
        for stop in self._until:
            answer = answer.split(stop)[0]
        results = self._task.process_results(self._documents[int(sample.key)], [answer])
        for value in results.values():
            if isinstance(value, numbers.Real) and math.isfinite(value) and 0 <= float(value) <= 1:
                return float(value)
        raise ValueError(
            f"data: expected lmms:{self.name} to score one answer with a number from 0 to 1, got "
            f"{', '.join(results) or 'nothing'}, which are for all answers together; choose another task"
        )


class _Documents(Sequence[Sample]):
    def __init__(self, name: str, documents: Sequence[Any], task: Any) -> None:
        self._name, self._documents, self._task = name, documents, task

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        document = self._documents[index]
        visuals = self._task.doc_to_visual(document) or []
        return Sample(
            key=str(index),
            question=str(self._task.doc_to_text(document)),
            images=tuple(visual for visual in visuals if not isinstance(visual, str)),
            videos=tuple(visual for visual in visuals if isinstance(visual, str)),
            origin=f"lmms:{self._name}[{index}]",
        )
