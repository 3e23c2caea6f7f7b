"""Score visual tokens by the text token that attends to each most, without storing the attention matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hawk_kernels.backends.choose import PreparedCalls, load_backend, plain_signature, without_autocast
from hawk_kernels.ops.library import define
from hawk_kernels.ops.score_and_select import batched_without_grad, checked_arguments

_prepared = PreparedCalls()


def score_peaks(
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    *,
    q_mask: torch.Tensor | None = None,
    k_mask: torch.Tensor | None = None,
    normalize: str | None = "softmax",
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Score visual tokens like `score_tokens`, with the maximum over the text in place of the mean.

    `I[k] = sum_i w[i] max_n norm_k(q[i, n] . k[i, k] * scale)`: the products of each head and text token are normalised
    over the candidates first, so that a visual token that one word asks for is not outvoted by the words that ask for
    none. The mean does not commute with this, so every product is made, but the `[H, N, M]` matrix is never stored:
    memory grows with N + M. Everything is accumulated in float32. A product that is not finite counts as 0.

    Args:
        q: text queries before RoPE, `[B, H, N, D]` or `[H, N, D]`, float32, float16 or bfloat16, any strides.
        k: visual keys before RoPE, `[B, Hkv, M, D]` or `[Hkv, M, D]`, same dtype, `H % Hkv == 0`.
        w: head importance, `[H]`, floating point.
        q_mask: bool `[B, N]` (`[N]` unbatched), True = this query counts.
        k_mask: bool `[B, M]` (`[M]` unbatched), True = this key is a candidate.
        normalize: `"softmax"`, `"l2"`, `"minmax"` or `None`, over the candidates, for each head and query.
        scale: default `D ** -0.5`.
        backend: `None` chooses; `"triton"` or `"torch"` is used or refused, never replaced. On a CPU `"torch"` reads
            the masks.

    Returns:
        float32 `[B, M]` (`[M]` unbatched), `-inf` at non-candidates, 0 at the candidates of a row without text. It does
        not require grad.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, range or name does not fit.
        ImportError: `backend="triton"` without Triton.
    """
    tensors = q, k, w, q_mask, k_mask
    peaks: torch.Tensor = _prepared.call(plain_signature(*tensors), tensors, (normalize, scale, backend), _prepare)
    return peaks


def _prepare(
    is_plain: bool,
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    q_mask: torch.Tensor | None,
    k_mask: torch.Tensor | None,
    normalize: str | None,
    scale: float | None,
    backend: str | None,
) -> Callable[..., torch.Tensor]:
    """Check the arguments, and return what scores by tensors of their signature."""
    scale, backend = checked_arguments(q, k, w, q_mask, k_mask, normalize, scale, backend)
    batched = q.dim() == 4
    if is_plain and backend == "triton":
        tensors = batched_without_grad(q, k, w, q_mask, k_mask)
        prepared: Callable[..., torch.Tensor] = load_backend("triton", "score_peaks").PreparedCall(
            *tensors, normalize, scale, batched
        )
        return prepared
    run: Callable[..., torch.Tensor] = _run_score_peaks if is_plain else _score_peaks

    def call(*tensors: Any) -> torch.Tensor:
        scores = run(*batched_without_grad(*tensors), normalize, scale, backend)
        return scores if batched else scores[0]

    return call


def _run_score_peaks(
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    q_mask: torch.Tensor | None,
    k_mask: torch.Tensor | None,
    normalize: str | None,
    scale: float,
    backend: str,
) -> torch.Tensor:
    compute = load_backend(backend, "score_peaks").score_peaks
    with without_autocast(q):
        scores: torch.Tensor = compute(q, k, w, q_mask, k_mask, normalize, scale)
    return scores


def _fake_score_peaks(q: torch.Tensor, k: torch.Tensor, *others: object) -> torch.Tensor:
    return k.new_empty((k.shape[0], k.shape[2]), dtype=torch.float32)


_score_peaks = define(
    "score_peaks(Tensor q, Tensor k, Tensor w, Tensor? q_mask, Tensor? k_mask, str? normalize, float scale, "
    "str backend) -> Tensor",
    _run_score_peaks,
    _fake_score_peaks,
)
