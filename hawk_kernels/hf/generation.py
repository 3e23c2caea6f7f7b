"""Looking at the arguments of `generate`."""

from __future__ import annotations

from typing import Any

import torch

_IDS = ("inputs", "input_ids")


def given_prompt_length(arguments: dict[str, Any]) -> int | None:
    """Tokens of the prompt that `generate` is called with, `T`; None where it gets no ids."""
    given = (arguments.get(name) for name in _IDS)
    ids = next((ids for ids in given if isinstance(ids, torch.Tensor) and ids.dim() == 2), None)
    return None if ids is None else ids.shape[1]


def check_one_prefill(model: Any, arguments: dict[str, Any], length: int | None) -> None:
    """Refuse to read a prompt of `length` tokens in chunks.

    Raises:
        ValueError: `prefill_chunk_size` asks for that.
    """
    config = arguments.get("generation_config") or getattr(model, "generation_config", None)
    chunk = arguments.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
    if chunk is not None and length is not None and chunk < length:
        raise ValueError(
            f"prefill_chunk_size: expected the prompt in one call, got chunks of {chunk} of {length} tokens; the "
            "budget and the question are those of the whole prompt, so call generate without prefill_chunk_size"
        )
