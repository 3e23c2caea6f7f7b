"""Finds tasks by the words that name them on a command line."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hawk_kernels.tasks.jsonl import LETTER, SHORT, JsonlTask
from hawk_kernels.tasks.task import Task

_TRAINING_DIGITS = "bench.tinyvqa.tasks:calibration_tasks"
_HELD_OUT_DIGITS = "bench.tinyvqa.tasks:evaluation_tasks"
_WHERE = "with --traceback the command shows where"

FORMS = f"""\
FILE.jsonl           questions, one JSON object per line, scored by exact match, or as multiple choice where the lines
                     have choices
FILE.jsonl:METRIC    the same, scored by exact, relaxed (numbers off by 5 %), anls or choice
lmms:TASK            a task or group of lmms-eval, say lmms:chartqa
lmms:TASK@FOLDER     one of your own, which a file in the folder defines (lmms_eval --include_path FOLDER)
tinyvqa              coloured digits, in a checkout of this repository: calibrate asks about those of the training set,
                     evaluate about others
MODULE:FUNCTION      a function that returns a task or a list of tasks

A line of FILE.jsonl, with paths as seen from the file's folder:

  {{"id": "bars-1", "image": "charts/1.png", "question": "How many bars?", "answer": "7"}}

  image, images, video, videos   what the question is about
  question                       is asked with a sentence appended: "{SHORT}"
  choices                        a list of texts; they are listed as A., B., ... after the question, the sentence is
                                 "{LETTER}"
                                 and answer names a choice by letter or text
  prompt                         is asked word for word instead: nothing is appended
  answer, answers                text or numbers that count as right
  id                             names the sample (default: the number of its line); keep it when lines move, so that
                                 the journal finds its score again"""


def load_tasks(names: Sequence[str], *, held_out: bool = False) -> list[Task]:
    """Load the tasks that `names` stand for; see `FORMS`.

    Args:
        names: of the tasks.
        held_out: whether "tinyvqa" stands for digits that no model was trained on, or calibrated on.

    Raises:
        ValueError: a name of no known form, no such file or function, or something that is no task.
        ImportError: lmms-eval is asked for and not installed.
    """
    return [task for name in names for task in _tasks(name, _HELD_OUT_DIGITS if held_out else _TRAINING_DIGITS)]


def _tasks(name: str, digits: str) -> list[Task]:
    path, _, metric = name.rpartition(":") if not Path(name).is_file() else (name, "", "")
    if name.endswith(".jsonl") or Path(name).is_file():
        return [JsonlTask(name)]
    if path.endswith(".jsonl") or (path and Path(path).is_file()):
        return [JsonlTask(path, metric)]
    if name.startswith("lmms:"):
        from hawk_kernels.tasks.lmms import lmms_tasks

        return list(lmms_tasks(name.removeprefix("lmms:")))
    if name == "tinyvqa":
        return _called(digits, "run it in a checkout of the repository, with scikit-learn: pip install scikit-learn")
    module, _, function = name.partition(":")
    if module and function and all(part.isidentifier() for part in (*module.split("."), function)):
        return _called(name, "the module must be in this folder or installed")
    raise ValueError(
        f"data: expected FILE.jsonl, FILE.jsonl:METRIC, lmms:TASK, tinyvqa or MODULE:FUNCTION, got {name!r}"
        + ("" if ":" in name else "; there is no such file")
    )


def _called(name: str, remedy: str) -> list[Task]:
    module_name, _, function_name = name.partition(":")
    try:
        function: Any = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"data: could not get {name}: {error}; {remedy}") from error
    except Exception as error:  # whatever a module does when it is imported
        raise ValueError(f"data: could not get {name}: {type(error).__name__}: {error}; {_WHERE}") from error
    try:
        made = function() if callable(function) and not _is_task(function) else function
    except Exception as error:  # whatever a function of the caller's does
        raise ValueError(f"data: {name} failed: {type(error).__name__}: {error}; {_WHERE}") from error
    tasks = list(made) if isinstance(made, (list, tuple)) else [made]
    for task in tasks:
        if not _is_task(task):
            raise ValueError(
                f"data: expected {name} to return a task or a list of tasks, got {type(task).__name__}; a task has "
                "name, max_new_tokens, samples, prompt() and score()"
            )
    return tasks


def _is_task(value: object) -> bool:
    return isinstance(value, Task) and not inspect.isclass(value)
