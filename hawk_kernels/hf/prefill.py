"""The hooks of one call: they read a prompt, choose tokens, pack the rest, unpack the output, and serve later calls.

Three modules are watched. The model that the caller calls is told how many logits are wanted. The multimodal model
below it sees `input_ids`, and there the prompt is read. The text model sees `inputs_embeds`: there tokens are scored
and dropped, the rest are packed, and the masks of later calls are translated to the shorter cache. For stages inside
the stack, `inside_stack` watches the layers as well. What one hook of a call leaves to the next is kept for each
thread, in `call_state`; what outlives a call is kept with the cache, in `pruned_cache`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from hawk_kernels.hf.anatomy import Anatomy
from hawk_kernels.hf.call_state import CallState, Generation, Outcome, Prefill, no_uncached_prompts
from hawk_kernels.hf.choose_tokens import Choice, Chooser
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
from hawk_kernels.hf.packing import pack_call, slot_limit
from hawk_kernels.hf.prompt import Prompt, check_one_prefill, count_guesses, given_ids, read_prompt
from hawk_kernels.hf.pruned_cache import (
    STACK_RECORDS,
    CachedPrompt,
    CacheRecords,
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
from hawk_kernels.hf.sources import Sources
from hawk_kernels.hf.uncached_prompt import UncachedPrompt

if TYPE_CHECKING:
    from hawk_kernels.hf.inside_stack import Chosen, InsideStack


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
        all_nan: on the device, whether the method scored all visual tokens of some row NaN; None where the host knows.

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
        self._sources = Sources(anatomy, chooser, budget)
        self._records = CacheRecords(CachedPrompt, anatomy.text)
        served = None if inside is None else inside.served
        self._unserved = tuple(name for name in STACK_RECORDS if name != served)
        self._thread = CallState()
        self.lifetime = Lifetime(self._attach, self._watch_generate, ended)
        self.has_chosen = self.left_images_alone = False
        self.tiny_budget = 0
        self.all_nan: torch.Tensor | None = None

    def __reduce__(self) -> str:
        # a copy would carry the hooks, and no block would ever take them off
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
        """Name the layers that the method before the first layer reads, where these are not the first one."""
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
            generation = Generation(ids)
            thread.generation, thread.uncached = generation, no_uncached_prompts()
            try:
                if arguments.get("past_key_values") is not None:
                    from hawk_kernels.hf.chat_history import history_of

                    generation.history = history_of(self._records, ids, arguments)
                if generation.history is not None:
                    generation.history.begin()
                config = arguments.get("generation_config")
                yield self._count_for_main if getattr(config, "is_assistant", False) else lambda output: None
            finally:
                if generation.history is not None:
                    generation.history.count_dropped(False)
                thread.generation, thread.uncached = earlier

    def _count_for_main(self, output: Any) -> None:
        """Let the cache of an assistant report its length before pruning, by which the main model crops it."""
        generation, cache = self._thread.generation, getattr(output, "past_key_values", None)
        record = self._records.of(cache)
        if generation is not None and record is not None and record.grows:
            generation.history = None
            count_dropped(cache, record.num_dropped)

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
        generation = self._thread.generation
        history = None if generation is None else generation.history
        if generation is None or history is None or history.cache is not kwargs.get("past_key_values"):
            return False, kwargs
        history.count_dropped(False)
        from hawk_kernels.hf.chat_history import new_images_only

        changed = None if generation.has_begun else new_images_only(self._anatomy, history, kwargs)
        return changed is not None, kwargs if changed is None else changed

    def _read_embeddings(self, kwargs: dict[str, Any]) -> None:
        """Let a prompt of text through if it comes as embeddings alone.

        Raises:
            ValueError: it may hold visual tokens.
        """
        from hawk_kernels.hf.text_embeddings import check_text

        check_text(self._anatomy, kwargs)
        embeds, cache, generation = kwargs["inputs_embeds"], kwargs.get("past_key_values"), self._thread.generation
        forget(cache)
        unguard(cache)
        if generation is None or not generation.has_begun:
            whole = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
            self._leave_alone(whole, None, "no visual tokens: the embeddings are those of text")
        if generation is not None:
            generation.has_begun = True

    @outside_graphs
    def _read(self, kwargs: dict[str, Any], input_ids: torch.Tensor) -> Prefill | None:
        """Read the prompt of a call; None over a cache that is not empty."""
        cache = kwargs.get("past_key_values")
        features = visual_features(kwargs, self._anatomy.family.features)
        generation = self._thread.generation
        # later calls inside generate are decoding steps, or prompts of a logits processor that compares two answers
        is_own = generation is None or not generation.has_begun
        guesses = 0
        if generation is not None:
            guesses = count_guesses(generation.ids, input_ids) if is_own and cache is not None else 0
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
        return Prefill(prompt, valid, features, kwargs, is_own, grown)

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
                # for a prompt without images too, since all processes must gather together
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

    def _prefill(self, prefill: Prefill, kwargs: dict[str, Any]) -> dict[str, Any] | None:
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
            if _keeps_everything(prefill):
                return None
        elif not prompt.visual.any():
            prefill.kept = [(valid, prompt.valid.sum(axis=1).tolist())]
            if prefill.is_own:
                self._leave_alone(valid, prompt, "no visual tokens")
            return None
        entering = None if self._chooser is None else self._pack_before(self._chooser, prefill, kwargs)
        if self._inside is None:
            return entering
        from hawk_kernels.hf.inside_stack import passage_of

        whole_length, entering = prompt.ids.shape[1], kwargs if entering is None else entering
        check_slots(slot_limit(self._anatomy), max(whole_length, fixed_size(entering.get("past_key_values"))))
        chosen = partial(self._chosen_inside, prefill)
        passage = passage_of(prefill, self._inside, entering["inputs_embeds"], valid, chosen)
        return self._inside.enter(passage, entering)

    def _pack_before(self, chooser: Chooser, prefill: Prefill, kwargs: dict[str, Any]) -> dict[str, Any] | None:
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

    def _chosen_inside(self, prefill: Prefill, chosen: Chosen) -> None:
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
        prefill: Prefill,
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
        """Refuse scores that rank nothing; scores on a device are judged when the block ends, so that no call waits.

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
        if cache is not None and not _keeps_everything(prefill):
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
        generation = self._thread.generation
        if generation is not None and generation.history is not None:
            generation.history.count_dropped(True)
        self.lifetime.end_forward()
        if prefill is not None and output is not None:
            raise compiled_before()


def _keeps_everything(prefill: Prefill) -> bool:
    """Tell whether the text model reads the prompt as it came."""
    if any(merge is not None for merge in (prefill.merge, *prefill.inner_merges)):
        return False
    counts: list[int] = prefill.prompt.valid.sum(axis=1).tolist()
    return prefill.kept[-1][1] == counts
