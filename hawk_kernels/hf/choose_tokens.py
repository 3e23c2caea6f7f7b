"""Chooses which tokens of a prompt stay: shows a method what it may ask of the prompt, and applies its answer.

This module does not know before which layer the tokens are chosen. Its caller passes the states that enter that layer.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from hawk_kernels.hf.encoders.recorder import PromptAttention
from hawk_kernels.hf.hooks import upload
from hawk_kernels.hf.projections import LayerProjections
from hawk_kernels.hf.prompt import Prompt, padded_positions
from hawk_kernels.hf.rotary import Rotary
from hawk_kernels.methods import Method
from hawk_kernels.methods.base import Falling, Keep, checked_selection
from hawk_kernels.methods.prefill_view import (
    EncoderAttention,
    HiddenStates,
    LastQuery,
    LayerAttention,
    LocalAttention,
    PrefillView,
    Segments,
)
from hawk_kernels.selection import Merge, Selection

Kept = tuple[torch.Tensor, list[int]]
"""The tokens that stay, bool `[B, T]`, and how many those are in each row."""


@dataclass(frozen=True)
class Context:
    """What is known of a prompt besides the states that enter the scoring layer, for methods that declare its use.

    Attributes:
        attention: what was recorded in the vision encoder.
        frames: finds the grids of each image's frames, which may wait for the device.
        rotary: the rotation of each token in the scoring layer.
        seen: which tokens the last one of each prompt sees in the scoring layer, bool `[B, T]`.
        scale: what the scoring layer multiplies its products by; None means `D ** -0.5`.
        states: computes what enters the scoring layer, `[B, T, hidden]`, where other layers come before it.
        entered: the embeddings `[B, T, hidden]` that entered the text model and the prompt that they are of, inside the
            stack.
    """

    attention: PromptAttention | None = None
    frames: Callable[[], list[list[list[tuple[int, int]]]]] | None = None
    rotary: Rotary | None = None
    seen: torch.Tensor | None = None
    scale: float | None = None
    states: Callable[[], torch.Tensor] | None = None
    entered: tuple[torch.Tensor, Prompt] | None = None


class LayerView(PrefillView):
    """Projects only the tokens that a method asks for: text to queries, visual tokens to keys.

    Args:
        inputs_embeds: `[B, T, hidden]`, what enters the scoring layer, or the first layer where `context.states` tells
            what enters the scoring one.
        prompt: where text queries and visual tokens stand.
        projections: queries and keys of the scoring layer.
        head_weights: float32 `[H]`, or None.
        budgets: tokens kept of each image or tile of each row, or None for one budget for each row.
        context: what else is known.
    """

    def __init__(
        self,
        inputs_embeds: torch.Tensor,
        prompt: Prompt,
        projections: LayerProjections,
        head_weights: torch.Tensor | None,
        budgets: list[list[int]] | None,
        context: Context,
    ) -> None:
        self._embeds = inputs_embeds
        self._prompt = prompt
        self._projections = projections
        self._device = projections.device(inputs_embeds.device)
        _, self._filled = padded_positions(prompt.visual)
        self._head_weights = head_weights
        self._budgets = budgets
        self._context = context
        self._entering: torch.Tensor | None = None
        self._normalized: tuple[torch.Tensor, torch.Tensor] | None = None

    # mypy does not take a cached_property for the attribute that the base class declares
    @cached_property
    def candidates(self) -> torch.Tensor:  # type: ignore[override]
        return upload(self._filled, self._device)

    @property
    def _states(self) -> torch.Tensor:
        """Return what enters the scoring layer, `[B, T, hidden]`."""
        # not a cached_property, which before Python 3.12 lets other threads wait while layers run
        if self._entering is None:
            self._entering = self._embeds if self._context.states is None else self._context.states().detach()
        return self._entering

    @cached_property
    def head_weights(self) -> torch.Tensor:  # type: ignore[override]
        if self._head_weights is None:
            raise ValueError(_undeclared("head_weights", "uses_head_weights = True"))
        return self._head_weights.to(self._device, non_blocking=True)

    @cached_property
    def segments(self) -> Segments | None:  # type: ignore[override]
        if self._budgets is None:
            return None
        width = self._filled.shape[1]
        units = [row * width + place for row, places in enumerate(_places(self._prompt)) for place in places]
        lengths = np.array([[len(unit)] for unit in units])
        mask = np.arange(lengths.max()) < lengths
        index = np.zeros(mask.shape, dtype=np.int64)
        index[mask] = np.concatenate(units)
        kept_per_row = max(sum(row) for row in self._budgets)
        return Segments(upload(index, self._device), upload(mask, self._device), kept_per_row)

    def hidden_states(self) -> HiddenStates | None:
        plain = self._projections.plain()
        if plain is None or self._device != self._states.device or self._states.dtype == torch.float64:
            return None
        positions, _ = padded_positions(self._prompt.visual)
        return HiddenStates(
            x=self._states,
            layer=plain,
            q_mask=upload(self._prompt.query, self._device),
            k_mask=upload(self._prompt.visual, self._device),
            visual=upload(positions, self._device),
        )

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
        normalized = self._projections.normalize(self._visual_rows(self._states))
        return self._padded(self._projections.keys(normalized).to(self._device)).transpose(1, 2)

    def visual_embeddings(self) -> torch.Tensor:
        return self._padded(self._visual_rows(self._embeds))

    def encoder_attention(self) -> EncoderAttention:
        recorded = self._context.attention
        if recorded is None or "deep" not in recorded.values:
            raise ValueError(_undeclared("encoder_attention", "uses_encoder_attention = True"))
        of_object, of_deep = (self._of_cells(recorded.values[name]) for name in ("object", "deep"))
        return EncoderAttention(of_object, of_deep, recorded.grids)

    def cls_attention(self) -> torch.Tensor:
        recorded = self._context.attention
        if recorded is None or "cls" not in recorded.values:
            raise ValueError(_undeclared("cls_attention", "uses_cls_attention = True"))
        return self._of_cells(recorded.values["cls"])

    def local_attention(self) -> LocalAttention:
        recorded = self._context.attention
        if recorded is None or "local" not in recorded.values:
            raise ValueError(_undeclared("local_attention", "uses_local_attention = True"))
        return LocalAttention(self._of_cells(recorded.values["local"]), recorded.grids, recorded.has_cls)

    def encoder_features(self) -> torch.Tensor:
        recorded = self._context.attention
        if recorded is None or "features" not in recorded.values:
            raise ValueError(_undeclared("encoder_features", "uses_encoder_features = True"))
        return self._of_cells(recorded.values["features"])

    def encoder_keys(self) -> torch.Tensor:
        recorded = self._context.attention
        if recorded is None or "keys" not in recorded.values:
            raise ValueError(_undeclared("encoder_keys", "uses_encoder_keys = True"))
        return self._of_cells(recorded.values["keys"])

    def text_keys(self) -> torch.Tensor:
        normalized, _ = self._normalized_text
        return self._projections.keys(normalized).to(self._device).transpose(1, 2)

    def text_embeddings(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._text_tokens(self._embeds)

    def rotated_text_queries(self) -> tuple[torch.Tensor, torch.Tensor]:
        queries, mask = self.text_queries()
        positions, _ = padded_positions(self._prompt.query)
        return self._rotated(queries, upload(positions, self._device)), mask

    def rotated_visual_keys(self) -> torch.Tensor:
        return self._rotated(self.visual_keys(), self._visual_positions)

    def last_query(self) -> LastQuery:
        if self._context.seen is None:
            raise _inside_only("last_query")
        own = self._prompt.valid[:, : self._prompt.length]
        last = own.shape[1] - 1 - np.argmax(own[:, ::-1], axis=1, keepdims=True)
        normalized = self._projections.normalize(self._states.to(self._device))
        at_end = normalized.gather(1, upload(last, self._device).unsqueeze(2).expand(-1, -1, normalized.shape[2]))
        query = self._rotated(self._queries(at_end), upload(last, self._device))
        everywhere = torch.arange(normalized.shape[1], device=self._device).expand(len(last), -1)
        keys = self._projections.keys(normalized).to(self._device).transpose(1, 2)
        keys = self._rotated(keys, everywhere)
        visible = self._context.seen.to(self._device)
        # the last token sees itself
        source = torch.where(visible, everywhere, upload(last, self._device))
        keys = keys.gather(2, source[:, None, :, None].expand_as(keys))
        return LastQuery(query, keys, visible, self._visual_positions, self._scale(query))

    def layer_attention(self) -> LayerAttention:
        if self._context.seen is None:
            raise _inside_only("layer_attention")
        prompt = self._prompt
        own = prompt.valid & (np.arange(prompt.valid.shape[1]) < prompt.length)
        place = np.cumsum(own).reshape(own.shape) - 1
        lengths = own.sum(axis=1)
        bounds = np.concatenate([[0], np.cumsum(lengths[lengths > 0])]).astype(np.int32)
        rows = np.flatnonzero(own)
        normalized = self._projections.normalize(self._gathered(self._states, rows)).unsqueeze(0)
        length = own.shape[1]
        positions = np.tile(np.arange(length), (len(own), 1))

        def rotated(heads: torch.Tensor) -> torch.Tensor:
            # the rotation of each row is its own, so the heads are laid out row by row for it
            whole = heads.new_zeros(heads.shape[1], own.size, heads.shape[3])
            at = upload(rows, heads.device)
            whole = whole.index_copy(1, at, heads[0]).unflatten(1, own.shape).transpose(0, 1)
            turned = self._rotated(whole, upload(positions, heads.device))
            return turned.transpose(0, 1).flatten(1, 2).index_select(1, at).unsqueeze(0)

        text, visual = (
            upload(np.take_along_axis(place, padded_positions(mask)[0], axis=1), self._device)
            for mask in (prompt.query, prompt.visual)
        )
        queries = rotated(self._queries(normalized))
        keys = rotated(self._projections.keys(normalized).to(self._device).transpose(1, 2))
        return LayerAttention(queries, keys, upload(bounds, self._device), text, visual, self._scale(queries))

    def entered(self) -> PrefillView:
        if self._context.entered is None:
            return self
        embeds, prompt = self._context.entered
        return LayerView(embeds.detach(), prompt, self._projections, self._head_weights, None, Context())

    def _scale(self, queries: torch.Tensor) -> float:
        return float(queries.shape[-1] ** -0.5) if self._context.scale is None else self._context.scale

    def frames(self) -> list[list[list[tuple[int, int]]]]:
        if self._context.frames is None:
            raise ValueError(_undeclared("frames", "uses_grids = True"))
        return self._context.frames()

    def row_keys(self) -> list[int]:
        prompt = self._prompt
        own = zip(prompt.ids[:, : prompt.length], prompt.valid[:, : prompt.length], strict=True)
        return [zlib.crc32(ids[valid].astype("<i8").tobytes()) for ids, valid in own]

    def _rotated(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if self._context.rotary is None:
            raise ValueError(_undeclared("positions", "uses_positions = True"))
        return self._context.rotary.rotated(heads, positions)

    @cached_property
    def _visual_positions(self) -> torch.Tensor:
        """Tell where the visual tokens stand, int64 `[B, M]`, 0 at padding."""
        return upload(padded_positions(self._prompt.visual)[0], self._device)

    @property
    def _normalized_text(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Norm the text queries, `[B, N, hidden]`, and mark which of them are not padding, bool `[B, N]`."""
        if self._normalized is None:
            text, mask = self._text_tokens(self._states)
            self._normalized = self._projections.normalize(text).to(self._device), mask
        return self._normalized

    def _text_tokens(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather the text queries of each row, `[B, N, hidden]`, and mark which are not padding, bool `[B, N]`."""
        positions, filled = padded_positions(self._prompt.query)
        rows = positions + np.arange(len(positions))[:, None] * states.shape[1]
        return torch.unflatten(self._gathered(states, rows.ravel()), 0, positions.shape), upload(filled, self._device)

    def _queries(self, normalized: torch.Tensor) -> torch.Tensor:
        return self._projections.queries(normalized).to(self._device).transpose(1, 2)

    def _visual_rows(self, states: torch.Tensor) -> torch.Tensor:
        """Gather the visual tokens of all rows without padding, `[1, S, hidden]`."""
        return self._gathered(states, np.flatnonzero(self._prompt.visual)).unsqueeze(0)

    def _gathered(self, states: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        return states.flatten(0, 1).index_select(0, upload(rows, states.device)).to(self._device)

    def _of_cells(self, recorded: torch.Tensor) -> torch.Tensor:
        """Lay out what was recorded of the visual tokens of all rows, `[S, ...]`, as `[B, M, ...]`."""
        return self._padded(recorded.to(self._device).unsqueeze(0))

    def _padded(self, tokens: torch.Tensor) -> torch.Tensor:
        """Lay `[1, S, ...]` out as `[B, M, ...]`; the padding repeats the first token."""
        if not self._filled.all():
            place = np.where(self._filled, np.cumsum(self._filled).reshape(self._filled.shape) - 1, 0)
            tokens = tokens.index_select(1, upload(place.ravel(), self._device))
        return torch.unflatten(tokens.squeeze(0), 0, self._filled.shape)


@dataclass(frozen=True)
class Choice:
    """The tokens of a batch of prompts that stay.

    Attributes:
        kept: bool `[B, T]`, False at dropped tokens and padding.
        counts: how many stay in each row, known on the host.
        scores: float32 `[B, T]`, `-inf` where nothing was scored.
        budgets: visual tokens kept, for each row a list with one entry for each image, or a single one for the row.
        merge: makes kept tokens sums of visual tokens, by places among the T, targets ascending; None means none.
    """

    kept: torch.Tensor
    counts: list[int]
    scores: torch.Tensor
    budgets: list[list[int]]
    merge: Merge | None = None


@dataclass(frozen=True)
class Chooser:
    """Chooses the tokens of a prompt that stay.

    Attributes:
        method: scores and selects.
        keep_ratio: the fraction kept, the budget, or a number on the way to a budget.
        per_image: whether each image has a budget of its own, or each tile of a prompt that knows its tiles.
        head_weights: float32 `[H]`, or None.
    """

    method: Method
    keep_ratio: Keep
    per_image: bool = False
    head_weights: torch.Tensor | None = None

    @torch.no_grad()
    def choose(
        self,
        states: torch.Tensor,
        prompt: Prompt,
        projections: LayerProjections,
        context: Context,
        original: list[list[int]] | None = None,
    ) -> Choice:
        """Score and select the visual tokens of a batch in which at least one row has some.

        Args:
            states: `[B, T, hidden]`, what enters the scoring layer, or the first layer where `context.states` tells
                what enters the scoring one.
            prompt: where text queries and visual tokens stand.
            projections: queries and keys of the scoring layer.
            context: what else is known of the prompt.
            original: how many visual tokens each row, or each image of it, had before any were dropped; None means as
                many as now. The keep ratio is a fraction of these.

        Raises:
            ValueError: a row has visual tokens, but none of the text that the method needs.
        """
        if self.method.uses_text:
            _check_text(prompt)
        whole, prompt = prompt, prompt.candidates()
        if context.attention is not None:
            prompt = prompt.with_separators(context.attention.is_separator)
        lengths, all_lengths = self.lengths(prompt), self.lengths(whole)
        budgets = self._budgets(lengths, lengths if original is None else original)

        def view(budgets: list[list[int]]) -> LayerView:
            of_images = budgets if self.per_image else None
            return LayerView(states.detach(), prompt, projections, self.head_weights, of_images, context)

        keep = self.keep_ratio
        if not isinstance(keep, Falling) and budgets == self._budgets(lengths, lengths):
            selection = self._selected(view(budgets), keep)
        else:
            selection = self._selected_by_budget(view, prompt, budgets)

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
        merge = None if selection.merge is None else _in_prompt(selection.merge, positions, filled, device)
        return Choice(kept[:, :-1].contiguous(), counts.tolist(), scores[:, :-1].contiguous(), stayed, merge)

    def _budgets(self, lengths: list[list[int]], original: list[list[int]]) -> list[list[int]]:
        """Count what each row or image of these lengths keeps, where the keep ratio is a fraction of `original`."""
        return [
            [min(length, self._count(whole)) for length, whole in zip(*row, strict=True)]
            for row in zip(lengths, original, strict=True)
        ]

    def _count(self, num_candidates: int) -> int:
        keep = self.keep_ratio
        if isinstance(keep, Falling):
            return keep.count(num_candidates, self.method.rounding)
        return self.method.kept_count(keep, num_candidates)

    def _selected(self, view: LayerView, keep_ratio: float | int) -> Selection:
        return checked_selection(self.method.name, self.method.select(view, keep_ratio), view.candidates)

    def _selected_by_budget(
        self, view: Callable[[list[list[int]]], LayerView], prompt: Prompt, budgets: list[list[int]]
    ) -> Selection:
        """Select as many tokens of each row or image as its own budget says, with one selection for each budget."""
        _, filled = padded_positions(prompt.visual)
        of_token = np.zeros(filled.shape, dtype=np.int64)
        units = _places(prompt) if self.per_image else [[np.flatnonzero(row)] for row in filled]
        for row, (places, of_row) in enumerate(zip(units, budgets, strict=True)):
            for place, budget in zip(places, of_row, strict=True):
                of_token[row, place] = budget
        chosen: Selection | None = None
        merges = []
        for budget in sorted({budget for row in budgets for budget in row if budget}):
            clamped = [[min(budget, length) for length in row] for row in self.lengths(prompt)]
            selection = self._selected(view(clamped), budget)
            here = upload(of_token == budget, selection.mask.device)
            if selection.merge is not None:
                target, source, weight = selection.merge
                is_here = (target >= 0) & here.gather(1, target.clamp(min=0))
                merges.append(Merge(torch.where(is_here, target, -1), source, weight))
            if chosen is None:
                chosen = Selection(selection.mask & here, selection.indices, selection.scores)
            else:
                scores = torch.where(here, selection.scores, chosen.scores)
                chosen = Selection(chosen.mask | (selection.mask & here), selection.indices, scores)
        assert chosen is not None
        if not merges:
            return chosen
        return chosen.merging(Merge(*(torch.cat(parts, dim=1) for parts in zip(*merges, strict=True))))

    def lengths(self, prompt: Prompt) -> list[list[int]]:
        """Count the visual tokens that share a budget: those of each image or tile, or those of each row."""
        if self.per_image:
            return prompt.unit_lengths()
        return [[int(count)] for count in prompt.visual.sum(axis=1)]


def _places(prompt: Prompt) -> list[list[np.ndarray]]:
    """Find, for each row and each of its images or tiles, the places of its tokens among the visual ones of the row."""
    rank = np.cumsum(prompt.visual, axis=1) - 1
    return [[rank[row, unit] for unit in prompt.units(row)] for row in range(len(prompt.ids))]


def _undeclared(name: str, declaration: str) -> str:
    return f"cannot read {name} in a method that does not declare it; set {declaration} in its class"


def _in_prompt(merge: Merge, positions: np.ndarray, filled: np.ndarray, device: torch.device) -> Merge:
    """Turn places among the visual tokens `[B, M]` of a merge map into places in the prompt.

    Entries that name no visual token, which only a CPU refuses, become padding.
    """
    target, source, weight = (part.to(device) for part in merge)
    place, exists = upload(positions, device), upload(filled, device)
    last = positions.shape[1] - 1
    inside = [places.clamp(0, last) for places in (target, source)]
    counts = (target == inside[0]) & (source == inside[1]) & exists.gather(1, inside[0]) & exists.gather(1, inside[1])
    return Merge(torch.where(counts, place.gather(1, inside[0]), -1), place.gather(1, inside[1]), weight).ordered()


def _inside_only(name: str) -> ValueError:
    return ValueError(
        f"cannot read {name} before the first layer; let `stages` of the method return layers after which tokens are "
        "dropped, or call prune(model, {layer: keep})"
    )


def _check_text(prompt: Prompt) -> None:
    for row in np.flatnonzero(prompt.visual.any(axis=1) & ~prompt.query.any(axis=1)):
        raise ValueError(
            f"query: expected text in row {row} to rank its visual tokens by, got none; pass query= or add a question"
        )
