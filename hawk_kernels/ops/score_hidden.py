"""Scores straight from the hidden states: for code bases that prune before the first layer has projected anything."""

from __future__ import annotations

import math
import numbers

import torch

from hawk_kernels.backends.choose import choose_backend
from hawk_kernels.ops import registration as ops
from hawk_kernels.selection import Selection
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


def score_hidden_and_select(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
    wq: torch.Tensor,
    bq: torch.Tensor | None,
    wk: torch.Tensor,
    bk: torch.Tensor | None,
    w: torch.Tensor,
    r: float | int,
    *,
    num_key_value_heads: int,
    q_mask: torch.Tensor,
    k_mask: torch.Tensor,
    normalize: str | None = None,
    scale: float | None = None,
    rounding: str = "floor",
    backend: str | None = None,
) -> Selection:
    """`score_and_select` of the queries and keys that a layer would make of `x`, without making them, in one launch.

    The layer is RMSNorm (`x / rms(x) * norm_weight`), then linear projections, without norms of single heads. The mean
    over text is taken before `W_q`, and `W_k` is folded into the mean query, so only one vector a head meets the
    visual tokens, each of which is read once; everything is accumulated in float32.

    Args:
        x: hidden states before the layer, `[B, T, C]` or `[T, C]`, float32, float16 or bfloat16, any strides.
        norm_weight: gamma of the RMSNorm, `[C]`, floating point (where a model adds 1 to its parameter, with the 1), or
            None for ones.
        norm_eps: its epsilon, at least 0.
        wq: weight of the query projection, `[H * D, C]`, float32, float16 or bfloat16; `bq`: its bias `[H * D]`,
            floating point, or None.
        wk: weight of the key projection, `[Hkv * D, C]`, as `wq`; `bk`: its bias `[Hkv * D]` or None.
        w: head importance, `[H]`, floating point.
        r: float in (0, 1] is the fraction of candidates **kept**; int >= 1 is a budget, clamped to a row's candidates.
        num_key_value_heads: `Hkv`, a divisor of `H`.
        q_mask: bool `[B, T]` (`[T]` unbatched), True = this token is text that asks.
        k_mask: bool `[B, T]` (`[T]` unbatched), True = this token is visual, a candidate.
        normalize, scale, rounding, backend: as in `score_and_select`.

    Returns:
        `Selection(mask, indices, scores)` over T: bool `[B, T]`, int64 `[B, Kmax]` ascending and padded with -1, and
        float32 `[B, T]` with `-inf` at non-candidates; without the leading B for unbatched input.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, range or name does not fit.
        ImportError: `backend="triton"` without Triton.
    """
    batched, layer, masks, scale, backend = _checked(
        x, norm_weight, norm_eps, wq, bq, wk, bk, w, num_key_value_heads, q_mask, k_mask, normalize, scale, backend
    )
    ratio, budget = checked_keep(r, x.shape[-2], True)
    check_rounding(rounding)
    mask, indices, scores = ops.score_hidden_and_select(
        *layer, ratio, budget, num_key_value_heads, *masks, normalize, scale, rounding, backend
    )
    return Selection(mask, indices, scores) if batched else Selection(mask[0], indices[0], scores[0])


def score_hidden(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
    wq: torch.Tensor,
    bq: torch.Tensor | None,
    wk: torch.Tensor,
    bk: torch.Tensor | None,
    w: torch.Tensor,
    *,
    num_key_value_heads: int,
    q_mask: torch.Tensor,
    k_mask: torch.Tensor,
    normalize: str | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Importance of visual tokens from hidden states, the first half of `score_hidden_and_select`.

    Arguments and errors as there.

    Returns:
        float32 `[B, T]` (`[T]` unbatched), `-inf` at non-candidates, without grad.
    """
    batched, layer, masks, scale, backend = _checked(
        x, norm_weight, norm_eps, wq, bq, wk, bk, w, num_key_value_heads, q_mask, k_mask, normalize, scale, backend
    )
    scores = ops.score_hidden(*layer, num_key_value_heads, *masks, normalize, scale, backend)
    return scores if batched else scores[0]


def _checked(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
    wq: torch.Tensor,
    bq: torch.Tensor | None,
    wk: torch.Tensor,
    bk: torch.Tensor | None,
    w: torch.Tensor,
    num_key_value_heads: int,
    q_mask: torch.Tensor,
    k_mask: torch.Tensor,
    normalize: str | None,
    scale: float | None,
    backend: str | None,
) -> tuple[bool, tuple, tuple[torch.Tensor, torch.Tensor], float, str]:
    """Whether the input came batched; the layer and the masks, batched and without grad; scale and backend."""
    check_tensor("x", x)
    if x.dtype not in FLOATS:
        raise TypeError(f"x: expected dtype float32, float16 or bfloat16, got {x.dtype}; use x.float()")
    if x.dim() not in (2, 3):
        raise ValueError(f"x: expected [B, T, C] or [T, C], got shape {shape_of(x)}; one hidden state a token")
    hidden_size, device = x.shape[-1], x.device
    if hidden_size < 1:
        raise ValueError(f"x: expected hidden states of at least one channel, got shape {shape_of(x)}; channels last")
    _check_parameter("w", w, None, device, "one weight a head")
    num_heads = w.shape[0]
    _check_heads(num_heads, num_key_value_heads)
    _check_parameter("wq", wq, (None, hidden_size), device, "as nn.Linear keeps it: outputs first")
    if wq.shape[0] < 1 or wq.shape[0] % num_heads != 0:
        raise ValueError(
            f"wq: expected a multiple of w's {num_heads} heads as outputs, got shape {shape_of(wq)}; w has one "
            "weight a query head"
        )
    num_outputs = wq.shape[0]
    head_dim = num_outputs // num_heads
    num_key_outputs = num_key_value_heads * head_dim
    _check_parameter("wk", wk, (num_key_outputs, hidden_size), device, f"{num_key_value_heads} heads of {head_dim}")
    optional = (("norm_weight", norm_weight, hidden_size), ("bq", bq, num_outputs), ("bk", bk, num_key_outputs))
    for name, parameter, length in optional:
        if parameter is not None:
            _check_parameter(name, parameter, (length,), device, "or None")
    if isinstance(norm_eps, bool) or not isinstance(norm_eps, numbers.Real):
        raise TypeError(f"norm_eps: expected a float, got {type(norm_eps).__name__}; 1e-6 is usual")
    if not (math.isfinite(norm_eps) and norm_eps >= 0):
        raise ValueError(f"norm_eps: expected a finite number of at least 0, got {norm_eps}; 1e-6 is usual")
    for name, mask in (("q_mask", q_mask), ("k_mask", k_mask)):
        check_tensor(name, mask)
        check_mask(name, mask, tuple(x.shape[:-1]), "one entry a token", device)
    check_normalize(normalize)
    scale = checked_scale(scale, head_dim)
    backend = choose_backend(backend, device, head_dim)
    batched = x.dim() == 3
    if not batched:
        x, q_mask, k_mask = x.unsqueeze(0), q_mask.unsqueeze(0), k_mask.unsqueeze(0)
    gamma, bq, bk = (None if parameter is None else parameter.detach() for parameter in (norm_weight, bq, bk))
    layer = (x.detach(), gamma, float(norm_eps), wq.detach(), bq, wk.detach(), bk, w.detach())
    return batched, layer, (q_mask, k_mask), scale, backend


def _check_parameter(
    name: str, parameter: torch.Tensor, shape: tuple[int | None, ...] | None, device: torch.device, meaning: str
) -> None:
    """`parameter` is a floating point tensor of this shape on this device; None is a vector, None inside any length.

    A matrix is multiplied as it is, so its dtype is one of those that have a kernel.
    """
    check_tensor(name, parameter)
    expected = (None,) if shape is None else shape
    if len(expected) > 1 and parameter.dtype not in FLOATS:
        raise TypeError(f"{name}: expected dtype float32, float16 or bfloat16, got {parameter.dtype}; use .float()")
    if not parameter.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating point dtype, got {parameter.dtype}; use .float()")
    fits = parameter.dim() == len(expected) and all(
        length in (None, came) for length, came in zip(expected, parameter.shape, strict=True)
    )
    if not fits or 0 in parameter.shape:
        shown = [length or "any" for length in expected]
        raise ValueError(
            f"{name}: expected shape {shown} ({meaning}), got {shape_of(parameter)}; see the layer's config"
        )
    if parameter.device != device:
        raise ValueError(f"{name}: expected device {device} as x, got {parameter.device}; use .to({str(device)!r})")


def _check_heads(num_heads: int, num_key_value_heads: object) -> None:
    if isinstance(num_key_value_heads, bool) or not isinstance(num_key_value_heads, numbers.Integral):
        raise TypeError(
            f"num_key_value_heads: expected an int, got {type(num_key_value_heads).__name__}; the config has it"
        )
    if num_key_value_heads < 1 or num_heads % num_key_value_heads != 0:
        raise ValueError(
            f"num_key_value_heads: expected a divisor of w's {num_heads} heads, got {num_key_value_heads}; the config "
            "has it"
        )
