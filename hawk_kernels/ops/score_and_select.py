"""Score visual tokens by text queries, and keep the best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hawk_kernels.backends.choose import (
    PreparedCalls,
    choose_backend,
    load_backend,
    plain_signature,
    without_autocast,
)
from hawk_kernels.ops.library import define, fake_selection
from hawk_kernels.selection import Fields, Selection, as_selection
from hawk_kernels.validation import (
    check_head_vector,
    check_mask,
    check_normalize,
    check_queries_and_keys,
    check_rounding,
    checked_keep,
    checked_scale,
)

_prepared = PreparedCalls()
_prepared_scores = PreparedCalls()


def score_and_select(
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    r: float | int,
    *,
    q_mask: torch.Tensor | None = None,
    k_mask: torch.Tensor | None = None,
    normalize: str | None = None,
    scale: float | None = None,
    rounding: str = "floor",
    backend: str | None = None,
) -> Selection:
    """Score visual tokens by text queries and keep the best: HAWK (arXiv 2604.07812) in one launch.

    `c[i, k]` is the mean over text of `q[i] . k[k] * scale` (non-finite counts as 0), normalised per head over the
    candidates, and `I[k] = sum_i w[i] c[i, k]`. A row with `M_b` candidates keeps `max(1, floor(r * M_b))`: those
    with the highest scores, of equal ones those with the lower index; NaN ranks last. A row without candidates keeps
    nothing.

    Args:
        q: text queries before RoPE, `[B, H, N, D]` or `[H, N, D]`, float32, float16 or bfloat16, any strides.
        k: visual keys before RoPE, `[B, Hkv, M, D]` or `[Hkv, M, D]`, same dtype, `H % Hkv == 0`.
        w: head importance, `[H]`, floating point.
        r: float in (0, 1] is the fraction of candidates **kept**; int >= 1 is a budget, clamped to the
            candidates of a row under `k_mask` and an error above M without one.
        q_mask: bool `[B, N]` (`[N]` unbatched), True = this query is averaged.
        k_mask: bool `[B, M]` (`[M]` unbatched), True = this key is a candidate.
        normalize: `None`, `"l2"` (the authors' release), `"softmax"` or `"minmax"`.
        scale: default `D ** -0.5`.
        rounding: `"floor"` (paper), `"ceil"` (release) or `"nearest"` (half to even).
        backend: `None` chooses; `"triton"` or `"torch"` is used or refused, never replaced.

    Returns:
        `Selection(mask, indices, scores)`: bool `[B, M]`, int64 `[B, Kmax]` ascending and padded with -1, and float32
        `[B, M]` with `-inf` at non-candidates; without the leading B for unbatched input. None requires grad.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, range or name does not fit.
        ImportError: `backend="triton"` without Triton.
    """
    tensors = q, k, w, q_mask, k_mask
    options = r, normalize, scale, rounding, backend
    selection: Selection = _prepared.call(plain_signature(*tensors), tensors, options, _prepare)
    return selection


def score_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    *,
    q_mask: torch.Tensor | None = None,
    k_mask: torch.Tensor | None = None,
    normalize: str | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Score visual tokens; this is the first half of `score_and_select`.

    Arguments and errors are those of `score_and_select`.

    Returns:
        float32 `[B, M]` (`[M]` unbatched), `-inf` at non-candidates, without grad.
    """
    tensors = q, k, w, q_mask, k_mask
    selection: Selection = _prepared_scores.call(
        plain_signature(*tensors), tensors, (normalize, scale, backend), _prepare_scores
    )
    return selection.scores


def _prepare(
    is_plain: bool,
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    q_mask: torch.Tensor | None,
    k_mask: torch.Tensor | None,
    r: float | int,
    normalize: str | None,
    scale: float | None,
    rounding: str,
    backend: str | None,
) -> Callable[..., Selection]:
    """Check the arguments, and return what selects by tensors of their signature."""
    scale, backend = checked_arguments(q, k, w, q_mask, k_mask, normalize, scale, backend)
    ratio, budget = checked_keep(r, k.shape[-2], k_mask is not None)
    check_rounding(rounding)
    batched = q.dim() == 4
    if is_plain:
        return _prepared_call(q, k, w, q_mask, k_mask, budget or ratio, normalize, scale, rounding, backend)

    def call(*tensors: Any) -> Selection:
        fields = _score_and_select(*batched_without_grad(*tensors), ratio, budget, normalize, scale, rounding, backend)
        return as_selection(fields, batched)

    return call


def _prepare_scores(
    is_plain: bool,
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    q_mask: torch.Tensor | None,
    k_mask: torch.Tensor | None,
    normalize: str | None,
    scale: float | None,
    backend: str | None,
) -> Callable[..., Selection]:
    """Check the arguments, and return what scores by tensors of their signature."""
    scale, backend = checked_arguments(q, k, w, q_mask, k_mask, normalize, scale, backend)
    batched = q.dim() == 4
    if is_plain:
        return _prepared_call(q, k, w, q_mask, k_mask, None, normalize, scale, "floor", backend)

    def call(*tensors: Any) -> Selection:
        scores = _score_tokens(*batched_without_grad(*tensors), normalize, scale, backend)
        return as_selection((scores, scores, scores), batched)

    return call


def _prepared_call(
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    q_mask: torch.Tensor | None,
    k_mask: torch.Tensor | None,
    r: float | int | None,
    normalize: str | None,
    scale: float,
    rounding: str,
    backend: str,
) -> Callable[..., Selection]:
    """Prepare calls of the signature of these tensors, which are checked, for a backend."""
    batched = q.dim() == 4
    q, k, w, q_mask, k_mask = batched_without_grad(q, k, w, q_mask, k_mask)
    prepared: Callable[..., Any] = load_backend(backend, "score_and_select").PreparedCall
    call: Callable[..., Selection] = prepared(q, k, w, r, q_mask, k_mask, normalize, scale, rounding, batched)
    return call


def checked_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    q_mask: torch.Tensor | None,
    k_mask: torch.Tensor | None,
    normalize: str | None,
    scale: float | None,
    backend: str | None,
) -> tuple[float, str]:
    """Check the arguments, and return the scale and the backend."""
    _check_tensors(q, k, w, q_mask, k_mask)
    check_normalize(normalize)
    head_dim = q.shape[-1]
    return checked_scale(scale, head_dim), choose_backend(backend, q.device, head_dim)


def batched_without_grad(
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    q_mask: torch.Tensor | None,
    k_mask: torch.Tensor | None,
) -> tuple[Any, ...]:
    """Return the tensors as an operator takes them."""
    q, k, w = q.detach(), k.detach(), w.detach()
    if q.dim() == 4:
        return q, k, w, q_mask, k_mask
    q_mask = None if q_mask is None else q_mask.unsqueeze(0)
    k_mask = None if k_mask is None else k_mask.unsqueeze(0)
    return q.unsqueeze(0), k.unsqueeze(0), w, q_mask, k_mask


def _check_tensors(
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    q_mask: torch.Tensor | None,
    k_mask: torch.Tensor | None,
) -> None:
    check_queries_and_keys(q, k)
    check_head_vector("w", w, q)
    batch = q.shape[:-3]
    if q_mask is not None:
        check_mask("q_mask", q_mask, (*batch, q.shape[-2]), "one entry a query", q.device)
    if k_mask is not None:
        check_mask("k_mask", k_mask, (*batch, k.shape[-2]), "one entry a key", q.device)


def _run_score_and_select(
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    q_mask: torch.Tensor | None,
    k_mask: torch.Tensor | None,
    ratio: float,
    budget: int,
    normalize: str | None,
    scale: float,
    rounding: str,
    backend: str,
) -> Selection:
    compute = load_backend(backend, "score_and_select").score_and_select
    with without_autocast(q):
        selection: Selection = compute(q, k, w, budget or ratio, q_mask, k_mask, normalize, scale, rounding)
    return selection


def _fake_score_and_select(
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    q_mask: torch.Tensor | None,
    k_mask: torch.Tensor | None,
    ratio: float,
    budget: int,
    normalize: str | None,
    scale: float,
    rounding: str,
    backend: str,
) -> Fields:
    return fake_selection(k, k.shape[2], ratio, budget, rounding)


def _run_score_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    q_mask: torch.Tensor | None,
    k_mask: torch.Tensor | None,
    normalize: str | None,
    scale: float,
    backend: str,
) -> torch.Tensor:
    compute = load_backend(backend, "score_and_select").score_tokens
    with without_autocast(q):
        scores: torch.Tensor = compute(q, k, w, q_mask, k_mask, normalize, scale)
    return scores


def _fake_score_tokens(q: torch.Tensor, k: torch.Tensor, *others: object) -> torch.Tensor:
    return k.new_empty((k.shape[0], k.shape[2]), dtype=torch.float32)


_score_and_select = define(
    "score_and_select(Tensor q, Tensor k, Tensor w, Tensor? q_mask, Tensor? k_mask, float ratio, SymInt budget, "
    "str? normalize, float scale, str rounding, str backend) -> (Tensor, Tensor, Tensor)",
    _run_score_and_select,
    _fake_score_and_select,
)
_score_tokens = define(
    "score_tokens(Tensor q, Tensor k, Tensor w, Tensor? q_mask, Tensor? k_mask, str? normalize, float scale, "
    "str backend) -> Tensor",
    _run_score_tokens,
    _fake_score_tokens,
)
