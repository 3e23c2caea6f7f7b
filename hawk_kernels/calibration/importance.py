"""Turns drops in score into head importance and its uncertainty, by the equations of HAWK (arXiv 2604.07812)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import torch

FLAT = 1e-9
"""Heads whose drops differ by no more than this are equal: what is left of a difference after rounding."""

RESAMPLES = 1000


def head_importance(deltas: torch.Tensor) -> torch.Tensor:
    """Compute head importance `w[i]` from the drop in score of each benchmark when head `i` sees no visual tokens.

        S'[i,j] = dS[i,j] - min_i dS[i,j]
        w[i] = 1/N_d * sum_j S'[i,j] / sum_i S'[i,j]

    A benchmark on which all heads cost the same does not tell them apart, so it counts as uniform, 1/H.

    Args:
        deltas: `dS[i,j] = S_base[j] - S[i,j]`, float `[H, N_d]`, heads first.

    Returns:
        float64 `[H]`, non-negative, summing to one.

    Raises:
        ValueError: another shape, no heads, no benchmarks, or a number that is not finite.
    """
    if deltas.dim() != 2 or 0 in deltas.shape:
        raise ValueError(
            f"deltas: expected [heads, benchmarks] with at least one of each, got shape {list(deltas.shape)}; stack "
            "one column for each benchmark"
        )
    if not bool(torch.isfinite(deltas).all()):
        raise ValueError("deltas: expected finite drops in score, got NaN or infinity; look at the task's scorer")
    return torch.from_numpy(_normalized(deltas.double().numpy(force=True).T).mean(axis=0))


def flat_benchmarks(deltas: torch.Tensor) -> list[int]:
    """Return benchmarks, as columns of `deltas` `[H, N_d]`, on which no head moves the score more than another."""
    spread = deltas.amax(dim=0) - deltas.amin(dim=0)
    return torch.nonzero(spread <= FLAT).flatten().tolist()


def spread_of_heads(deltas: torch.Tensor, standard_errors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare how much the heads differ on each benchmark with what noise alone would make them differ.

    The heads with the largest and the smallest drop were picked among all, so the interval of their difference is that
    of all pairs of heads together (Bonferroni, 95 %).

    Args:
        deltas: `dS[i,j]`, `[H, N_d]`.
        standard_errors: of `deltas`, `[H, N_d]`.

    Returns:
        The largest minus the smallest drop of each benchmark, and half of the interval around it, float64 `[N_d]`.
    """
    pairs = max(1, math.comb(len(deltas), 2))
    quantile = NormalDist().inv_cdf(1 - 0.025 / pairs)
    variances = standard_errors.double() ** 2
    (highest, most), (lowest, least) = deltas.double().max(dim=0), deltas.double().min(dim=0)
    noise = (variances.gather(0, most[None]) + variances.gather(0, least[None])).squeeze(0).sqrt()
    return highest - lowest, quantile * noise


def importance_standard_errors(
    sample_deltas: Sequence[np.ndarray], *, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Estimate the standard error of each weight by the bootstrap, which redraws the samples of each benchmark.

    A sample keeps its drops for all heads together, so what heads share does not count as noise between them. The same
    seed gives the same bits.

    Args:
        sample_deltas: for each benchmark the drop of each sample, float64 `[n_j, H]`.
        resamples: how often.
        seed: of the draws.

    Returns:
        float64 `[H]`.
    """
    random = np.random.default_rng(seed)
    total = np.zeros((resamples, sample_deltas[0].shape[1]))
    for drops in sample_deltas:
        count = len(drops)
        times = random.multinomial(count, np.full(count, 1.0 / count), size=resamples)
        # einsum without BLAS adds in one order, whatever the number of threads
        means = np.einsum("rn,nh->rh", times.astype(np.float64), drops) / count
        total += _normalized(means)
    return np.asarray(np.std(total / len(sample_deltas), axis=0, ddof=1))


def _normalized(drops: np.ndarray) -> np.ndarray:
    """Shift by the minimum over heads and divide by the sum over heads, `[..., H]`; uniform where all are equal."""
    shifted = drops - drops.min(axis=-1, keepdims=True)
    total = shifted.sum(axis=-1, keepdims=True)
    is_flat = shifted.max(axis=-1, keepdims=True) <= FLAT
    return np.asarray(np.where(is_flat, 1.0 / drops.shape[-1], shifted / np.where(is_flat, 1.0, total)))
