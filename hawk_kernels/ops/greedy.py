"""Keep tokens that differ from each other, picked greedily one after another."""

from __future__ import annotations

from typing import Any

import torch

from hawk_kernels.backends.choose import choose_backend, load_backend, without_autocast
from hawk_kernels.ops.library import define, fake_selection
from hawk_kernels.selection import Fields, Selection, as_selection
from hawk_kernels.validation import check_mask, check_rounding, check_tensor, checked_keep, shape_of

# With one token of padding, these are as many as fit into the registers of a program.
MAX_TRITON_TOKENS = 8191


def greedy_max_min(
    features: torch.Tensor,
    r: float | int,
    *,
    mask: torch.Tensor | None = None,
    rounding: str = "floor",
    backend: str | None = None,
) -> Selection:
    """Keep tokens that are far from each other: greedy max-min cosine distance (DivPrune, arXiv 2503.02175).

    The first pick is the token whose nearest other candidate is farthest away; each next one is the token whose nearest
    picked token is farthest away, by `1 - cos`. Equal distances go to the lower index; distances below 1e-6, which
    float32 cannot tell from 0, count as 0. A zero vector has cosine 0 with every other; tokens with entries that are
    not finite come last.

    Args:
        features: `[B, M, D]` or `[M, D]`, floating point, compared as float32.
        r: float in (0, 1] is the fraction of candidates **kept**; int >= 1 is a budget, clamped to the candidates
            of a row under `mask` and an error above M without one.
        mask: bool `[B, M]` (`[M]` unbatched), True = candidate.
        rounding: `"floor"`, `"ceil"` or `"nearest"` (half to even), how `r` becomes a number of tokens.
        backend: `None` chooses; `"triton"` or `"torch"` is used or refused, never replaced.

    Returns:
        `Selection(mask, indices, scores)`: bool `[B, M]`, int64 `[B, Kmax]` ascending and padded with -1, and float32
        `[B, M]` with the distance at which a token was picked (3, more than any, for the first) or, of a token
        that was not, its distance to the picked ones; `-inf` at non-candidates. Without B for unbatched input; no grad.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, range or name does not fit.
        ImportError: `backend="triton"` without Triton.
    """
    batched, features, mask, ratio, budget = _checked(features, r, mask, rounding)
    backend = _backend(backend, features)
    return as_selection(_greedy_max_min(features, mask, ratio, budget, rounding, backend), batched)


def greedy_dpp(
    features: torch.Tensor,
    quality: torch.Tensor,
    r: float | int,
    *,
    mask: torch.Tensor | None = None,
    rounding: str = "floor",
    backend: str | None = None,
) -> Selection:
    """Keep tokens of high quality that differ: greedy MAP of a determinantal point process (arXiv 1709.05135).

    The kernel is `L[i, j] = q[i] cos(x[i], x[j]) q[j]`, as in CDPruner (arXiv 2506.10967); each pick is the token that
    multiplies the determinant of the picked ones' kernel by most. Equal gains go to the lower index. Once the picked
    tokens span the others (less than 1e-5 of a squared length is outside, about what float32 can tell), these follow
    by quality; tokens that are not finite come last. Scaling the quality of a whole row changes nothing. A quality
    below 1e-6 of the row's largest counts as 1e-6 of it.

    Args:
        features: `[B, M, D]` or `[M, D]`, floating point, compared as float32.
        quality: `[B, M]` or `[M]`, floating point, compared as float32; its sign plays no part.
        r, mask, rounding, backend: as in `greedy_max_min`.

    Returns:
        `Selection(mask, indices, scores)` as there; the scores are the factor by which a token multiplied the
        determinant when it was picked, or would multiply it now, with the largest quality of a row scaled to 1.

    Raises:
        TypeError, ValueError, ImportError: as there.
    """
    batched, features, mask, ratio, budget = _checked(features, r, mask, rounding)
    check_tensor("quality", quality)
    if not quality.dtype.is_floating_point:
        raise TypeError(f"quality: expected a floating point dtype, got {quality.dtype}; use quality.float()")
    expected = tuple(features.shape[:2]) if batched else (features.shape[1],)
    if tuple(quality.shape) != expected:
        raise ValueError(
            f"quality: expected shape {list(expected)}, one number a token, got {shape_of(quality)}; as "
            "features without their last dimension"
        )
    if quality.device != features.device:
        raise ValueError(
            f"quality: expected device {features.device} as features, got {quality.device}; use "
            f"quality.to({str(features.device)!r})"
        )
    quality = quality.detach().float()
    backend = _backend(backend, features)
    quality = quality if batched else quality.unsqueeze(0)
    return as_selection(_greedy_dpp(features, quality, mask, ratio, budget, rounding, backend), batched)


def _checked(
    features: torch.Tensor, r: float | int, mask: torch.Tensor | None, rounding: str
) -> tuple[bool, torch.Tensor, torch.Tensor | None, float, int | torch.SymInt]:
    """Check the arguments, and return whether they came batched, and them batched and without grad."""
    check_tensor("features", features)
    if not features.dtype.is_floating_point:
        raise TypeError(f"features: expected a floating point dtype, got {features.dtype}; use features.float()")
    if features.dim() not in (2, 3):
        raise ValueError(
            f"features: expected [B, M, D] or [M, D], got shape {shape_of(features)}; one vector a token, flatten heads"
        )
    batched = features.dim() == 3
    if mask is not None:
        check_mask("mask", mask, tuple(features.shape[:-1]), "one entry a token", features.device)
    ratio, budget = checked_keep(r, features.shape[-2], mask is not None)
    check_rounding(rounding)
    features = features.detach()
    if not batched:
        features, mask = features.unsqueeze(0), None if mask is None else mask.unsqueeze(0)
    return batched, features, mask, ratio, budget


def _backend(requested: str | None, features: torch.Tensor) -> str:
    fits = features.shape[1] <= MAX_TRITON_TOKENS
    if requested is None and not fits:
        return "torch"
    backend = choose_backend(requested, features.device)
    if backend == "triton" and not fits:
        raise ValueError(
            f"backend='triton': expected at most {MAX_TRITON_TOKENS} tokens, a row that a program can hold, got "
            f"{features.shape[1]}; use backend='torch'"
        )
    return backend


def _run_greedy_max_min(
    features: torch.Tensor, mask: torch.Tensor | None, ratio: float, budget: int, rounding: str, backend: str
) -> Selection:
    compute = load_backend(backend, "greedy").greedy_max_min
    with without_autocast(features):
        selection: Selection = compute(features, budget or ratio, mask, rounding)
    return selection


def _fake_greedy_max_min(
    features: torch.Tensor, mask: torch.Tensor | None, ratio: float, budget: int, rounding: str, backend: str
) -> Fields:
    return fake_selection(features, features.shape[1], ratio, budget, rounding)


def _run_greedy_dpp(
    features: torch.Tensor,
    quality: torch.Tensor,
    mask: torch.Tensor | None,
    ratio: float,
    budget: int,
    rounding: str,
    backend: str,
) -> Selection:
    compute = load_backend(backend, "greedy").greedy_dpp
    with without_autocast(features):
        selection: Selection = compute(features, quality, budget or ratio, mask, rounding)
    return selection


def _fake_greedy_dpp(features: torch.Tensor, quality: torch.Tensor, *others: Any) -> Fields:
    return _fake_greedy_max_min(features, *others)


_greedy_max_min = define(
    "greedy_max_min(Tensor features, Tensor? mask, float ratio, SymInt budget, str rounding, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _run_greedy_max_min,
    _fake_greedy_max_min,
)
_greedy_dpp = define(
    "greedy_dpp(Tensor features, Tensor quality, Tensor? mask, float ratio, SymInt budget, str rounding, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _run_greedy_dpp,
    _fake_greedy_dpp,
)
