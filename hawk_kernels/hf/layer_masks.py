"""Hides tokens inside the stack: the layers after a stage get masks without the dropped tokens.

The sequence keeps its length. The layers after a stage get an attention mask in which the columns of the dropped tokens
are closed, in the prompt and in every later call over its cache. This computes what dropping them computes, and saves
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hawk_kernels.hf.prompt import Prompt
from hawk_kernels.hf.pruned_cache import CacheRecords
from hawk_kernels.selection import Merge


class PromptMask:
    """A prompt on its way through the layers; each stage hides more of its tokens.

    Args:
        text: the text model.
        prompt: the prompt that enters it, on the host.
        valid: bool `[B, T]`, its own tokens, False at padding and at guesses after its end.
    """

    def __init__(self, text: Any, prompt: Prompt, valid: torch.Tensor) -> None:
        self._text = text
        self._entered = prompt
        self.valid = valid
        self._hidden: list[_Hidden] = []
        # masks that were made for the prompt's layers: the mask that came, its kind, and the one made from it
        self._made: list[tuple[Any, Any, torch.Tensor]] = []

    @property
    def prompt(self) -> Prompt:
        """Describe the tokens that are still seen, on the host; this waits for the device if some were hidden."""
        if not self._hidden:
            return self._entered
        seen = ~self._hidden[-1].tokens.cpu().numpy()
        return replace(self._entered, visual=self._entered.visual & seen, valid=self._entered.valid & seen)

    def keep(self, first: int, kept: torch.Tensor, counts: list[int], merge: Merge | None) -> None:
        """Hide all tokens but these, bool `[B, T]`, from the layers from index `first` on.

        Raises:
            ValueError: a map by which tokens are merged, which a mask cannot do.
        """
        if merge is not None:
            raise ValueError(
                "mode: expected 'drop' with a method that merges tokens inside the stack, got 'hide'; a mask cannot "
                "merge, so leave mode out, or turn the method's merging off"
            )
        hidden = self.valid & ~kept
        if self._hidden:
            hidden = hidden | self._hidden[-1].tokens
        self.valid = self.valid & kept
        self._hidden.append(_Hidden(first, hidden))

    def of_present(self, kept: torch.Tensor) -> torch.Tensor:
        """Return a mask of the rows that entered, bool `[B, T]`, for the present ones, which are the same."""
        return kept

    def of_whole(self, values: torch.Tensor, fill: Any) -> torch.Tensor:
        """Return `[B, T]` of the present rows for the rows that entered, which are the same."""
        return values

    def adapted(
        self, index: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give a layer a mask without the tokens that are hidden from it."""
        hidden = hidden_from(self._hidden, index)
        if hidden is None:
            return args, kwargs
        states, mask, cache = states_of(args, kwargs), kwargs.get("attention_mask"), kwargs.get("past_key_values")
        length = states.shape[1]
        width, offset = (length, 0) if cache is None else cache.get_mask_sizes(length, index)
        # most layers share one mask
        kind = (id(hidden), width, offset, states.device, is_causal(layer))
        for given, other_kind, made in self._made:
            if given is mask and other_kind == kind:
                return args, {**kwargs, "attention_mask": made}
        made = closed(self._text, layer, mask, hidden, states, width, offset, is_prompt=True)
        self._made.append((mask, kind, made))
        return args, {**kwargs, "attention_mask": made}

    def after(self, index: int, states: torch.Tensor) -> torch.Tensor | None:
        """Leave what comes out of a layer as it is."""
        return None

    def keep_with(self, cache: Any, records: CacheRecords[MaskedPrompt]) -> None:
        """Note on `cache`, which the prompt has filled, what is hidden; None stands for no cache."""
        if cache is not None and self._hidden:
            records.keep(cache, MaskedPrompt(list(self._hidden)))


@dataclass(frozen=True)
class _Hidden:
    """Tokens that the layers from index `first` on do not see, bool `[B, T]`."""

    first: int
    tokens: torch.Tensor


@dataclass
class MaskedPrompt:
    """The tokens of a cached prompt that later layers do not see, stage by stage."""

    hidden: list[_Hidden]

    @property
    def num_rows(self) -> int:
        return self.hidden[0].tokens.shape[0]

    @property
    def grows(self) -> bool:
        # a cache that was reset is filled by a prompt, which forgets what was masked before
        return False

    def take_rows(self, rows: torch.Tensor) -> None:
        self.hidden = [
            _Hidden(each.first, each.tokens.index_select(0, rows.to(each.tokens.device))) for each in self.hidden
        ]


class LaterMask:
    """A call over a cache of a prompt some of whose tokens are hidden from later layers."""

    def __init__(self, text: Any, record: MaskedPrompt, given: Any) -> None:
        self._text, self._record = text, record

    def adapted(
        self, index: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Give a layer a mask without the tokens that are hidden from it; None where there are none."""
        hidden = hidden_from(self._record.hidden, index)
        if hidden is None:
            return None
        states = states_of(args, kwargs)
        width, offset = kwargs["past_key_values"].get_mask_sizes(states.shape[1], index)
        mask = kwargs.get("attention_mask")
        made = closed(self._text, layer, mask, hidden, states, width, offset, is_prompt=False)
        return args, {**kwargs, "attention_mask": made}


def hidden_from(hidden: list[_Hidden], index: int) -> torch.Tensor | None:
    """Return the tokens that the layer at `index` does not see, bool `[B, T]`, or None where it sees all."""
    return next((each.tokens for each in reversed(hidden) if each.first <= index), None)


def closed(
    text: Any,
    layer: Any,
    mask: torch.Tensor | None,
    hidden: torch.Tensor,
    states: torch.Tensor,
    width: int,
    offset: int,
    is_prompt: bool,
) -> torch.Tensor:
    """Make the mask of a layer, `[B, 1, length, keys]`, with the columns of hidden tokens closed.

    Args:
        text: the text model.
        layer: whose mask it is.
        mask: the layer's own, bool or additive; None means what the layer's attention takes it for.
        hidden: bool `[B, T]`.
        states: what enters the layer, `[B, length, hidden]`.
        width: keys of the layer.
        offset: tokens before the first of its keys, over which a window has slid.
        is_prompt: whether the call is that of the prompt itself.

    Raises:
        ValueError: the call has other rows than the prompt.
    """
    device, length = states.device, states.shape[1]
    check_rows(hidden.shape[0], states)
    if mask is None:
        row = torch.arange(length, device=device) + (0 if is_prompt else width + offset - length)
        last = row if is_causal(layer) else torch.full_like(row, offset + width)
        mask = (torch.arange(offset, offset + width, device=device) <= last.unsqueeze(1)).view(1, 1, length, width)
        mask = for_attention(text, mask, states)
    end = offset + mask.shape[-1]
    columns = nn.functional.pad(hidden.to(device), (0, max(0, end - hidden.shape[1])))[:, None, None, offset:end]
    if is_prompt:
        # a hidden token still sees itself: a row that sees nothing at all would be NaN
        itself = torch.eye(length, mask.shape[-1], dtype=torch.bool, device=device)
        columns = columns & ~itself
    return mask & ~columns if mask.dtype == torch.bool else mask.masked_fill(columns, torch.finfo(mask.dtype).min)


def for_attention(text: Any, mask: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Turn a bool mask into numbers to add if the text model's attention is eager, and return it as it is otherwise."""
    if mask.dtype != torch.bool or text.config._attn_implementation != "eager":
        return mask
    lowest = torch.finfo(states.dtype).min
    return torch.zeros(mask.shape, dtype=states.dtype, device=states.device).masked_fill_(~mask, lowest)


def is_causal(layer: Any) -> bool:
    """Tell whether no mask means causal attention; in a model that reads both ways, no mask shows all tokens."""
    return bool(getattr(layer.self_attn, "is_causal", True))


def check_rows(rows: int, states: torch.Tensor) -> None:
    """Refuse a call that has more or fewer rows than the prompt that was read into its cache.

    Raises:
        ValueError: `states`, `[B, length, hidden]`, does not have `rows` rows.
    """
    if rows != states.shape[0]:
        raise ValueError(
            f"past_key_values: expected the {rows} rows of the prompt that was read into this cache, got "
            f"{states.shape[0]}; call the cache's own batch_select_indices or batch_repeat_interleave, or prefill "
            "again with the rows you need"
        )


def states_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return what enters a layer, `[B, T, hidden]`."""
    states: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return states


def with_states(
    args: tuple[Any, ...], kwargs: dict[str, Any], states: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a layer with other states."""
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})
