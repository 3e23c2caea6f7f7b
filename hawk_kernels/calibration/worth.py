"""Measures what head weights are worth: the same questions, pruned with the weights and with uniform heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from hawk_kernels.hf.prune import Pruning, prune
from hawk_kernels.tasks.encoding import decode, encode, processor_of
from hawk_kernels.tasks.samples import Chosen, Question, check_pictures, choose_samples
from hawk_kernels.tasks.survey import checked_score, evaluating, naming
from hawk_kernels.tasks.task import Task


@dataclass(frozen=True)
class Worth:
    """What head weights gained on some questions.

    Attributes:
        keep_ratio: the fraction of visual tokens kept, or how many.
        reduce: how HAWK reduced the text, "mean" or "max".
        samples: how many questions were asked.
        whole, weighted, uniform: scores with all visual tokens, pruned with the weights, and pruned with uniform heads;
            means over the benchmarks of the mean over their questions.
        standard_error: of `gain`, or None where a benchmark has one question.
    """

    keep_ratio: float | int
    reduce: str
    samples: int
    whole: float
    weighted: float
    uniform: float
    standard_error: float | None

    @property
    def gain(self) -> float:
        """By how much the weights beat uniform heads, in score."""
        return self.weighted - self.uniform

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" +- {self.standard_error:.3f}"
        return (
            f"with keep_ratio={self.keep_ratio} and reduce={self.reduce!r}, on {self.samples} "
            f"question{'s' * (self.samples > 1)}: weights {self.weighted:.3f}, uniform heads {self.uniform:.3f}, all "
            f"tokens {self.whole:.3f}; the weights are worth {self.gain:+.3f}{error}"
        )


def worth_of_weights(
    model: nn.Module,
    tasks: Task | Sequence[Task],
    head_weights: Any,
    *,
    keep_ratio: float | int = 0.2,
    reduce: str = "mean",
    processor: Any = None,
    limit: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Worth:
    """Ask questions with all visual tokens, pruned by HAWK with these weights, and pruned with uniform heads.

    Weights are worth most under the paper's mean over the text. Under the maximum (`reduce="max"`), a head that attends
    to nothing in particular adds little to any peak, so weights often gain nothing and a calibration can be spared. Ask
    other questions than the weights were measured on.

    Args:
        model: a transformers model of a supported family.
        tasks: the benchmarks, as in `calibrate`.
        head_weights: as in `prune`: a `[H]` tensor or sequence, or the path of a weights file.
        keep_ratio: as in `prune`.
        reduce: as in `Hawk`.
        processor: of the model; by default the one of its checkpoint.
        limit: at most so many samples of each task, drawn at random.
        seed: of that draw.
        progress: whether to show progress on stderr.

    Raises:
        TypeError, ValueError: what `prune` and `calibrate` raise for the same arguments.
    """
    chosen = choose_samples([tasks] if isinstance(tasks, Task) else list(tasks), limit, seed)
    check_pictures(chosen, progress)
    return worth_of_chosen(
        model, chosen, head_weights, keep_ratio=keep_ratio, reduce=reduce, processor=processor, progress=progress
    )


def worth_of_chosen(
    model: nn.Module,
    chosen: Sequence[Chosen],
    head_weights: Any,
    *,
    keep_ratio: float | int,
    reduce: str,
    processor: Any,
    progress: bool,
) -> Worth:
    """Do what `worth_of_weights` does with samples that were chosen and checked before."""
    from tqdm import tqdm

    processor = processor_of(model) if processor is None else processor
    # made before anything is asked, so that a wrong argument costs no time
    blocks = [prune(model, keep_ratio, head_weights=heads, reduce=reduce) for heads in (head_weights, "uniform")]
    questions = [question for part in chosen for question in part.questions]
    with evaluating(model), tqdm(total=len(questions), desc="worth", unit="sample", disable=not progress) as bar:

        def scores_of(question: Question) -> list[float]:
            bar.update()
            return _scores(model, processor, question, blocks)

        scores = [np.array([scores_of(question) for question in part.questions]) for part in chosen]
    whole, weighted, uniform = np.mean([part.mean(axis=0) for part in scores], axis=0)
    return Worth(
        keep_ratio=keep_ratio,
        reduce=reduce,
        samples=len(questions),
        whole=float(whole),
        weighted=float(weighted),
        uniform=float(uniform),
        standard_error=_standard_error([part[:, 1] - part[:, 2] for part in scores]),
    )


def _scores(model: Any, processor: Any, question: Question, blocks: Sequence[Pruning]) -> list[float]:
    """Score one sample with all visual tokens, then pruned in each of the blocks."""
    task, sample, place = question.task, question.sample, question.place
    with naming(place, "cannot be asked"):
        inputs = encode(task, sample, processor, model)

    def score() -> float:
        with naming(place, "cannot be answered"):
            tokens = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=task.max_new_tokens)
        answer = decode(processor, tokens[0, inputs["input_ids"].shape[1] :].tolist())
        with naming(place, "cannot be scored"):
            return checked_score(task.score(sample, answer))

    with torch.no_grad():
        scores = [score()]
        for block in blocks:
            with block:
                scores.append(score())
    return scores


def _standard_error(gains: Sequence[np.ndarray]) -> float | None:
    """Estimate the standard error of the mean over benchmarks of the mean gain, from the gains of their questions."""
    if any(len(of_task) < 2 for of_task in gains):
        return None
    variance = sum(float(of_task.var(ddof=1)) / len(of_task) for of_task in gains)
    return float(variance**0.5 / len(gains))
