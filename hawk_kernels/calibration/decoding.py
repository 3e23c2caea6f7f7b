"""Answers one prompt with the visual tokens masked from one attention head after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hawk_kernels.calibration.masking import MaskedVisualTokens
from hawk_kernels.calibration.repeating import RepeatedPrompt
from hawk_kernels.hf.anatomy import Anatomy

_MASK_BYTES = 2**30


def rows_per_pass(batch_size: int, num_heads: int, length: int) -> int:
    """Return the rows of one pass: `batch_size`, or as many as keep the masks of all heads below a gigabyte.

    The number depends only on the prompt, so that a prompt is always read in the same batches.
    """
    return max(1, min(batch_size, _MASK_BYTES // (num_heads * length**2)))


@torch.no_grad()
def answers_with_masked_heads(
    anatomy: Anatomy,
    inputs: Mapping[str, Any],
    heads: Sequence[int | None],
    *,
    layers: str,
    max_new_tokens: int,
    batch_size: int = 8,
) -> list[list[int]]:
    """Answer one prompt greedily, once for each entry of `heads`.

    This is plain greedy decoding up to an end of turn, without the sampling, penalties and stop strings of a generation
    config, so that nothing but the masked head tells two answers apart.

    Args:
        anatomy: the model's parts.
        inputs: the model's inputs of one prompt, batch size 1, without padding.
        heads: for each answer the head that does not see visual tokens, or None.
        layers: "first" or "all", as in `hide_visual_tokens`.
        max_new_tokens: tokens of the longest answer.
        batch_size: answers that are generated together, at most.

    Returns:
        the token ids of each answer, without the one that ends it.
    """
    ids = inputs["input_ids"]
    if ids.shape[0] != 1:
        raise ValueError(f"inputs: expected one prompt, batch size 1, got {ids.shape[0]}; encode the samples singly")
    padding = inputs.get("attention_mask")
    if padding is not None and not bool((padding == 1).all()):
        raise ValueError("attention_mask: expected a prompt without padding, got zeros; encode the samples singly")
    rows = rows_per_pass(batch_size, anatomy.projections.num_heads, ids.shape[1] + max_new_tokens)
    passes = -(-len(heads) // rows)
    rows = -(-len(heads) // passes)
    answers: list[list[int]] = []
    for start in range(0, len(heads), rows):
        part = heads[start : start + rows]
        # the last pass has as many rows as the others, so that a head gets the same kernels and bits in any pass
        filled = [*part, *[None] * (rows - len(part))]
        with RepeatedPrompt(anatomy, rows) as repeated, MaskedVisualTokens(anatomy, filled, layers):
            answers += _greedy(anatomy, inputs, repeated, max_new_tokens)[: len(part)]
    return answers


def _greedy(
    anatomy: Anatomy, inputs: Mapping[str, Any], repeated: RepeatedPrompt, max_new_tokens: int
) -> list[list[int]]:
    model: Any = anatomy.head
    output = model(**inputs, use_cache=True, logits_to_keep=1)
    end_ids = _end_ids(model)
    ends = torch.tensor(end_ids, dtype=torch.long, device=output.logits.device)
    steps = [_greedy_choice(output.logits)]
    finished = torch.isin(steps[0], ends)
    while len(steps) < max_new_tokens and not bool(finished.all()):
        # not every model remembers how far its pictures moved the positions of what follows, so they are passed
        following = repeated.following
        output = model(
            input_ids=steps[-1][:, None],
            position_ids=None if following is None else following + len(steps) - 1,
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        steps.append(_greedy_choice(output.logits))
        finished |= torch.isin(steps[-1], ends)
    tokens = torch.stack(steps, dim=1).tolist()
    return [_up_to_end(row, end_ids) for row in tokens]


def _greedy_choice(logits: torch.Tensor) -> torch.Tensor:
    highest, choice = logits[:, -1].max(-1)
    # a NaN is the maximum of its row, and its index would pass for an answer
    if not bool(torch.isfinite(highest).all()):
        raise ValueError(
            "model: expected finite logits, got NaN or infinity, which are no answer; check the checkpoint, or load it "
            "in another dtype (float16 overflows where bfloat16 and float32 do not)"
        )
    return choice


def _end_ids(model: Any) -> list[int]:
    """Return the ids that end an answer in `generate`: those of the generation config, or of the text config."""
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []


def _up_to_end(tokens: list[int], ends: list[int]) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]
