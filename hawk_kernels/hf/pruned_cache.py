"""Keeps with a pruned cache what later calls need to know of its prompt.

The caller goes on counting the tokens of the whole prompt: masks and positions have its length. The cache is shorter.
The record that translates between the two is an attribute of the cache object, so that copies of a cache and several
caches at once each carry their own. It follows the rows of the cache when the caller reorders, selects or repeats them.
A cache may carry one record of each kind: what was dropped before the first layer, and what was dropped or hidden
inside the stack. `uncached_prompt` serves generations without a cache.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

_ATTRIBUTE = "_hawk_kernels_prompt_"
STACK_RECORDS = (f"{_ATTRIBUTE}CutPrompt", f"{_ATTRIBUTE}MaskedPrompt")
"""Attributes where a cache keeps what was dropped or hidden inside the stack."""
_ROW_METHODS = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave")


class RowRecord(Protocol):
    """What is kept with a cache, one row for each row of the cache."""

    def take_rows(self, rows: torch.Tensor) -> None:
        """Keep these rows of the record, int64 `[B']`; a row may come more than once."""

    @property
    def num_rows(self) -> int:
        """Count the rows, `B`."""

    @property
    def grows(self) -> bool:
        """Tell whether the cache grows with each token, so that a cache of length 0 has been reset."""


@dataclass
class CachedPrompt:
    """Translates calls that follow a pruned prompt from how the caller counts tokens to how the cache does.

    Attributes:
        full_length: tokens of a row before pruning, padding included, `T`.
        mask: int64 `[B, P]`, the mask of the prompt's tokens that are in the cache.
        is_full: whether that mask is all ones.
        next_position: `[..., B, 1]`, the position id of the first token after the prompt, as the caller counts.
        constant_mask: `[B, max_cache_len]` for a cache of fixed size, where a mask that grows or a look at the cache's
            length would recompile every step; None for other caches.
        slot_limit: tokens that a row may have, counted before pruning; None means any number.
        shift: `[..., B, 1]`, how much lower the position ids in the cache are than the caller's; None means not at all.
    """

    full_length: int
    mask: torch.Tensor
    is_full: bool
    next_position: torch.Tensor
    constant_mask: torch.Tensor | None
    slot_limit: int | None = None
    shift: torch.Tensor | None = None

    @property
    def num_rows(self) -> int:
        return self.mask.shape[0]

    @property
    def grows(self) -> bool:
        return self.constant_mask is None

    @property
    def num_dropped(self) -> int:
        """Count the tokens by which a row of the cache is shorter than the caller's counting."""
        return self.full_length - self.mask.shape[1]

    def take_rows(self, rows: torch.Tensor) -> None:
        self.mask = self.mask.index_select(0, rows.to(self.mask.device))
        if self.next_position.shape[-2] > 1:
            self.next_position = self.next_position.index_select(-2, rows.to(self.next_position.device))
        if self.constant_mask is not None:
            self.constant_mask = self.constant_mask.index_select(0, rows.to(self.constant_mask.device))
        if self.shift is not None:
            self.shift = self.shift.index_select(-2, rows.to(self.shift.device))

    def mask_for(
        self, cache: Any, incoming: torch.Tensor | dict[str, Any] | None, batch: int, length: int
    ) -> torch.Tensor | None:
        """Make the mask of a call with `length` new tokens over the pruned cache.

        Args:
            cache: the cache, before the call.
            incoming: the caller's mask: None, 2-D over the whole prompt, or prepared for a cache of fixed size.
            batch: rows of the call.
            length: new tokens.

        Raises:
            ValueError: the mask does not have the length of the whole prompt and what followed, the rows changed, or
                rows became longer than the model's attention allows.
        """
        if self.slot_limit is not None and self.constant_mask is None:
            check_slots(self.slot_limit, self.num_dropped + int(cache.get_seq_length()) + length)
        given = incoming if isinstance(incoming, torch.Tensor) and incoming.dim() == 2 else None
        if self.constant_mask is not None and given is None:
            return self._rows(self.constant_mask, batch)
        if incoming is not None and given is None:
            came = "a dict of masks" if isinstance(incoming, dict) else f"a mask of {incoming.dim()} dimensions"
            raise ValueError(
                f"attention_mask: expected a [batch, length] mask or None over a pruned cache, got {came}; pass the "
                "2-D mask"
            )
        if given is None and self.is_full:
            return None
        prompt = self.mask
        if self.constant_mask is None:
            cached = int(cache.get_seq_length())
            # assisted decoding may have cropped the cache into the prompt, which ends in text
            prompt = prompt[:, :cached]
            new = cached - prompt.shape[1] + length
            if given is not None:
                self.check_length(cache, given, length)
        seen = self.num_dropped + prompt.shape[1]
        prompt = self._rows(prompt, batch)
        tail = prompt.new_ones(batch, new) if given is None else given[:, seen:].to(prompt)
        return torch.cat([prompt, tail], dim=1)

    def positions_for(self, cache: Any, length: int, batch: int | None = None) -> torch.Tensor:
        """Number `length` new tokens from where the prompt ended: position ids `[..., B, length]`.

        Raises:
            ValueError: the call has `batch` rows, and the prompt had another number.
        """
        if batch is not None and self.next_position.shape[-2] not in (1, batch):
            raise ValueError(self._other_rows(batch))
        after = int(cache.get_seq_length()) - self.mask.shape[1]
        return self.next_position + torch.arange(after, after + length, device=self.next_position.device)

    def in_cache(self, positions: torch.Tensor) -> torch.Tensor:
        """Turn the caller's position ids of new tokens, `[..., 1 or B, length]`, into those that continue the cache.

        Raises:
            ValueError: the call has other rows than the prompt had.
        """
        if self.shift is None:
            return positions
        if positions.shape[-2] not in (1, self.num_rows):
            raise ValueError(self._other_rows(positions.shape[-2]))
        return positions - self.shift.to(positions)

    def check_length(self, cache: Any, attention_mask: torch.Tensor, length: int) -> None:
        """Refuse a 2-D mask that does not span the whole prompt and everything after it.

        Raises:
            ValueError: the mask has another length.
        """
        seen = int(cache.get_seq_length()) + self.num_dropped
        if attention_mask.shape[1] != seen + length:
            raise ValueError(
                f"attention_mask: expected length {seen + length} ({seen} tokens so far, counted before pruning, and "
                f"{length} new), got {attention_mask.shape[1]}. {_CONTINUE}. Assisted decoding needs "
                "transformers >= 5.14"
            )

    def check_continues(self, cache: Any, position_ids: torch.Tensor) -> None:
        """Refuse tokens that are in the cache already, as when a full history is cut at the pruned length.

        Raises:
            ValueError: the positions do not go on where the cache ends.
        """
        # where there are several rows of positions the first may count otherwise; all advance alike over text
        expected, came = self.positions_for(cache, 1), position_ids[..., :1].to(self.next_position.device)
        expected, came = (positions[-1] if positions.dim() > 2 else positions for positions in (expected, came))
        if not bool((came == expected).all()):
            raise ValueError(
                f"position_ids: expected {position_ids.shape[-1]} tokens that continue where the pruned cache ends, "
                f"got some that are in the cache already. {_CONTINUE}"
            )

    def _rows(self, mask: torch.Tensor, batch: int) -> torch.Tensor:
        if mask.shape[0] == batch:
            return mask
        if self.is_full:
            return mask[:1].expand(batch, -1)
        raise ValueError(self._other_rows(batch))

    def _other_rows(self, batch: int) -> str:
        return (
            f"past_key_values: expected the {self.num_rows} rows of the prompt that was pruned into this cache, got "
            f"{batch}; call the cache's own batch_select_indices or batch_repeat_interleave, or prefill again with the "
            "rows you need"
        )


_CONTINUE = (
    "Only generate over a cache that grows can take the full history again: pass only the new tokens as input_ids, "
    "with an attention_mask over the whole conversation before pruning, or start with a new cache"
)


_Record = TypeVar("_Record", bound=RowRecord)
# for each text model, by kind of record, what its latest caches are recognised by
_TRACES: weakref.WeakKeyDictionary[nn.Module, dict[str, deque[Any]]] = weakref.WeakKeyDictionary()


class CacheRecords(Generic[_Record]):
    """Keeps a record with each cache, and in step with the rows of the cache.

    The methods of a cache object that change its rows are replaced, on that object alone, for as long as it has a
    record. A cache that was built anew from the tensors of a recorded one gets that one's record: it is recognised by
    the keys of the prompt's last token.

    Args:
        kind: class of the records.
        text: the text model that fills the caches; what it has filled in one block is recognised in the next.
    """

    def __init__(self, kind: type[_Record], text: nn.Module) -> None:
        self._kind = kind
        self.attribute = _ATTRIBUTE + kind.__name__
        self._traces: deque[_Trace[_Record]] = _TRACES.setdefault(text, {}).setdefault(kind.__name__, deque(maxlen=8))

    def keep(self, cache: Any, record: _Record) -> None:
        """Keep `record` with `cache`, which a prompt has just filled."""
        self._attach(cache, record)
        # a cache of fixed size is not built anew: its tensors stay where they are
        if not getattr(cache, "is_compileable", False):
            trace = _Trace.of(cache, record)
            if trace is not None:
                self._traces.append(trace)

    def of(self, cache: Any) -> _Record | None:
        """Return the record of `cache`, if it has one."""
        record = getattr(cache, self.attribute, None)
        if isinstance(record, self._kind):
            # a growing cache that was reset is empty; the length of a cache of fixed size lives on the device
            return None if record.grows and cache.get_seq_length() == 0 else record
        if cache is None or not self._traces or hasattr(cache, self.attribute) or torch.compiler.is_compiling():
            return None
        return self._recognised(cache)

    def forget(self, cache: Any) -> None:
        """Drop the record of a cache that was reset and is about to be filled again."""
        forget(cache)

    def _recognised(self, cache: Any) -> _Record | None:
        if getattr(cache, "is_compileable", False) or cache.get_seq_length() == 0:
            return None
        found = next((found for trace in list(self._traces) if (found := trace.record_of(cache)) is not None), None)
        if found is None:
            # so that no later call looks for it again
            setattr(cache, self.attribute, None)
        else:
            self._attach(cache, found)
        return found

    def _attach(self, cache: Any, record: _Record) -> None:
        setattr(cache, self.attribute, record)
        for name in _ROW_METHODS:
            if hasattr(type(cache), name) and name not in vars(cache):
                setattr(cache, name, _FollowedRows(cache, name))


def _records(cache: Any) -> list[RowRecord]:
    """Collect the records of all kinds that are kept with a cache."""
    kept = [value for name, value in vars(cache).items() if name.startswith(_ATTRIBUTE)]
    return [record for record in kept if record is not None]


def forget(cache: Any) -> None:
    """Drop what a prompt left with `cache`."""
    if cache is None:
        return
    left = [
        name for name, value in vars(cache).items() if name.startswith(_ATTRIBUTE) or isinstance(value, _FollowedRows)
    ]
    for name in left:
        delattr(cache, name)


class _Guarded:
    """Mixed into the class of a pruned cache: it takes new tokens only inside `prune`.

    The class of the one object changes, and nothing in it points back at the object, so that the cache is freed as
    before. Copies have the same class, and so the same guard.
    """

    # mypy does not know that the class of a cache follows this one, where `super()` finds the methods

    def update(self, *args: Any, **kwargs: Any) -> Any:
        state = vars(self)
        if not state[_IS_SERVED]:
            cache: Any = self
            # as in a cache that was reset to be filled anew
            if int(cache.get_seq_length()) > 0:
                raise ValueError(
                    "cannot continue a pruned cache outside prune, nor by code that was compiled before the block: "
                    "positions and masks would be those of the whole prompt; continue inside a block, or prefill a "
                    "new cache"
                )
            unguard(cache)
            return cache.update(*args, **kwargs)
        # the class of the cache that is guarded comes next, which mypy cannot know
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        held = super().get_seq_length(*args, **kwargs)  # type: ignore[misc]
        return held + vars(self).get(_NUM_DROPPED, 0)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new_guarded, (type(self).__mro__[2],), vars(self)


_IS_SERVED = "_hawk_kernels_is_served"
_NUM_DROPPED = "_hawk_kernels_num_dropped"


def check_served(cache: Any, attributes: tuple[str, ...]) -> None:
    """Refuse a cache with a record of a kind that this block does not serve.

    Args:
        cache: of the call.
        attributes: where such records would be kept.

    Raises:
        ValueError: the cache has such a record.
    """
    for name in attributes:
        if getattr(cache, name, None) is not None:
            raise ValueError(
                "cannot continue a cache of which another block dropped or hid tokens inside the stack; continue it in "
                "that block, entered again, or in one with stages after a layer and the same mode, or prefill a new "
                "cache"
            )


def guard(cache: Any) -> None:
    """Let `cache`, which holds a pruned prompt, refuse new tokens wherever the hooks do not serve it."""
    setattr(cache, _IS_SERVED, False)
    if not isinstance(cache, _Guarded):
        plain: Any = type(cache)
        cache.__class__ = _guarded_class(plain)


def unguard(cache: Any) -> None:
    """Undo `guard` for a cache that is about to be filled anew."""
    if isinstance(cache, _Guarded):
        vars(cache).pop(_IS_SERVED, None)
        vars(cache).pop(_NUM_DROPPED, None)
        cache.__class__ = type(cache).__mro__[2]


def serve(cache: Any, is_served: bool) -> None:
    """Tell a guarded cache whether the hooks of `prune` serve the call that is under way."""
    if isinstance(cache, _Guarded):
        setattr(cache, _IS_SERVED, is_served)


def count_dropped(cache: Any, num_dropped: int) -> None:
    """Let a guarded cache count dropped tokens in the length that it reports; 0 ends that."""
    if isinstance(cache, _Guarded):
        setattr(cache, _NUM_DROPPED, num_dropped)


@functools.cache
def _guarded_class(plain: Any) -> Any:
    return type(plain.__name__, (_Guarded, plain), {"__module__": plain.__module__})


def _new_guarded(plain: Any) -> Any:
    cls = _guarded_class(plain)
    return cls.__new__(cls)


class _FollowedRows:
    """Replaces a method that changes the rows of one cache by one that changes the rows of its record as well.

    It refers to the cache weakly, so that a cache is freed as soon as nobody else uses it.
    """

    def __init__(self, cache: Any, name: str) -> None:
        self._cache, self._name = weakref.ref(cache), name

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy of the cache gets one of its own
        return type(self), (self._cache(), self._name)

    def __call__(self, change: Any) -> None:
        cache = self._cache()
        if cache is None:
            raise ValueError(
                f"cannot call {self._name} on a shallow copy of a pruned cache that is gone; use copy.deepcopy"
            )
        getattr(type(cache), self._name)(cache, change)
        for record in _records(cache):
            if self._name == "reorder_cache":
                record.take_rows(change)
                continue
            rows = torch.arange(record.num_rows, device=change.device if isinstance(change, torch.Tensor) else None)
            repeats = self._name == "batch_repeat_interleave"
            record.take_rows(rows.repeat_interleave(change) if repeats else rows[change])


@dataclass(frozen=True)
class _Trace(Generic[_Record]):
    """What identifies a cache that was built anew from the tensors of another.

    Attributes:
        record: of the prompt.
        layer: index of the last layer whose keys are those of all its tokens of the prompt.
        length: tokens of the prompt in that layer.
        keys: `[B, Hkv, D]`, the keys of the last token there, which depend on the whole prompt.
    """

    record: _Record
    layer: int
    length: int
    keys: torch.Tensor

    @classmethod
    def of(cls, cache: Any, record: _Record) -> _Trace[_Record] | None:
        """Remember a cache that a prompt has just filled; None where every layer keeps a window of the prompt."""
        for layer in reversed(range(len(cache.layers))):
            keys = _keys(cache, layer)
            # tokens that were dropped inside the stack leave later layers with fewer of them
            length = 0 if keys is None else int(cache.layers[layer].get_seq_length())
            if keys is not None and keys.shape[-2] == length > 0:
                return cls(copy.copy(record), layer, length, keys[:, :, -1].detach().clone())
        return None

    def record_of(self, cache: Any) -> _Record | None:
        """Return the record of a cache if all of its rows are among those of this prompt, else None."""
        keys = _keys(cache, self.layer) if self.layer < len(cache.layers) else None
        if keys is None or keys.shape[-2] < self.length or keys.shape[1::2] != self.keys.shape[1:]:
            return None
        came = keys[:, :, self.length - 1]
        # in the dtype of the cache, which may have been converted
        same = (came.unsqueeze(1) == self.keys.to(came)).flatten(2).all(dim=2)
        if not bool(same.any(dim=1).all()):
            return None
        record = copy.copy(self.record)
        record.take_rows(same.int().argmax(dim=1))
        return record


def _keys(cache: Any, layer: int) -> torch.Tensor | None:
    """Return the keys that a layer of a cache holds, `[B, Hkv, N, D]`, where it holds them as they are."""
    keys = getattr(cache.layers[layer], "keys", None)
    return keys if isinstance(keys, torch.Tensor) and keys.dim() == 4 else None


def check_slots(limit: int | None, length: int) -> None:
    """Refuse rows in which attention would depend on where a token stands, which pruning changes.

    Args:
        limit: tokens that a row may have; None means any number.
        length: tokens that the rows have, padding included, counted before pruning.

    Raises:
        ValueError: the rows have more tokens.
    """
    if limit is not None and length > limit:
        raise ValueError(
            f"input_ids: expected rows of at most {limit} tokens, padding and generated tokens included, got {length}: "
            "above that this model scales attention by the number of tokens before a query, which pruning changes; use "
            "shorter prompts, set attn_temperature_tuning = False in the config of its text model, or leave the block"
        )


def constant_mask(cache: Any, mask: torch.Tensor) -> torch.Tensor | None:
    """Continue `mask` by ones to the size of the cache; None for a cache that grows or is shorter than the prompt."""
    left = fixed_size(cache) - mask.shape[1]
    return None if left < 0 else torch.cat([mask, mask.new_ones(mask.shape[0], left)], dim=1)


def fixed_size(cache: Any) -> int:
    """Count the tokens that layers without windows can hold in a cache of fixed size; -1 for a cache that grows."""
    if not getattr(cache, "is_compileable", False):
        return -1
    if hasattr(cache, "get_max_length"):
        return int(cache.get_max_length())
    # before transformers 5.18 a cache told the size of its first layer, which may be a window
    sizes = (layer.get_max_cache_shape() for layer in cache.layers if hasattr(layer, "get_max_cache_shape"))
    return max(map(int, sizes), default=-1)


def bytes_saved(cache: Any, full_length: int) -> int | None:
    """Count the bytes by which a cache that a prompt has just filled is smaller than that of the whole prompt.

    Args:
        cache: of `past_key_values`.
        full_length: tokens of a row before any were dropped, padding included.

    Returns:
        The number, 0 for a cache of fixed size; None where no layer holds keys and values as they are.
    """
    if getattr(cache, "is_compileable", False):
        return 0
    saved, is_known = 0, False
    for index, layer in enumerate(cache.layers):
        keys, values = _keys(cache, index), getattr(layer, "values", None)
        if keys is None or not keys.shape[-2] or not isinstance(values, torch.Tensor):
            continue
        is_known = True
        whole = full_length
        if getattr(layer, "is_sliding", False):
            whole = min(whole, layer.sliding_window - 1)
        held = keys.shape[-2]
        saved += (whole - held) * (keys.nbytes + values.nbytes) // held
    return saved if is_known else None
