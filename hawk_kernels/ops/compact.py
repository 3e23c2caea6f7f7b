"""Build the pruned prompt: move the tokens that stay together, ready for the language model, and merge others in."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hawk_kernels.backends.choose import PreparedCalls, choose_backend, load_backend, plain_signature
from hawk_kernels.merge_checks import check_entries, check_merge
from hawk_kernels.ops.library import LIBRARY, NAMESPACE, define
from hawk_kernels.selection import Merge
from hawk_kernels.validation import check_mask, check_tensor, shape_of

_prepared = PreparedCalls()
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Compacted(NamedTuple):
    """A pruned prompt, padded on the left: a row ends with its tokens in their order and begins with zeros.

    Attributes:
        inputs_embeds: `[B, T', C]`, the dtype of the input; padding is zero.
        position_ids: the tokens' own positions, `[B, T']` or `[A, B, T']`, the dtype of the input; 0 at padding.
        attention_mask: int64 `[B, T']`, 1 at tokens and 0 at padding.
        source: int64 `[B, T']`, where in its row a token stood, 0 at padding. It gathers whatever else has one entry a
            token: `torch.take_along_dim(other, source, dim=1)`.
    """

    inputs_embeds: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    source: torch.Tensor


def compact(
    inputs_embeds: torch.Tensor,
    keep_mask: torch.Tensor,
    *,
    position_ids: torch.Tensor | None = None,
    length: int | None = None,
    merge: Merge | None = None,
    backend: str | None = None,
) -> Compacted:
    """Build the embeddings, positions and mask of the pruned prompt in one launch.

    Gradients flow back to `inputs_embeds`, zero to dropped tokens that nothing is merged from, and to `merge.weight`.

    Args:
        inputs_embeds: `[B, T, C]` or `[T, C]`, float32, float16, bfloat16 or float64, any strides.
        keep_mask: bool `[B, T]` (`[T]` unbatched), True at text and visual tokens that stay, False at those that are
            dropped and at padding.
        position_ids: int32 or int64 `[B, T]`, or `[A, B, T]` where RoPE has several axes, 1 in place of B for positions
            that all rows share (`[T]`, `[A, T]` unbatched). None: `0 .. T - 1`.
        length: tokens of a packed row, `T'`, at least as many as the fullest row keeps; more add padding. None reads
            that number from the device, which is the one host sync and cannot be captured in a CUDA graph. Too small
            a number is an error on a CPU; on a GPU, where checking it would be a sync, a row keeps its last `length`
            tokens.
        merge: makes kept tokens sums of tokens, `packed[target] = sum of weight * inputs_embeds[source]` over the
            entries of a target, accumulated in float32 (float64 for float64 embeddings) in an order that depends on
            nothing but the map. Its targets ascend in each row, padding comes last; `Merge.ordered` makes that so.
            Kept tokens without an entry are copied. What does not fit is an error on a CPU; on a GPU, where checking
            it would be a sync, entries with places outside the row or with a dropped target have no effect, and
            targets out of order give wrong sums.
        backend: `None` chooses; `"triton"` or `"torch"` is used or refused, never replaced.

    Returns:
        `Compacted(inputs_embeds, position_ids, attention_mask, source)`, without the B for unbatched input.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, range or name does not fit.
        ImportError: `backend="triton"` without Triton.
    """
    # A gradient needs the dispatcher, and a length that must be read takes longer than all that is kept here.
    needs_grad = torch.is_grad_enabled() and getattr(inputs_embeds, "requires_grad", False)
    is_plain = type(length) is int and not needs_grad and merge is None
    signature = plain_signature(inputs_embeds, keep_mask, position_ids) if is_plain else None
    key = _prepared.key(signature, inputs_embeds, length, backend)
    call = _prepared.get(key)
    if call is None or length is None:
        _check_embeds(inputs_embeds)
        check_tensor("keep_mask", keep_mask)
        device, batched = inputs_embeds.device, inputs_embeds.dim() == 3
        check_mask("keep_mask", keep_mask, tuple(inputs_embeds.shape[:-1]), "one entry a token", device)
        if position_ids is not None:
            _check_positions(position_ids, inputs_embeds)
        if merge is not None:
            check_merge("merge", merge, tuple(inputs_embeds.shape[:-1]), device)
        backend = choose_backend(backend, device)
        rows, rows_mask, axes = _batched(inputs_embeds, keep_mask, position_ids)
        if length is None:
            length = _fullest_row(keep_mask)
        else:
            _check_length(length)
        has_axes = position_ids is not None and position_ids.dim() == inputs_embeds.dim()
        if key is None or backend != "triton":
            if merge is not None and not batched:
                merge = Merge(*(part.unsqueeze(0) for part in merge))
            entries = () if merge is None else merge
            embeds, positions, attention_mask, source = _compact(rows, rows_mask, axes, length, backend, *entries)
            positions = positions if has_axes else positions[0]
            if batched:
                return Compacted(embeds, positions, attention_mask, source)
            return Compacted(embeds[0], positions.squeeze(-2), attention_mask[0], source[0])
        prepared: Callable[..., Any] = load_backend("triton", "compact").PreparedCall
        call = prepared(rows, rows_mask, axes, length, batched, has_axes)
        _prepared.add(key, call)
    if keep_mask.is_cpu:
        _check_fits(keep_mask, length)
    return Compacted(*call(inputs_embeds, keep_mask, position_ids))


def _batched(
    inputs_embeds: torch.Tensor, keep_mask: torch.Tensor, position_ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return embeddings `[B, T, C]`, a mask `[B, T]` and positions `[A, B, T]` as views of valid arguments."""
    if inputs_embeds.dim() == 2:
        inputs_embeds, keep_mask = inputs_embeds.unsqueeze(0), keep_mask.unsqueeze(0)
        position_ids = None if position_ids is None else position_ids.unsqueeze(-2)
    if position_ids is not None:
        axes = position_ids if position_ids.dim() == 3 else position_ids.unsqueeze(0)
        position_ids = axes.expand(-1, *keep_mask.shape)
    return inputs_embeds, keep_mask, position_ids


def _fullest_row(keep_mask: torch.Tensor) -> int:
    return int(keep_mask.sum(dim=-1).max()) if keep_mask.numel() else 0


def _check_embeds(inputs_embeds: torch.Tensor) -> None:
    check_tensor("inputs_embeds", inputs_embeds)
    if inputs_embeds.dtype not in _FLOATS:
        raise TypeError(
            f"inputs_embeds: expected dtype float32, float16, bfloat16 or float64, got {inputs_embeds.dtype}; token "
            "ids are embedded first"
        )
    if inputs_embeds.dim() not in (2, 3):
        raise ValueError(
            f"inputs_embeds: expected [B, T, C] or [T, C], got shape {shape_of(inputs_embeds)}; one vector a token"
        )


def _check_positions(position_ids: torch.Tensor, inputs_embeds: torch.Tensor) -> None:
    check_tensor("position_ids", position_ids)
    if position_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"position_ids: expected dtype int32 or int64, got {position_ids.dtype}; use position_ids.long()"
        )
    rows = tuple(inputs_embeds.shape[:-1])
    came = tuple(position_ids.shape)
    has_axes = len(came) == len(rows) + 1
    own = came[1:] if has_axes else came
    shared = (1, *rows[1:]) if len(rows) == 2 else rows
    if own not in (rows, shared) or (has_axes and came[0] == 0):
        axes = f"[A, {', '.join(map(str, rows))}]"
        raise ValueError(
            f"position_ids: expected shape {list(rows)}, or {axes} where RoPE has several axes, got "
            f"{shape_of(position_ids)}; one position a token"
        )
    if position_ids.device != inputs_embeds.device:
        device = str(inputs_embeds.device)
        raise ValueError(
            f"position_ids: expected device {device}, got {position_ids.device}; use position_ids.to({device!r})"
        )


def _check_length(length: object) -> None:
    expected = "length: expected an int >= 0, tokens of a packed row, or None"
    if isinstance(length, bool) or not isinstance(length, (numbers.Integral, torch.SymInt)):
        remedy = "read it first, or pass None" if isinstance(length, torch.Tensor) else "None counts"
        raise TypeError(f"{expected}, got {type(length).__name__}; {remedy}")
    if length < 0:
        raise ValueError(f"{expected}, got {length}; None counts")


def _check_fits(keep_mask: torch.Tensor, length: int) -> None:
    """Refuse rows that are too short. This reads `keep_mask`, which on a CPU costs no synchronisation."""
    fullest = _fullest_row(keep_mask)
    if fullest > length:
        raise ValueError(
            f"length: expected at least {fullest}, as many as the fullest row keeps, got {length}; None counts"
        )


Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _run_compact(
    inputs_embeds: torch.Tensor,
    keep_mask: torch.Tensor,
    position_ids: torch.Tensor | None,
    length: int,
    backend: str,
    target: torch.Tensor | None = None,
    source: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> Packed:
    merge = _as_merge(target, source, weight)
    if keep_mask.device.type == "cpu":
        _check_fits(keep_mask, length)
        if merge is not None:
            check_entries("merge", merge, keep_mask)
    packed: Packed = load_backend(backend, "compact").compact(inputs_embeds, keep_mask, position_ids, length, merge)
    return packed


def _as_merge(target: torch.Tensor | None, source: torch.Tensor | None, weight: torch.Tensor | None) -> Merge | None:
    return None if target is None or source is None or weight is None else Merge(target, source, weight)


def _fake_compact(
    inputs_embeds: torch.Tensor,
    keep_mask: torch.Tensor,
    position_ids: torch.Tensor | None,
    length: int,
    backend: str,
    target: torch.Tensor | None = None,
    source: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> Packed:
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


def _save_masks(ctx: Any, inputs: tuple[Any, ...], output: Packed) -> None:
    inputs_embeds, keep_mask, _, _, _, target, source, weight = inputs
    # only the gradient of the weights needs the embeddings
    embeds = inputs_embeds if weight is not None and weight.requires_grad else None
    ctx.save_for_backward(keep_mask, target, source, weight, embeds)


def _restore_gradient(ctx: Any, gradient: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    keep_mask, *entries, inputs_embeds = ctx.saved_tensors
    eager, merge = load_backend("torch", "compact"), _as_merge(*entries)
    if merge is None:
        return eager.restore(gradient, keep_mask), *[None] * 7
    of_weight = None if inputs_embeds is None else eager.weight_gradient(gradient, inputs_embeds, keep_mask, merge)
    return eager.restore_merged(gradient, keep_mask, merge), *[None] * 6, of_weight


_compact = define(
    "compact(Tensor inputs_embeds, Tensor keep_mask, Tensor? position_ids, SymInt length, str backend, "
    "Tensor? target=None, Tensor? source=None, Tensor? weight=None) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_compact,
    _fake_compact,
)
torch.library.register_autograd(f"{NAMESPACE}::compact", _restore_gradient, setup_context=_save_masks, lib=LIBRARY)
