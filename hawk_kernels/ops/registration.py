"""The operators as `torch.library` sees them: opaque to `torch.compile`, with shapes known in advance.

Defined with `torch.library.define` and `impl`, which cost about half of what `custom_op` costs on each call.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from hawk_kernels.backends.choose import load_backend
from hawk_kernels.backends.eager.compact import check_fits, restore
from hawk_kernels.backends.visibility import segment_limits
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
_LAYER = "Tensor x, Tensor? norm_weight, float norm_eps, Tensor wq, Tensor? bq, Tensor wk, Tensor? bk, Tensor w"
_LIBRARY.define(
    f"score_hidden_and_select({_LAYER}, float ratio, SymInt budget, int num_key_value_heads, Tensor q_mask, "
    "Tensor k_mask, str? normalize, float scale, str rounding, str backend) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIBRARY.define(
    f"score_hidden({_LAYER}, int num_key_value_heads, Tensor q_mask, Tensor k_mask, str? normalize, float scale, "
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
_LIBRARY.define(
    "compact(Tensor inputs_embeds, Tensor keep_mask, Tensor? position_ids, SymInt length, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIBRARY.define(
    "greedy_max_min(Tensor features, Tensor? mask, float ratio, SymInt budget, str rounding, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIBRARY.define(
    "greedy_dpp(Tensor features, Tensor quality, Tensor? mask, float ratio, SymInt budget, str rounding, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _without_autocast(tensor: torch.Tensor):
    """Scores are accumulated in float32; an autocast region would cast the products inside to half."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _score_and_select(q, k, w, q_mask, k_mask, ratio, budget, normalize, scale, rounding, backend):
    with _without_autocast(q):
        return load_backend(backend, "score_and_select").score_and_select(
            q, k, w, budget or ratio, q_mask, k_mask, normalize, scale, rounding
        )


def _score_tokens(q, k, w, q_mask, k_mask, normalize, scale, backend):
    with _without_autocast(q):
        return load_backend(backend, "score_and_select").score_tokens(q, k, w, q_mask, k_mask, normalize, scale)


def _score_hidden_and_select(
    x, norm_weight, norm_eps, wq, bq, wk, bk, w, ratio, budget, num_key_value_heads, q_mask, k_mask, normalize, scale,
    rounding, backend,
):  # fmt: skip
    layer = (x, norm_weight, norm_eps, wq, bq, wk, bk, w)
    with _without_autocast(x):
        return load_backend(backend, "score_hidden").score_hidden_and_select(
            *layer, budget or ratio, num_key_value_heads, q_mask, k_mask, normalize, scale, rounding
        )


def _score_hidden(
    x, norm_weight, norm_eps, wq, bq, wk, bk, w, num_key_value_heads, q_mask, k_mask, normalize, scale, backend
):
    layer = (x, norm_weight, norm_eps, wq, bq, wk, bk, w)
    with _without_autocast(x):
        return load_backend(backend, "score_hidden").score_hidden(
            *layer, num_key_value_heads, q_mask, k_mask, normalize, scale
        )


def _select_topk(scores, mask, ratio, budget, rounding, backend):
    return load_backend(backend, "select_topk").select_topk(scores, budget or ratio, mask, rounding)


def _attention_column_mean(q, k, cu_seqlens, causal, q_rows, head_weights, reduce_heads, reduction, scale, backend):
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        segment_limits(cu_seqlens, k.shape[2])
    with _without_autocast(q):
        return load_backend(backend, "attention_column_mean").attention_column_mean(
            q, k, cu_seqlens, causal, q_rows, head_weights, reduce_heads, reduction, scale
        )


def _compact(inputs_embeds, keep_mask, position_ids, length, backend):
    if keep_mask.device.type == "cpu":
        check_fits(keep_mask, length)
    return load_backend(backend, "compact").compact(inputs_embeds, keep_mask, position_ids, length)


def _greedy_max_min(features, mask, ratio, budget, rounding, backend):
    with _without_autocast(features):
        return load_backend(backend, "greedy").greedy_max_min(features, budget or ratio, mask, rounding)


def _greedy_dpp(features, quality, mask, ratio, budget, rounding, backend):
    with _without_autocast(features):
        return load_backend(backend, "greedy").greedy_dpp(features, quality, budget or ratio, mask, rounding)


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


def _fake_score_hidden_and_select(
    x, norm_weight, norm_eps, wq, bq, wk, bk, w, ratio, budget, num_key_value_heads, q_mask, k_mask, normalize, scale,
    rounding, backend,
):  # fmt: skip
    return _fake_selection(x, x.shape[1], ratio, budget, rounding)


def _fake_score_hidden(
    x, norm_weight, norm_eps, wq, bq, wk, bk, w, num_key_value_heads, q_mask, k_mask, normalize, scale, backend
):
    return x.new_empty((x.shape[0], x.shape[1]), dtype=torch.float32)


def _fake_select_topk(scores, mask, ratio, budget, rounding, backend):
    return _fake_selection(scores, scores.shape[1], ratio, budget, rounding)


def _fake_attention_column_mean(
    q, k, cu_seqlens, causal, q_rows, head_weights, reduce_heads, reduction, scale, backend
):
    heads = () if reduce_heads else (q.shape[1],)
    return k.new_empty((k.shape[0], *heads, k.shape[2]), dtype=torch.float32)


def _fake_greedy_max_min(features, mask, ratio, budget, rounding, backend):
    return _fake_selection(features, features.shape[1], ratio, budget, rounding)


def _fake_greedy_dpp(features, quality, mask, ratio, budget, rounding, backend):
    return _fake_selection(features, features.shape[1], ratio, budget, rounding)


def _fake_compact(inputs_embeds, keep_mask, position_ids, length, backend):
    batch, _, hidden_size = inputs_embeds.shape
    positions = keep_mask.new_empty((1, batch, length), dtype=torch.int64)
    if position_ids is not None:
        positions = position_ids.new_empty((position_ids.shape[0], batch, length))
    return (
        inputs_embeds.new_empty((batch, length, hidden_size)),
        positions,
        keep_mask.new_empty((batch, length), dtype=torch.int64),
        keep_mask.new_empty((batch, length), dtype=torch.int64),
    )


def _remember_kept(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _restore_gradient(ctx, gradient, *_):
    return restore(gradient, *ctx.saved_tensors), None, None, None, None


for _name, _run, _fake in (
    ("score_and_select", _score_and_select, _fake_score_and_select),
    ("score_tokens", _score_tokens, _fake_score_tokens),
    ("score_hidden_and_select", _score_hidden_and_select, _fake_score_hidden_and_select),
    ("score_hidden", _score_hidden, _fake_score_hidden),
    ("select_topk", _select_topk, _fake_select_topk),
    ("attention_column_mean", _attention_column_mean, _fake_attention_column_mean),
    ("compact", _compact, _fake_compact),
    ("greedy_max_min", _greedy_max_min, _fake_greedy_max_min),
    ("greedy_dpp", _greedy_dpp, _fake_greedy_dpp),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hawk_kernels::{_name}", _fake, lib=_LIBRARY)

torch.library.register_autograd("hawk_kernels::compact", _restore_gradient, setup_context=_remember_kept, lib=_LIBRARY)

score_and_select = torch.ops.hawk_kernels.score_and_select.default
score_tokens = torch.ops.hawk_kernels.score_tokens.default
score_hidden_and_select = torch.ops.hawk_kernels.score_hidden_and_select.default
score_hidden = torch.ops.hawk_kernels.score_hidden.default
select_topk = torch.ops.hawk_kernels.select_topk.default
attention_column_mean = torch.ops.hawk_kernels.attention_column_mean.default
compact = torch.ops.hawk_kernels.compact.default
greedy_max_min = torch.ops.hawk_kernels.greedy_max_min.default
greedy_dpp = torch.ops.hawk_kernels.greedy_dpp.default
