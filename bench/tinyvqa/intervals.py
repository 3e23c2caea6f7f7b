"""From right and wrong answers to relative accuracies with intervals.

Questions about one prompt see the same pictures, so prompts are what the bootstrap draws anew, within each layout, the
same for all methods and models: differences between methods are paired. The models are not drawn; what they differ by
is shown model by model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000
_SEED = 17


@dataclass(frozen=True)
class Questions:
    """What was asked, in the order of the answers.

    Attributes:
        kinds: of each question, one of `names`.
        prompts: int `[Q]`, which prompt a question is about.
        layouts: int `[P]`, the layout of each prompt.
        names: all kinds.
    """

    kinds: np.ndarray
    prompts: np.ndarray
    layouts: np.ndarray
    names: tuple[str, ...]

    def per_prompt(self, right: np.ndarray) -> np.ndarray:
        """Count right answers of each kind to each prompt, `[P, kinds]`."""
        table = np.zeros((len(self.layouts), len(self.names)))
        columns = np.array([self.names.index(kind) for kind in self.kinds])
        np.add.at(table, (self.prompts, columns), right)
        return table


def resampling_weights(layouts: np.ndarray, resamples: int = RESAMPLES, seed: int = _SEED) -> np.ndarray:
    """Draw how often each prompt occurs in each resample, `[1 + resamples, P]`; the first row is the sample itself."""
    rng = np.random.default_rng(seed)
    weights = np.ones((resamples + 1, len(layouts)))
    for layout in np.unique(layouts):
        of_layout = np.flatnonzero(layouts == layout)
        weights[1:, of_layout] = rng.multinomial(
            len(of_layout), np.full(len(of_layout), 1 / len(of_layout)), size=resamples
        )
    return weights


def relative_accuracies(questions: Questions, pruned: np.ndarray, whole: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Accuracy with fewer tokens divided by that with all of them, `[resamples + 1, models, kinds]`.

    Args:
        questions: what was asked.
        pruned, whole: bool `[models, Q]`, right answers.
        weights: from `resampling_weights`.
    """
    few, all_ = (np.stack([weights @ questions.per_prompt(row) for row in right], 1) for right in (pruned, whole))
    return np.asarray(few / all_)


def interval(values: np.ndarray) -> dict[str, Any]:
    """Return percentages: the estimate, which is the first of `values`, and the 95 % interval of the others."""
    low, high = np.percentile(100 * values[1:], (2.5, 97.5))
    return {"percent": round(100 * float(values[0]), 2), "low": round(float(low), 2), "high": round(float(high), 2)}


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
        questions: what was asked.
        right: for each label and keep ratio, bool `[models, Q]`.
        whole: bool `[models, Q]`, right answers with all visual tokens.
        reference: label that the others are compared with.
        ratios: keep ratios.
        weights: from `resampling_weights`; drawn here where left out.
    """
    if weights is None:
        weights = resampling_weights(questions.layouts)
    summary: dict[str, Any] = {}
    for ratio in ratios:
        relative = {
            label: relative_accuracies(questions, answers[ratio], whole, weights) for label, answers in right.items()
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
