"""Holds what each thread remembers of a call between one hook and the next. There is only data here, no behaviour."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from hawk_kernels.hf.choose_tokens import Kept
from hawk_kernels.hf.packing import Packing
from hawk_kernels.hf.projections import LayerProjections
from hawk_kernels.hf.prompt import Prompt
from hawk_kernels.hf.sources import Encoded
from hawk_kernels.hf.uncached_prompt import UncachedPrompt
from hawk_kernels.selection import Merge

if TYPE_CHECKING:
    from hawk_kernels.hf.chat_history import History

# Several generations without a cache may take turns, such as a question and what it is contrasted with.
no_uncached_prompts = partial(deque[UncachedPrompt], maxlen=16)


@dataclass(frozen=True)
class Outcome:
    """What happened to a prompt.

    Attributes:
        keep_mask: bool `[B, T]`, the tokens that stayed.
        scores: float32 `[B, T]`, `-inf` where nothing was scored.
        query_mask: bool `[B, T]`, the text that ranked the visual tokens.
        prompt: the prompt on the host; None where it was not read.
        encoded: what the vision encoder was told and returned, by kind.
        budgets: visual tokens kept, for each row a list with one entry for each image, or a single one for the row;
            None means all.
        reason: why the whole call was left alone, or None.
        by_stage: the budgets of each stage so far; the last ones are `budgets`.
        cache_bytes_saved: bytes by which the cache is smaller than that of the whole prompt; None without a cache, or
            where its layers do not tell.
    """

    keep_mask: torch.Tensor
    scores: torch.Tensor
    query_mask: torch.Tensor
    prompt: Prompt | None
    encoded: dict[str, Encoded]
    budgets: list[list[int]] | None
    reason: str | None
    by_stage: tuple[list[list[int]], ...] = ()
    cache_bytes_saved: int | None = None


@dataclass
class Prefill:
    """A prompt on its way from the multimodal model to the text model and back.

    Attributes:
        prompt: the prompt on the host.
        valid: bool `[B, T]` on the device, the tokens that are not padding; None where no token is padding.
        features: its images and videos.
        arguments: those of the multimodal model.
        is_own: whether it is the prompt that `generate` was called with, or that of a plain call.
        earlier: without a cache, the prompt of which this one is a later step; None for a first step.
        encoded: what the vision encoder was told and returned, by kind; like the fields after it up to `following`, it
            is filled in at the text model.
        projections: the queries and keys that rank the tokens.
        kept: the tokens that stay after each stage, and how many those are in each row.
        merge: makes the tokens kept before the first layer sums of tokens.
        inner_merges: the same for each stage inside the stack.
        outcome: what has been published so far.
        packing: how the tokens that stay are packed, if some were dropped or merged before the first layer.
        following: the position ids of what follows the prompt, in the same case.
        logits_to_keep: how many logits at the end the caller wants, 0 for all.
    """

    prompt: Prompt
    valid: torch.Tensor | None
    features: tuple[Any, ...]
    arguments: dict[str, Any]
    is_own: bool
    earlier: UncachedPrompt | None
    encoded: dict[str, Encoded] = field(default_factory=dict)
    projections: LayerProjections | None = None
    kept: list[Kept] = field(default_factory=list)
    merge: Merge | None = None
    inner_merges: list[Merge | None] = field(default_factory=list)
    outcome: Outcome | None = None
    packing: Packing | None = None
    following: torch.Tensor | None = None
    logits_to_keep: int = 0


@dataclass
class Generation:
    """A call of `generate`.

    Attributes:
        ids: the prompt that it was called with, `[B, T]`, or None.
        history: the cache that holds the beginning of `ids`; None where there is none.
        has_begun: whether it has read a prompt.
    """

    ids: torch.Tensor | None
    history: History | None = None
    has_begun: bool = False


@dataclass(eq=False)
class CallState(threading.local):
    """What one thread is doing inside the model.

    Attributes:
        is_reached: whether the call of the head has reached the multimodal model.
        is_inside: whether the multimodal model has been called and has not called the text model yet.
        prefill: the prompt of that call.
        entered: the prompt that the text model reads now.
        mask: the attention mask that the multimodal model was called with.
        logits_to_keep: how many logits at the end the caller of the head wants, 0 for all.
        generation: the call of `generate` that is running, or None.
        uncached: the prompts of generations without a cache.
    """

    is_reached: bool = False
    is_inside: bool = False
    prefill: Prefill | None = None
    entered: Prefill | None = None
    mask: Any = None
    logits_to_keep: int = 0
    generation: Generation | None = None
    uncached: deque[UncachedPrompt] = field(default_factory=no_uncached_prompts)
