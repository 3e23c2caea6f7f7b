"""Keep the tokens with the highest scores, in an order that is defined for ties and NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hawk_kernels.backends.choose import PreparedCalls, choose_backend, load_backend, plain_signature, without_grad
from hawk_kernels.ops.library import define, fake_selection
from hawk_kernels.selection import Fields, Selection, as_selection
from hawk_kernels.validation import Passed, check_mask, check_rounding, check_tensor, checked_keep, shape_of

_passed = Passed()
_prepared = PreparedCalls()


def select_topk(
    scores: torch.Tensor,
    r: float | int,
    *,
    mask: torch.Tensor | None = None,
    rounding: str = "floor",
) -> Selection:
    """Keep the best tokens by given scores; this is the second half of `score_and_select`.

    Args:
        scores: `[B, M]` or `[M]`, floating point, compared as float32; higher is better, equal scores (`-0 == +0`)
            go to the lower index, NaN ranks last.
        r: as in `score_and_select`.
        mask: bool like `scores`, True = candidate; a token outside is never kept, whatever its score.
        rounding: `"floor"`, `"ceil"` or `"nearest"` (half to even).

    Returns:
        `Selection(mask, indices, scores)` as `score_and_select`.

    Raises:
        TypeError, ValueError: as `score_and_select`.
    """
    signature = plain_signature(scores, mask)
    key = _prepared.key(signature, scores, r, rounding)
    call = _prepared.get(key)
    if call is None:
        if signature is None or signature not in _passed:
            _check_tensors(scores, mask)
            if signature is not None:
                _passed.add(signature)
        ratio, budget = checked_keep(r, scores.shape[-1], mask is not None)
        check_rounding(rounding)
        batched = scores.dim() == 2
        backend = choose_backend(None, scores.device)
        rows = without_grad(scores if batched else scores.unsqueeze(0), signature).float()
        rows_mask = mask if batched or mask is None else mask.unsqueeze(0)
        if key is None or backend != "triton":
            run: Callable[..., Any] = _select_topk if signature is None else _run_select_topk
            return as_selection(run(rows, rows_mask, ratio, budget, rounding, backend), batched)
        prepared: Callable[..., Any] = load_backend("triton", "select_topk").PreparedCall
        call = prepared(rows, budget or ratio, rows_mask, rounding, batched)
        _prepared.add(key, call)
    selection: Selection = call(without_grad(scores, signature).float(), mask)
    return selection


def _check_tensors(scores: torch.Tensor, mask: torch.Tensor | None) -> None:
    check_tensor("scores", scores)
    if not scores.dtype.is_floating_point:
        raise TypeError(f"scores: expected a floating point dtype, got {scores.dtype}; use scores.float()")
    if scores.dim() not in (1, 2):
        raise ValueError(f"scores: expected [B, M] or [M], got shape {shape_of(scores)}; one row a sample")
    if mask is not None:
        check_mask("mask", mask, tuple(scores.shape), "one entry a score", scores.device)


def _run_select_topk(
    scores: torch.Tensor, mask: torch.Tensor | None, ratio: float, budget: int, rounding: str, backend: str
) -> Selection:
    selection: Selection = load_backend(backend, "select_topk").select_topk(scores, budget or ratio, mask, rounding)
    return selection


def _fake_select_topk(
    scores: torch.Tensor, mask: torch.Tensor | None, ratio: float, budget: int, rounding: str, backend: str
) -> Fields:
    return fake_selection(scores, scores.shape[1], ratio, budget, rounding)


_select_topk = define(
    "select_topk(Tensor scores, Tensor? mask, float ratio, SymInt budget, str rounding, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _run_select_topk,
    _fake_select_topk,
)
