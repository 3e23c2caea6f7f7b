"""Compute how much attention each token receives, without storing the attention matrix."""

from __future__ import annotations

import torch

from hawk_kernels.backends.choose import PreparedCalls, choose_backend, load_backend, plain_signature, without_autocast
from hawk_kernels.backends.visibility import segment_limits
from hawk_kernels.ops.library import define
from hawk_kernels.validation import (
    check_device,
    check_head_vector,
    check_mask,
    check_queries_and_keys,
    check_tensor,
    checked_scale,
    shape_of,
)

_prepared = PreparedCalls()
REDUCTIONS = ("mean", "sum", "max")


def attention_column_mean(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    causal: bool = False,
    q_rows: torch.Tensor | None = None,
    head_weights: torch.Tensor | None = None,
    reduce_heads: bool = True,
    reduction: str = "mean",
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Compute how much attention each key receives, from the columns of `P[i] = softmax(q[i] k[i]^T * scale)`.

    `a[i, m]` is the mean over the query rows that can see key `m` of `P[i, n, m]`, or their sum or maximum; 0 where no
    row sees the key. The matrix is never stored: memory grows with N + M. With the encoder's queries and keys this
    is the statistic of HiPrune (arXiv 2508.00553), with the last row only that of FastV, with the text rows that of
    SparseVLM. A non-finite logit of a row that counts makes the keys of that row NaN, as in the softmax. Rows that do
    not count and keys that no row sees may hold anything.

    Args:
        q: queries, `[B, H, N, D]` or `[H, N, D]`, float32, float16 or bfloat16, any strides.
        k: keys, `[B, Hkv, M, D]` or `[Hkv, M, D]`, same dtype, `H % Hkv == 0`.
        cu_seqlens: int32 `[S + 1]`, ascending from 0 to T: `q` and `k` pack S sequences (B = 1, N = M = T) and
            attention stays within each, as in `flash_attn_varlen_func`. Other numbers are an error on a CPU; on a GPU,
            where checking them would be a host sync, the result of `"triton"` is then undefined.
        causal: row `n` sees keys up to `n + M - N` (right-aligned, as with a cache; with N > M the first rows see
            nothing), or up to itself in its segment.
        q_rows: bool `[B, N]` (`[N]` unbatched), True = this row counts.
        head_weights: floating point `[H]`; heads are summed by these weights instead of averaged.
        reduce_heads: False keeps the heads apart.
        reduction: `"mean"`, `"sum"` or `"max"` over the query rows.
        scale: default `D ** -0.5`.
        backend: `None` chooses; `"triton"` or `"torch"` is used or refused, never replaced. `"torch"` reads `q_rows`
            and `cu_seqlens` on the host.

    Returns:
        float32 `[B, M]`, or `[B, H, M]` with `reduce_heads=False`; without the leading B for unbatched input. It
        does not require grad.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, range or name does not fit.
        ImportError: `backend="triton"` without Triton.
    """
    signature = plain_signature(q, k, cu_seqlens, q_rows, head_weights)
    key = _prepared.key(signature, q, causal, reduce_heads, reduction, scale, backend)
    call = _prepared.get(key)
    if call is None:
        scale = _checked(q, k, cu_seqlens, causal, q_rows, head_weights, reduce_heads, reduction, scale)
        backend = choose_backend(backend, q.device, q.shape[-1])
        batched = q.dim() == 4
        weights = None if head_weights is None else head_weights.detach()
        heads_q, heads_k, rows = q.detach(), k.detach(), q_rows
        if not batched:
            heads_q, heads_k = heads_q.unsqueeze(0), heads_k.unsqueeze(0)
            rows = None if rows is None else rows.unsqueeze(0)
        arguments = (heads_q, heads_k, cu_seqlens, causal, rows, weights, reduce_heads, reduction, scale)
        if key is None or backend != "triton":
            columns: torch.Tensor = _attention_column_mean(*arguments, backend)
            return columns if batched else columns[0]
        call = load_backend("triton", "attention_column_mean").PreparedCall(*arguments, batched)
        _prepared.add(key, call)
    if cu_seqlens is not None and cu_seqlens.is_cpu:
        segment_limits(cu_seqlens, k.shape[-2])
    with without_autocast(q):
        prepared: torch.Tensor = call(q, k, cu_seqlens, q_rows, head_weights)
    return prepared


def _checked(
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    causal: bool,
    q_rows: torch.Tensor | None,
    head_weights: torch.Tensor | None,
    reduce_heads: bool,
    reduction: str,
    scale: float | None,
) -> float:
    """Check the arguments and return the scale."""
    check_queries_and_keys(q, k)
    if cu_seqlens is not None:
        _check_segments(cu_seqlens, q, k)
    _check_flag("causal", causal)
    _check_flag("reduce_heads", reduce_heads)
    if q_rows is not None:
        rows_shape = (q.shape[0], q.shape[2]) if q.dim() == 4 else (q.shape[1],)
        check_mask("q_rows", q_rows, rows_shape, "one entry a query", q.device)
    if head_weights is not None:
        check_head_vector("head_weights", head_weights, q)
        if not reduce_heads:
            raise ValueError(
                "head_weights: expected None with reduce_heads=False, where heads are not summed, got a tensor; leave "
                "one of the two out"
            )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'max', got {reduction!r}")
    return checked_scale(scale, q.shape[-1])


def _check_flag(name: str, flag: object) -> None:
    if not isinstance(flag, bool):
        raise TypeError(f"{name}: expected a bool, got {type(flag).__name__}; use True or False")


def _check_segments(cu_seqlens: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> None:
    """Check of `cu_seqlens` what can be checked without reading it."""
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: expected dtype torch.int32, got {cu_seqlens.dtype}; use cu_seqlens.int()")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens: expected shape [S + 1] for S >= 1 segments, got {shape_of(cu_seqlens)}; the first entry is 0 "
            "and the last the length of the packed sequence"
        )
    check_device("cu_seqlens", cu_seqlens, q.device)
    if q.dim() == 4 and q.shape[0] != 1:
        raise ValueError(
            f"q: expected batch size 1 beside cu_seqlens, got {q.shape[0]}; pack the rows into one, [1, H, T, D]"
        )
    if q.shape[-2] != k.shape[-2]:
        raise ValueError(
            f"k: expected the {q.shape[-2]} tokens of q beside cu_seqlens, got {k.shape[-2]} (shape {shape_of(k)}); a "
            "query looks at its own segment"
        )


def _run_attention_column_mean(
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    causal: bool,
    q_rows: torch.Tensor | None,
    head_weights: torch.Tensor | None,
    reduce_heads: bool,
    reduction: str,
    scale: float,
    backend: str,
) -> torch.Tensor:
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        segment_limits(cu_seqlens, k.shape[2])
    compute = load_backend(backend, "attention_column_mean").attention_column_mean
    with without_autocast(q):
        columns: torch.Tensor = compute(q, k, cu_seqlens, causal, q_rows, head_weights, reduce_heads, reduction, scale)
    return columns


def _fake_attention_column_mean(
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    causal: bool,
    q_rows: torch.Tensor | None,
    head_weights: torch.Tensor | None,
    reduce_heads: bool,
    *others: object,
) -> torch.Tensor:
    heads = () if reduce_heads else (q.shape[1],)
    return k.new_empty((k.shape[0], *heads, k.shape[2]), dtype=torch.float32)


_attention_column_mean = define(
    "attention_column_mean(Tensor q, Tensor k, Tensor? cu_seqlens, bool causal, Tensor? q_rows, Tensor? head_weights, "
    "bool reduce_heads, str reduction, float scale, str backend) -> Tensor",
    _run_attention_column_mean,
    _fake_attention_column_mean,
)
