"""Chooses the tokens of one picture or video that stay, from its rows and, for some methods, from the prompt's ids.

Each picture has a budget and a normalisation of its own. vLLM may read two pictures of a prompt in different steps, and
a choice that depended on the other picture would depend on how the prompt was cut into steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hawk_kernels.backends.eager.compact import restore
from hawk_kernels.hf.choose_tokens import Choice, Chooser, Context
from hawk_kernels.hf.encoder_stage import merged_before_projector
from hawk_kernels.hf.encoders.recorder import PromptAttention
from hawk_kernels.hf.projections import LayerProjections
from hawk_kernels.hf.prompt import Prompt
from hawk_kernels.hf.question import NO_VISUAL, Markers, text_queries
from hawk_kernels.methods.downsample import Downsample
from hawk_kernels.ops.compact import compact
from hawk_kernels.selection import Merge

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Place:
    """Where a picture stands in a pruned prompt, and which of its tokens are visual before any are dropped.

    Attributes:
        ids: int64 `[T]`, the whole pruned prompt.
        start: index of its first placeholder.
        places: number of its placeholders. The last of them hold the ids of the texts between a video's frames.
        visual: bool `[tokens]` of the whole picture or video, False at these texts.
    """

    ids: NDArray[np.int64]
    start: int
    places: int
    visual: NDArray[np.bool_]


class Chosen(NamedTuple):
    """The tokens of a picture that stay.

    Attributes:
        places: int64 `[K]`, ascending.
        merged: `[K, C]`, their embeddings where the method merges dropped tokens in; None where each stays as it is.
    """

    places: torch.Tensor
    merged: torch.Tensor | None


@dataclass(frozen=True)
class PictureChooser:
    """Chooses the tokens of one picture or video that stay, as `prune` chooses those of a prompt with this one alone.

    Attributes:
        chooser: method, keep ratio and head weights.
        projections: queries and keys of the first layer.
        visual_token_ids: placeholders of images and videos.
        markers: ids that close images and turns.
        embed: embeds the ids of text, int64 `[T]` to `[T, C]`.
        project: runs the projector on rows that were recorded as "features", for a method that merges these.
        hidden_size: width of the embeddings; None where no row is wider.
    """

    chooser: Chooser
    projections: LayerProjections
    visual_token_ids: tuple[int, ...]
    markers: Markers
    embed: Callable[[torch.Tensor], torch.Tensor]
    project: Callable[[torch.Tensor], torch.Tensor] | None = None
    hidden_size: int | None = None

    def choose(
        self,
        rows: torch.Tensor,
        grid: Grid,
        place: Place | None = None,
        recorded: Mapping[str, torch.Tensor] | None = None,
    ) -> Chosen:
        """Choose among the rows of a picture.

        Args:
            rows: `[n, C]`, the embeddings that enter the language model and, beside them, what is added after its first
                layers (DeepStack), which takes no part in the choice.
            grid: frames, height and width of its tokens, `n` together.
            place: where it stands in the prompt, for a method that reads the prompt.
            recorded: what is known of each row from the vision encoder, `[n, ...]` by name as in
                `PromptAttention.values`, for a method that reads the encoder.
        """
        if place is None:
            prompt, states = _alone(len(rows), self.visual_token_ids[0]), rows[:, : self.hidden_size]
        else:
            prompt = self._in_prompt(place)
            ids = torch.from_numpy(prompt.ids[0]).to(rows.device)
            states = self.embed(ids).to(rows.dtype)
            states[torch.from_numpy(prompt.visual[0]).to(rows.device)] = rows[:, : self.hidden_size]
        chooser = self.chooser
        if chooser.method.uses_text and not prompt.query.any():
            # an error here would end the server, not the request
            chooser = Chooser(Downsample(chooser.method.rounding), chooser.keep_ratio)
        frames, height, width = grid
        attention = None
        if recorded:
            separators = np.zeros_like(prompt.visual)
            attention = PromptAttention(dict(recorded), [[[(1, height, width)] * frames]], separators)
        context = Context(attention, frames=lambda: [[[(height, width)] * frames]])
        choice = chooser.choose(states.unsqueeze(0), prompt, self.projections, context)
        assert isinstance(chooser.keep_ratio, (float, int))
        count = chooser.method.kept_count(chooser.keep_ratio, len(rows))
        picture = torch.from_numpy(np.flatnonzero(prompt.visual[0])).to(rows.device)
        places = choice.kept[0, picture].int().argsort(descending=True, stable=True)[:count]
        if choice.merge is None:
            return Chosen(places, None)
        added = rows[:, states.shape[1] :]
        added = added.new_zeros(len(states), added.shape[1]).index_copy(0, picture, added)
        merged = self._merged(states, added, prompt, choice, choice.merge, attention)
        return Chosen(places, merged[picture[places]])

    def _merged(
        self,
        states: torch.Tensor,
        added: torch.Tensor,
        prompt: Prompt,
        choice: Choice,
        merge: Merge,
        attention: PromptAttention | None,
    ) -> torch.Tensor:
        """Return the rows `[T, C]` of a prompt with those of kept tokens replaced by what a method merges.

        Args:
            states: `[T, hidden]`.
            added: `[T, C - hidden]`, which is merged as it is, as in `prune`.
            prompt, choice, merge, attention: what was chosen, and of what.
        """
        states, kept = states.unsqueeze(0), choice.kept
        whole = torch.cat([states, added.unsqueeze(0)], dim=2)
        merged = restore(compact(whole, kept, length=choice.counts[0], merge=merge).inputs_embeds, kept)[0]
        if self.chooser.method.stage == "decoder":
            return merged
        assert attention is not None
        assert self.project is not None
        projected = merged_before_projector(states, prompt, kept, choice.counts, merge, attention, self.project)[0]
        return torch.cat([projected, merged[:, states.shape[2] :]], dim=1)

    def _in_prompt(self, place: Place) -> Prompt:
        """Put all tokens of a picture where its placeholders stand."""
        ids, stop = place.ids, place.start + place.places
        item = np.full(len(place.visual), ids[place.start])
        texts = np.count_nonzero(~place.visual)
        item[~place.visual] = ids[stop - texts : stop]
        whole = np.concatenate([ids[: place.start], item, ids[stop:]])
        valid, visual = np.ones(len(whole), dtype=bool), np.isin(whole, self.visual_token_ids)
        query, _ = text_queries(whole[None], valid[None], visual[None], self.markers)
        of_picture = np.zeros(len(whole), dtype=bool)
        of_picture[place.start : place.start + len(item)] = place.visual
        return _prompt(whole, of_picture, query[0])


def _alone(count: int, placeholder: int) -> Prompt:
    return _prompt(np.full(count, placeholder), np.ones(count, dtype=bool), np.zeros(count, dtype=bool))


def _prompt(ids: NDArray[np.int64], visual: NDArray[np.bool_], query: NDArray[np.bool_]) -> Prompt:
    valid = np.ones((1, len(ids)), dtype=bool)
    return Prompt(ids[None], valid, visual[None], query[None], [NO_VISUAL], len(ids))
