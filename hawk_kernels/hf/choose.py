"""Which tokens of a prompt stay."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from hawk_kernels.hf.projections import LayerProjections
from hawk_kernels.hf.prompt import Prompt, padded_positions
from hawk_kernels.hf.upload import upload
from hawk_kernels.hf.view import Context, LayerView
from hawk_kernels.methods import Method


@dataclass(frozen=True)
class Choice:
    """The tokens of a batch of prompts that stay.

    Attributes:
        kept: bool `[B, T]`, False at dropped tokens and padding.
        counts: how many that are in each row, known on the host.
        scores: float32 `[B, T]`, `-inf` where nothing was scored.
        budgets: visual tokens kept, for each row a list with one entry an image, or one for the row.
    """

    kept: torch.Tensor
    counts: list[int]
    scores: torch.Tensor
    budgets: list[list[int]]


@torch.no_grad()
def choose_tokens(
    inputs_embeds: torch.Tensor,
    prompt: Prompt,
    method: Method,
    keep_ratio: float | int,
    per_image: bool,
    projections: LayerProjections,
    head_weights: torch.Tensor | None,
    context: Context,
) -> Choice:
    """Score the visual tokens of a batch, some row of which has some, and select.

    Args:
        inputs_embeds: `[B, T, hidden]`, what enters the first decoder layer.
        prompt: where text queries and visual tokens stand.
        method: scores and selects.
        keep_ratio: fraction kept, or the budget.
        per_image: whether each image has a budget of its own.
        projections: queries and keys of the scoring layer.
        head_weights: float32 `[H]`, or None.
        context: what else is known of the prompt.

    Raises:
        ValueError: a row with visual tokens but without text that a method needs.
    """
    if method.uses_text:
        for row in np.flatnonzero(prompt.visual.any(axis=1) & ~prompt.query.any(axis=1)):
            raise ValueError(
                f"query: expected text in row {row} to rank its visual tokens by, got none; "
                "pass query= or add a question"
            )
    whole = prompt
    if context.attention is not None:
        prompt = prompt.with_separators(context.attention.is_separator)
    lengths, all_lengths = (
        each.image_lengths() if per_image else each.visual.sum(axis=1, keepdims=True).tolist()
        for each in (prompt, whole)
    )
    budgets = [[method.kept_count(keep_ratio, length) for length in row] for row in lengths]
    segments = budgets if per_image else None
    view = LayerView(inputs_embeds.detach(), prompt, projections, head_weights, segments, context)
    selection = method.select(view, keep_ratio)

    device, length = inputs_embeds.device, inputs_embeds.shape[1]
    positions, filled = padded_positions(prompt.visual)
    # padding of rows with fewer visual tokens lands in one column behind the end
    target = upload(np.where(filled, positions, length), device)
    kept = upload(np.pad(prompt.valid & ~prompt.visual, ((0, 0), (0, 1))), device)
    kept = kept.scatter_(1, target, selection.mask.to(device))
    scores = torch.full(kept.shape, -math.inf, dtype=torch.float32, device=device).scatter_(
        1, target, selection.scores.to(device)
    )
    counts = (prompt.valid & ~prompt.visual).sum(axis=1) + [sum(row) for row in budgets]
    stayed = [
        [budget + visual - length for budget, visual, length in zip(*row, strict=True)]
        for row in zip(budgets, all_lengths, lengths, strict=True)
    ]
    return Choice(kept[:, :-1].contiguous(), counts.tolist(), scores[:, :-1].contiguous(), stayed)
