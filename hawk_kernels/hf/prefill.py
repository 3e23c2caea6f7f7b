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
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from hawk_kernels.hf.anatomy import Anatomy, first_attention_layer
from hawk_kernels.hf.choose_tokens import Choice, Chooser, Context
from hawk_kernels.hf.encoders.recorder import attention_of_prompt, recorder_for
from hawk_kernels.hf.hooks import (
    Handle,
    Lifetime,
    WatchedMethod,
    call_length,
    check_hooks_run,
    check_not_empty,
    check_parts_run,
    compiled_before,
    is_paged,
    named,
    outside_graphs,
    upload,
    visual_features,
)
from hawk_kernels.hf.images import Encoded, EncodingWatch, frames_of_prompt
from hawk_kernels.hf.layer_masks import LayerMasks
from hawk_kernels.hf.packing import Packing, pack_call, slot_limit
from hawk_kernels.hf.projections import LayerProjections
from hawk_kernels.hf.prompt import Prompt, check_one_prefill, given_ids, read_prompt
from hawk_kernels.hf.pruned_cache import (
    CachedPrompt,
    CacheRecords,
    UncachedPrompt,
    constant_mask,
    forget,
    guard,
    serve,
    unguard,
)
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
        ended: is called when the hooks are off.
        spent: is called with the seconds that choosing and packing took on the host.

    Attributes:
        lifetime: puts the hooks on and takes them off.
        has_chosen: whether tokens of any prompt were chosen.
        left_images_alone: whether images came over a cache that was not empty.
        tiny_budget: how many visual tokens the largest unit had of which a budget kept less than 1 %, or 0.
        all_nan: on the device, whether the method scored all visual tokens of some row NaN; None where it is known.

    Raises:
        TypeError: a method that the model's family cannot serve.
        ValueError: a layer that the model does not have.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        chooser: Chooser,
        query: Query | None,
        publish: Callable[[Outcome], None],
        ended: Callable[[], None],
        spent: Callable[[float], None],
    ) -> None:
        self._anatomy = anatomy
        self._chooser = chooser
        self._query = query
        self._publish = publish
        self._spent = spent
        self._sources = _Sources(anatomy, chooser)
        layer = chooser.method.hidden_from_layer
        self._masks = None if layer is None else LayerMasks(anatomy, layer, chooser.method.name)
        self._records = CacheRecords(CachedPrompt)
        self._thread = _ThreadState()
        self.lifetime = Lifetime(self._attach, self._watch_generate, ended)
        self.has_chosen = self.left_images_alone = False
        self.tiny_budget = 0
        self.all_nan: torch.Tensor | None = None

    def __reduce__(self) -> str:
        # a copy of the model would be pruned for ever: no block of its own would end that
        raise TypeError(
            "cannot copy or save a model inside prune; leave the block first, and prune the copy in a block of its own"
        )

    def _attach(self) -> list[Handle]:
        """Register the hooks.

        Raises:
            ValueError: the model is being pruned already, or runs compiled code that would skip hooks.
        """
        parts = self._anatomy
        watched = (parts.head, parts.multimodal, parts.text)
        hooks = [hook for module in watched for hook in module._forward_pre_hooks.values()]
        if any(isinstance(getattr(hook, "__self__", None), CallHooks) for hook in hooks):
            raise ValueError(
                f"cannot prune a {type(parts.head).__name__} that is being pruned already; leave that block first, and "
                "join the threads that generate in it"
            )
        for module in watched:
            check_hooks_run(module)
        method = self._chooser.method.name
        if self._masks is not None:
            text: Any = parts.text
            check_parts_run(text.layers, "the text model", method)
        self._sources.check_hooks_run(method)
        return [
            parts.head.register_forward_pre_hook(self._before_head, with_kwargs=True),
            parts.head.register_forward_hook(self._after_head),
            parts.multimodal.register_forward_pre_hook(self._before_multimodal, with_kwargs=True),
            parts.text.register_forward_pre_hook(self._before_text, with_kwargs=True),
            parts.text.register_forward_hook(self._after_text, with_kwargs=True, always_call=True),
            parts.multimodal.register_forward_hook(self._after_multimodal, always_call=True),
            *(
                [WatchedMethod(parts.head, "generate_batch", self._around_generate_batch)]
                if hasattr(parts.head, "generate_batch")
                else []
            ),
            *self._sources.attach(),
            *([] if self._masks is None else self._masks.attach()),
        ]

    def _watch_generate(self) -> Handle:
        return WatchedMethod(self._anatomy.head, "generate", self._around_generate)

    @contextmanager
    def _around_generate_batch(self, arguments: dict[str, Any]) -> Iterator[Callable[[Any], None]]:
        """Let continuous batching of text through.

        Raises:
            ValueError: a request holds visual tokens.
        """
        for number, ids in enumerate(arguments.get("inputs") or ()):
            if np.isin(np.asarray(ids), self._anatomy.visual_token_ids).any():
                raise ValueError(
                    f"inputs: expected requests of text alone, got visual tokens in request {number}; generate_batch "
                    "cannot be pruned, so call generate for prompts with images"
                )
        yield lambda output: None

    def options(self) -> dict[str, object]:
        """Return what the method was made with and, where it reads the vision encoder, from which layers."""
        return {**self._chooser.method.options(), **self._sources.options()}

    @contextmanager
    def _around_generate(self, arguments: dict[str, Any]) -> Iterator[Callable[[Any], None]]:
        """Note the prompt, since assisted decoding reads its first guesses together with the prompt."""
        with self.lifetime.generating():
            ids = given_ids(arguments)
            check_not_empty(ids, arguments.get("inputs_embeds"))
            check_one_prefill(self._anatomy.head, arguments, None if ids is None else ids.shape[1])
            thread = self._thread
            earlier = thread.generation, thread.uncached
            thread.generation, thread.uncached = _Generation(ids), _no_uncached_prompts()
            try:
                yield lambda output: None
            finally:
                thread.generation, thread.uncached = earlier

    def _before_head(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.lifetime.acts():
            return
        self._thread.is_reached = False
        kwargs = named(module, args, kwargs)
        if call_length(kwargs) > 1:
            logits_to_keep = kwargs.get("logits_to_keep")
            self._thread.logits_to_keep = logits_to_keep if isinstance(logits_to_keep, int) else 0

    def _after_head(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.lifetime.acts() and not self._thread.is_reached:
            raise compiled_before()

    def _before_multimodal(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.lifetime.acts():
            return None
        self.lifetime.begin_forward()
        self._thread.is_reached = True
        kwargs = named(module, args, kwargs)
        cache, input_ids, mask = (kwargs.get(name) for name in ("past_key_values", "input_ids", "attention_mask"))
        if is_paged(kwargs):
            return None
        length = call_length(kwargs)
        check_not_empty(input_ids, kwargs.get("inputs_embeds"))
        self._thread.mask = mask
        if length > 1:
            if input_ids is None and (cache is None or int(cache.get_seq_length()) == 0):
                raise ValueError(
                    "input_ids: expected the token ids of the prompt, got inputs_embeds only, which do not tell which "
                    "tokens are visual; pass input_ids and pixel_values, or leave the prune block"
                )
            # taken here, so that a call which was interrupted leaves nothing to the next one
            wanted, self._thread.logits_to_keep = self._thread.logits_to_keep, 0
            self._thread.is_inside, self._thread.prefill = True, None
            self._sources.start()
            if input_ids is not None:
                self._thread.prefill = self._read(kwargs, input_ids)
            if self._thread.prefill is not None:
                self._thread.prefill.logits_to_keep = wanted
                forget(cache)
                unguard(cache)
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
        generation = self._thread.generation
        # later calls inside generate are steps, or prompts that a processor of logits compares with
        is_own = generation is None or not generation.has_begun
        guesses = 0
        if generation is not None:
            guesses = generation.count_guesses(input_ids) if is_own and cache is not None else 0
            generation.has_begun = True
        waiting = self._thread.uncached if cache is None else ()
        candidates = [earlier for earlier in waiting if earlier.may_grow_into(input_ids, features)]
        query = None if candidates else self._query
        prompt, valid = read_prompt(self._anatomy, kwargs, query, guesses)
        if prompt is None:
            if features:
                self.left_images_alone = True
                reason = "images came over a cache that is not empty; only prompts in one call are pruned"
                if is_own:
                    self._leave_alone(torch.ones_like(input_ids, dtype=torch.bool), None, reason)
            return None
        grown = next((earlier for earlier in candidates if earlier.grows_into(prompt)), None)
        if candidates and grown is None and self._query is not None:
            prompt, valid = read_prompt(self._anatomy, kwargs, self._query, guesses)
            assert prompt is not None
        return _Prefill(prompt, valid, features, kwargs, is_own, grown)

    def _before_text(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        kwargs = named(module, args, kwargs)
        cache, embeds = kwargs.get("past_key_values"), kwargs.get("inputs_embeds")
        if embeds is None or is_paged(kwargs) or not self.lifetime.acts():
            return None
        if embeds.shape[1] > 1:
            is_inside, prefill = self._thread.is_inside, self._thread.prefill
            self._thread.is_inside, self._thread.prefill, self._thread.entered = False, None, prefill
            if not is_inside:
                raise ValueError(
                    "cannot call the text model by itself inside prune: inputs_embeds do not tell which tokens are "
                    "visual; call the model that was given to prune, not a compiled wrapper of it, or leave the block"
                )
            if prefill is not None:
                started = time.perf_counter()
                packed = self._prefill(prefill, kwargs)
                self._spent(time.perf_counter() - started)
                return None if packed is None else ((), packed)
        serve(cache, True)
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
        device, masks, earlier = embeds.device, self._masks, prefill.earlier
        valid = upload(prompt.valid, device) if prefill.valid is None else prefill.valid.to(device)
        if masks is not None:
            masks.start(nn.functional.pad(valid[:, : prompt.length], (0, valid.shape[1] - prompt.length)))
        if earlier is not None:
            prefill.kept, prefill.counts = earlier.extended(valid, prompt.valid)
        elif not prompt.visual.any():
            prefill.kept, prefill.counts = valid, prompt.valid.sum(axis=1).tolist()
            if prefill.is_own:
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
        self.has_chosen = True
        self._note_nan(choice.scores, prompt)
        self._note_budget(prompt)
        prefill.kept, prefill.counts = choice.kept, choice.counts
        if prefill.is_own:
            own = slice(None), slice(prompt.length)
            query_mask = upload(prompt.query, states.device)
            masks = choice.kept[own], choice.scores[own], query_mask[own]
            self._publish(Outcome(*masks, prompt, prefill.encoded, choice.budgets, reason=None))
        return choice

    def _note_nan(self, scores: torch.Tensor, prompt: Prompt) -> None:
        """Refuse scores that rank nothing; those on a device are judged on leaving, to make no call wait for it.

        Raises:
            ValueError: all visual tokens of some row are NaN.
        """
        if scores.device.type == "cpu":
            unranked = np.isnan(scores.detach().numpy()) | ~prompt.visual
            if (unranked.all(axis=1) & prompt.visual.any(axis=1)).any():
                raise self.nan_error()
            return
        visual = upload(prompt.visual, scores.device)
        found = ((scores.isnan() | ~visual).all(dim=1) & visual.any(dim=1)).any()
        self.all_nan = found if self.all_nan is None else self.all_nan.to(found.device) | found

    def nan_error(self) -> ValueError:
        """Make the error for scores that rank nothing."""
        return ValueError(
            f"method {self._chooser.method.name!r}: expected finite scores, got NaN for every visual token of a row; "
            "look for NaN in the weights of the model, or in what the method computes"
        )

    def _note_budget(self, prompt: Prompt) -> None:
        budget = self._chooser.keep_ratio
        if isinstance(budget, float):
            return
        rows = prompt.image_lengths() if self._chooser.per_image else prompt.visual.sum(axis=1, keepdims=True).tolist()
        longest = max((length for row in rows for length in row), default=0)
        if budget * 100 < longest:
            self.tiny_budget = max(self.tiny_budget, longest)

    def _leave_alone(self, keep_mask: torch.Tensor, prompt: Prompt | None, reason: str) -> None:
        keep_mask = keep_mask if prompt is None else keep_mask[:, : prompt.length]
        scores = torch.full(keep_mask.shape, -math.inf, dtype=torch.float32, device=keep_mask.device)
        self._publish(Outcome(keep_mask, scores, torch.zeros_like(keep_mask), prompt, {}, None, reason))

    def _after_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        embeds = kwargs.get("inputs_embeds")
        if not self.lifetime.acts():
            return None
        serve(kwargs.get("past_key_values"), False)
        if embeds is None or embeds.shape[1] == 1:
            return None
        prefill, self._thread.entered = self._thread.entered, None
        if prefill is None or prefill.kept is None or output is None:
            return None
        prompt, packing, cache = prefill.prompt, prefill.packing, output.past_key_values
        if self._masks is not None:
            self._masks.finish(cache)
        if cache is not None and not prefill.keeps_everything:
            guard(cache)
        if cache is None and prefill.earlier is None:
            self._thread.uncached.append(UncachedPrompt(prompt, prefill.features, prefill.kept, prefill.counts))
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
        wanted = prefill.logits_to_keep
        if wanted and prompt.ends_in_text(wanted):
            return None
        output["last_hidden_state"] = packing.unpack(output.last_hidden_state)
        return output

    def _after_multimodal(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.lifetime.acts():
            return
        prefill = self._thread.prefill
        self._thread.is_inside, self._thread.prefill, self._thread.mask = False, None, None
        self._thread.logits_to_keep = 0
        self.lifetime.end_forward()
        if prefill is not None and output is not None:
            raise compiled_before()


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

    def check_hooks_run(self, method: str) -> None:
        """Refuse a vision encoder with compiled layers, where the method watches them."""
        if self._recorder is not None:
            check_parts_run(self._recorder.tower, "the vision encoder", method)

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

    `is_own` is false for a prompt that is not the one which `generate` was called with. `earlier` is the prompt of
    which this one is a later step, where there is no cache. At the text model `encoded` is filled in; then `kept` and
    `counts`, the tokens that stay and their number in each row; and where some were dropped, how the rest are packed
    and the position ids of what follows. `logits_to_keep` is how many logits at the end the caller wants, 0 for all.
    """

    prompt: Prompt
    valid: torch.Tensor | None
    features: tuple[Any, ...]
    arguments: dict[str, Any]
    is_own: bool
    earlier: UncachedPrompt | None
    encoded: dict[str, Encoded] = field(default_factory=dict)
    kept: torch.Tensor | None = None
    counts: list[int] = field(default_factory=list)
    packing: Packing | None = None
    following: torch.Tensor | None = None
    logits_to_keep: int = 0

    @property
    def keeps_everything(self) -> bool:
        counts: list[int] = self.prompt.valid.sum(axis=1).tolist()
        return self.counts == counts


@dataclass
class _Generation:
    """A call of `generate`.

    Attributes:
        ids: the prompt that it was called with, `[B, T]`, or None.
        has_begun: whether it has read a prompt.
    """

    ids: torch.Tensor | None
    has_begun: bool = False

    def count_guesses(self, input_ids: torch.Tensor) -> int:
        """Count the tokens that assisted decoding reads together with the prompt, after it."""
        if self.ids is None or input_ids.shape[0] != self.ids.shape[0] or input_ids.shape[1] <= self.ids.shape[1]:
            return 0
        length = self.ids.shape[1]
        return int(input_ids.shape[1]) - length if torch.equal(input_ids[:, :length], self.ids.to(input_ids)) else 0


def _no_uncached_prompts() -> deque[UncachedPrompt]:
    # several generations without a cache may take turns, such as a question and what it is contrasted with
    return deque(maxlen=16)


class _ThreadState(threading.local):
    # whether the multimodal model was reached by the call of the head
    is_reached: bool = False
    # whether the text model was not reached yet by the call of the multimodal model, and the prompt of that call
    is_inside: bool = False
    prefill: _Prefill | None = None
    # the prompt that the text model reads now
    entered: _Prefill | None = None
    mask: Any = None
    logits_to_keep: int = 0
    generation: _Generation | None = None

    def __init__(self) -> None:
        self.uncached = _no_uncached_prompts()
