"""The operators as `torch.library` sees them: opaque to `torch.compile`, with shapes known in advance.

Defined with `torch.library.define` and `impl`, which cost about half of what `custom_op` costs on each call.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from hawk_kernels.backends.choose import load_backend
from hawk_kernels.selection import keep_fraction

_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIBRARY = torch.library.Library("hawk_kernels", "DEF")

# A budget is an int and a ratio a float; a schema has no union, so a ratio travels with budget 0.
_LIBRARY.define(
    "score_and_select(Tensor q, Tensor k, Tensor w, Tensor? q_mask, Tensor? k_mask, float ratio, SymInt budget, "
    "str? normalize, float scale, str rounding, str backend) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIBRARY.define(
    "score_tokens(Tensor q, Tensor k, Tensor w, Tensor? q_mask, Tensor? k_mask, str? normalize, float scale, "
    "str backend) -> Tensor",
    tags=_TAGS,
)
_LIBRARY.define(
    "select_topk(Tensor scores, Tensor? mask, float ratio, SymInt budget, str rounding, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIBRARY.define(
    "attention_column_mean(Tensor q, Tensor k, Tensor? cu_seqlens, bool causal, Tensor? q_rows, Tensor? head_weights, "
    "bool reduce_heads, str reduction, float scale, str backend) -> Tensor",
    tags=_TAGS,
)


def _without_autocast(tensor: torch.Tensor):
    """Scores are accumulated in float32; an autocast region would cast the products inside to half."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _score_and_select(q, k, w, q_mask, k_mask, ratio, budget, normalize, scale, rounding, backend):
    with _without_autocast(q):
        return load_backend(backend).score_and_select(
            q, k, w, budget or ratio, q_mask, k_mask, normalize, scale, rounding
        )


def _score_tokens(q, k, w, q_mask, k_mask, normalize, scale, backend):
    with _without_autocast(q):
        return load_backend(backend).score_tokens(q, k, w, q_mask, k_mask, normalize, scale)


def _select_topk(scores, mask, ratio, budget, rounding, backend):
    return load_backend(backend).select_topk(scores, budget or ratio, mask, rounding)


def _attention_column_mean(q, k, cu_seqlens, causal, q_rows, head_weights, reduce_heads, reduction, scale, backend):
    with _without_autocast(q):
        return load_backend(backend).attention_column_mean(
            q, k, cu_seqlens, causal, q_rows, head_weights, reduce_heads, reduction, scale
        )


def _width(num_keys, ratio, budget, rounding):
    """Kmax, also of a symbolic number of keys or a symbolic budget."""
    if isinstance(budget, torch.SymInt) or budget:
        return torch.sym_min(budget, num_keys)
    numerator, denominator = keep_fraction(float(ratio), rounding)
    extra = denominator - 1 if rounding == "ceil" else 0
    kept = torch.sym_max((num_keys * numerator + extra) // denominator, 1)
    return torch.sym_min(kept, num_keys)


def _fake_selection(like, num_keys, ratio, budget, rounding):
    batch = like.shape[0]
    return (
        like.new_empty((batch, num_keys), dtype=torch.bool),
        like.new_empty((batch, _width(num_keys, ratio, budget, rounding)), dtype=torch.int64),
        like.new_empty((batch, num_keys), dtype=torch.float32),
    )


def _fake_score_and_select(q, k, w, q_mask, k_mask, ratio, budget, normalize, scale, rounding, backend):
    return _fake_selection(k, k.shape[2], ratio, budget, rounding)


def _fake_score_tokens(q, k, w, q_mask, k_mask, normalize, scale, backend):
    return k.new_empty((k.shape[0], k.shape[2]), dtype=torch.float32)


def _fake_select_topk(scores, mask, ratio, budget, rounding, backend):
    return _fake_selection(scores, scores.shape[1], ratio, budget, rounding)


def _fake_attention_column_mean(
    q, k, cu_seqlens, causal, q_rows, head_weights, reduce_heads, reduction, scale, backend
):
    heads = () if reduce_heads else (q.shape[1],)
    return k.new_empty((k.shape[0], *heads, k.shape[2]), dtype=torch.float32)


for _name, _run, _fake in (
    ("score_and_select", _score_and_select, _fake_score_and_select),
    ("score_tokens", _score_tokens, _fake_score_tokens),
    ("select_topk", _select_topk, _fake_select_topk),
    ("attention_column_mean", _attention_column_mean, _fake_attention_column_mean),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hawk_kernels::{_name}", _fake, lib=_LIBRARY)

score_and_select = torch.ops.hawk_kernels.score_and_select.default
score_tokens = torch.ops.hawk_kernels.score_tokens.default
select_topk = torch.ops.hawk_kernels.select_topk.default
attention_column_mean = torch.ops.hawk_kernels.attention_column_mean.default
