"""The hooks of one call: they read a prompt, choose tokens, pack the rest, unpack the output, and serve later calls.

Three modules are watched. The model that the caller calls tells how many logits are wanted. The multimodal model below
it sees `input_ids`: there the prompt is read. The text model sees `inputs_embeds`: there tokens are scored, dropped and
the rest packed, and there the masks of later calls are translated to the shorter cache. For a method that chooses
inside the stack, `layer_masks` watches the layers as well. What happens between two hooks of one call is kept for each
thread; what outlives a call is kept with the cache.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from hawk_kernels.hf.anatomy import Anatomy, first_attention_layer
from hawk_kernels.hf.choose_tokens import Choice, Chooser, Context
from hawk_kernels.hf.encoders.recorder import attention_of_prompt, recorder_for
from hawk_kernels.hf.hooks import Handle, WatchedMethod, call_length, named, outside_graphs, upload, visual_features
from hawk_kernels.hf.images import Encoded, EncodingWatch, frames_of_prompt
from hawk_kernels.hf.layer_masks import LayerMasks
from hawk_kernels.hf.packing import Packing, pack_call, slot_limit
from hawk_kernels.hf.projections import LayerProjections
from hawk_kernels.hf.prompt import Prompt, check_one_prefill, given_prompt_length, read_prompt
from hawk_kernels.hf.pruned_cache import CachedPrompt, CacheRecords, UncachedPrompt, constant_mask, forget
from hawk_kernels.hf.question import Query
from hawk_kernels.hf.rotary import check_rotates, rotary_of_first_layer


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
    """

    keep_mask: torch.Tensor
    scores: torch.Tensor
    query_mask: torch.Tensor
    prompt: Prompt | None
    encoded: dict[str, Encoded]
    budgets: list[list[int]] | None
    reason: str | None


class CallHooks:
    """Prunes each prompt that a model reads while these hooks are attached.

    Args:
        anatomy: the model's parts.
        chooser: chooses the tokens that stay.
        query: the caller's choice of text queries, or None.
        publish: is called with the outcome of each prefill.

    Raises:
        TypeError: a method that the model's family cannot serve.
        ValueError: a layer that the model does not have.
    """

    def __init__(
        self, anatomy: Anatomy, chooser: Chooser, query: Query | None, publish: Callable[[Outcome], None]
    ) -> None:
        self._anatomy = anatomy
        self._chooser = chooser
        self._query = query
        self._publish = publish
        self._sources = _Sources(anatomy, chooser)
        layer = chooser.method.hidden_from_layer
        self._masks = None if layer is None else LayerMasks(anatomy, layer, chooser.method.name)
        self._records = CacheRecords(CachedPrompt)
        self._thread = _ThreadState()

    def __reduce__(self) -> str:
        # a copy of the model would be pruned for ever: no block of its own would end that
        raise TypeError(
            "cannot copy or save a model inside prune; leave the block first, and prune the copy in a block of its own"
        )

    def attach(self) -> list[Handle]:
        """Register the hooks; removing the handles, the last one first, ends the pruning."""
        parts = self._anatomy
        return [
            parts.head.register_forward_pre_hook(self._before_head, with_kwargs=True),
            parts.multimodal.register_forward_pre_hook(self._before_multimodal, with_kwargs=True),
            parts.text.register_forward_pre_hook(self._before_text, with_kwargs=True),
            parts.text.register_forward_hook(self._after_text, with_kwargs=True),
            parts.multimodal.register_forward_hook(self._after_multimodal, always_call=True),
            WatchedMethod(parts.head, "generate", self._around_generate),
            *self._sources.attach(),
            *([] if self._masks is None else self._masks.attach()),
        ]

    def options(self) -> dict[str, object]:
        """Return what the method was made with and, where it reads the vision encoder, from which layers."""
        return {**self._chooser.method.options(), **self._sources.options()}

    @contextmanager
    def _around_generate(self, arguments: dict[str, Any]) -> Iterator[Callable[[Any], None]]:
        """Note the length of the prompt, since assisted decoding reads its first guesses together with the prompt."""
        length = given_prompt_length(arguments)
        check_one_prefill(self._anatomy.head, arguments, length)
        earlier, self._thread.prompt_length = self._thread.prompt_length, length
        try:
            yield lambda output: None
        finally:
            self._thread.prompt_length = earlier

    def _before_head(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = named(module, args, kwargs)
        if call_length(kwargs) > 1:
            logits_to_keep = kwargs.get("logits_to_keep")
            self._thread.logits_to_keep = logits_to_keep if isinstance(logits_to_keep, int) else 0

    def _before_multimodal(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        kwargs = named(module, args, kwargs)
        cache, input_ids, mask = (kwargs.get(name) for name in ("past_key_values", "input_ids", "attention_mask"))
        length = call_length(kwargs)
        self._thread.mask = mask
        if length > 1:
            if input_ids is None and (cache is None or int(cache.get_seq_length()) == 0):
                raise ValueError(
                    "input_ids: expected the token ids of the prompt, got inputs_embeds only, which do not tell which "
                    "tokens are visual; pass input_ids and pixel_values, or leave the prune block"
                )
            self._thread.is_inside, self._thread.prefill = True, None
            self._sources.start()
            if input_ids is not None:
                self._thread.prefill = self._read(kwargs, input_ids)
            if self._thread.prefill is not None:
                forget(cache)
                return None
        record = self._records.of(cache)
        if record is None:
            return None
        positions = kwargs.get("position_ids")
        if positions is None:
            batch = None if input_ids is None else len(input_ids)
            return (), {**kwargs, "position_ids": record.positions_for(cache, length, batch)}
        if length > 1:
            if isinstance(mask, torch.Tensor) and mask.dim() == 2:
                record.check_length(cache, mask, length)
            else:
                record.check_continues(cache, positions)
        return None

    @outside_graphs
    def _read(self, kwargs: dict[str, Any], input_ids: torch.Tensor) -> _Prefill | None:
        """Read the prompt of a call; None over a cache that is not empty."""
        cache = kwargs.get("past_key_values")
        features = visual_features(kwargs, self._anatomy.family.features)
        earlier = self._thread.uncached if cache is None else None
        if earlier is not None and not earlier.may_grow_into(input_ids, features):
            earlier = None
        query = self._query if earlier is None else None
        own_length = self._thread.prompt_length if cache is not None else None
        guesses = 0 if own_length is None else max(0, input_ids.shape[1] - own_length)
        prompt, valid = read_prompt(self._anatomy, kwargs, query, guesses)
        if prompt is None:
            if features:
                reason = "images came over a cache that is not empty; only prompts in one call are pruned"
                self._leave_alone(torch.ones_like(input_ids, dtype=torch.bool), None, reason)
            return None
        if earlier is not None and not earlier.grows_into(prompt):
            self._thread.uncached = None
            again: _Prefill | None = self._read(kwargs, input_ids)
            return again
        self._thread.uncached = earlier
        return _Prefill(prompt, valid, features, kwargs)

    def _before_text(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        kwargs = named(module, args, kwargs)
        cache, embeds = kwargs.get("past_key_values"), kwargs.get("inputs_embeds")
        if embeds is None:
            return None
        if embeds.shape[1] > 1:
            if not self._thread.is_inside:
                raise ValueError(
                    "cannot call the text model by itself inside prune: inputs_embeds do not tell which tokens are "
                    "visual; call the model that was given to prune, not a compiled wrapper of it, or leave the block"
                )
            if self._thread.prefill is not None:
                packed = self._prefill(self._thread.prefill, kwargs)
                return None if packed is None else ((), packed)
        if self._masks is not None:
            self._masks.resume(cache)
        record = self._records.of(cache)
        if record is None:
            return None
        # masks over pairs were made for the whole prompt: a growing cache gets its own from the caller's mask
        pairs = self._anatomy.family.pair_masks and record.constant_mask is None
        given = self._thread.mask if pairs else kwargs.get("attention_mask")
        mask = record.mask_for(cache, given, *embeds.shape[:2])
        return (), {**kwargs, "attention_mask": mask}

    def _prefill(self, prefill: _Prefill, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Choose and pack: the text model's arguments for the tokens that stay, or None where all enter it."""
        embeds = kwargs["inputs_embeds"]
        prefill.encoded = self._sources.encoded(prefill.arguments)
        prompt = prefill.prompt = self._sources.with_images(prefill.prompt, prefill.encoded)
        if embeds.shape[:2] != prompt.ids.shape:
            raise ValueError(
                f"inputs_embeds: expected one embedding for each of the {list(prompt.ids.shape)} input_ids, got shape "
                f"{list(embeds.shape)}; prune does not support a model that inserts tokens between the two"
            )
        device, masks, earlier = embeds.device, self._masks, self._thread.uncached
        valid = upload(prompt.valid, device) if prefill.valid is None else prefill.valid.to(device)
        if masks is not None:
            masks.start(nn.functional.pad(valid[:, : prompt.length], (0, valid.shape[1] - prompt.length)))
        if earlier is not None:
            prefill.kept, prefill.counts = earlier.extended(valid, prompt.valid)
        elif not prompt.visual.any():
            prefill.kept, prefill.counts = valid, prompt.valid.sum(axis=1).tolist()
            self._leave_alone(valid, prompt, "no visual tokens")
        elif masks is not None:
            masks.choose_inside(partial(self._choose_inside, prefill, valid))
            return None
        else:
            context = self._sources.context(prefill, kwargs)
            self._choose(prefill, embeds, self._anatomy.projections, context)
        if prefill.keeps_everything or prefill.kept is None:
            return None
        if masks is not None:
            masks.mask(valid & ~prefill.kept)
            return None
        prefill.packing, packed, prefill.following = pack_call(
            self._anatomy, prompt, prefill.kept, prefill.counts, kwargs
        )
        return packed

    def _choose_inside(
        self,
        prefill: _Prefill,
        valid: torch.Tensor,
        states: torch.Tensor,
        projections: LayerProjections,
        context: Context,
    ) -> torch.Tensor | None:
        """Choose inside the stack: the tokens that later layers do not see, bool `[B, T]`, or None."""
        choice = self._choose(prefill, states, projections, context)
        return None if prefill.keeps_everything else valid & ~choice.kept

    def _choose(
        self, prefill: _Prefill, states: torch.Tensor, projections: LayerProjections, context: Context
    ) -> Choice:
        """Choose by what enters the scoring layer, `[B, T, hidden]`, and publish the choice."""
        prompt = prefill.prompt
        choice = self._chooser.choose(states, prompt, projections, context)
        prefill.kept, prefill.counts = choice.kept, choice.counts
        own = slice(None), slice(prompt.length)
        query_mask = upload(prompt.query, states.device)
        masks = choice.kept[own], choice.scores[own], query_mask[own]
        self._publish(Outcome(*masks, prompt, prefill.encoded, choice.budgets, reason=None))
        return choice

    def _leave_alone(self, keep_mask: torch.Tensor, prompt: Prompt | None, reason: str) -> None:
        keep_mask = keep_mask if prompt is None else keep_mask[:, : prompt.length]
        scores = torch.full(keep_mask.shape, -math.inf, dtype=torch.float32, device=keep_mask.device)
        self._publish(Outcome(keep_mask, scores, torch.zeros_like(keep_mask), prompt, {}, None, reason))

    def _after_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        embeds = kwargs.get("inputs_embeds")
        if embeds is None or embeds.shape[1] == 1:
            return None
        prefill = self._thread.prefill
        if prefill is None or prefill.kept is None:
            return None
        prompt, packing, cache = prefill.prompt, prefill.packing, output.past_key_values
        if self._masks is not None:
            self._masks.finish(cache)
        if cache is None and self._thread.uncached is None:
            self._thread.uncached = UncachedPrompt(prompt, prefill.features, prefill.kept, prefill.counts)
        if packing is None or prefill.following is None:
            return None
        if cache is not None:
            record = CachedPrompt(
                full_length=prompt.ids.shape[1],
                mask=packing.mask,
                is_full=packing.is_full,
                next_position=prefill.following,
                constant_mask=constant_mask(cache, packing.mask),
                slot_limit=slot_limit(self._anatomy),
            )
            self._records.keep(cache, record)
        wanted = self._thread.logits_to_keep
        if wanted and prompt.ends_in_text(wanted):
            return None
        output["last_hidden_state"] = packing.unpack(output.last_hidden_state)
        return output

    def _after_multimodal(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._thread.is_inside, self._thread.prefill, self._thread.mask = False, None, None
        self._thread.logits_to_keep = 0


class _Sources:
    """What is watched besides the prompt, for a method that asks: the vision encoder, the images, RoPE."""

    def __init__(self, anatomy: Anatomy, chooser: Chooser) -> None:
        method = chooser.method
        self._anatomy = anatomy
        self._rotates = method.uses_positions
        if self._rotates:
            check_rotates(anatomy, method.name)
        self._recorder = recorder_for(anatomy, method) if method.uses_encoder_attention else None
        self._encoding = EncodingWatch(anatomy.multimodal)
        self._layers_before, _ = first_attention_layer(anatomy.text)
        self._uses_grids = method.uses_grids
        wants_images = chooser.per_image or method.uses_grids
        self._whole_kinds = anatomy.family.encoded_whole if wants_images else ()

    def attach(self) -> list[Handle]:
        watches = (self._recorder, self._encoding)
        return [handle for watch in watches if watch is not None for handle in watch.attach()]

    def start(self) -> None:
        """Forget what earlier calls of the multimodal model encoded."""
        if self._recorder is not None:
            self._recorder.start()
        self._encoding.start()

    def options(self) -> dict[str, object]:
        ranking: dict[str, object] = {"ranking_layer": self._layers_before + 1} if self._layers_before else {}
        return ranking if self._recorder is None else {**ranking, **self._recorder.options()}

    def encoded(self, arguments: dict[str, Any]) -> dict[str, Encoded]:
        """Collect what was encoded for a call of the multimodal model."""
        return self._encoding.encoded(arguments)

    def with_images(self, prompt: Prompt, encoded: dict[str, Encoded]) -> Prompt:
        """Divide the prompt into images as the encoder did."""
        if not self._whole_kinds:
            return prompt
        lengths = {kind: run.lengths for kind, run in encoded.items() if kind in self._whole_kinds}
        return prompt.with_images(lengths, self._anatomy.kinds)

    def context(self, prefill: _Prefill, text_arguments: dict[str, Any]) -> Context:
        """Collect what the method may want to know before the first layer.

        Args:
            prefill: the prompt on its way.
            text_arguments: those of the text model.
        """
        attention = frames = rotary = states = None
        if self._layers_before:
            from hawk_kernels.hf.attention_input import input_of_first_attention

            states = partial(input_of_first_attention, self._anatomy, text_arguments)
        if self._recorder is not None:
            recordings = self._recorder.recordings(prefill.arguments)
            attention = attention_of_prompt(recordings, prefill.prompt, self._anatomy.kinds)
        if self._uses_grids:
            frames = partial(frames_of_prompt, self._anatomy, prefill.prompt, prefill.encoded)
        if self._rotates:
            embeds = text_arguments["inputs_embeds"]
            rotary = rotary_of_first_layer(self._anatomy, embeds, text_arguments.get("position_ids"))
        return Context(attention=attention, frames=frames, rotary=rotary, states=states)


@dataclass
class _Prefill:
    """A prompt on its way from the multimodal model to the text model and back.

    At the text model `encoded` is filled in; then `kept` and `counts`, the tokens that stay and their number in each
    row; and where some were dropped, how the rest are packed and the position ids of what follows.
    """

    prompt: Prompt
    valid: torch.Tensor | None
    features: tuple[Any, ...]
    arguments: dict[str, Any]
    encoded: dict[str, Encoded] = field(default_factory=dict)
    kept: torch.Tensor | None = None
    counts: list[int] = field(default_factory=list)
    packing: Packing | None = None
    following: torch.Tensor | None = None

    @property
    def keeps_everything(self) -> bool:
        counts: list[int] = self.prompt.valid.sum(axis=1).tolist()
        return self.counts == counts


class _ThreadState(threading.local):
    is_inside: bool = False
    prefill: _Prefill | None = None
    mask: Any = None
    logits_to_keep: int = 0
    # of the prompt that generate was called with
    prompt_length: int | None = None
    uncached: UncachedPrompt | None = None
