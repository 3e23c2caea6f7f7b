"""Score visual tokens by text queries, and keep the best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hawk_kernels.backends.choose import (
    PreparedCalls,
    Signature,
    choose_backend,
    load_backend,
    plain_signature,
    without_autocast,
    without_grad,
)
from hawk_kernels.ops.library import define, fake_selection
from hawk_kernels.selection import Fields, Selection, as_selection
from hawk_kernels.validation import (
    Passed,
    check_head_vector,
    check_mask,
    check_normalize,
    check_queries_and_keys,
    check_rounding,
    checked_keep,
    checked_scale,
)

_passed = Passed()
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
    signature = plain_signature(q, k, w, q_mask, k_mask)
    key = _prepared.key(signature, q, r, normalize, scale, rounding, backend)
    call = _prepared.get(key)
    if call is None:
        batched, tensors, scale, backend = checked_arguments(
            q, k, w, q_mask, k_mask, normalize, scale, backend, signature
        )
        ratio, budget = checked_keep(r, k.shape[-2], k_mask is not None)
        check_rounding(rounding)
        if key is None or backend != "triton":
            run: Callable[..., Any] = _score_and_select if signature is None else _run_score_and_select
            return as_selection(run(*tensors, ratio, budget, normalize, scale, rounding, backend), batched)
        call = _prepare(tensors, budget or ratio, normalize, scale, rounding, batched)
        _prepared.add(key, call)
    selection: Selection = call(q, k, w, q_mask, k_mask)
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
    signature = plain_signature(q, k, w, q_mask, k_mask)
    key = _prepared_scores.key(signature, q, normalize, scale, backend)
    call = _prepared_scores.get(key)
    if call is None:
        batched, tensors, scale, backend = checked_arguments(
            q, k, w, q_mask, k_mask, normalize, scale, backend, signature
        )
        if key is None or backend != "triton":
            run: Callable[..., Any] = _score_tokens if signature is None else _run_score_tokens
            scores: torch.Tensor = run(*tensors, normalize, scale, backend)
            return scores if batched else scores[0]
        call = _prepare(tensors, None, normalize, scale, "floor", batched)
        _prepared_scores.add(key, call)
    selection: Selection = call(q, k, w, q_mask, k_mask)
    return selection.scores


def _prepare(
    tensors: tuple[Any, ...],
    r: float | int | None,
    normalize: str | None,
    scale: float,
    rounding: str,
    batched: bool,
) -> Callable[..., Any]:
    """Prepare calls of the signature of these tensors for Triton; they are checked and batched."""
    q, k, w, q_mask, k_mask = tensors
    prepared: Callable[..., Any] = load_backend("triton", "score_and_select").PreparedCall
    call: Callable[..., Any] = prepared(q, k, w, r, q_mask, k_mask, normalize, scale, rounding, batched)
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
    signature: Signature | None,
) -> tuple[bool, tuple[Any, ...], float, str]:
    """Check the arguments; tensors of a signature that has passed are not checked again.

    Returns:
        Whether the input came batched; the five tensors, batched and without grad; the scale; the backend.
    """
    if signature is None or signature not in _passed:
        _check_tensors(q, k, w, q_mask, k_mask)
        if signature is not None:
            _passed.add(signature)
    check_normalize(normalize)
    head_dim = q.shape[-1]
    scale = checked_scale(scale, head_dim)
    backend = choose_backend(backend, q.device, head_dim)

    q, k, w = without_grad(q, signature), without_grad(k, signature), without_grad(w, signature)
    batched = q.dim() == 4
    if not batched:
        q, k = q.unsqueeze(0), k.unsqueeze(0)
        q_mask = None if q_mask is None else q_mask.unsqueeze(0)
        k_mask = None if k_mask is None else k_mask.unsqueeze(0)
    return batched, (q, k, w, q_mask, k_mask), scale, backend


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
