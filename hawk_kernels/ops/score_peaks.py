"""Score visual tokens by the text token that attends to each most, without storing the attention matrix."""

from __future__ import annotations

import torch

from hawk_kernels.backends.choose import choose_backend, load_backend, without_autocast
from hawk_kernels.ops.library import define
from hawk_kernels.validation import (
    check_head_vector,
    check_mask,
    check_normalize,
    check_queries_and_keys,
    checked_scale,
)


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
    check_queries_and_keys(q, k)
    check_head_vector("w", w, q)
    batch = q.shape[:-3]
    if q_mask is not None:
        check_mask("q_mask", q_mask, (*batch, q.shape[-2]), "one entry a query", q.device)
    if k_mask is not None:
        check_mask("k_mask", k_mask, (*batch, k.shape[-2]), "one entry a key", q.device)
    check_normalize(normalize)
    scale = checked_scale(scale, q.shape[-1])
    backend = choose_backend(backend, q.device, q.shape[-1])

    q, k, w = q.detach(), k.detach(), w.detach()
    batched = q.dim() == 4
    if not batched:
        q, k = q.unsqueeze(0), k.unsqueeze(0)
        q_mask = None if q_mask is None else q_mask.unsqueeze(0)
        k_mask = None if k_mask is None else k_mask.unsqueeze(0)
    scores: torch.Tensor = _score_peaks(q, k, w, q_mask, k_mask, normalize, scale, backend)
    return scores if batched else scores[0]


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
