"""Drops tokens inside the stack: the layers after a stage get shorter rows, and their part of the cache is shorter.

While a prompt is read, a hook before each of these layers cuts the rotary tables, ids and masks that the text model has
made for the whole row, and the first of them cuts the states as well. A mask over pairs is cut by rows and columns, so
that windows still measure distances in the whole row. In later calls a growing cache holds fewer tokens in these layers
than in the first; each gets a mask over its own tokens, in which windows are measured by where the tokens stood in the
row. So the answers are those of a model from whose later layers the dropped tokens are hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from hawk_kernels.hf.layer_masks import check_rows, for_attention, is_causal, states_of, with_states
from hawk_kernels.hf.packing import Packing, packed_pairs
from hawk_kernels.hf.prompt import Prompt
from hawk_kernels.hf.pruned_cache import CacheRecords
from hawk_kernels.selection import Merge


@dataclass(frozen=True)
class Layout:
    """The tokens that the layers after a stage hold, as packed rows.

    Attributes:
        first: index of the first of these layers, from 0.
        source: int64 `[B, P]`, where in the row that entered the text model each token stood; 0 at padding.
        mask: bool `[B, P]`, False at padding.
        is_full: whether no row has padding.
    """

    first: int
    source: torch.Tensor
    mask: torch.Tensor
    is_full: bool


@dataclass(frozen=True)
class VisualFeatures:
    """What is added to the visual tokens after some layers (DeepStack, arXiv 2406.04334).

    Attributes:
        first: index of the first of these layers, from 0.
        layers: for each layer the features of all visual tokens, `[S, hidden]`.
        places: bool `[B, T]`, where these tokens stand in the rows that enter the text model.
    """

    first: int
    layers: list[torch.Tensor]
    places: torch.Tensor

    def after(self, index: int) -> torch.Tensor | None:
        """Return the features that are added after the layer at `index`; None where there are none."""
        return self.layers[index - self.first] if 0 <= index - self.first < len(self.layers) else None


class PromptCut:
    """A prompt on its way through the layers, which gets shorter at each stage.

    Args:
        text: the text model.
        prompt: the prompt that enters it, on the host.
        valid: bool `[B, T]`, its own tokens, False at padding and at guesses after its end.
        features: what is added to the visual tokens after some layers, or None.
    """

    def __init__(self, text: Any, prompt: Prompt, valid: torch.Tensor, features: VisualFeatures | None) -> None:
        self._text = text
        self._prompt = prompt
        self._shape = valid.shape
        self._entered_valid = valid
        self._features = features
        self._packings: list[Packing] = []
        self._layouts: list[Layout] = []
        self._waiting: tuple[int, torch.Tensor, list[int], Merge | None] | None = None
        self._kept: torch.Tensor | None = None
        self._made: list[tuple[Any, Any, Any]] = []

    @property
    def valid(self) -> torch.Tensor:
        """Mark the prompt's own tokens in the present rows, bool `[B, P]`."""
        if not self._layouts:
            return self._entered_valid
        layout = self._layouts[-1]
        return layout.mask & self._entered_valid.to(layout.mask.device).gather(1, layout.source)

    @property
    def prompt(self) -> Prompt:
        """Describe the present rows on the host, which waits for the device where tokens were dropped."""
        if self._kept is not None:
            kept = self._kept.cpu().numpy()
            self._prompt, self._kept = packed_prompt(self._prompt, kept, self._packings[-1].length), None
        return self._prompt

    def keep(self, first: int, kept: torch.Tensor, counts: list[int], merge: Merge | None) -> None:
        """Let the layers from index `first` on hold only these tokens of the present rows.

        Args:
            first: the first of these layers.
            kept: bool `[B, P]`.
            counts: how many stay in each row.
            merge: makes the states of kept tokens sums of states, by places among the P; None means none.
        """
        self._waiting = first, kept, counts, merge

    def of_present(self, kept: torch.Tensor) -> torch.Tensor:
        """Cut a mask of the rows that entered, bool `[B, T]`, to the present ones."""
        if not self._layouts:
            return kept
        layout = self._layouts[-1]
        return kept.to(layout.mask.device).gather(1, layout.source) & layout.mask

    def of_whole(self, values: torch.Tensor, fill: Any) -> torch.Tensor:
        """Spread `[B, P]` of the present rows over the rows that entered, with `fill` elsewhere."""
        for packing in reversed(self._packings):
            values = packing.spread(values, fill)
        return values

    def unpacked(self, states: torch.Tensor) -> torch.Tensor:
        """Spread `[B, P, hidden]` over the rows that entered, zero where a token was dropped."""
        for packing in reversed(self._packings):
            states = packing.unpack(states)
        return states

    def adapted(
        self, index: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Turn a layer's arguments for the rows that entered into those for the present rows."""
        if self._waiting is not None and index >= self._waiting[0]:
            args, kwargs = with_states(args, kwargs, self._cut_states(states_of(args, kwargs)))
        if not self._layouts:
            return args, kwargs
        layout, states = self._layouts[-1], states_of(args, kwargs)
        mask = self._mask(index, layer, kwargs.get("attention_mask"), states, kwargs.get("past_key_values"))
        others = {name: self._cut(name, value) for name, value in kwargs.items() if name != "hidden_states"}
        if "hidden_states" in kwargs:
            others["hidden_states"] = kwargs["hidden_states"]
        if kwargs.get("cache_position") is not None:
            others["cache_position"] = torch.arange(layout.mask.shape[1], device=kwargs["cache_position"].device)
        return (*args[:1], *(self._cut("", value) for value in args[1:])), {**others, "attention_mask": mask}

    def after(self, index: int, states: torch.Tensor) -> torch.Tensor | None:
        """Add the features that belong to the visual tokens after this layer; return None if there are none."""
        features = None if self._features is None else self._features.after(index)
        if self._features is None or features is None:
            return None
        device = states.device
        here = self._features.places.to(device)
        row = (here.flatten().cumsum(0) - 1).view(here.shape).clamp(min=0)
        if any(packing.merges for packing in self._packings):
            whole = torch.where(here.unsqueeze(-1), features.to(device, states.dtype)[row], 0)
            for packing in self._packings:
                whole = packing.merged(whole)
            return states + whole
        if self._layouts:
            source = self._layouts[-1].source.to(device)
            here, row = here.gather(1, source) & self._layouts[-1].mask.to(device), row.gather(1, source)
        return states + torch.where(here.unsqueeze(-1), features.to(device, states.dtype)[row], 0)

    def keep_with(self, cache: Any, records: CacheRecords[CutPrompt], full_length: int) -> None:
        """Note on `cache`, which the prompt has filled, which tokens its layers hold; None stands for no cache."""
        if cache is not None and self._layouts:
            grows = not getattr(cache, "is_compileable", False)
            padding = (self._entered_valid.cumsum(1) == 0).sum(1)
            records.keep(cache, CutPrompt(list(self._layouts), self._shape[1], full_length, padding, grows))

    def _cut_states(self, states: torch.Tensor) -> torch.Tensor:
        assert self._waiting is not None
        first, kept, counts, merge = self._waiting
        device = states.device
        self._kept, self._waiting = kept, None
        packing = Packing(states, kept.to(device), counts, merge=merge)
        source, mask = packing.source, packing.mask.bool()
        if self._layouts:
            source = self._layouts[-1].source.to(device).gather(1, source)
        self._packings.append(packing)
        self._layouts.append(Layout(first, source, mask, packing.is_full))
        self._made = []
        return packing.inputs_embeds

    def _cut(self, name: str, value: Any) -> Any:
        """Cut one argument of a layer, or return it as it is if it has no entry for each token."""
        if isinstance(value, tuple) and name == "position_embeddings":
            return self._remembered(value, name, lambda: tuple(self._angles(each) for each in value))
        if not isinstance(value, torch.Tensor):
            return value
        if name == "position_embeddings":
            return self._remembered(value, name, lambda: self._angles(value))
        if name == "position_ids":
            return self._remembered(value, name, lambda: self._ids(value))
        if value.dim() > 1 and value.shape[:2] == self._shape:
            return self._remembered(value, name, lambda: self._tokens(value))
        return value

    def _remembered(self, given: Any, kind: Any, make: Any) -> Any:
        # layers share most arguments
        for other, other_kind, made in self._made:
            if other is given and other_kind == kind:
                return made
        made = make()
        self._made.append((given, kind, made))
        return made

    def _angles(self, angles: torch.Tensor) -> torch.Tensor:
        """Cut `[..., 1 or B, T, D]`."""
        source = self._layouts[-1].source.to(angles.device)
        whole = angles if angles.dim() > 2 else angles.unsqueeze(0)
        shape = (*whole.shape[:-3], *source.shape, whole.shape[-1])
        whole = whole.expand(*shape[:-2], *whole.shape[-2:])
        return whole.gather(-2, source.unsqueeze(-1).expand(shape))

    def _ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Cut `[..., 1 or B, T]`."""
        source = self._layouts[-1].source.to(ids.device)
        shape = (*ids.shape[:-2], *source.shape)
        return ids.expand(*shape[:-1], ids.shape[-1]).gather(-1, source.expand(shape))

    def _tokens(self, values: torch.Tensor) -> torch.Tensor:
        """Cut `[B, T, ...]`."""
        source = self._layouts[-1].source.to(values.device)
        start = torch.arange(0, values.shape[0] * values.shape[1], values.shape[1], device=values.device).unsqueeze(1)
        return torch.unflatten(values.flatten(0, 1).index_select(0, (source + start).flatten()), 0, source.shape)

    def _mask(self, index: int, layer: Any, given: Any, states: torch.Tensor, cache: Any) -> torch.Tensor | None:
        layout = self._layouts[-1]
        length, device = layout.mask.shape[1], states.device
        if not hasattr(layer, "self_attn"):
            # linear attention and convolutions take a mask of padding only
            return None if layout.is_full else layout.mask.to(device, torch.long if given is None else given.dtype)
        width = length if cache is None else int(cache.get_mask_sizes(length, index)[0])
        if given is None and layout.is_full and width == length:
            return None
        kind = ("mask", width, device, is_causal(layer))
        made: torch.Tensor = self._remembered(given, kind, lambda: self._pairs(layer, given, width, states))
        return made

    def _pairs(self, layer: Any, given: Any, width: int, states: torch.Tensor) -> torch.Tensor:
        layout, whole = self._layouts[-1], self._shape[1]
        if given is None and not is_causal(layer):
            given = torch.ones(1, 1, whole, whole, dtype=torch.bool, device=states.device)
        return for_attention(self._text, packed_pairs(given, layout, width).to(states.device), states)


@dataclass
class CutPrompt:
    """Records which tokens of its prompt the layers of a cache hold.

    Attributes:
        layouts: for each stage, the tokens that the layers after it hold.
        entered: tokens of a row that entered the text model, `T`.
        full_length: tokens of a row before any were dropped.
        padding: int64 `[B]`, tokens of padding before each row.
        grows: whether the cache grows with each token.
    """

    layouts: list[Layout]
    entered: int
    full_length: int
    padding: torch.Tensor
    grows: bool

    @property
    def num_rows(self) -> int:
        return self.padding.shape[0]

    def take_rows(self, rows: torch.Tensor) -> None:
        def of(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.index_select(0, rows.to(tensor.device))

        self.layouts = [replace(each, source=of(each.source), mask=of(each.mask)) for each in self.layouts]
        self.padding = of(self.padding)


class Reach(NamedTuple):
    """How far back the tokens of a layer see.

    Attributes:
        window: how many tokens each one sees, itself included; None means all before it.
        chunk: length of the chunks that a row is cut into, where a token sees its own chunk only; None means no chunks.
    """

    window: int | None
    chunk: int | None


class LaterCut:
    """A call over a cache whose later layers hold fewer tokens.

    Args:
        text: the text model.
        reaches: how far each of its layers sees.
        record: what its layers hold.
        given: the caller's mask of the call: None, 2-D over the whole prompt and what followed, or what `generate`
            prepares for a cache of fixed size.
    """

    def __init__(self, text: Any, reaches: list[Reach], record: CutPrompt, given: Any) -> None:
        self._text, self._reaches, self._record, self._given = text, reaches, record, given
        self._made: list[tuple[Any, torch.Tensor]] = []

    def adapted(
        self, index: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Give a layer a mask over the tokens that it holds; return None if its arguments can stay as they are."""
        layout = next((each for each in reversed(self._record.layouts) if each.first <= index), None)
        if layout is None or not hasattr(layer, "self_attn"):
            return None
        states, cache, reach = states_of(args, kwargs), kwargs["past_key_values"], self._reaches[index]
        length, held = states.shape[1], cache.get_seq_length(index)
        check_rows(layout.mask.shape[0], states)
        # where the new tokens would stand in the whole row
        ahead = self._record.entered - layout.mask.shape[1]
        is_near = reach.window is None or (isinstance(held, int) and held + ahead < reach.window)
        shows_all = kwargs.get("attention_mask") is None and layout.is_full
        if shows_all and length == 1 and is_near and reach.chunk is None:
            return None
        width, offset = cache.get_mask_sizes(length, index)
        kind = (id(layout), width, offset, reach, states.device)
        for other, made in self._made:
            if other == kind:
                return args, {**kwargs, "attention_mask": made}
        mask = self._pairs(layout, held, length, int(width), int(offset), reach, states)
        self._made.append((kind, mask))
        return args, {**kwargs, "attention_mask": mask}

    def _pairs(
        self,
        layout: Layout,
        held: Any,
        length: int,
        width: int,
        offset: int,
        reach: Reach,
        states: torch.Tensor,
    ) -> torch.Tensor:
        """Make the mask `[B, 1, length, width]` of a layer.

        Args:
            layout: the tokens of the prompt that the layer holds.
            held: tokens that it holds before the call; a tensor for a cache of fixed size.
            length: new tokens.
            width: keys of the layer.
            offset: tokens before the first of its keys, over which a window has slid.
            reach: how far the layer sees.
            states: what enters the layer.
        """
        device, kept = states.device, layout.mask.shape[1]
        is_token = self._with_tail(layout.mask.to(device), held, length)
        missing = max(0, offset + width - is_token.shape[1])
        is_token = torch.nn.functional.pad(is_token, (0, missing), value=True)[:, offset : offset + width]
        key = torch.arange(offset, offset + width, device=device)
        query = held + torch.arange(length, device=device)
        seen = (key <= query.unsqueeze(1)) & is_token[:, None, None]
        window, chunk = reach
        if window is not None or chunk is not None:
            ahead = self._record.entered - kept
            source = torch.nn.functional.pad(layout.source.to(device), (0, max(0, offset + width - kept)))
            stood = torch.where(key < kept, source[:, offset : offset + width], key + ahead)[:, None, None]
            stands = (query + ahead).unsqueeze(1)
            if window is not None:
                seen = seen & (stands - stood < window)
            if chunk is not None:
                padding = self._record.padding.to(device)[:, None, None, None]
                seen = seen & ((stands - padding) // chunk == (stood - padding) // chunk)
        return for_attention(self._text, seen, states)

    def _with_tail(self, is_token: torch.Tensor, held: Any, length: int) -> torch.Tensor:
        """Append to the mask of the prompt, bool `[B, P]`, what the caller's mask says of the tokens after it."""
        given = self._given
        if not (isinstance(given, torch.Tensor) and given.dim() == 2):
            if given is not None and self._record.grows:
                came = "a dict of masks" if isinstance(given, dict) else f"a mask of {given.dim()} dimensions"
                raise ValueError(
                    f"attention_mask: expected a [batch, length] mask or None over a pruned cache, got {came}; pass "
                    "the 2-D mask"
                )
            return is_token
        after = given[:, self._record.full_length :].to(is_token)
        if self._record.grows:
            expected = held + length - is_token.shape[1]
            if given.shape[1] != self._record.full_length + expected:
                raise ValueError(
                    f"attention_mask: expected length {self._record.full_length + expected}, counted before pruning, "
                    f"over a pruned cache, got {given.shape[1]}; pass only the new tokens, with a mask over the whole "
                    "conversation"
                )
            if expected <= 0:
                return is_token
        return torch.cat([is_token, after], dim=1)


def packed_prompt(prompt: Prompt, kept: np.ndarray, length: int) -> Prompt:
    """Describe the rows of a prompt after some tokens were dropped.

    Args:
        prompt: before.
        kept: bool `[B, T]`, the tokens that stayed.
        length: length of a packed row, `P`; padding stands before its tokens.
    """
    counts = kept.sum(axis=1, keepdims=True)
    filled = np.arange(length) >= length - counts

    def packed(values: np.ndarray) -> np.ndarray:
        moved = np.zeros((len(values), length), dtype=values.dtype)
        moved[filled] = values[kept]
        return moved

    # an image now starts at the first of its tokens that is left
    images = np.zeros(prompt.ids.shape, dtype=np.int64)
    for row in range(len(prompt.ids)):
        for number, image in enumerate(prompt.whole_images(row), start=1):
            images[row, image] = number
    left = packed(images)
    starts = (left > 0) & (np.maximum.accumulate(np.pad(left, ((0, 0), (1, 0))), axis=1)[:, :-1] < left)
    return Prompt(
        ids=packed(prompt.ids),
        valid=packed(prompt.valid),
        visual=packed(prompt.visual),
        query=packed(prompt.query),
        query_sources=prompt.query_sources,
        length=length - (prompt.ids.shape[1] - prompt.length),
        placeholders=packed(prompt.all_placeholders()),
        starts=starts,
        tiles=None if prompt.tiles is None else packed(prompt.tiles + 1) - 1,
        separators=None if prompt.separators is None else packed(prompt.separators),
    )


def cut_features(kwargs: dict[str, Any], first: int) -> tuple[dict[str, Any], VisualFeatures | None]:
    """Take from the text model what it would add to visual tokens after the layers from index `first` on.

    Returns:
        The arguments of the text model without these features; and the features, or None where there are none to take.
    """
    features = kwargs.get("deepstack_visual_embeds")
    if not features or len(features) <= first:
        return kwargs, None
    taken = VisualFeatures(first, list(features)[first:], kwargs["visual_pos_masks"])
    return {**kwargs, "deepstack_visual_embeds": list(features)[:first]}, taken


def reaches_of(config: Any, depth: int) -> list[Reach]:
    """Read from the config of a text model how far each of its layers sees."""
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    # a model whose layers are all of one kind need not list them
    kinds = getattr(config, "layer_types", None) or ["" if window is None else "sliding_attention"] * depth
    return [Reach(window if "sliding" in kind else None, chunk if "chunked" in kind else None) for kind in kinds]
