"""The hooks of one call: they read a prompt, choose tokens, pack the rest, unpack the output, and serve later calls.

Three modules are watched. The model that the caller calls tells how many logits are wanted. The multimodal model below
it sees `input_ids`: there the prompt is read. The text model sees `inputs_embeds`: there tokens are scored, dropped and
the rest packed, and there the masks of later calls are translated to the shorter cache. For stages inside the stack,
`inside_stack` watches the layers as well. What happens between two hooks of one call is kept for each thread; what
outlives a call is kept with the cache.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from hawk_kernels.hf.anatomy import Anatomy, first_attention_layer
from hawk_kernels.hf.choose_tokens import Choice, Chooser, Context
from hawk_kernels.hf.encoder_stage import check_projector, merged_before_projector
from hawk_kernels.hf.encoders.recorder import PromptAttention, VisionRecorder, attention_of_prompt, recorder_for
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
from hawk_kernels.hf.packing import Packing, pack_call, slot_limit
from hawk_kernels.hf.projections import LayerProjections
from hawk_kernels.hf.prompt import Prompt, check_one_prefill, given_ids, read_prompt
from hawk_kernels.hf.pruned_cache import (
    STACK_RECORDS,
    CachedPrompt,
    CacheRecords,
    Kept,
    UncachedPrompt,
    bytes_saved,
    check_served,
    check_slots,
    constant_mask,
    count_dropped,
    fixed_size,
    forget,
    guard,
    serve,
    unguard,
)
from hawk_kernels.hf.question import Query
from hawk_kernels.hf.rotary import check_rotates, rotary_of_first_layer
from hawk_kernels.selection import Merge

if TYPE_CHECKING:
    from hawk_kernels.hf.inside_stack import Chosen, InsideStack


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


class CallHooks:
    """Prunes each prompt that a model reads while these hooks are attached.

    Args:
        anatomy: the model's parts.
        chooser: chooses the tokens that stay before the first layer; None where all enter it.
        inside: drops or hides tokens after later layers, or None.
        budget: "shared", "per_image" or "per_tile".
        renumbers: whether the tokens that stay after the choice before the first layer are numbered anew.
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
        chooser: Chooser | None,
        inside: InsideStack | None,
        budget: str,
        renumbers: bool,
        query: Query | None,
        publish: Callable[[Outcome], None],
        ended: Callable[[], None],
        spent: Callable[[float], None],
    ) -> None:
        self._anatomy = anatomy
        self._chooser = chooser
        self._query = query
        self._publish = publish
        self._inside = inside
        self._spent = spent
        self._renumbers = renumbers
        self._sources = _Sources(anatomy, chooser, budget)
        self._records = CacheRecords(CachedPrompt, anatomy.text)
        served = None if inside is None else inside.served
        self._unserved = tuple(name for name in STACK_RECORDS if name != served)
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
        if self._inside is not None:
            text: Any = parts.text
            check_parts_run(text.layers, "the text model", self._inside.methods)
        self._sources.check_hooks_run()
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
            *([] if self._inside is None else self._inside.attach()),
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
        """Return the layers that the method before the first layer reads instead of the first, where it does."""
        return self._sources.options()

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
                self._begin_history(thread.generation, arguments)
                config = arguments.get("generation_config")
                yield self._count_for_main if getattr(config, "is_assistant", False) else lambda output: None
            finally:
                thread.generation.count_dropped(False)
                thread.generation, thread.uncached = earlier

    def _count_for_main(self, output: Any) -> None:
        """Let the cache of an assistant report its length before pruning, by which the main model crops it."""
        generation, cache = self._thread.generation, getattr(output, "past_key_values", None)
        record = self._records.of(cache)
        if generation is not None and record is not None and record.grows:
            generation.cache = None
            count_dropped(cache, record.num_dropped)

    def _begin_history(self, generation: _Generation, arguments: dict[str, Any]) -> None:
        """Note a cache that holds the beginning of the ids, and let it report its length before pruning to `generate`.

        Raises:
            ValueError: the history has no token after those in the cache.
        """
        ids, cache, mask = generation.ids, arguments.get("past_key_values"), arguments.get("attention_mask")
        # a mask that is longer tells that the ids are the new tokens alone
        if ids is None or cache is None or (mask is not None and mask.shape[-1] != ids.shape[1]):
            return
        record = self._records.of(cache)
        # the length of a cache of fixed size lives on the device
        if getattr(cache, "is_compileable", False) or (record is not None and not record.grows):
            return
        # an assistant's may have been counting
        count_dropped(cache, 0)
        dropped = 0 if record is None else record.num_dropped
        seen = int(cache.get_seq_length()) + dropped
        if record is not None and ids.shape[1] <= seen:
            raise ValueError(
                f"input_ids: expected the whole conversation, of which {seen} tokens, counted before pruning, are in "
                f"past_key_values, got {ids.shape[1]} tokens; append the new turn, or pass the new tokens alone with "
                "an attention_mask over the whole conversation"
            )
        generation.cache, generation.num_dropped, generation.seen = cache, dropped, seen
        if dropped:
            guard(cache)
            generation.count_dropped(True)

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
        changed, kwargs = self._over_history(kwargs)
        length = call_length(kwargs)
        check_not_empty(input_ids, kwargs.get("inputs_embeds"))
        self._thread.mask = mask
        if length > 1:
            if input_ids is None and (cache is None or int(cache.get_seq_length()) == 0):
                self._read_embeddings(kwargs)
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
        unchanged = ((), kwargs) if changed else None
        record = self._records.of(cache)
        if record is None:
            return unchanged
        positions = kwargs.get("position_ids")
        if positions is None:
            batch = None if input_ids is None else len(input_ids)
            positions = record.in_cache(record.positions_for(cache, length, batch))
            return (), {**kwargs, "position_ids": positions}
        if length > 1:
            if isinstance(mask, torch.Tensor) and mask.dim() == 2:
                record.check_length(cache, mask, length)
            else:
                record.check_continues(cache, positions)
        if record.shift is None:
            return unchanged
        return (), {**kwargs, "position_ids": record.in_cache(positions)}

    def _over_history(self, kwargs: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
        """Leave out the images that a cache holds already, and tell whether there were any."""
        generation, features = self._thread.generation, self._anatomy.family.features
        if generation is None or generation.cache is None or generation.cache is not kwargs.get("past_key_values"):
            return False, kwargs
        generation.count_dropped(False)
        if generation.ids is None or generation.has_begun or not generation.seen:
            return False, kwargs
        if not visual_features(kwargs, features):
            return False, kwargs
        from hawk_kernels.hf.chat_history import without_old_images

        return True, without_old_images(self._anatomy, generation.ids, generation.seen, kwargs)

    def _read_embeddings(self, kwargs: dict[str, Any]) -> None:
        """Let a prompt of text through if it comes as embeddings alone.

        Raises:
            ValueError: it may hold visual tokens.
        """
        from hawk_kernels.hf.text_embeddings import are_text

        embeds, cache, generation = kwargs["inputs_embeds"], kwargs.get("past_key_values"), self._thread.generation
        if visual_features(kwargs, self._anatomy.family.features) or not are_text(self._anatomy, embeds):
            raise ValueError(
                "input_ids: expected the token ids of the prompt, got inputs_embeds only, which do not tell which "
                "tokens are visual; pass input_ids and pixel_values, or leave the prune block. Only embeddings of text "
                "that are exactly those of model.get_input_embeddings() need no ids"
            )
        forget(cache)
        unguard(cache)
        if generation is None or not generation.has_begun:
            whole = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
            self._leave_alone(whole, None, "no visual tokens: the embeddings are those of text")
        if generation is not None:
            generation.has_begun = True

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
            projections = self._anatomy.projections
            if self._chooser is not None and self._chooser.method.reads_layer:
                # also for a prompt without images, since other processes may have one with some
                projections = projections.gathered()
                self._sources.check_gathered(projections)
            if prefill is not None:
                prefill.projections = projections
                started = time.perf_counter()
                packed = self._prefill(prefill, kwargs)
                self._spent(time.perf_counter() - started)
                return None if packed is None else ((), packed)
        check_served(cache, self._unserved)
        serve(cache, True)
        if self._inside is not None:
            self._inside.resume(cache, self._thread.mask, embeds.shape[1])
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
        device, earlier = embeds.device, prefill.earlier
        valid = upload(prompt.valid, device) if prefill.valid is None else prefill.valid.to(device)
        if self._inside is not None:
            self._inside.resume(None, None, 0)
        if earlier is not None:
            prefill.kept = earlier.extended(valid, prompt.valid)
            prefill.merge, prefill.inner_merges = earlier.merge, earlier.inner_merges
            if prefill.keeps_everything:
                return None
        elif not prompt.visual.any():
            prefill.kept = [(valid, prompt.valid.sum(axis=1).tolist())]
            if prefill.is_own:
                self._leave_alone(valid, prompt, "no visual tokens")
            return None
        entering = None if self._chooser is None else self._pack_before(self._chooser, prefill, kwargs)
        if self._inside is None:
            return entering
        return self._enter_stack(self._inside, prefill, kwargs if entering is None else entering, valid)

    def _pack_before(self, chooser: Chooser, prefill: _Prefill, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Choose before the first layer and pack: the arguments for the tokens that stay, or None where all do."""
        prompt = prefill.prompt
        if prefill.earlier is None:
            context = self._sources.context(prefill, kwargs)
            projections = prefill.projections or self._anatomy.projections
            choice = chooser.choose(kwargs["inputs_embeds"], prompt, projections, context)
            self._note(prefill, chooser, choice, prompt, choice.kept, choice.scores)
            prefill.merge = choice.merge
        kept, counts = prefill.kept[0]
        if prefill.merge is None and counts == prompt.valid.sum(axis=1).tolist():
            return None
        merge, merges_before = prefill.merge, chooser.method.stage == "encoder"
        if merge is not None and merges_before:
            embeds = self._sources.merged_before_projector(prefill, kept, counts, merge, kwargs["inputs_embeds"])
            kwargs = {**kwargs, "inputs_embeds": embeds}
        packed: dict[str, Any]
        prefill.packing, packed, prefill.following = pack_call(
            self._anatomy,
            prompt,
            kept,
            counts,
            kwargs,
            merge,
            embeds_are_merged=merges_before,
            renumbers=self._renumbers,
        )
        return packed

    def _enter_stack(
        self,
        inside: InsideStack,
        prefill: _Prefill,
        kwargs: dict[str, Any],
        valid: torch.Tensor,
    ) -> dict[str, Any]:
        """Prepare the stages inside the stack for the tokens that enter it."""
        from hawk_kernels.hf.inside_stack import Passage
        from hawk_kernels.hf.layer_cuts import packed_prompt

        whole, packing = prefill.prompt, prefill.packing
        known = None if prefill.earlier is None else prefill.kept[0 if self._chooser is None else 1 :]
        # guesses after the prompt are not its own
        own = nn.functional.pad(valid[:, : whole.length], (0, valid.shape[1] - whole.length))
        prompt = whole
        if packing is not None:
            kept, _ = prefill.kept[0]
            own = packing.pack(own)
            if known is None:
                prompt = packed_prompt(whole, kept.cpu().numpy(), packing.length)
            else:
                known = [(packing.pack(kept), counts) for kept, counts in known]
        passage = Passage(
            prompt=prompt,
            valid=own,
            original=inside.chooser.lengths(whole.candidates()),
            full_length=whole.ids.shape[1],
            chosen=partial(self._chosen_inside, prefill),
            embeds=kwargs["inputs_embeds"],
            known=known,
            known_merges=prefill.inner_merges,
        )
        check_slots(slot_limit(self._anatomy), max(whole.ids.shape[1], fixed_size(kwargs.get("past_key_values"))))
        return inside.enter(passage, kwargs)

    def _chosen_inside(self, prefill: _Prefill, chosen: Chosen) -> None:
        """Note what a stage inside the stack has chosen."""
        if chosen.choice.merge is not None and chosen.chooser.method.stage == "encoder":
            raise ValueError(
                f"method {chosen.chooser.method.name!r}: expected a Selection without a merge map inside the stack, "
                "got one of rows that enter the projector; return one without, or choose before the first layer"
            )
        prefill.inner_merges.append(chosen.choice.merge)
        kept, scores = chosen.kept, chosen.scores
        if prefill.packing is not None:
            kept, scores = prefill.packing.spread(kept, False), prefill.packing.spread(scores, -math.inf)
        self._note(prefill, chosen.chooser, chosen.choice, chosen.prompt, kept, scores)

    def _note(
        self,
        prefill: _Prefill,
        chooser: Chooser,
        choice: Choice,
        present: Prompt,
        kept: torch.Tensor,
        scores: torch.Tensor,
    ) -> None:
        """Note a choice and publish it.

        Args:
            prefill: the prompt.
            chooser: what made the choice.
            choice: in the rows of `present`.
            present: the tokens that the choice was made from.
            kept: bool `[B, T]`, the tokens that stay, in the rows of the whole prompt.
            scores: float32 `[B, T]`, likewise.
        """
        prompt = prefill.prompt
        self.has_chosen = True
        self._note_nan(choice.scores, present, chooser)
        self._note_budget(prompt, chooser)
        prefill.kept.append((kept, choice.counts))
        if prefill.is_own:
            own = slice(None), slice(prompt.length)
            query_mask = upload(prompt.query, kept.device)
            by_stage = () if prefill.outcome is None else prefill.outcome.by_stage
            masks = kept[own], scores[own], query_mask[own]
            prefill.outcome = Outcome(
                *masks, prompt, prefill.encoded, choice.budgets, reason=None, by_stage=(*by_stage, choice.budgets)
            )
            self._publish(prefill.outcome)

    def _note_nan(self, scores: torch.Tensor, prompt: Prompt, chooser: Chooser) -> None:
        """Refuse scores that rank nothing; those on a device are judged on leaving, to make no call wait for it.

        Raises:
            ValueError: all visual tokens of some row are NaN.
        """
        if scores.device.type == "cpu":
            unranked = np.isnan(scores.detach().numpy()) | ~prompt.visual
            if (unranked.all(axis=1) & prompt.visual.any(axis=1)).any():
                raise self.nan_error(chooser.method.name)
            return
        visual = upload(prompt.visual, scores.device)
        found = ((scores.isnan() | ~visual).all(dim=1) & visual.any(dim=1)).any()
        self.all_nan = found if self.all_nan is None else self.all_nan.to(found.device) | found

    def nan_error(self, method: str) -> ValueError:
        """Make the error for scores that rank nothing."""
        return ValueError(
            f"method {method!r}: expected finite scores, got NaN for every visual token of a row; "
            "look for NaN in the weights of the model, or in what the method computes"
        )

    def _note_budget(self, prompt: Prompt, chooser: Chooser) -> None:
        budget = chooser.keep_ratio
        if not isinstance(budget, int):
            return
        rows = prompt.unit_lengths() if chooser.per_image else prompt.visual.sum(axis=1, keepdims=True).tolist()
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
        if prefill is None:
            return None
        unpack_inside = None
        if self._inside is not None:
            unpack_inside = self._inside.leave(None if output is None else output.past_key_values)
        if output is None or not prefill.kept:
            return None
        prompt, packing, cache = prefill.prompt, prefill.packing, output.past_key_values
        if cache is not None and not prefill.keeps_everything:
            guard(cache)
        if cache is None and prefill.earlier is None:
            self._thread.uncached.append(
                UncachedPrompt(prompt, prefill.features, prefill.kept, prefill.merge, prefill.inner_merges)
            )
        if cache is not None and prefill.outcome is not None:
            saved = bytes_saved(cache, prompt.ids.shape[1])
            self._publish(replace(prefill.outcome, cache_bytes_saved=saved))
        if packing is not None and prefill.following is not None and cache is not None:
            record = CachedPrompt(
                full_length=prompt.ids.shape[1],
                mask=packing.mask,
                is_full=packing.is_full,
                next_position=prefill.following,
                constant_mask=constant_mask(cache, packing.mask),
                slot_limit=slot_limit(self._anatomy),
                shift=packing.shift,
            )
            self._records.keep(cache, record)
        wanted = prefill.logits_to_keep
        if (packing is None and unpack_inside is None) or (wanted and prompt.ends_in_text(wanted)):
            return None
        states = output.last_hidden_state
        states = states if unpack_inside is None else unpack_inside(states)
        output["last_hidden_state"] = states if packing is None else packing.unpack(states)
        return output

    def _after_multimodal(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.lifetime.acts():
            return
        prefill = self._thread.prefill
        self._thread.is_inside, self._thread.prefill, self._thread.mask = False, None, None
        self._thread.logits_to_keep = 0
        if self._thread.generation is not None:
            self._thread.generation.count_dropped(True)
        self.lifetime.end_forward()
        if prefill is not None and output is not None:
            raise compiled_before()


class _Sources:
    """Watches what a method asks for besides the prompt: the vision encoder, the images, RoPE."""

    def __init__(self, anatomy: Anatomy, chooser: Chooser | None, budget: str) -> None:
        self._anatomy = anatomy
        self._chooser = chooser
        method = None if chooser is None else chooser.method
        self._rotates = method is not None and method.uses_positions
        if method is not None and self._rotates:
            check_rotates(anatomy, method.name)
        self._recorder = None if method is None or not method.reads_encoder() else recorder_for(anatomy, method)
        if method is not None and method.stage == "encoder":
            check_projector(anatomy, method.name)
        self._encoding = EncodingWatch(anatomy.multimodal)
        self._layers_before, _ = first_attention_layer(anatomy.text)
        self._uses_grids = method is not None and method.uses_grids
        wants_images = self._uses_grids or budget != "shared"
        self._wants_tiles = budget == "per_tile"
        self._whole_kinds = anatomy.family.encoded_whole if wants_images else ()

    def attach(self) -> list[Handle]:
        watches = (self._recorder, self._encoding)
        return [handle for watch in watches if watch is not None for handle in watch.attach()]

    def check_hooks_run(self) -> None:
        """Refuse a vision encoder with compiled layers, where the method watches them."""
        if self._recorder is not None and self._chooser is not None:
            for part in self._recorder.watched:
                check_parts_run(part, "the vision encoder", self._chooser.method.name)

    def check_gathered(self, projections: LayerProjections) -> None:
        """Refuse projections whose weights had to be gathered, where layers come before the one that ranks.

        Raises:
            ValueError: these would run on those ranks alone whose prompts hold images.
        """
        if self._layers_before and projections is not self._anatomy.projections:
            raise ValueError(
                f"cannot rank visual tokens by sharded weights in a {self._anatomy.family.model_type}, since each rank "
                "would run the layers before the first one with attention by itself; load the model whole on each "
                "rank, or use a method that reads no layer, such as 'divprune'"
            )

    def start(self) -> None:
        """Forget what earlier calls of the multimodal model encoded."""
        if self._recorder is not None:
            self._recorder.start()
        self._encoding.start()

    def options(self) -> dict[str, object]:
        if self._chooser is None:
            return {}
        ranking: dict[str, object] = {"ranking_layer": self._layers_before + 1} if self._layers_before else {}
        return ranking if self._recorder is None else {**ranking, **self._recorder.options()}

    def encoded(self, arguments: dict[str, Any]) -> dict[str, Encoded]:
        """Collect what was encoded for a call of the multimodal model."""
        return self._encoding.encoded(arguments)

    def with_images(self, prompt: Prompt, encoded: dict[str, Encoded]) -> Prompt:
        """Divide the prompt into images as the encoder did, and into tiles where these have budgets of their own."""
        if self._whole_kinds:
            lengths = {kind: run.lengths for kind, run in encoded.items() if kind in self._whole_kinds}
            prompt = prompt.with_images(lengths, self._anatomy.kinds)
        if self._wants_tiles:
            from hawk_kernels.hf.tiles import with_tiles

            prompt = with_tiles(self._anatomy, prompt, encoded)
        return prompt

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
            attention = self._attention(self._recorder, prefill)
        if self._uses_grids:
            frames = partial(frames_of_prompt, self._anatomy, prefill.prompt, prefill.encoded)
        if self._rotates:
            embeds = text_arguments["inputs_embeds"]
            rotary = rotary_of_first_layer(self._anatomy, embeds, text_arguments.get("position_ids"))
        return Context(attention=attention, frames=frames, rotary=rotary, states=states)

    def merged_before_projector(
        self, prefill: _Prefill, kept: torch.Tensor, counts: list[int], merge: Merge, inputs_embeds: torch.Tensor
    ) -> torch.Tensor:
        """Return the embeddings with those of kept visual tokens projected from merged rows of the encoder."""
        recorder = self._recorder
        assert recorder is not None
        recorded, project = self._attention(recorder, prefill), recorder.encoder.project
        return merged_before_projector(inputs_embeds, prefill.prompt, kept, counts, merge, recorded, project)

    def _attention(self, recorder: VisionRecorder, prefill: _Prefill) -> PromptAttention:
        return attention_of_prompt(recorder.recordings(prefill.arguments), prefill.prompt, self._anatomy.kinds)


@dataclass
class _Prefill:
    """A prompt on its way from the multimodal model to the text model and back.

    `is_own` is false for a prompt that is not the one which `generate` was called with. `earlier` is the prompt of
    which this one is a later step, where there is no cache. At the text model `encoded` is filled in, and what ranks
    the tokens, `projections`; then `kept`, the tokens that stay after each stage and their number in each row, `merge`,
    which makes those before the first layer sums, `inner_merges`, which do so at each stage inside the stack, and the
    `outcome` so far; and where some were dropped or merged before the first layer, how the rest are packed and the
    position ids of what follows. `logits_to_keep` is how many logits at the end the caller wants, 0 for all.
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

    @property
    def keeps_everything(self) -> bool:
        """Tell whether the text model reads the prompt as it came."""
        if any(merge is not None for merge in (self.merge, *self.inner_merges)):
            return False
        counts: list[int] = self.prompt.valid.sum(axis=1).tolist()
        return self.kept[-1][1] == counts


@dataclass
class _Generation:
    """A call of `generate`.

    Attributes:
        ids: the prompt that it was called with, `[B, T]`, or None.
        has_begun: whether it has read a prompt.
        cache: holds the beginning of `ids`; None where it is of fixed size, or `ids` are the new tokens alone.
        num_dropped: tokens by which a row of this cache is shorter than what it stands for.
        seen: tokens of a row that this cache stood for at the start.
    """

    ids: torch.Tensor | None
    has_begun: bool = False
    cache: Any = None
    num_dropped: int = 0
    seen: int = 0

    def count_dropped(self, counts: bool) -> None:
        """Let the cache, outside the model, report its length in the caller's counting."""
        if self.cache is not None:
            count_dropped(self.cache, self.num_dropped if counts else 0)

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
