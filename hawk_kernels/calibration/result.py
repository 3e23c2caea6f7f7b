"""Holds what a calibration found, and writes and reads it as the weights file of `prune(head_weights=...)`.

People also write such files by hand, so `Calibration.from_dict` checks every field and needs none but `weights`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hawk_kernels.calibration.importance import (
    RESAMPLES,
    flat_benchmarks,
    head_importance,
    importance_standard_errors,
    spread_of_heads,
)
from hawk_kernels.head_weights import read_weights_file
from hawk_kernels.output_files import WEIGHTS_FILE, OutputFileError, check_output, write_whole

DEFINITION = (
    "w[i] = 1/N_d * sum_j S'[i,j] / sum_i S'[i,j], S'[i,j] = dS[i,j] - min_i dS[i,j], dS[i,j] = S_base[j] - S[i,j], "
    "where S[i,j] is the mean score of task j with the visual keys masked from head i (HAWK, arXiv 2604.07812); a task "
    "on which all heads are equal counts as uniform; standard errors by the bootstrap over samples"
)

# beyond this a number of a file is no float64 that can be added to others
_LARGEST = 1e300

# lists of numbers over several lines; a JSON string never contains a line end
_NUMBERS = re.compile(r"\[\n[\s\d.,e+-]*(?:null[\s\d.,e+-]*)*\]")
# Below this many samples the standard error of a score is several points.
_FEW_SAMPLES = 100


@dataclass(frozen=True)
class TaskScore:
    """One benchmark of a calibration.

    Attributes:
        name: of the task.
        samples: how many were asked.
        total: how many the task has.
        digest: of what was asked.
        base: mean score with nothing masked.
        base_standard_error: of that mean, or None where one sample was asked.
    """

    name: str
    samples: int
    total: int
    digest: str
    base: float
    base_standard_error: float | None

    @classmethod
    def from_dict(cls, fields: _Fields) -> TaskScore:
        """Read one entry of `tasks` in a weights file; `total` and `digest` may be missing."""
        samples = int(fields.number("samples"))
        return cls(
            name=fields.text("name", required=True),
            samples=samples,
            total=int(fields.number("total", default=samples)),
            digest=fields.text("digest"),
            base=fields.number("base"),
            base_standard_error=fields.optional_number("base_standard_error"),
        )


@dataclass(frozen=True)
class LayerResult:
    """Head importance with visual tokens masked in the first layer, or in all.

    Attributes:
        weights: float64 `[H]`, summing to one.
        standard_errors: float64 `[H]`, or None where a task has one sample.
        deltas: `dS[i,j]`, float64 `[H, N_d]`; None where a file does not have them.
        delta_standard_errors: float64 `[H, N_d]`, or None.
        flat_tasks: names of the tasks on which all heads are equal, which count as uniform.
    """

    weights: torch.Tensor
    standard_errors: torch.Tensor | None
    deltas: torch.Tensor | None
    delta_standard_errors: torch.Tensor | None
    flat_tasks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return {
            "weights": self.weights.tolist(),
            "standard_errors": _as_list(self.standard_errors),
            "deltas": _as_list(self.deltas),
            "delta_standard_errors": _as_list(self.delta_standard_errors),
            "flat_tasks": list(self.flat_tasks),
        }

    @classmethod
    def from_dict(cls, fields: _Fields, heads: int, tasks: int) -> LayerResult:
        """Read one result of a weights file of `heads` heads and `tasks` benchmarks; only `weights` must be there."""
        weights = fields.vector("weights", heads)
        if weights is None:
            raise fields.unexpected("weights", f"a list of {heads} finite numbers")
        return cls(
            weights=weights,
            standard_errors=fields.vector("standard_errors", heads),
            deltas=fields.matrix("deltas", heads, tasks),
            delta_standard_errors=fields.matrix("delta_standard_errors", heads, tasks),
            flat_tasks=fields.texts("flat_tasks"),
        )


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` returns.

    Attributes:
        model: id or path of the model.
        fingerprint: fields of its config that tell checkpoints apart.
        layer: index of the decoder layer whose queries and keys score the tokens, or None in a file that does not say.
        tasks: the benchmarks `j`, in the order of the columns of `deltas`.
        results: by "first" and "all", in which layers the visual tokens were masked; the first entry is the one that
            counts.
        settings: seed, limit, dtype and whatever else was chosen.
        versions: of the packages that took part.
        date: when it was finished, ISO 8601.
    """

    model: str
    fingerprint: Mapping[str, Any]
    layer: int | None
    tasks: tuple[TaskScore, ...]
    results: Mapping[str, LayerResult]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    date: str

    @property
    def layers(self) -> str:
        """The layers in which the visual tokens were masked for `weights`."""
        return next(iter(self.results))

    @property
    def weights(self) -> torch.Tensor:
        """Head importance, float64 `[H]`, as `prune(head_weights=...)` takes it."""
        return self.results[self.layers].weights

    @property
    def standard_errors(self) -> torch.Tensor | None:
        """Of `weights`."""
        return self.results[self.layers].standard_errors

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a weights file: the result that counts, and that of other layers if measured."""
        chosen, *others = self.results
        return {
            "model": self.model,
            "fingerprint": dict(self.fingerprint),
            "layer": self.layer,
            "layers": chosen,
            **self.results[chosen].to_dict(),
            "tasks": [asdict(task) for task in self.tasks],
            **({"other_layers": {layers: self.results[layers].to_dict() for layers in others}} if others else {}),
            "definition": DEFINITION,
            "source": "hawk-kernels calibrate",
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "date": self.date,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], origin: str) -> Calibration:
        """Read the calibration that a weights file holds.

        Args:
            content: of the file, a JSON object; all but `weights` may be missing.
            origin: of the content, for messages.

        Raises:
            ValueError: a field holds something that `hawk-kernels calibrate` does not write; the message names it.
        """
        fields = _Fields(content, origin)
        heads = fields.length("weights", "a number for each head")
        tasks = tuple(TaskScore.from_dict(task) for task in fields.objects("tasks"))
        results = {fields.text("layers"): LayerResult.from_dict(fields, heads, len(tasks))}
        for layers, other in fields.named_objects("other_layers").items():
            results[layers] = LayerResult.from_dict(other, heads, len(tasks))
        layer = fields.optional_number("layer")
        return cls(
            model=fields.text("model"),
            fingerprint=fields.mapping("fingerprint"),
            layer=None if layer is None else int(layer),
            tasks=tasks,
            results=results,
            settings=fields.mapping("settings"),
            versions=fields.mapping("versions"),
            date=fields.text("date"),
        )

    def doubts(self) -> list[str]:
        """Say how uncertain the score of each benchmark with few samples is, and how uncertain the weights are.

        A benchmark gets the same share of the weights as the others however little its heads differ, since the paper
        normalises each by itself; where they differ by no more than noise, that share is noise.
        """
        found = []
        for task in self.tasks:
            if task.samples < _FEW_SAMPLES:
                error = task.base_standard_error
                spread = "unknown" if error is None else f"{error:.3f}"
                found.append(
                    f"{task.name}: {task.samples} sample{'s' * (task.samples > 1)} are few; the score {task.base:.3f} "
                    f"has a standard error of {spread}, so the weights are rough; take {_FEW_SAMPLES} or more"
                )
        result = self.results[self.layers]
        if result.deltas is not None and result.delta_standard_errors is not None:
            share = (
                "all weights"
                if len(self.tasks) == 1
                else f"1/{len(self.tasks)} of the weights, as does every other task"
            )
            spreads, noises = spread_of_heads(result.deltas, result.delta_standard_errors)
            for task, differ, within in zip(self.tasks, spreads.tolist(), noises.tolist(), strict=True):
                if task.name not in result.flat_tasks and differ <= within:
                    found.append(
                        f"{task.name}: the drops of its heads differ by {differ:.3f} at most, which is within their "
                        f"noise of {within:.3f}, but it decides {share}; take more samples of it, or leave it out"
                    )
        errors = self.standard_errors
        if errors is not None:
            lowest, highest = float(self.weights.min()), float(self.weights.max())
            if float(errors.max()) >= (highest - lowest) / 2:
                found.append(
                    f"the weights lie between {lowest:.3f} and {highest:.3f} with standard errors up to "
                    f"{float(errors.max()):.3f}: more samples may order the heads in another way"
                )
        return found

    def save(self, path: str | Path) -> None:
        """Write the weights file, whole or not at all; its folder is made where it does not exist.

        Raises:
            OutputFileError: it cannot be written, or something stands there that is not a file of head weights.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        check_output(path, WEIGHTS_FILE)
        text = _NUMBERS.sub(_on_one_line, json.dumps(self.to_dict(), indent=2)) + "\n"
        write_whole(path, lambda file: file.write(text.encode()))


class _Fields:
    """The fields of a JSON object, each checked as it is read."""

    def __init__(self, content: Mapping[str, Any], origin: str, within: str = "") -> None:
        self._content, self._origin, self._within = content, origin, within

    def unexpected(self, name: str, wanted: str) -> ValueError:
        return ValueError(
            f"{self._origin}: expected '{self._within}{name}' to be {wanted}; `hawk-kernels calibrate` writes such "
            "files"
        )

    def _expect(self, holds: bool, name: str, wanted: str) -> None:
        if not holds:
            raise self.unexpected(name, wanted)

    def text(self, name: str, *, required: bool = False) -> str:
        value = self._content.get(name, None if required else "")
        self._expect(isinstance(value, str), name, "text")
        return str(value)

    def texts(self, name: str) -> tuple[str, ...]:
        value = self._content.get(name)
        are_texts = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        self._expect(value is None or are_texts, name, "a list of names")
        return tuple(value or ())

    def number(self, name: str, *, default: float | None = None) -> float:
        value = self._content.get(name, default)
        self._expect(_is_number(value), name, "a finite number")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        return None if self._content.get(name) is None else self.number(name)

    def length(self, name: str, wanted: str) -> int:
        value = self._content.get(name)
        self._expect(isinstance(value, list) and len(value) > 0, name, wanted)
        return len(value or ())

    def vector(self, name: str, count: int) -> torch.Tensor | None:
        value = self._content.get(name)
        self._expect(value is None or _are_numbers(value, count), name, f"a list of {count} finite numbers")
        return None if value is None else torch.tensor(value, dtype=torch.float64)

    def matrix(self, name: str, rows: int, columns: int) -> torch.Tensor | None:
        value = self._content.get(name)
        is_list = isinstance(value, list) and len(value) == rows and columns > 0
        holds = value is None or (is_list and all(_are_numbers(row, columns) for row in value))
        self._expect(holds, name, f"{rows} lists of {columns} finite numbers, one for each task")
        return None if value is None else torch.tensor(value, dtype=torch.float64)

    def mapping(self, name: str) -> Mapping[str, Any]:
        value = self._content.get(name, {})
        self._expect(isinstance(value, Mapping), name, "an object")
        return dict(value)

    def objects(self, name: str) -> list[_Fields]:
        value = self._content.get(name, [])
        are_objects = isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value)
        self._expect(are_objects, name, "a list of objects with name, samples, base and base_standard_error")
        return [self._part(f"{name}[{i}]", entry) for i, entry in enumerate(value)]

    def named_objects(self, name: str) -> dict[str, _Fields]:
        value = self.mapping(name)
        self._expect(all(isinstance(entry, Mapping) for entry in value.values()), name, "an object of results")
        return {key: self._part(f"{name}.{key}", entry) for key, entry in value.items()}

    def _part(self, name: str, content: Mapping[str, Any]) -> _Fields:
        return _Fields(content, self._origin, f"{self._within}{name}.")


def _is_number(value: Any) -> bool:
    # the bound also refuses NaN, and whole numbers of hundreds of digits, which are no floats
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _are_numbers(values: Any, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(map(_is_number, values))


def _as_list(values: torch.Tensor | None) -> Any:
    return None if values is None else values.tolist()


def check_target(path: str | Path) -> None:
    """Check that a weights file can be written there, which is better known before the hours than after them.

    Args:
        path: of the file; folders that do not exist will be made.

    Raises:
        OutputFileError: something stands there that must not be replaced.
        PermissionError: its folder is not this user's to write in.
    """
    path = Path(path)
    if not path.name or path.is_dir():
        raise OutputFileError(f"out: expected a file to write, got the folder {str(path)!r}; name a file in it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"out: expected a folder that can be written to, got {folder}; choose another one")
    if path.absolute().parent.exists():
        check_output(path, WEIGHTS_FILE)


def check_same_model(path: str | Path, fingerprint: Mapping[str, Any], parameters: str) -> None:
    """Check that a weights file which will be replaced holds the weights of the model that is measured.

    Args:
        path: of the file, which need not exist.
        fingerprint: of the model.
        parameters: digest of the model's parameters, as `Calibration.settings` has it.

    Raises:
        OutputFileError: it holds those of another model, or does not say whose.
    """
    if not Path(path).exists():
        return
    content = read_weights_file(path)
    owner = content.get("model") or "a model that it does not name"
    if content.get("fingerprint") != fingerprint:
        raise OutputFileError(
            f"out: {path} holds head weights of {owner}, not of this model, so it is not replaced; choose another name"
        )
    settings = content.get("settings")
    measured = settings.get("parameters") if isinstance(settings, Mapping) else None
    if measured not in (None, parameters):
        raise OutputFileError(
            f"out: {path} holds head weights of {owner} with other parameters than this model has, so it is not "
            "replaced; choose another name"
        )


def task_score(name: str, total: int, digest: str, base: np.ndarray) -> TaskScore:
    """Compute a benchmark's score from the scores `[n]` of its samples with nothing masked."""
    return TaskScore(name, len(base), total, digest, _mean(base), _standard_error(base))


def layer_result(
    names: Sequence[str], base: Sequence[np.ndarray], masked: Sequence[np.ndarray], seed: int
) -> LayerResult:
    """Compute head importance from the scores of single samples.

    Args:
        names: of the benchmarks.
        base: for each of them the score of each sample, float64 `[n_j]`.
        masked: likewise with the visual tokens masked from one head, float64 `[n_j, H]`.
        seed: of the bootstrap.
    """
    columns = [[_mean(before) - _mean(head) for head in after.T] for before, after in zip(base, masked, strict=True)]
    deltas = torch.tensor(columns, dtype=torch.float64).T.contiguous()
    errors = delta_errors = None
    if all(len(scores) > 1 for scores in base):
        drops = [before[:, None] - after for before, after in zip(base, masked, strict=True)]
        errors = torch.from_numpy(importance_standard_errors(drops, resamples=RESAMPLES, seed=seed))
        delta_errors = torch.tensor(
            [[_standard_error(head) for head in drop.T] for drop in drops], dtype=torch.float64
        ).T.contiguous()
    flat = tuple(names[j] for j in flat_benchmarks(deltas))
    return LayerResult(head_importance(deltas), errors, deltas, delta_errors, flat)


def _on_one_line(numbers: re.Match[str]) -> str:
    return " ".join(numbers.group().split()).replace("[ ", "[").replace(" ]", "]")


def _mean(scores: np.ndarray) -> float:
    # rounded once, so that equal sums in another order are equal means
    return math.fsum(scores.tolist()) / len(scores)


def _standard_error(scores: np.ndarray) -> float | None:
    if len(scores) < 2:
        return None
    mean = _mean(scores)
    variance = math.fsum(((scores - mean) ** 2).tolist()) / (len(scores) - 1)
    return math.sqrt(variance / len(scores))
