"""From right and wrong answers to the numbers of the table; the models are not drawn anew, but shown one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hawk_kernels.evaluation.intervals import Questions, interval, relative_scores, resampling_weights


def summarise(
    questions: Questions,
    right: Mapping[str, Mapping[float, np.ndarray]],
    whole: np.ndarray,
    reference: str,
    ratios: Sequence[float],
    weights: np.ndarray | None = None,
) -> dict[str, Any]:
    """Every method at every keep ratio: mean of kinds, each kind, each model, and the difference to `reference`.

    Args:
        questions: what was asked; a group is a prompt, its stratum the layout.
        right: for each label and keep ratio, bool `[models, Q]`.
        whole: bool `[models, Q]`, right answers with all visual tokens.
        reference: label that the others are compared with.
        ratios: keep ratios.
        weights: from `resampling_weights`; drawn here where left out.
    """
    if weights is None:
        weights = resampling_weights(questions.strata)
    summary: dict[str, Any] = {}
    for ratio in ratios:
        relative = {
            label: relative_scores(questions, answers[ratio], whole, weights) for label, answers in right.items()
        }
        mean = {label: values.mean(axis=(1, 2)) for label, values in relative.items()}
        for label, values in relative.items():
            entry = {
                "mean": interval(mean[label]),
                "by_kind": {name: interval(values[:, :, i].mean(1)) for i, name in enumerate(questions.names)},
                "by_model": [interval(values[:, model].mean(1)) for model in range(values.shape[1])],
            }
            if label != reference:
                entry["reference_minus_this"] = interval(mean[reference] - mean[label])
                entry["reference_minus_this_by_model"] = [
                    interval((relative[reference] - values)[:, model].mean(1)) for model in range(values.shape[1])
                ]
            summary.setdefault(label, {})[str(ratio)] = entry
    return summary
