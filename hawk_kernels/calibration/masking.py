"""Masks the visual tokens of a prompt from single attention heads, by forward hooks alone.

The keys of visual tokens leave the softmax of that head, in the prefill and in every decoding step; its view of the
text, and all other heads, stay as they are. The mask gets an axis of heads for that, which scaled dot product
attention and eager attention take as it is, whatever the number of KV heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hawk_kernels.hf.anatomy import Anatomy, dissect
from hawk_kernels.hf.hooks import call_length, named

LAYERS = ("first", "all")
"""Where heads are masked: in the layer whose queries and keys score the tokens, or in every attention layer."""

_ATTENTIONS = ("sdpa", "eager")


def attention_modules(anatomy: Anatomy, layers: str) -> list[nn.Module]:
    """Return the attention of the first decoder layer that has one ("first"), or of all that do ("all")."""
    if layers not in LAYERS:
        raise ValueError(f"layers: expected 'first' (the scoring layer) or 'all', got {layers!r}")
    text: Any = anatomy.text
    modules = [layer.self_attn for layer in text.layers if hasattr(layer, "self_attn")]
    return modules[:1] if layers == "first" else modules


def hide_visual_tokens(model: nn.Module, heads: Sequence[int | None], *, layers: str = "first") -> MaskedVisualTokens:
    """Hide the visual tokens from one head of each row, for whatever runs inside a `with` block.

        with hide_visual_tokens(model, [None, 0, 7]):
            logits = model(**inputs).logits    # row 0 as always, rows 1 and 2 without what heads 0 and 7 see

    Visual keys leave the softmax of that head for every query. A visual token whose every other key is masked keeps
    itself, since a softmax over no key is not a number.

    Args:
        model: a transformers model of a supported family, with attention "sdpa" or "eager".
        heads: for each row of the batch the head, in `[0, H)`, that does not see visual tokens; None hides nothing.
        layers: "first", the layer whose queries and keys score the tokens, or "all": the head of that number in every
            layer with attention.

    Raises:
        TypeError: a model that is not supported, or an attention whose masks have no axis of heads.
        ValueError: a head or layers out of range.
    """
    return MaskedVisualTokens(dissect(model), heads, layers)


class MaskedVisualTokens:
    """The context manager that `hide_visual_tokens` returns; it does not support several threads at once."""

    def __init__(self, anatomy: Anatomy, heads: Sequence[int | None], layers: str) -> None:
        num_heads = anatomy.projections.num_heads
        for head in heads:
            if head is not None and not 0 <= head < num_heads:
                raise ValueError(f"heads: expected None or a head from 0 to {num_heads - 1}, got {head}")
        text: Any = anatomy.text
        attention = text.config._attn_implementation
        if attention not in _ATTENTIONS:
            raise TypeError(
                f"model: expected attention 'sdpa' or 'eager', whose masks may differ between heads, got {attention!r};"
                " load the model with attn_implementation='sdpa'"
            )
        self._anatomy = anatomy
        self._num_heads = num_heads
        self._pairs = [(row, head) for row, head in enumerate(heads) if head is not None]
        self._batch = len(heads)
        self._modules = attention_modules(anatomy, layers)
        self._visual: torch.Tensor | None = None
        self._seen = 0
        self._latest: tuple[torch.Tensor | None, tuple[int, bool], torch.Tensor] | None = None
        self._num_keys: dict[nn.Module, int] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> MaskedVisualTokens:
        parts = self._anatomy
        self._handles = [
            parts.multimodal.register_forward_pre_hook(self._before_multimodal, with_kwargs=True),
            parts.text.register_forward_pre_hook(self._before_text, with_kwargs=True),
            *(module.register_forward_pre_hook(self._before_attention, with_kwargs=True) for module in self._modules),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._visual, self._latest, self._num_keys = [], None, None, {}

    def _before_multimodal(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = named(module, args, kwargs)
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        if cache is not None and int(cache.get_seq_length()) > 0:
            return
        if ids is None:
            raise ValueError(
                "input_ids: expected the token ids of the prompt, got inputs_embeds only; without ids nothing says "
                "which tokens are visual"
            )
        placeholders = torch.tensor(self._anatomy.visual_token_ids, device=ids.device)
        self._visual = torch.isin(ids, placeholders)

    def _before_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = named(module, args, kwargs)
        cache = kwargs.get("past_key_values")
        if getattr(cache, "is_compileable", False):
            raise ValueError(
                "past_key_values: expected a cache that grows, got one of fixed size, whose columns are not those of "
                "the prompt; leave cache_implementation out"
            )
        length = call_length(kwargs)
        self._seen = (0 if cache is None else int(cache.get_seq_length())) + length
        self._latest = None
        self._num_keys = {module: self._keys_of(module, cache, length) for module in self._modules}

    def _before_attention(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._pairs:
            return None
        kwargs = named(module, args, kwargs)
        hidden_states = kwargs["hidden_states"]
        batch, length = hidden_states.shape[:2]
        if batch != self._batch:
            raise ValueError(
                f"heads: expected one entry for each of the {batch} rows of the batch, got {self._batch}; beams and "
                "return sequences count as rows"
            )
        mask = kwargs.get("attention_mask")
        shape = (self._num_keys[module], bool(kwargs.get("is_causal", getattr(module, "is_causal", True))))
        # most layers get the same mask as the one before
        if self._latest is None or self._latest[0] is not mask or self._latest[1] != shape:
            made = _default_mask(length, *shape, hidden_states.device) if mask is None else mask
            self._latest = (mask, shape, self._with_heads(made, length))
        return (), {**kwargs, "attention_mask": self._latest[2].to(hidden_states.device)}

    def _keys_of(self, module: Any, cache: Any, length: int) -> int:
        """Count the keys of a layer in a call of `length` tokens; a sliding window holds fewer keys than were read."""
        if cache is None:
            return length
        text: Any = self._anatomy.text
        layer, kinds = module.layer_idx, getattr(text.config, "layer_types", None)
        # a layer that borrows the keys of another has no place in the cache, but the first of its kind has
        layer = kinds.index(kinds[layer]) if kinds else layer
        return int(cache.get_mask_sizes(length, layer)[0])

    def _with_heads(self, mask: torch.Tensor, length: int) -> torch.Tensor:
        """Expand a mask `[B or 1, 1, T, S]`, bool or additive, to `[B, H, T, S]`; chosen heads get no visual keys."""
        keys = mask.shape[-1]
        visual = self._visual_keys(keys).to(mask.device)
        sees_it = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        itself = torch.ones(length, keys, dtype=torch.bool, device=mask.device)
        itself = itself.tril(keys - length) & itself.triu(keys - length)
        masked = visual.expand(sees_it.shape[0] if len(visual) == 1 else len(visual), -1)[:, None, None, :]
        sees_text = (sees_it & ~masked).any(-1, keepdim=True)
        masked = masked & (sees_text | ~itself)
        per_head = mask.expand(self._batch, self._num_heads, -1, -1).clone()
        rows, heads = (torch.tensor(index, device=mask.device) for index in zip(*self._pairs, strict=True))
        masked = masked.expand(self._batch, self._num_heads, length, -1)[rows, heads]
        blocked = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        per_head[rows, heads] = per_head[rows, heads].masked_fill(masked, blocked)
        return per_head

    def _visual_keys(self, keys: int) -> torch.Tensor:
        """Tell which of the last `keys` tokens that the model has read are visual, bool `[B or 1, keys]`.

        A sliding window keeps the last keys, so columns are counted from the end.
        """
        if self._visual is None:
            raise ValueError("model: expected a prompt that began inside the block, got a cache that was filled before")
        following = self._visual.new_zeros(len(self._visual), self._seen - self._visual.shape[1])
        return torch.cat([self._visual, following], dim=1)[:, self._seen - keys :]


def _default_mask(length: int, keys: int, is_causal: bool, device: torch.device) -> torch.Tensor:
    """Return the mask that attention uses when given none, bool `[1, 1, length, keys]`."""
    mask = torch.ones(1, 1, length, keys, dtype=torch.bool, device=device)
    return mask.tril(keys - length) if is_causal else mask
