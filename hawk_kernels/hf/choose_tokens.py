"""Which tokens of a prompt stay, whichever layer they are chosen before."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from hawk_kernels.hf.hooks import upload
from hawk_kernels.hf.layer_view import Context, LayerView
from hawk_kernels.hf.projections import LayerProjections
from hawk_kernels.hf.prompt import Prompt, padded_positions
from hawk_kernels.methods import Method


@dataclass(frozen=True)
class Choice:
    """The tokens of a batch of prompts that stay.

    Attributes:
        kept: bool `[B, T]`, False at dropped tokens and padding.
        counts: how many stay in each row, known on the host.
        scores: float32 `[B, T]`, `-inf` where nothing was scored.
        budgets: visual tokens kept, for each row a list with one entry for each image, or a single one for the row.
    """

    kept: torch.Tensor
    counts: list[int]
    scores: torch.Tensor
    budgets: list[list[int]]


@dataclass(frozen=True)
class Chooser:
    """Chooses tokens by what enters some layer; which layer that is, only its caller knows.

    Attributes:
        method: scores and selects.
        keep_ratio: the fraction kept, or the budget.
        per_image: whether each image has a budget of its own.
        head_weights: float32 `[H]`, or None.
    """

    method: Method
    keep_ratio: float | int
    per_image: bool = False
    head_weights: torch.Tensor | None = None

    @torch.no_grad()
    def choose(self, states: torch.Tensor, prompt: Prompt, projections: LayerProjections, context: Context) -> Choice:
        """Score the visual tokens of a batch, some row of which has some, and select.

        Args:
            states: `[B, T, hidden]`, what enters the scoring layer.
            prompt: where text queries and visual tokens stand.
            projections: queries and keys of the scoring layer.
            context: what else is known of the prompt.

        Raises:
            ValueError: a row has visual tokens, but none of the text that the method needs.
        """
        if self.method.uses_text:
            _check_text(prompt)
        whole = prompt
        if context.attention is not None:
            prompt = prompt.with_separators(context.attention.is_separator)
        lengths, all_lengths = self._lengths(prompt), self._lengths(whole)
        budgets = [[self.method.kept_count(self.keep_ratio, length) for length in row] for row in lengths]
        segments = budgets if self.per_image else None
        view = LayerView(states.detach(), prompt, projections, self.head_weights, segments, context)
        selection = self.method.select(view, self.keep_ratio)

        device, length = states.device, states.shape[1]
        positions, filled = padded_positions(prompt.visual)
        # padding of rows with fewer visual tokens lands in one column after the end
        target = upload(np.where(filled, positions, length), device)
        kept = upload(np.pad(prompt.valid & ~prompt.visual, ((0, 0), (0, 1))), device)
        kept = kept.scatter_(1, target, selection.mask.to(device))
        scores = torch.full(kept.shape, -math.inf, dtype=torch.float32, device=device).scatter_(
            1, target, selection.scores.to(device)
        )
        counts = (prompt.valid & ~prompt.visual).sum(axis=1) + [sum(row) for row in budgets]
        # separators stay without a score and without a budget
        stayed = [
            [budget + visual - length for budget, visual, length in zip(*row, strict=True)]
            for row in zip(budgets, all_lengths, lengths, strict=True)
        ]
        return Choice(kept[:, :-1].contiguous(), counts.tolist(), scores[:, :-1].contiguous(), stayed)

    def _lengths(self, prompt: Prompt) -> list[list[int]]:
        """Count the visual tokens that share a budget: those of each image, or those of each row."""
        if self.per_image:
            return prompt.image_lengths()
        return [[int(count)] for count in prompt.visual.sum(axis=1)]


def _check_text(prompt: Prompt) -> None:
    for row in np.flatnonzero(prompt.visual.any(axis=1) & ~prompt.query.any(axis=1)):
        raise ValueError(
            f"query: expected text in row {row} to rank its visual tokens by, got none; pass query= or add a question"
        )
