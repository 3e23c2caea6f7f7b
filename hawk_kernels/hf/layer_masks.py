"""Choosing tokens inside the stack and masking them: later layers of the text model get masks without them.

The sequence keeps its length. The layers after the one that ranks the tokens get an attention mask in which the columns
of the dropped tokens are closed, in the prompt and in every later call over its cache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

from hawk_kernels.hf.anatomy import Anatomy
from hawk_kernels.hf.choose_tokens import Context
from hawk_kernels.hf.hooks import Handle
from hawk_kernels.hf.projections import LayerProjections
from hawk_kernels.hf.pruned_cache import CacheRecords
from hawk_kernels.hf.rotary import rotary_of_layer

_IMPLEMENTATIONS = ("sdpa", "eager")
# from this version of transformers on, the hooks of a layer run outside what is computed again
_HOOKS_OUTSIDE_CHECKPOINTS = (5, 18)
# from what enters the ranking layer to the tokens that later layers do not see, bool [B, T]
Choose = Callable[[torch.Tensor, LayerProjections, Context], torch.Tensor | None]


class LayerMasks:
    """Masks tokens in the later layers of a text model while its hooks are attached.

    Args:
        anatomy: the model's parts.
        layer: the last layer that sees every token, counted from 1; what enters it ranks the tokens.
        method: name of the method, for messages.

    Raises:
        ValueError: there is no such layer, or no layer after it.
        TypeError: the model has layers that see tokens without attention.
    """

    def __init__(self, anatomy: Anatomy, layer: int, method: str) -> None:
        text: Any = anatomy.text
        self._text = text
        self._layers: list[Any] = list(text.layers)
        depth = len(self._layers)
        if layer >= depth:
            remedy = f"pass layer={depth - 1} or less" if depth > 1 else "use another method"
            raise ValueError(
                f"layer: expected 1 to {depth - 1}, since tokens are hidden from the layers after it, got {layer} of "
                f"{depth} layers; {remedy}"
            )
        if not all(hasattr(each, "self_attn") for each in self._layers[layer - 1 :]):
            raise TypeError(
                f"method: expected one that removes tokens before the first layer, got {method!r}; use 'hawk', as a "
                f"{anatomy.family.model_type} has layers without attention masks, which see every token"
            )
        self._first = layer
        self._projections = anatomy.family.projections(self._layers[layer - 1])
        self._records = CacheRecords(_MaskedPrompt)
        self._thread = _ThreadState()

    def attach(self) -> list[Handle]:
        """Register the hooks; removing the handles ends the masking."""
        ranking = self._layers[self._first - 1]
        handles: list[Handle] = [ranking.register_forward_pre_hook(self._before_ranking, with_kwargs=True)]
        for index in range(self._first, len(self._layers)):
            hook = partial(self._before_masked, index)
            handles.append(self._layers[index].register_forward_pre_hook(hook, with_kwargs=True))
        return handles

    def start(self, valid: torch.Tensor) -> None:
        """Prepare for a prompt that is about to enter the text model, so far with nothing to mask.

        Args:
            valid: bool `[B, T]`, its own tokens, False at padding and at guesses after its end.

        Raises:
            ValueError: an implementation of attention that takes no mask over pairs, or gradient checkpointing that
                would compute the layers again without these masks.
        """
        implementation = self._text.config._attn_implementation
        if implementation not in _IMPLEMENTATIONS:
            raise ValueError(
                f"attn_implementation: expected 'sdpa' or 'eager', whose masks can hide tokens from single layers, got "
                f"{implementation!r}; call model.set_attn_implementation('sdpa')"
            )
        recomputes = any(getattr(each, "gradient_checkpointing", False) and each.training for each in self._layers)
        if recomputes and torch.is_grad_enabled() and _version() < _HOOKS_OUTSIDE_CHECKPOINTS:
            raise ValueError(
                "cannot hide tokens from single layers with gradient checkpointing before transformers 5.18, which "
                "computes the layers again without the masks; upgrade, or call model.gradient_checkpointing_disable()"
            )
        self._thread.begin(valid, is_prompt=True)

    def choose_inside(self, choose: Choose) -> None:
        """Let `choose` tell what to mask once the ranking layer is reached."""
        self._thread.choose = choose

    def mask(self, masked: torch.Tensor) -> None:
        """Mask these tokens, bool `[B, T]`, which are known before the first layer."""
        self._thread.masked = masked

    def finish(self, cache: Any) -> None:
        """Let `cache` keep what was masked in the prompt that has just left the text model."""
        if cache is not None and self._thread.masked is not None:
            self._records.keep(cache, _MaskedPrompt(self._thread.masked))
        self._thread.begin(None, is_prompt=False)

    def resume(self, cache: Any) -> None:
        """Mask in a later call over `cache`, which is about to enter the text model, what was masked in its prompt."""
        self._thread.begin(None, is_prompt=False)
        record = self._records.of(cache)
        self._thread.masked = None if record is None else record.masked

    def _before_ranking(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        choose, valid = self._thread.choose, self._thread.valid
        if choose is None or valid is None:
            return
        self._thread.choose = None
        states = args[0] if args else kwargs["hidden_states"]
        rotary = rotary_of_layer(layer, kwargs.get("position_embeddings"), states)
        seen = _seen_by_last(kwargs.get("attention_mask"), valid)
        scale = layer.self_attn.scaling * getattr(layer.self_attn, "qk_scale_factor", 1.0)
        self._thread.masked = choose(states, self._projections, Context(rotary=rotary, seen=seen, scale=scale))

    def _before_masked(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        masked = self._thread.masked
        if masked is None:
            return None
        states = args[0] if args else kwargs["hidden_states"]
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        length = states.shape[1]
        width, offset = (length, 0) if cache is None else cache.get_mask_sizes(length, index)
        if not self._thread.is_prompt:
            return args, {**kwargs, "attention_mask": self._closed(layer, mask, masked, states, width, offset)}
        # most layers of a prompt share one mask
        kind = (width, offset, states.device, _is_causal(layer))
        for given, other_kind, made in self._thread.made:
            if given is mask and other_kind == kind:
                return args, {**kwargs, "attention_mask": made}
        made = self._closed(layer, mask, masked, states, width, offset)
        self._thread.made.append((mask, kind, made))
        return args, {**kwargs, "attention_mask": made}

    def _closed(
        self, layer: Any, mask: torch.Tensor | None, masked: torch.Tensor, states: torch.Tensor, width: int, offset: int
    ) -> torch.Tensor:
        """Make the mask of a layer, `[B, 1, length, keys]`, with the columns of masked tokens closed.

        Args:
            layer: whose mask it is.
            mask: the layer's own, bool or additive; None means what the layer's attention takes it for.
            masked: bool `[B, T]`.
            states: what enters the layer, `[B, length, hidden]`.
            width: keys of the layer.
            offset: tokens before the first of its keys, over which a window has slid.

        Raises:
            ValueError: the call has other rows than the prompt.
        """
        device, length = states.device, states.shape[1]
        if masked.shape[0] != states.shape[0]:
            raise ValueError(
                f"past_key_values: expected the {masked.shape[0]} rows of the prompt that was read into this cache, "
                f"got {states.shape[0]}; call the cache's own batch_select_indices or batch_repeat_interleave, or "
                "prefill again with the rows you need"
            )
        if mask is None:
            row = torch.arange(length, device=device) + (0 if self._thread.is_prompt else width + offset - length)
            last = row if _is_causal(layer) else torch.full_like(row, offset + width)
            mask = (torch.arange(offset, offset + width, device=device) <= last.unsqueeze(1)).view(1, 1, length, width)
            if self._text.config._attn_implementation == "eager":
                lowest = torch.finfo(states.dtype).min
                mask = torch.zeros(mask.shape, dtype=states.dtype, device=device).masked_fill_(~mask, lowest)
        end = offset + mask.shape[-1]
        columns = nn.functional.pad(masked.to(device), (0, max(0, end - masked.shape[1])))[:, None, None, offset:end]
        if self._thread.is_prompt:
            # a masked token still sees itself: a row that sees nothing at all would be NaN
            itself = torch.eye(length, mask.shape[-1], dtype=torch.bool, device=device)
            columns = columns & ~itself
        return mask & ~columns if mask.dtype == torch.bool else mask.masked_fill(columns, torch.finfo(mask.dtype).min)


def _version() -> tuple[int, ...]:
    return tuple(map(int, transformers.__version__.split(".")[:2]))


def _is_causal(layer: Any) -> bool:
    """Tell whether no mask means causal attention; in a model that reads both ways, no mask shows all tokens."""
    return bool(getattr(layer.self_attn, "is_causal", True))


def _seen_by_last(mask: torch.Tensor | None, valid: torch.Tensor) -> torch.Tensor:
    """Mark which tokens the last valid one of each row sees in a layer with this mask, bool `[B, T]`; all without."""
    if mask is None:
        return valid
    length = valid.shape[1]
    last = length - 1 - valid.flip(1).int().argmax(dim=1)
    rows = mask[:, 0].expand(len(valid), -1, -1)[..., :length].to(valid.device)
    row = rows.gather(1, last.view(-1, 1, 1).expand(-1, 1, length)).squeeze(1)
    return valid & (row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2)


@dataclass
class _MaskedPrompt:
    """The tokens of a cached prompt that later layers do not see, bool `[B, T]`."""

    masked: torch.Tensor

    @property
    def num_rows(self) -> int:
        return self.masked.shape[0]

    @property
    def grows(self) -> bool:
        # a cache that was reset is filled by a prompt, which forgets what was masked before
        return False

    def take_rows(self, rows: torch.Tensor) -> None:
        self.masked = self.masked.index_select(0, rows.to(self.masked.device))


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.begin(None, is_prompt=False)

    def begin(self, valid: torch.Tensor | None, is_prompt: bool) -> None:
        """Forget the call before."""
        self.valid, self.is_prompt = valid, is_prompt
        self.choose: Choose | None = None
        self.masked: torch.Tensor | None = None
        # masks that were made for the prompt's layers: the given one, of which kind, and what became of it
        self.made: list[tuple[Any, Any, torch.Tensor]] = []
