"""What an evaluation found: for each method and keep ratio its scores with intervals, tokens, memory and times."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hawk_kernels.evaluation.contenders import Way
from hawk_kernels.evaluation.intervals import Questions, interval, relative_scores, resampling_weights
from hawk_kernels.evaluation.stages import plain
from hawk_kernels.hf.prune import KeepRatio

SOURCE = "hawk-kernels evaluate"
_FEW_PICTURES = 100

Record = Mapping[str, Any]
"""What was measured when one question was asked in one way; see `run`."""


@dataclass(frozen=True)
class TaskResult:
    """One benchmark.

    Attributes:
        name: of the task.
        samples: how many were asked.
        total: how many the task has.
        pictures: how many different pictures these are about.
        digest: of what was asked.
        score: mean score with nothing pruned, from 0 to 1.
    """

    name: str
    samples: int
    total: int
    pictures: int
    digest: str
    score: float


@dataclass(frozen=True)
class Unpruned:
    """The score and the cost of the model with all its visual tokens, over all questions.

    Attributes:
        score: mean over the tasks of their mean scores.
        visual_tokens: mean number in a prompt.
        cache_bytes: mean bytes of the keys and values of a prompt.
        first_token_ms: milliseconds to the first token, the vision encoder included, median.
        next_token_ms: milliseconds for each token after it, median; None where answers have one token.
    """

    score: float
    visual_tokens: float
    cache_bytes: float
    first_token_ms: float
    next_token_ms: float | None


@dataclass(frozen=True)
class MethodResult:
    """One method at one keep ratio.

    Attributes:
        method: its label.
        keep: how much it keeps: a share, a number of tokens, or stages `{layer: keep}`.
        layers: after which layers tokens leave, counted from 1; 0 is before the first.
        options: of the method, as it was made.
        score: mean over the tasks of their mean scores.
        scores: mean score of each task, by name.
        relative: score divided by that with nothing pruned, mean of the tasks on which the model scores anything: a
            dict with `percent` and the ends `low` and `high` of its 95 % interval; None where it scores nothing.
        relative_by_task: the same for each of these tasks.
        behind_first: by how many points of `relative` the method is behind the first one at this keep ratio, paired
            over questions; None for the first method.
        visual_tokens: mean number that stay in a prompt.
        tokens_per_layer: mean number that a layer of the text model reads in a prompt.
        cache_bytes: mean bytes of the keys and values of a prompt.
        first_token_ms, next_token_ms: as for `Unpruned`.
        first_token_speedup: how many times sooner the first token comes than when nothing is pruned: median over
            questions, each asked both ways in turn.
        next_token_speedup: likewise for a token after it; None where answers have one token.
    """

    method: str
    keep: KeepRatio
    layers: tuple[int, ...]
    options: Mapping[str, Any]
    score: float
    scores: Mapping[str, float]
    relative: Mapping[str, float] | None
    relative_by_task: Mapping[str, Mapping[str, float]]
    behind_first: Mapping[str, float] | None
    visual_tokens: float
    tokens_per_layer: float
    cache_bytes: float
    first_token_ms: float
    next_token_ms: float | None
    first_token_speedup: float
    next_token_speedup: float | None


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns.

    Attributes:
        model: id or path of the model.
        tasks: the benchmarks.
        unpruned: the model with all its visual tokens.
        methods: every method at every keep ratio, method by method.
        refused: methods that cannot serve the model's family, or that cannot choose in some stages, with the reason.
        settings: seed, limit, dtype, device and whatever else was chosen.
        versions: of the packages that took part.
        date: when it was finished, ISO 8601.
    """

    model: str
    tasks: tuple[TaskResult, ...]
    unpruned: Unpruned
    methods: tuple[MethodResult, ...]
    refused: Mapping[str, str]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    date: str

    def of(self, method: str, keep: KeepRatio) -> MethodResult:
        """Return the result of a method at a keep ratio.

        Raises:
            KeyError: there is none.
        """
        for result in self.methods:
            if (result.method, result.keep) == (method, keep):
                return result
        known = ", ".join(f"{result.method} at {result.keep}" for result in self.methods)
        raise KeyError(f"expected one of {known}, got {method} at {keep}")

    def to_dict(self) -> dict[str, Any]:
        """Return the content of results.json."""
        methods = [{**asdict(result), "keep": plain(result.keep)} for result in self.methods]
        return {"source": SOURCE, **asdict(self), "methods": methods}

    def doubts(self) -> list[str]:
        """Say which benchmarks cannot tell methods apart, and why."""
        found = []
        for task in self.tasks:
            if task.score == 0:
                found.append(
                    f"{task.name}: the model scores 0 with nothing pruned, so the task is left out of relative scores; "
                    "look at the prompt, the answers and the metric"
                )
            elif task.pictures < _FEW_PICTURES:
                found.append(
                    f"{task.name}: {task.samples} question{'s' * (task.samples > 1)} about {task.pictures} "
                    f"picture{'s' * (task.pictures > 1)} are few; intervals are rough below {_FEW_PICTURES} pictures"
                )
        return found

    def __repr__(self) -> str:
        lines = [f"Evaluation({self.model}, {sum(task.samples for task in self.tasks)} questions)"]
        lines.append(f"  unpruned: score {self.unpruned.score:.3f}, {self.unpruned.visual_tokens:.0f} visual tokens")
        for result in self.methods:
            relative = "-" if result.relative is None else f"{result.relative['percent']:.1f} %"
            lines.append(
                f"  {result.method} at {result.keep}: {relative} of the score, {result.visual_tokens:.0f} visual "
                f"tokens, first token {result.first_token_speedup:.2f}x sooner"
            )
        return "\n".join(lines)


def summarise(
    kinds: Sequence[str],
    groups: Sequence[str],
    whole: Sequence[Record],
    pruned: Mapping[Way, Sequence[Record]],
) -> tuple[Unpruned, list[MethodResult]]:
    """Compute what every method keeps and saves from the records of all questions.

    Args:
        kinds: of each question, the name of its task.
        groups: of each question, what stands for its pictures.
        whole: the record of each question with nothing pruned.
        pruned: for each method and keep ratio the record of each question. The first method is the one that the others
            are compared with.
    """
    names = tuple(dict.fromkeys(kinds))
    base = {name: _mean_of(kinds, whole, name) for name in names}
    scoring = tuple(name for name in names if base[name] > 0)
    compared = [i for i, kind in enumerate(kinds) if base[kind] > 0]
    questions = _grouped([kinds[i] for i in compared], [groups[i] for i in compared], scoring)
    weights = resampling_weights(questions.strata) if compared else np.ones((1, 0))

    def relatives(records: Sequence[Record]) -> np.ndarray:
        """Compute relative scores `[resamples + 1, kinds]`."""
        few, all_ = (np.array([[of[i]["score"] for i in compared]]) for of in (records, whole))
        return relative_scores(questions, few, all_, weights)[:, 0]

    first = next(iter(pruned)).contender
    found = {way: relatives(records) for way, records in pruned.items()} if compared else {}
    means = {way: values.mean(axis=1) for way, values in found.items()}
    results = []
    for way, records in pruned.items():
        assert way.contender is not None
        beside = None if way.contender is first else means.get(Way(first, way.keep))
        scores = {name: _mean_of(kinds, records, name) for name in names}
        results.append(
            MethodResult(
                method=way.contender.label,
                keep=way.keep,
                layers=tuple(records[0]["layers"]),
                options=records[0]["options"],
                score=_mean(list(scores.values())),
                scores=scores,
                relative=interval(means[way]) if compared else None,
                relative_by_task={name: interval(found[way][:, i]) for i, name in enumerate(scoring)},
                behind_first=None if beside is None else interval(beside - means[way]),
                visual_tokens=_mean([record["visual_tokens_after"] for record in records]),
                tokens_per_layer=_mean([record["tokens_per_layer"] for record in records]),
                cache_bytes=_mean([record["cache_bytes"] for record in records]),
                first_token_ms=_milliseconds([record["first_token"] for record in records]) or 0.0,
                next_token_ms=_milliseconds([record["next_token"] for record in records]),
                first_token_speedup=_speedup(records, "first_token") or 0.0,
                next_token_speedup=_speedup(records, "next_token"),
            )
        )
    visual_tokens = next(iter(pruned.values()))
    unpruned = Unpruned(
        score=_mean(list(base.values())),
        visual_tokens=_mean([record["visual_tokens_before"] for record in visual_tokens]),
        cache_bytes=_mean([record["cache_bytes"] for record in whole]),
        first_token_ms=_milliseconds([record["first_token"] for record in whole]) or 0.0,
        next_token_ms=_milliseconds([record["next_token"] for record in whole]),
    )
    return unpruned, results


def _grouped(kinds: Sequence[str], groups: Sequence[str], names: tuple[str, ...]) -> Questions:
    """Number the groups; a stratum is all groups about which the same tasks ask.

    Where all questions are about one picture, which cannot be drawn anew, they are drawn singly.
    """
    if len(set(groups)) == 1:
        groups = [f"question {number}" for number in range(len(groups))]
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    asking: list[set[str]] = [set() for _ in numbers]
    for kind, group in zip(kinds, groups, strict=True):
        asking[numbers[group]].add(kind)
    strata = np.array(["\n".join(sorted(tasks)) for tasks in asking])
    return Questions(np.array(kinds), np.array([numbers[group] for group in groups], dtype=np.int64), strata, names)


def _mean_of(kinds: Sequence[str], records: Sequence[Record], name: str) -> float:
    return _mean([record["score"] for kind, record in zip(kinds, records, strict=True) if kind == name])


def _mean(values: Sequence[float]) -> float:
    # rounded once, so that equal sums in another order are equal means
    return math.fsum(values) / len(values)


def _milliseconds(seconds: Sequence[float | None]) -> float | None:
    known = [value for value in seconds if value is not None]
    return round(1e3 * statistics.median(known), 4) if known else None


def _speedup(records: Sequence[Record], name: str) -> float | None:
    """Compute the median over questions of the time with nothing pruned divided by the time of this way."""
    pairs = [(record["beside"][name], record[name]) for record in records]
    ratios = [whole / pruned for whole, pruned in pairs if whole and pruned]
    return round(statistics.median(ratios), 4) if ratios else None
