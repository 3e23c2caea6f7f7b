"""Turns the scores of questions into relative scores with intervals.

Questions about the same picture are not independent, so the bootstrap draws whole groups of them, within each stratum.
All methods get the same draws, so that differences between methods are paired.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
_SEED = 17


@dataclass(frozen=True)
class Questions:
    """What was asked, in the order of the scores.

    Attributes:
        kinds: of each question, one of `names`.
        groups: int `[Q]`, which group a question belongs to.
        strata: `[G]`, the stratum of each group.
        names: all kinds.
    """

    kinds: np.ndarray
    groups: np.ndarray
    strata: np.ndarray
    names: tuple[str, ...]

    def per_group(self, scores: np.ndarray) -> np.ndarray:
        """Sum the scores `[Q]` of each kind in each group, `[G, kinds]`."""
        table = np.zeros((len(self.strata), len(self.names)))
        columns = np.array([self.names.index(kind) for kind in self.kinds])
        np.add.at(table, (self.groups, columns), scores)
        return table


def resampling_weights(strata: np.ndarray, resamples: int = RESAMPLES, seed: int = _SEED) -> np.ndarray:
    """Draw how often each group occurs in each resample, `[1 + resamples, G]`; the first row is the sample itself."""
    rng = np.random.default_rng(seed)
    weights = np.ones((resamples + 1, len(strata)))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        weights[1:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=resamples)
    return weights


def relative_scores(questions: Questions, pruned: np.ndarray, whole: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Divide the score with fewer tokens by that with all of them, `[resamples + 1, models, kinds]`.

    Args:
        questions: what was asked.
        pruned, whole: scores `[models, Q]`, numbers or bools.
        weights: from `resampling_weights`.

    Returns:
        NaN where a resample holds no question that scored anything with all tokens.
    """
    few, all_ = (np.stack([weights @ questions.per_group(row) for row in scores], 1) for scores in (pruned, whole))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(all_ > 0, few / all_, np.nan))


def interval(values: np.ndarray) -> dict[str, float]:
    """Return percentages: the estimate, which is the first of `values`, and the 95 % interval of the others."""
    low, high = np.nanpercentile(100 * values[1:], (2.5, 97.5))
    return {"percent": round(100 * float(values[0]), 2), "low": round(float(low), 2), "high": round(float(high), 2)}
