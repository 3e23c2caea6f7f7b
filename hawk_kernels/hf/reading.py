"""Reading a prefill from the arguments of the multimodal model, with one transfer from the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hawk_kernels.hf.families import Anatomy
from hawk_kernels.hf.prompt import Prompt
from hawk_kernels.hf.queries import GIVEN, text_queries

Query = torch.Tensor | Callable[[torch.Tensor], torch.Tensor]


def read_prompt(
    anatomy: Anatomy,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | dict[str, Any] | None,
    cache: Any,
    query: Query | None,
    guesses: int = 0,
) -> tuple[Prompt | None, torch.Tensor | None]:
    """The prompt of a call, or None where the cache is not empty.

    Args:
        anatomy: the model's parts.
        input_ids: `[B, T]`.
        attention_mask: None, 2-D, or what `generate` prepares for a cache of fixed size.
        cache: `past_key_values`.
        query: the caller's choice of text queries, or None.
        guesses: tokens at the end that assisted decoding proposes; they are no part of the prompt.

    Returns:
        the prompt, and the tokens that are no padding as bool `[B, T]` on the device (None: all).
    """
    cached = 0 if cache is None else cache.get_seq_length()
    if not isinstance(cached, torch.Tensor) and cached > 0:
        return None, None
    valid = _valid_tokens(attention_mask, input_ids, cache)
    prompt_length = input_ids.shape[1] - guesses
    queries = None if query is None else _given_queries(query, input_ids[:, :prompt_length])
    length = cached if isinstance(cached, torch.Tensor) else None
    host_ids, host_valid, host_queries, host_length = _fetch(input_ids, valid, queries, length)
    if host_length is not None and host_length.item() > 0:
        return None, None
    host_valid = np.ones(host_ids.shape, dtype=bool) if host_valid is None else host_valid.astype(bool)
    own_ids, own = host_ids[:, :prompt_length], host_valid[:, :prompt_length]
    placeholders = np.isin(own_ids, anatomy.visual_token_ids)
    visual = placeholders & own
    if host_queries is None:
        found, sources = text_queries(own_ids, own, visual, anatomy.markers)
    else:
        found, sources = host_queries.astype(bool) & own, [GIVEN] * len(host_ids)
    visual, found, placeholders = (np.pad(mask, ((0, 0), (0, guesses))) for mask in (visual, found, placeholders))
    return Prompt(host_ids, host_valid, visual, found, sources, prompt_length, placeholders), valid


def _valid_tokens(
    attention_mask: torch.Tensor | dict[str, Any] | None, input_ids: torch.Tensor, cache: Any
) -> torch.Tensor | None:
    if isinstance(attention_mask, dict):
        attention_mask = next((mask for mask in attention_mask.values() if mask is not None), None)
    if attention_mask is None:
        return None
    if attention_mask.dim() == 4:
        if not getattr(cache, "is_compileable", False):
            raise ValueError(
                f"attention_mask: expected a [batch, length] mask, got shape {list(attention_mask.shape)}; a mask of "
                "one's own over pairs of tokens cannot be pruned"
            )
        diagonal = attention_mask.diagonal(dim1=-2, dim2=-1)[:, 0]
        valid = diagonal if diagonal.dtype == torch.bool else diagonal == 0
        return valid.expand(input_ids.shape[0], -1)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected the shape of input_ids, {list(input_ids.shape)}, got "
            f"{list(attention_mask.shape)}; a prompt is pruned in one call with an empty cache"
        )
    return attention_mask.to(input_ids.device) != 0


def _given_queries(query: Query, input_ids: torch.Tensor) -> torch.Tensor:
    mask = query(input_ids) if callable(query) else query
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        came = f"a tensor of {mask.dtype}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise TypeError(f"query: expected a bool tensor like input_ids, or a callable that returns one, got {came}")
    batch, length = input_ids.shape
    # generate repeats a sample for its beams and return sequences
    if mask.dim() == 2 and mask.shape[1] == length and mask.shape[0] and batch % mask.shape[0] == 0:
        return mask.repeat_interleave(batch // mask.shape[0], dim=0)
    raise ValueError(f"query: expected shape [{batch}, {length}] like input_ids, got {list(mask.shape)}; True = asks")


def _fetch(*tensors: torch.Tensor | None) -> list[Any]:
    """The tensors as host arrays, None for None, in one transfer."""
    given = [tensor for tensor in tensors if tensor is not None]
    device = next((tensor.device for tensor in given if tensor.device.type != "cpu"), torch.device("cpu"))
    flat = torch.cat([tensor.reshape(-1).to(device, torch.int64) for tensor in given]).cpu().numpy()
    sizes = np.cumsum([tensor.numel() for tensor in given])[:-1]
    parts = iter(np.split(flat, sizes))
    return [None if tensor is None else next(parts).reshape(tensor.shape) for tensor in tensors]
