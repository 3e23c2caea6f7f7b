"""What a weights file holds, checked before it is shown: people also write such files by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TEXTS = ("model", "layers", "source", "date")
_LARGEST = 1e300


def check_content(content: Mapping[str, Any], origin: str) -> None:
    """Whether the fields of a weights file hold what `hawk-kernels calibrate` writes; all but `weights` may be missing.

    Args:
        content: of the file, a JSON object with a list `weights`.
        origin: of the content, for messages.

    Raises:
        ValueError: a field holds something else; the message names it.
    """

    def expect(holds: bool, field: str, wanted: str) -> None:
        if not holds:
            raise ValueError(f"{origin}: expected {field!r} to be {wanted}; `hawk-kernels calibrate` writes such files")

    for field in _TEXTS:
        expect(isinstance(content.get(field, ""), str), field, "text")
    tasks = content.get("tasks", [])
    task_fields = "a list of objects with name, samples, base and base_standard_error"
    expect(isinstance(tasks, list) and all(map(_is_task, tasks)), "tasks", task_fields)
    others = content.get("other_layers", {})
    expect(_is_object(others) and all(map(_is_object, others.values())), "other_layers", "an object of results")
    heads, columns = len(content["weights"]), len(tasks)
    expect(heads > 0, "weights", "a number for each head")
    vector = f"a list of {heads} finite numbers"
    matrix = f"{heads} lists of {columns} finite numbers, one for each task"
    results = {"": content, **{f"other_layers.{layers}.": result for layers, result in others.items()}}
    for within, result in results.items():
        errors, flat = result.get("standard_errors"), result.get("flat_tasks")
        expect(_are_numbers(result.get("weights"), heads), f"{within}weights", vector)
        expect(errors is None or _are_numbers(errors, heads), f"{within}standard_errors", vector)
        expect(flat is None or _are_texts(flat), f"{within}flat_tasks", "a list of names")
        for field in ("deltas", "delta_standard_errors"):
            rows = result.get(field)
            expect(rows is None or _are_rows(rows, heads, columns), f"{within}{field}", matrix)


def _is_task(task: Any) -> bool:
    if not _is_object(task) or "base_standard_error" not in task:
        return False
    error = task["base_standard_error"]
    numbers = [task.get("samples"), task.get("base"), *([] if error is None else [error])]
    return _is_text(task.get("name")) and all(map(_is_number, numbers))


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    # a bound, since a whole number of hundreds of digits is no float; NaN is beyond it as well
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _are_numbers(values: Any, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(map(_is_number, values))


def _are_rows(rows: Any, count: int, columns: int) -> bool:
    return isinstance(rows, list) and len(rows) == count and columns > 0 and all(_are_numbers(r, columns) for r in rows)


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(map(_is_text, values))
