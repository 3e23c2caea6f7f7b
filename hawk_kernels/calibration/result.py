"""What a calibration found, and the weights file that `prune(head_weights=...)` reads."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hawk_kernels.calibration.importance import (
    RESAMPLES,
    flat_benchmarks,
    head_importance,
    importance_standard_errors,
)

DEFINITION = (
    "w[i] = 1/N_d * sum_j S'[i,j] / sum_i S'[i,j], S'[i,j] = dS[i,j] - min_i dS[i,j], dS[i,j] = S_base[j] - S[i,j], "
    "where S[i,j] is the mean score of task j with the visual keys masked from head i (HAWK, arXiv 2604.07812); a task "
    "on which all heads are equal counts as uniform; standard errors by the bootstrap over samples"
)

# lists of numbers over several lines; within strings JSON has no line ends
_NUMBERS = re.compile(r"\[\n[\s\d.,e+-]*(?:null[\s\d.,e+-]*)*\]")


@dataclass(frozen=True)
class TaskScore:
    """One benchmark of a calibration.

    Attributes:
        name: of the task.
        samples: how many were asked.
        total: how many the task has.
        digest: of what was asked.
        base: mean score with nothing hidden.
        base_standard_error: of that mean, or None where one sample was asked.
    """

    name: str
    samples: int
    total: int
    digest: str
    base: float
    base_standard_error: float | None


@dataclass(frozen=True)
class LayerResult:
    """Head importance with visual tokens hidden in the first layer, or in all.

    Attributes:
        weights: float64 `[H]`, summing to one.
        standard_errors: float64 `[H]`, or None where a task has one sample.
        deltas: `dS[i,j]`, float64 `[H, N_d]`.
        delta_standard_errors: float64 `[H, N_d]`, or None.
        flat_tasks: names of the tasks on which all heads are equal, which count as uniform.
    """

    weights: torch.Tensor
    standard_errors: torch.Tensor | None
    deltas: torch.Tensor
    delta_standard_errors: torch.Tensor | None
    flat_tasks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "weights": self.weights.tolist(),
            "standard_errors": None if self.standard_errors is None else self.standard_errors.tolist(),
            "deltas": self.deltas.tolist(),
            "delta_standard_errors": None
            if self.delta_standard_errors is None
            else self.delta_standard_errors.tolist(),
            "flat_tasks": list(self.flat_tasks),
        }


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` returns.

    Attributes:
        model: id or path of the model.
        fingerprint: fields of its config that tell checkpoints apart.
        layer: index of the decoder layer whose queries and keys score the tokens.
        tasks: the benchmarks `j`, in the order of the columns of `deltas`.
        results: by "first" and "all", which layers hid the visual tokens; the first entry is the one that counts.
        settings: seed, limit, dtype and whatever else was chosen.
        versions: of the packages that took part.
        date: when it was finished, ISO 8601.
    """

    model: str
    fingerprint: Mapping[str, Any]
    layer: int
    tasks: tuple[TaskScore, ...]
    results: Mapping[str, LayerResult]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    date: str

    @property
    def layers(self) -> str:
        """Which layers hid the visual tokens for `weights`."""
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
        """The content of a weights file: the result that counts, and the other way of hiding where it was measured."""
        chosen, *others = self.results
        return {
            "model": self.model,
            "fingerprint": dict(self.fingerprint),
            "layer": self.layer,
            "layers": chosen,
            **self.results[chosen].to_dict(),
            "tasks": [vars(task) for task in self.tasks],
            **({"other_layers": {layers: self.results[layers].to_dict() for layers in others}} if others else {}),
            "definition": DEFINITION,
            "source": "hawk-kernels calibrate",
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "date": self.date,
        }

    def save(self, path: str | Path) -> None:
        """Write the weights file, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with partial.open("w", encoding="utf-8") as file:
            file.write(_NUMBERS.sub(_on_one_line, json.dumps(self.to_dict(), indent=2)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


def check_target(path: str | Path) -> None:
    """Whether a weights file can be written there, which is better known before the hours than after them.

    Raises:
        ValueError: a folder stands there.
        PermissionError: its folder is not this user's to write in.
    """
    path = Path(path)
    if not path.name or path.is_dir():
        raise ValueError(f"out: expected a file to write, got the folder {str(path)!r}; name a file in it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"out: expected a folder that can be written to, got {folder}; choose another one")


def task_score(name: str, total: int, digest: str, base: np.ndarray) -> TaskScore:
    """A benchmark from the scores `[n]` of its samples with nothing hidden."""
    return TaskScore(name, len(base), total, digest, _mean(base), _standard_error(base))


def layer_result(
    names: Sequence[str], base: Sequence[np.ndarray], hidden: Sequence[np.ndarray], seed: int
) -> LayerResult:
    """Head importance from the scores of single samples.

    Args:
        names: of the benchmarks.
        base: for each of them the score of each sample, float64 `[n_j]`.
        hidden: likewise with a head hidden, float64 `[n_j, H]`.
        seed: of the bootstrap.
    """
    columns = [[_mean(before) - _mean(head) for head in after.T] for before, after in zip(base, hidden, strict=True)]
    deltas = torch.tensor(columns, dtype=torch.float64).T.contiguous()
    errors = delta_errors = None
    if all(len(scores) > 1 for scores in base):
        drops = [before[:, None] - after for before, after in zip(base, hidden, strict=True)]
        errors = torch.from_numpy(importance_standard_errors(drops, resamples=RESAMPLES, seed=seed))
        delta_errors = torch.tensor(
            [[_standard_error(head) for head in drop.T] for drop in drops], dtype=torch.float64
        ).T.contiguous()
    flat = tuple(names[j] for j in flat_benchmarks(deltas))
    return LayerResult(head_importance(deltas), errors, deltas, delta_errors, flat)


def _on_one_line(numbers: re.Match[str]) -> str:
    return " ".join(numbers.group().split()).replace("[ ", "[").replace(" ]", "]")


def results_in(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The results of a weights file by the layers that hid the visual tokens, the one that counts first."""
    names = ("weights", "standard_errors", "deltas", "delta_standard_errors", "flat_tasks")
    chosen = {name: content.get(name) for name in names}
    return {content.get("layers", ""): chosen, **content.get("other_layers", {})}


def now() -> str:
    """The present second, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _mean(scores: np.ndarray) -> float:
    # rounded once, so that equal sums in another order are equal means
    return math.fsum(scores.tolist()) / len(scores)


def _standard_error(scores: np.ndarray) -> float | None:
    if len(scores) < 2:
        return None
    mean = _mean(scores)
    variance = math.fsum(((scores - mean) ** 2).tolist()) / (len(scores) - 1)
    return math.sqrt(variance / len(scores))
