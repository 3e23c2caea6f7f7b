"""The public functions: validate, choose the backend, call the operator. The one place where shapes are checked."""

from __future__ import annotations

import math
import numbers

import torch

from hawk_kernels import ops
from hawk_kernels.backends.choose import choose_backend
from hawk_kernels.selection import ROUNDINGS, Selection

NORMALIZATIONS = (None, "l2", "softmax", "minmax")
# Rows are shorter than this, so a larger budget keeps as much; an operator takes no integers beyond 64 bits.
_MAX_BUDGET = 2**31 - 1
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


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
    candidates, and `I[k] = sum_i w[i] c[i, k]`. A row with `M_b` candidates keeps `max(1, floor(r * M_b))`: higher
    scores first, equal scores by lower index, NaN last. A row without candidates keeps nothing.

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
        rounding: `"floor"` (paper) or `"ceil"` (release).
        backend: `None` chooses; `"triton"` or `"torch"` is used or refused, never replaced.

    Returns:
        `Selection(mask, indices, scores)`: bool `[B, M]`, int64 `[B, Kmax]` ascending and padded with -1, and float32
        `[B, M]` with `-inf` at non-candidates; without the leading B for unbatched input. None requires grad.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, range or name does not fit.
        ImportError: `backend="triton"` without Triton.
    """
    batched, q, k, w, q_mask, k_mask, scale, backend = _checked_scoring(
        q, k, w, q_mask, k_mask, normalize, scale, backend
    )
    ratio, budget = _checked_keep(r, k.shape[2], k_mask is not None)
    _check_rounding(rounding)
    selected = ops.score_and_select(q, k, w, q_mask, k_mask, ratio, budget, normalize, scale, rounding, backend)
    return _selection(selected, batched)


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
    """Importance of visual tokens, the first half of `score_and_select`.

    Arguments and errors as there.

    Returns:
        float32 `[B, M]` (`[M]` unbatched), `-inf` at non-candidates, without grad.
    """
    batched, q, k, w, q_mask, k_mask, scale, backend = _checked_scoring(
        q, k, w, q_mask, k_mask, normalize, scale, backend
    )
    scores = ops.score_tokens(q, k, w, q_mask, k_mask, normalize, scale, backend)
    return scores if batched else scores[0]


def select_topk(
    scores: torch.Tensor,
    r: float | int,
    *,
    mask: torch.Tensor | None = None,
    rounding: str = "floor",
) -> Selection:
    """Keep the best tokens by given scores, the second half of `score_and_select`.

    Args:
        scores: `[B, M]` or `[M]`, floating point, compared as float32; higher is better, equal scores (`-0 == +0`)
            go to the lower index, NaN ranks last.
        r: as in `score_and_select`.
        mask: bool like `scores`, True = candidate; a token outside is never kept, whatever its score.
        rounding: `"floor"` or `"ceil"`.

    Returns:
        `Selection(mask, indices, scores)` as `score_and_select`.

    Raises:
        TypeError, ValueError: as `score_and_select`.
    """
    _check_tensor("scores", scores)
    if not scores.dtype.is_floating_point:
        raise TypeError(f"scores: expected a floating point dtype, got {scores.dtype}; use scores.float()")
    if scores.dim() not in (1, 2):
        raise ValueError(f"scores: expected [B, M] or [M], got shape {_shape(scores)}")
    batched = scores.dim() == 2
    if mask is not None:
        _check_mask("mask", mask, tuple(scores.shape), "one entry a score", scores.device)
    ratio, budget = _checked_keep(r, scores.shape[-1], mask is not None)
    _check_rounding(rounding)
    if not batched:
        scores, mask = scores.unsqueeze(0), None if mask is None else mask.unsqueeze(0)
    selected = ops.select_topk(
        scores.detach().float(), mask, ratio, budget, rounding, choose_backend(None, scores.device)
    )
    return _selection(selected, batched)


def _selection(selected: tuple[torch.Tensor, torch.Tensor, torch.Tensor], batched: bool) -> Selection:
    mask, indices, scores = selected
    return Selection(mask, indices, scores) if batched else Selection(mask[0], indices[0], scores[0])


def _shape(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}; use torch.as_tensor")


def _check_mask(name: str, mask: object, shape: tuple[int, ...], meaning: str, device: torch.device) -> None:
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"{name}: expected a bool torch.Tensor or None, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected dtype torch.bool, got {mask.dtype}; use {name}.bool()")
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)} ({meaning}), got {_shape(mask)}")
    if mask.device != device:
        raise ValueError(f"{name}: expected device {device}, got {mask.device}; use {name}.to({str(device)!r})")


def _check_rounding(rounding: object) -> None:
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding: expected 'floor' (paper) or 'ceil' (release), got {rounding!r}")


def _checked_keep(r: object, num_keys: int, masked: bool) -> tuple[float, int | torch.SymInt]:
    """`(ratio, 0)` or `(1.0, budget)`."""
    expected = "r: expected a float in (0, 1] (the fraction kept) or an int >= 1 (a budget)"
    if isinstance(r, bool) or not isinstance(r, (numbers.Real, torch.SymInt, torch.SymFloat)):
        remedy = "; read it first: r.item() waits for the device" if isinstance(r, torch.Tensor) else ""
        raise TypeError(f"{expected}, got {type(r).__name__}{remedy}")
    if isinstance(r, (numbers.Integral, torch.SymInt)):
        budget = r if isinstance(r, torch.SymInt) else min(int(r), _MAX_BUDGET)
        if budget < 1:
            raise ValueError(f"{expected}, got {r}; to keep everything use 1.0")
        if not masked and budget > num_keys:
            raise ValueError(
                f"r: expected a budget of at most {num_keys} keys, got {r}; use a float, or min(budget, {num_keys})"
            )
        return 1.0, budget
    ratio = float(r)
    if not 0.0 < ratio <= 1.0:
        remedy = "a fraction of the candidates is kept, not removed"
        if math.isfinite(ratio) and ratio > 1.0:
            remedy += f"; for a budget pass the int {max(1, round(ratio))}"
        raise ValueError(f"{expected}, got {r}; {remedy}")
    return ratio, 0


def _check_queries_and_keys(q: torch.Tensor, k: torch.Tensor) -> None:
    """Types, dtypes, shapes and devices of `q` and `k`."""
    _check_tensor("q", q)
    _check_tensor("k", k)
    for name, tensor in (("q", q), ("k", k)):
        if tensor.dtype not in _FLOATS:
            raise TypeError(
                f"{name}: expected dtype float32, float16 or bfloat16, got {tensor.dtype}; use {name}.float()"
            )
    if q.dtype != k.dtype:
        raise TypeError(f"k: expected the dtype of q, {q.dtype}, got {k.dtype}; use k.to(q.dtype)")
    if q.dim() not in (3, 4):
        raise ValueError(f"q: expected [B, H, N, D] or [H, N, D], got shape {_shape(q)}")
    if k.dim() != q.dim():
        layout = "[B, Hkv, M, D]" if q.dim() == 4 else "[Hkv, M, D]"
        raise ValueError(f"k: expected {layout} because q has {q.dim()} dimensions, got shape {_shape(k)}")
    if q.dim() == 4 and q.shape[0] != k.shape[0]:
        raise ValueError(f"k: expected batch size {q.shape[0]} as q has, got {k.shape[0]} (shape {_shape(k)})")
    num_heads, _, head_dim = q.shape[-3:]
    num_key_value_heads = k.shape[-3]
    if k.shape[-1] != head_dim:
        raise ValueError(f"k: expected head_dim {head_dim} as q has, got {k.shape[-1]} (shape {_shape(k)})")
    if num_heads < 1 or head_dim < 1:
        raise ValueError(f"q: expected at least one head and head_dim >= 1, got shape {_shape(q)}")
    if num_key_value_heads < 1 or num_heads % num_key_value_heads != 0:
        raise ValueError(
            f"k: expected a number of KV heads that divides q's {num_heads} heads, got {num_key_value_heads}"
        )
    _check_device("k", k, q.device)


def _check_head_vector(name: str, weights: torch.Tensor, q: torch.Tensor) -> None:
    """One floating point weight a head of `q`, beside it."""
    _check_tensor(name, weights)
    if not weights.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating point dtype, got {weights.dtype}; use {name}.float()")
    num_heads = q.shape[-3]
    if weights.dim() != 1 or weights.shape[0] != num_heads:
        raise ValueError(f"{name}: expected shape [{num_heads}], one weight a head of q, got {_shape(weights)}")
    _check_device(name, weights, q.device)


def _check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device} as q, got {tensor.device}; use {name}.to({str(device)!r})")


def _checked_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return float(head_dim**-0.5)
    if isinstance(scale, bool) or not isinstance(scale, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"scale: expected a float or None (D ** -0.5), got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}; None means D ** -0.5")
    return float(scale)


def _checked_scoring(
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    q_mask: torch.Tensor | None,
    k_mask: torch.Tensor | None,
    normalize: str | None,
    scale: float | None,
    backend: str | None,
) -> tuple[bool, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, float, str]:
    """The arguments, batched, without grad, with defaults filled in; first item: whether they came batched."""
    _check_queries_and_keys(q, k)
    _check_head_vector("w", w, q)
    batched = q.dim() == 4
    num_queries, head_dim, num_keys = q.shape[-2], q.shape[-1], k.shape[-2]
    batch = (q.shape[0],) if batched else ()
    if q_mask is not None:
        _check_mask("q_mask", q_mask, (*batch, num_queries), "one entry a query", q.device)
    if k_mask is not None:
        _check_mask("k_mask", k_mask, (*batch, num_keys), "one entry a key", q.device)

    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize: expected None, 'l2', 'softmax' or 'minmax', got {normalize!r}")
    scale = _checked_scale(scale, head_dim)
    backend = choose_backend(backend, q.device, head_dim)

    q, k, w = q.detach(), k.detach(), w.detach()
    if not batched:
        q, k = q.unsqueeze(0), k.unsqueeze(0)
        q_mask = None if q_mask is None else q_mask.unsqueeze(0)
        k_mask = None if k_mask is None else k_mask.unsqueeze(0)
    return batched, q, k, w, q_mask, k_mask, scale, backend
