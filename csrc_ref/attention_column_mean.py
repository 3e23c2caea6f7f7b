"""Attention that each token receives: the literal softmax, one head and one segment at a time."""

import torch


def attention_column_mean(
    q,
    k,
    *,
    cu_seqlens=None,
    causal=False,
    q_rows=None,
    head_weights=None,
    reduce_heads=True,
    reduction="mean",
    scale=None,
    backend=None,
):
    """`P = softmax(q k^T * scale)` and what each of its columns sums to, averages or reaches over the query rows.

    Args:
        q: `[B, H, N, D]` or `[H, N, D]`.
        k: `[B, Hkv, M, D]` or `[Hkv, M, D]`, `H % Hkv == 0`.
        cu_seqlens: int32 `[S + 1]`, segments of a packed sequence (B = 1, N = M); attention stays within each.
        causal: row `n` sees keys up to `n + M - N` (right-aligned).
        q_rows: bool `[B, N]`, True = this row counts.
        head_weights: `[H]`; heads are summed by them instead of averaged.
        reduce_heads: whether heads are reduced.
        reduction: "mean" (over the rows that can see the key), "sum" or "max"; 0 for a key that no row sees.
        scale: default `D ** -0.5`.
        backend: only there so that the signature is the package's; the reference has none.

    Returns:
        `[B, M]`, or `[B, H, M]`; without B for unbatched input; float64 for float64 input, else float32.
    """
    if backend is not None:
        raise ValueError(f"the reference has no backends: expected backend=None, got {backend!r}")
    if q.dim() == 3:
        rows = None if q_rows is None else q_rows[None]
        options = {"head_weights": head_weights, "reduce_heads": reduce_heads, "reduction": reduction, "scale": scale}
        return attention_column_mean(q[None], k[None], cu_seqlens=cu_seqlens, causal=causal, q_rows=rows, **options)[0]

    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k = q.to(dtype), k.to(dtype)
    batch, num_heads, num_queries, head_dim = q.shape
    num_keys = k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    k = k.repeat_interleave(num_heads // k.shape[1], dim=1)
    visible = _visible(num_queries, num_keys, cu_seqlens, causal).to(q.device)

    columns = torch.zeros(batch, num_heads, num_keys, dtype=dtype, device=q.device)
    for b in range(batch):
        rows = visible.any(dim=1)
        if q_rows is not None:
            rows = rows & q_rows[b]
        sees = visible[rows]
        seen = sees.sum(dim=0)
        for h in range(num_heads):
            logits = q[b, h][rows] @ k[b, h].T * scale
            attention = torch.softmax(torch.where(sees, logits, -torch.inf), dim=1)
            attention = torch.where(sees, attention, 0.0)
            if reduction == "max":
                columns[b, h] = attention.amax(dim=0) if len(attention) else 0.0
            else:
                columns[b, h] = attention.sum(dim=0)
                if reduction == "mean":
                    columns[b, h] /= seen.clamp(min=1)
    if not reduce_heads:
        return columns
    if head_weights is None:
        return columns.mean(dim=1)
    return (head_weights.to(dtype)[:, None] * columns).sum(dim=1)


def _visible(num_queries, num_keys, cu_seqlens, causal):
    """bool `[N, M]`, which keys a row may look at."""
    row, key = torch.arange(num_queries)[:, None], torch.arange(num_keys)[None, :]
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if cu_seqlens is not None:
        ends = cu_seqlens[1:].tolist()
        segment = torch.tensor([sum(position >= end for end in ends) for position in range(num_keys)])
        visible = segment[:, None] == segment[None, :]
    if causal:
        visible = visible & (key <= row + num_keys - num_queries)
    return visible
