"""A `PrefillView` over the embeddings that enter the text model."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from hawk_kernels.hf.projections import LayerProjections
from hawk_kernels.hf.prompt import Prompt, padded_positions
from hawk_kernels.hf.upload import upload
from hawk_kernels.hf.vision_attention import PromptAttention
from hawk_kernels.methods.view import EncoderAttention, PrefillView, Segments


class LayerView(PrefillView):
    """Projects only the tokens a method asks for: text to queries, visual tokens to keys.

    Args:
        inputs_embeds: `[B, T, hidden]`, what enters the first decoder layer.
        prompt: where text queries and visual tokens stand.
        projections: queries and keys of the scoring layer.
        head_weights: float32 `[H]`, or None.
        budgets: tokens kept of each image of each row, or None for one budget a row.
        attention: what was recorded in the vision encoder, or None.
    """

    def __init__(
        self,
        inputs_embeds: torch.Tensor,
        prompt: Prompt,
        projections: LayerProjections,
        head_weights: torch.Tensor | None,
        budgets: list[list[int]] | None,
        attention: PromptAttention | None = None,
    ) -> None:
        self._embeds = inputs_embeds
        self._prompt = prompt
        self._projections = projections
        self._device = projections.device(inputs_embeds.device)
        _, self._filled = padded_positions(prompt.visual)
        self._head_weights = head_weights
        self._budgets = budgets
        self._attention = attention

    @cached_property
    def candidates(self) -> torch.Tensor:  # type: ignore[override]
        return upload(self._filled, self._device)

    @cached_property
    def head_weights(self) -> torch.Tensor:  # type: ignore[override]
        if self._head_weights is None:
            raise ValueError("head_weights: expected a method with uses_head_weights = True to read them, got another")
        return self._head_weights.to(self._device, non_blocking=True)

    @cached_property
    def segments(self) -> Segments | None:  # type: ignore[override]
        if self._budgets is None:
            return None
        width = self._filled.shape[1]
        lengths = self._prompt.image_lengths()
        longest = max(length for row in lengths for length in row)
        index, mask = [], []
        for row, images in enumerate(lengths):
            start = row * width
            for length in images:
                index.append(np.minimum(start + np.arange(longest), self._filled.size - 1))
                mask.append(np.arange(longest) < length)
                start += length
        kept_per_row = max(sum(row) for row in self._budgets)
        return Segments(upload(np.stack(index), self._device), upload(np.stack(mask), self._device), kept_per_row)

    def text_queries(self) -> tuple[torch.Tensor, torch.Tensor]:
        normalized, mask = self._normalized_text
        return self._queries(normalized), mask

    def mean_text_query(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self._projections.affine_queries:
            return self.text_queries()
        normalized, mask = self._normalized_text
        counts = mask.sum(dim=1, keepdim=True).clamp(min=1).unsqueeze(-1)
        total = normalized.float().masked_fill(~mask.unsqueeze(-1), 0).sum(dim=1, keepdim=True)
        return self._queries((total / counts).to(normalized.dtype)), None

    def visual_keys(self) -> torch.Tensor:
        normalized = self._projections.normalize(self._visual_rows())
        return self._padded(self._projections.keys(normalized).to(self._device)).transpose(1, 2)

    def visual_embeddings(self) -> torch.Tensor:
        return self._padded(self._visual_rows())

    def encoder_attention(self) -> EncoderAttention:
        recorded = self._attention
        if recorded is None:
            raise ValueError(
                "encoder_attention: expected a method with uses_encoder_attention = True to read it, got another"
            )
        of_object, of_deep = (self._padded(x.to(self._device).unsqueeze(0)) for x in (recorded.object, recorded.deep))
        return EncoderAttention(of_object, of_deep, recorded.grids)

    @cached_property
    def _normalized_text(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Text queries behind the layer's norm, `[B, N, hidden]`, and which of them are no padding, bool `[B, N]`."""
        positions, filled = padded_positions(self._prompt.query)
        rows = positions + np.arange(len(positions))[:, None] * self._embeds.shape[1]
        text = self._gathered(rows.ravel()).unflatten(0, positions.shape)
        return self._projections.normalize(text).to(self._device), upload(filled, self._device)

    def _queries(self, normalized: torch.Tensor) -> torch.Tensor:
        return self._projections.queries(normalized).to(self._device).transpose(1, 2)

    def _visual_rows(self) -> torch.Tensor:
        """Visual tokens of all rows without padding, `[1, S, hidden]`."""
        return self._gathered(np.flatnonzero(self._prompt.visual)).unsqueeze(0)

    def _gathered(self, rows: np.ndarray) -> torch.Tensor:
        device = self._embeds.device
        return self._embeds.flatten(0, 1).index_select(0, upload(rows, device)).to(self._device)

    def _padded(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[1, S, ...]` laid out as `[B, M, ...]`; the padding repeats the first token."""
        if not self._filled.all():
            place = np.where(self._filled, np.cumsum(self._filled).reshape(self._filled.shape) - 1, 0)
            tokens = tokens.index_select(1, upload(place.ravel(), self._device))
        return tokens.squeeze(0).unflatten(0, self._filled.shape)
