"""Score visual tokens from the hidden states that enter a layer, before it has projected anything."""

from __future__ import annotations

import math
import numbers
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
)
from hawk_kernels.layer import Layer
from hawk_kernels.ops.library import define, fake_selection
from hawk_kernels.selection import Fields, Selection, as_selection
from hawk_kernels.validation import (
    FLOATS,
    check_mask,
    check_normalize,
    check_rounding,
    check_tensor,
    checked_keep,
    checked_scale,
    shape_of,
)

_prepared = PreparedCalls()
_prepared_scores = PreparedCalls()


def score_hidden_and_select(
    x: torch.Tensor,
    layer: Layer,
    w: torch.Tensor,
    r: float | int,
    *,
    q_mask: torch.Tensor,
    k_mask: torch.Tensor,
    normalize: str | None = None,
    scale: float | None = None,
    rounding: str = "floor",
    backend: str | None = None,
) -> Selection:
    """Do what `score_and_select` does with the queries and keys that `layer` would make of `x`, in one launch.

    The queries and keys are never made. The mean over text is taken before `wq`, and `wk` is folded into the mean
    query, so that one vector of each head meets the visual tokens, each of which is read once. Everything is
    accumulated in float32.

    Args:
        x: hidden states before the layer, `[B, T, C]` or `[T, C]`, float32, float16 or bfloat16, any strides.
        layer: RMSNorm and projections; `Layer.of(norm, q_proj, k_proj)` reads them from modules.
        w: head importance, `[H]`, floating point.
        r: a float in (0, 1] is the fraction of the candidates that is **kept**; an int >= 1 is a budget, clamped to the
            candidates of a row.
        q_mask: bool `[B, T]` (`[T]` unbatched), True at the text tokens whose queries are averaged.
        k_mask: bool `[B, T]` (`[T]` unbatched), True at the visual tokens, which are the candidates.
        normalize, scale, rounding, backend: as in `score_and_select`.

    Returns:
        `Selection(mask, indices, scores)` over T: bool `[B, T]`, int64 `[B, Kmax]` ascending and padded with -1, and
        float32 `[B, T]` with `-inf` at non-candidates; without the leading B for unbatched input.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, range or name does not fit.
        ImportError: `backend="triton"` without Triton.
    """
    arguments = x, layer, w, q_mask, k_mask
    options = r, normalize, scale, rounding, backend
    selection: Selection = _prepared.call(_signature(*arguments), arguments, options, _prepare)
    return selection


def score_hidden(
    x: torch.Tensor,
    layer: Layer,
    w: torch.Tensor,
    *,
    q_mask: torch.Tensor,
    k_mask: torch.Tensor,
    normalize: str | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Score visual tokens from hidden states; this is the first half of `score_hidden_and_select`.

    Arguments and errors are those of `score_hidden_and_select`.

    Returns:
        float32 `[B, T]` (`[T]` unbatched), `-inf` at non-candidates, without grad.
    """
    arguments = x, layer, w, q_mask, k_mask
    options = normalize, scale, backend
    selection: Selection = _prepared_scores.call(_signature(*arguments), arguments, options, _prepare_scores)
    return selection.scores


def _prepare(
    is_plain: bool,
    x: torch.Tensor,
    layer: Layer,
    w: torch.Tensor,
    q_mask: torch.Tensor,
    k_mask: torch.Tensor,
    r: float | int,
    normalize: str | None,
    scale: float | None,
    rounding: str,
    backend: str | None,
) -> Callable[..., Selection]:
    """Check the arguments, and return what selects by arguments of their signature."""
    scale, backend = _checked(x, layer, w, q_mask, k_mask, normalize, scale, backend)
    ratio, budget = checked_keep(r, x.shape[-2], True)
    check_rounding(rounding)
    batched = x.dim() == 3
    if is_plain and backend == "triton":
        return _prepared_call(x, layer, w, q_mask, k_mask, budget or ratio, normalize, scale, rounding)
    run: Callable[..., Any] = _run_score_hidden_and_select if is_plain else _score_hidden_and_select

    def call(*arguments: Any) -> Selection:
        fields = run(*_batched_without_grad(*arguments), ratio, budget, normalize, scale, rounding, backend)
        return as_selection(fields, batched)

    return call


def _prepare_scores(
    is_plain: bool,
    x: torch.Tensor,
    layer: Layer,
    w: torch.Tensor,
    q_mask: torch.Tensor,
    k_mask: torch.Tensor,
    normalize: str | None,
    scale: float | None,
    backend: str | None,
) -> Callable[..., Selection]:
    """Check the arguments, and return what scores by arguments of their signature."""
    scale, backend = _checked(x, layer, w, q_mask, k_mask, normalize, scale, backend)
    batched = x.dim() == 3
    if is_plain and backend == "triton":
        return _prepared_call(x, layer, w, q_mask, k_mask, None, normalize, scale, "floor")
    run: Callable[..., torch.Tensor] = _run_score_hidden if is_plain else _score_hidden

    def call(*arguments: Any) -> Selection:
        scores = run(*_batched_without_grad(*arguments), normalize, scale, backend)
        return as_selection((scores, scores, scores), batched)

    return call


def _prepared_call(
    x: torch.Tensor,
    layer: Layer,
    w: torch.Tensor,
    q_mask: torch.Tensor,
    k_mask: torch.Tensor,
    r: float | int | None,
    normalize: str | None,
    scale: float,
    rounding: str,
) -> Callable[..., Selection]:
    """Prepare calls of the signature of these arguments, which are checked, for Triton."""
    batched = x.dim() == 3
    x, *fields, w, q_mask, k_mask = _batched_without_grad(x, layer, w, q_mask, k_mask)
    prepared: Callable[..., Any] = load_backend("triton", "score_hidden").PreparedCall
    call: Callable[..., Selection] = prepared(
        x, Layer(*fields), w, r, q_mask, k_mask, normalize, scale, rounding, batched
    )
    return call


def _signature(
    x: torch.Tensor, layer: Layer, w: torch.Tensor, q_mask: torch.Tensor, k_mask: torch.Tensor
) -> Signature | None:
    """Return the signature of the tensors and the numbers of the layer, or None where it is not a plain one."""
    if type(layer) is not Layer:
        return None
    norm_weight, norm_eps, wq, bq, wk, bk, num_key_value_heads = layer
    # True equals 1, so a number of any other type, which may be an error, must not find the signature of these.
    if type(norm_eps) is not float or type(num_key_value_heads) not in (int, type(None)):
        return None
    signature = plain_signature(x, norm_weight, wq, bq, wk, bk, w, q_mask, k_mask)
    return None if signature is None else (*signature, norm_eps, num_key_value_heads)


def _checked(
    x: torch.Tensor,
    layer: Layer,
    w: torch.Tensor,
    q_mask: torch.Tensor,
    k_mask: torch.Tensor,
    normalize: str | None,
    scale: float | None,
    backend: str | None,
) -> tuple[float, str]:
    """Check the arguments, and return the scale and the backend."""
    _check_tensors(x, layer, w, q_mask, k_mask)
    check_normalize(normalize)
    head_dim = layer.wq.shape[0] // w.shape[0]
    return checked_scale(scale, head_dim), choose_backend(backend, x.device, head_dim)


def _batched_without_grad(
    x: torch.Tensor, layer: Layer, w: torch.Tensor, q_mask: torch.Tensor, k_mask: torch.Tensor
) -> tuple[Any, ...]:
    """Return `x`, the fields of the layer, `w` and the masks as an operator takes them."""
    if x.dim() == 2:
        x, q_mask, k_mask = x.unsqueeze(0), q_mask.unsqueeze(0), k_mask.unsqueeze(0)
    norm_weight, norm_eps, wq, bq, wk, bk, _ = layer
    norm_weight, bq, bk = (None if vector is None else vector.detach() for vector in (norm_weight, bq, bk))
    return x.detach(), norm_weight, float(norm_eps), wq.detach(), bq, wk.detach(), bk, w.detach(), q_mask, k_mask


def _check_tensors(x: torch.Tensor, layer: Layer, w: torch.Tensor, q_mask: torch.Tensor, k_mask: torch.Tensor) -> None:
    check_tensor("x", x)
    if x.dtype not in FLOATS:
        raise TypeError(f"x: expected dtype float32, float16 or bfloat16, got {x.dtype}; use x.float()")
    if x.dim() not in (2, 3):
        raise ValueError(f"x: expected [B, T, C] or [T, C], got shape {shape_of(x)}; pass one hidden state a token")
    if x.shape[-1] < 1:
        raise ValueError(f"x: expected hidden states of at least one channel, got shape {shape_of(x)}; channels last")
    _check_parameter("w", w, (None,), x.device, "one weight a head")
    _check_layer(layer, x, w.shape[0])
    for name, mask in (("q_mask", q_mask), ("k_mask", k_mask)):
        check_tensor(name, mask)
        check_mask(name, mask, tuple(x.shape[:-1]), "one entry a token", x.device)


def _check_layer(layer: Layer, x: torch.Tensor, num_heads: int) -> None:
    """Check the fields of a layer that is to project `x` to `num_heads` query heads."""
    if not isinstance(layer, Layer):
        raise TypeError(
            f"layer: expected a hawk_kernels.Layer, got {type(layer).__name__}; use Layer.of(norm, q_proj, k_proj)"
        )
    hidden_size, device = x.shape[-1], x.device
    _check_parameter("layer.wq", layer.wq, (None, hidden_size), device, "outputs first, as in nn.Linear")
    num_outputs = layer.wq.shape[0]
    if num_outputs % num_heads != 0:
        raise ValueError(
            f"layer.wq: expected a multiple of w's {num_heads} heads as outputs, got shape {shape_of(layer.wq)}; w has "
            "one weight a query head"
        )
    head_dim = num_outputs // num_heads
    if layer.num_key_value_heads is None:
        _check_parameter("layer.wk", layer.wk, (None, hidden_size), device, "outputs first, as in nn.Linear")
        num_key_value_heads, remainder = divmod(layer.wk.shape[0], head_dim)
        if remainder or num_heads % max(1, num_key_value_heads) != 0:
            raise ValueError(
                f"layer.wk: expected outputs of a number of heads that divides w's {num_heads}, each of {head_dim} as "
                f"wq has, got shape {shape_of(layer.wk)}; see the model's config"
            )
    else:
        _check_num_key_value_heads(layer.num_key_value_heads, num_heads)
        meaning = f"{layer.num_key_value_heads} heads of {head_dim}"
        shape = (layer.num_key_value_heads * head_dim, hidden_size)
        _check_parameter("layer.wk", layer.wk, shape, device, meaning)
    vectors = (
        ("layer.norm_weight", layer.norm_weight, hidden_size),
        ("layer.bq", layer.bq, num_outputs),
        ("layer.bk", layer.bk, layer.wk.shape[0]),
    )
    for name, vector, length in vectors:
        if vector is not None:
            _check_parameter(name, vector, (length,), device, "or None")
    _check_epsilon(layer.norm_eps)


def _check_parameter(
    name: str, parameter: torch.Tensor, shape: tuple[int | None, ...], device: torch.device, meaning: str
) -> None:
    """Check that `parameter` is a floating point tensor of this shape on this device; a length of None is any.

    A matrix is multiplied as it is, so its dtype is one of those that have a kernel.
    """
    check_tensor(name, parameter)
    if len(shape) > 1 and parameter.dtype not in FLOATS:
        raise TypeError(f"{name}: expected dtype float32, float16 or bfloat16, got {parameter.dtype}; use .float()")
    if not parameter.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating point dtype, got {parameter.dtype}; use .float()")
    fits = parameter.dim() == len(shape) and all(
        length in (None, came) for length, came in zip(shape, parameter.shape, strict=True)
    )
    if not fits or 0 in parameter.shape:
        shown = [length or "any" for length in shape]
        raise ValueError(
            f"{name}: expected shape {shown} ({meaning}), got {shape_of(parameter)}; see the model's config"
        )
    if parameter.device != device:
        raise ValueError(f"{name}: expected device {device} as x, got {parameter.device}; use .to({str(device)!r})")


def _check_num_key_value_heads(num_key_value_heads: object, num_heads: int) -> None:
    expected = f"layer.num_key_value_heads: expected a divisor of w's {num_heads} heads, or None"
    if isinstance(num_key_value_heads, bool) or not isinstance(num_key_value_heads, numbers.Integral):
        raise TypeError(f"{expected}, got {type(num_key_value_heads).__name__}; the model's config has it")
    if num_key_value_heads < 1 or num_heads % num_key_value_heads != 0:
        raise ValueError(f"{expected}, got {num_key_value_heads}; the model's config has it")


def _check_epsilon(norm_eps: object) -> None:
    if isinstance(norm_eps, bool) or not isinstance(norm_eps, numbers.Real):
        raise TypeError(f"layer.norm_eps: expected a float, got {type(norm_eps).__name__}; 1e-6 is usual")
    if not (math.isfinite(norm_eps) and float(norm_eps) >= 0):
        raise ValueError(f"layer.norm_eps: expected a finite number of at least 0, got {norm_eps}; 1e-6 is usual")


def _run_score_hidden_and_select(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
    wq: torch.Tensor,
    bq: torch.Tensor | None,
    wk: torch.Tensor,
    bk: torch.Tensor | None,
    w: torch.Tensor,
    q_mask: torch.Tensor,
    k_mask: torch.Tensor,
    ratio: float,
    budget: int,
    normalize: str | None,
    scale: float,
    rounding: str,
    backend: str,
) -> Selection:
    layer = Layer(norm_weight, norm_eps, wq, bq, wk, bk)
    compute = load_backend(backend, "score_hidden").score_hidden_and_select
    with without_autocast(x):
        selection: Selection = compute(x, layer, w, budget or ratio, q_mask, k_mask, normalize, scale, rounding)
    return selection


def _run_score_hidden(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
    wq: torch.Tensor,
    bq: torch.Tensor | None,
    wk: torch.Tensor,
    bk: torch.Tensor | None,
    w: torch.Tensor,
    q_mask: torch.Tensor,
    k_mask: torch.Tensor,
    normalize: str | None,
    scale: float,
    backend: str,
) -> torch.Tensor:
    layer = Layer(norm_weight, norm_eps, wq, bq, wk, bk)
    compute = load_backend(backend, "score_hidden").score_hidden
    with without_autocast(x):
        scores: torch.Tensor = compute(x, layer, w, q_mask, k_mask, normalize, scale)
    return scores


def _fake_score_hidden_and_select(x: torch.Tensor, *others: Any) -> Fields:
    *_, ratio, budget, _normalize, _scale, rounding, _backend = others
    return fake_selection(x, x.shape[1], ratio, budget, rounding)


def _fake_score_hidden(x: torch.Tensor, *others: object) -> torch.Tensor:
    return x.new_empty((x.shape[0], x.shape[1]), dtype=torch.float32)


_TENSORS = (
    "Tensor x, Tensor? norm_weight, float norm_eps, Tensor wq, Tensor? bq, Tensor wk, Tensor? bk, Tensor w, "
    "Tensor q_mask, Tensor k_mask"
)
_score_hidden_and_select = define(
    f"score_hidden_and_select({_TENSORS}, float ratio, SymInt budget, str? normalize, float scale, str rounding, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    _run_score_hidden_and_select,
    _fake_score_hidden_and_select,
)
_score_hidden = define(
    f"score_hidden({_TENSORS}, str? normalize, float scale, str backend) -> Tensor",
    _run_score_hidden,
    _fake_score_hidden,
)
