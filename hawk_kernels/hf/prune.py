"""`with prune(model, keep_ratio): ...`: fewer visual tokens for whatever runs inside, by forward hooks alone.

Three modules are watched. The model that the caller calls tells how many logits are wanted. The multimodal model below
sees `input_ids`: there the prompt is read. The text model sees `inputs_embeds`: there tokens are scored, dropped and
the rest packed, and later masks are translated to the shorter cache. For a method that hides tokens from later layers
instead, these layers are watched too. What happens between two hooks of one call is kept per thread; what outlives a
call is kept with the cache.
"""

from __future__ import annotations

import math
import numbers
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hawk_kernels.head_weights import resolve_head_weights
from hawk_kernels.hf.arguments import call_length, named, visual_features
from hawk_kernels.hf.cached import CachedPrompt, cached_prompt, constant_mask, forget
from hawk_kernels.hf.chat import ChatQuestion
from hawk_kernels.hf.choose import choose_tokens
from hawk_kernels.hf.compiled import check_not_compiled_without_hooks, forget_compiled_call
from hawk_kernels.hf.encoders import ENCODERS
from hawk_kernels.hf.families import Anatomy, dissect
from hawk_kernels.hf.frames import GridWatch, frames_of_prompt
from hawk_kernels.hf.generation import check_one_prefill, given_prompt_length
from hawk_kernels.hf.hiding import LayerHiding
from hawk_kernels.hf.images import ImageWatch
from hawk_kernels.hf.packing import Packing, splits_at_gaps
from hawk_kernels.hf.projections import LayerProjections
from hawk_kernels.hf.prompt import Prompt
from hawk_kernels.hf.reading import Query, read_prompt
from hawk_kernels.hf.report import PruningStats, sample_stats
from hawk_kernels.hf.rotary import check_rotates, rotary_of_first_layer
from hawk_kernels.hf.special_arguments import packed_features, packed_pair_masks
from hawk_kernels.hf.uncached import UncachedPrompt
from hawk_kernels.hf.upload import upload
from hawk_kernels.hf.view import Context
from hawk_kernels.hf.vision_attention import PromptAttention, VisionRecorder, attention_of_prompt
from hawk_kernels.hf.watched_method import WatchedMethod
from hawk_kernels.methods import Method, resolve_method
from hawk_kernels.pictures.encoded import Encoded, EncodingWatch
from hawk_kernels.validation import as_written

BUDGETS = ("shared", "per_image")


def prune(
    model: nn.Module,
    keep_ratio: float | int,
    *,
    method: str | Method = "hawk",
    head_weights: str | Path | torch.Tensor | list[float] | None = None,
    budget: str = "shared",
    query: Query | None = None,
    **options: Any,
) -> Pruning:
    """Prune the visual tokens of every prompt that `model` reads inside a `with` block (HAWK, arXiv 2604.07812).

        with prune(model, keep_ratio=0.2) as pruning:
            out = model.generate(**inputs)   # same call, same slicing of `out`

    Works for `generate` and for `model(**inputs)`. Logits keep the length of the prompt; those of dropped tokens come
    from a hidden state of zeros, so that `labels` and slicing stay right. `hidden_states` and `attentions` of the
    output are those of the tokens that stayed. A cache that was filled inside the block must be continued inside one.
    Without a cache, a prompt that is the last one and a token more, about the same images, is the next step of a
    generation and keeps the tokens of the last one.

    Args:
        model: a transformers model of a supported family.
        keep_ratio: float in (0, 1], the fraction of the visual tokens that is kept, at least one; or an int, how many.
        method: name of a method, or a method object.
        head_weights: None (the shipped registry), "uniform", a `[H]` tensor or sequence, or the path of a weights file.
        budget: "shared" by all images of a row, or "per_image": `keep_ratio` applies to each image or video.
        query: the text that ranks the visual tokens: a bool mask `[B, T]`, a callable from `input_ids` to one, or a
            processor or tokenizer, whose chat template shows where the user's last turn stands. By default the text
            after the last image up to the final end of turn, of several turns there the user's last.
        **options: the method's own, such as `normalize="l2"` and `rounding="floor"` of "hawk".

    Returns:
        A context manager that shows what happened: `keep_mask`, `scores`, `query_mask`, `stats`.

    Raises:
        TypeError: a model that is not supported, an unknown option, or an argument of another type.
        ValueError: a value out of range, or a model whose head weights are not known.
    """
    return Pruning(model, keep_ratio, method, head_weights, budget, query, options)


class Pruning:
    """What `prune` returns: the `with` block, and what happened to the last prompt inside it.

    Results are those of the last prefill in the calling thread, or of any thread where this one has had none. They are
    None before the first prefill, and stay after the block. Their rows are those that the model saw: `generate` repeats
    a sample for its beams and return sequences. The object can be entered again.
    """

    def __init__(
        self,
        model: nn.Module,
        keep_ratio: float | int,
        method: str | Method,
        head_weights: Any,
        budget: str,
        query: Query | None,
        options: dict[str, Any],
    ) -> None:
        self._anatomy = dissect(model)
        self._keep_ratio = _checked_keep_ratio(keep_ratio)
        self._method = resolve_method(method, options)
        if budget not in BUDGETS:
            raise ValueError(
                f"budget: expected 'shared' or 'per_image', got {budget!r}; how many tokens stay is keep_ratio"
            )
        if hasattr(query, "apply_chat_template"):
            query = ChatQuestion(query)
        if query is not None and not callable(query) and not isinstance(query, torch.Tensor):
            raise TypeError(
                f"query: expected a bool mask [B, T], a callable or a processor, got {type(query).__name__}; "
                "use torch.as_tensor, or leave it out for the text after the last image"
            )
        self._per_image = budget == "per_image"
        self._query = query
        self._head_weights: torch.Tensor | None = None
        source = None
        if self._method.uses_head_weights:
            self._head_weights, source = resolve_head_weights(
                head_weights, model.config, self._anatomy.projections.num_heads
            )
        elif head_weights is not None:
            raise TypeError(f"head_weights: method {self._method.name!r} uses none; leave the argument out")
        self._recorder = _encoder_recorder(self._anatomy, self._method)
        self._grid_watch = GridWatch(self._anatomy) if self._method.uses_grids else None
        wants_images = self._per_image or self._method.uses_grids
        self._image_watch = ImageWatch(self._anatomy) if wants_images and self._anatomy.family.encoded_whole else None
        self._encoding_watch = EncodingWatch(self._anatomy.multimodal)
        if self._method.uses_positions:
            check_rotates(self._anatomy, self._method.name)
        layer = self._method.hidden_from_layer
        self._hiding = None if layer is None else LayerHiding(self._anatomy, layer, self._method.name)
        self._no_stats = PruningStats(
            model=type(model).__name__,
            family=self._anatomy.family.model_type,
            method=self._method.name,
            method_options={**self._method.options(), **({} if self._recorder is None else self._recorder.options())},
            head_weights=source,
            keep_ratio=self._keep_ratio,
            budget=budget,
        )
        self._handles: list[Any] = []
        self._was_compiled = False
        self._thread = _ThreadState()
        self._latest: _Result | None = None

    @property
    def keep_mask(self) -> torch.Tensor | None:
        """bool `[B, T]` over the prompt: True = stayed, False = dropped or padding."""
        return None if self._result is None else self._result.keep_mask

    @property
    def scores(self) -> torch.Tensor | None:
        """float32 `[B, T]` over the prompt: importance of each visual token, `-inf` where nothing was scored."""
        return None if self._result is None else self._result.scores

    @property
    def query_mask(self) -> torch.Tensor | None:
        """bool `[B, T]` over the prompt: True = this text token ranked the visual ones."""
        return None if self._result is None else self._result.query_mask

    @property
    def stats(self) -> PruningStats:
        """Sample by sample: tokens before and after, budget, and why something was left alone."""
        return self._no_stats if self._result is None else self._result.stats

    def overlay(self, image: Any, *, row: int = 0, processor: Any = None, title: str | None = None) -> Any:
        """Draw the last prompt: its pictures with the dropped tokens dimmed, and with the scores as heat.

        Args:
            image: what the processor got for the row: a PIL image; a list of them in the order of the prompt; a video
                as a list of frames or an array `[frames, height, width, 3]`; a list with videos in it.
            row: of the batch, as the model saw it.
            processor: the one that made the inputs; tells how it cuts pictures where that is a setting of its own.
            title: a line above the pictures, say the question.

        Returns:
            a PIL image.

        Raises:
            ValueError: nothing was pruned yet, another number of pictures, or one that cannot be the encoded one.
            TypeError: `image` is no picture.
        """
        from hawk_kernels.pictures.pruned import overlay

        return overlay(self._pruned_prompt, image, row=row, processor=processor, title=title)

    def report(
        self,
        path: str | Path,
        image: Any = None,
        *,
        row: int = 0,
        processor: Any = None,
        timings: Mapping[str, float] | None = None,
    ) -> Path:
        """Write the last prompt as one HTML page without references to anything outside it.

        Args:
            path: of the page; replaces an earlier report, and nothing else.
            image: as for `overlay`; without it the page shows the tokens alone.
            row: of the batch, as the model saw it.
            processor: the one that made the inputs, or a tokenizer; tells what was asked.
            timings: seconds by name, shown as they are.

        Returns:
            the path.

        Raises:
            ValueError: as for `overlay`, or a path that holds something else than a report.
            OSError: the page cannot be written; what was there before stays.
        """
        from hawk_kernels.pictures.report import write_report

        return write_report(self._pruned_prompt, path, image, row=row, processor=processor, timings=timings)

    @property
    def _pruned_prompt(self) -> Any:
        from hawk_kernels.pictures.pruned import PrunedPrompt

        last = self._result
        if last is None or last.prompt is None:
            return None
        return PrunedPrompt(
            self._anatomy, last.prompt, last.encoded, last.keep_mask, last.scores, last.stats, self._method
        )

    def __enter__(self) -> Pruning:
        parts = self._anatomy
        watched = (parts.head, parts.multimodal, parts.text)
        hooks = [hook for module in watched for hook in module._forward_pre_hooks.values()]
        if any(isinstance(getattr(hook, "__self__", None), Pruning) for hook in hooks):
            raise ValueError(
                f"model: expected one that is not pruned yet, got a {type(parts.head).__name__} that is being pruned "
                "already; leave that block first"
            )
        for module in watched:
            check_not_compiled_without_hooks(module)
        self._was_compiled = "_compiled_call" in vars(parts.head)
        self._handles = [
            parts.head.register_forward_pre_hook(self._before_head, with_kwargs=True),
            parts.multimodal.register_forward_pre_hook(self._before_multimodal, with_kwargs=True),
            parts.text.register_forward_pre_hook(self._before_text, with_kwargs=True),
            parts.text.register_forward_hook(self._after_text, with_kwargs=True),
            parts.multimodal.register_forward_hook(self._after_multimodal, always_call=True),
            WatchedMethod(parts.head, "generate", self._around_generate),
            *([] if self._recorder is None else self._recorder.attach()),
            *([] if self._grid_watch is None else self._grid_watch.attach()),
            *([] if self._image_watch is None else self._image_watch.attach()),
            *([] if self._hiding is None else self._hiding.attach()),
            *self._encoding_watch.attach(),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        # the last first: of two watches of one method each puts back what it found
        for handle in reversed(self._handles):
            handle.remove()
        self._handles = []
        if not self._was_compiled:
            forget_compiled_call(self._anatomy.head)

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.stats!r}"

    def __reduce__(self) -> str:
        # a copy of the model would be pruned for ever: no block of its own would end that
        raise TypeError(
            "model: expected one that is copied or saved outside its prune block, got one whose hooks prune; leave the "
            "block first, and prune the copy in a block of its own"
        )

    @property
    def _result(self) -> _Result | None:
        return self._thread.result or self._latest

    def _publish(self, length: int, masks: tuple[torch.Tensor, ...], samples: Any, reason: str | None) -> None:
        """Show `(keep_mask, scores, query_mask)` of the first `length` tokens, those of the prompt."""
        stats = replace(self._no_stats, samples=samples, reason=reason)
        keep_mask, scores, query_mask = (mask[:, :length] for mask in masks)
        self._thread.result = self._latest = _Result(keep_mask, scores, query_mask, stats)

    @contextmanager
    def _around_generate(self, arguments: dict[str, Any]) -> Iterator[Callable[[Any], None]]:
        """What `generate` was asked for: assisted decoding reads its first guesses together with the prompt."""
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
                    "input_ids: expected the token ids of the prompt, got inputs_embeds only; without ids nobody can "
                    "tell which tokens are visual. Pass input_ids and pixel_values, or leave the prune block"
                )
            self._thread.is_inside, self._thread.prefill = True, None
            if self._recorder is not None:
                self._recorder.start()
            if self._image_watch is not None:
                self._image_watch.start()
            self._encoding_watch.start()
            if input_ids is not None:
                self._thread.prefill = self._read(kwargs, input_ids)
            if self._thread.prefill is not None:
                forget(cache)
                if self._hiding is not None:
                    self._hiding.forget(cache)
                return None
        record = cached_prompt(cache)
        if record is None:
            return None
        positions = kwargs.get("position_ids")
        if positions is None:
            return (), {**kwargs, "position_ids": record.positions_for(cache, length)}
        if length > 1:
            if isinstance(mask, torch.Tensor) and mask.dim() == 2:
                record.check_length(cache, mask, length)
            else:
                record.check_continues(cache, positions)
        return None

    @torch.compiler.disable
    def _read(self, kwargs: dict[str, Any], input_ids: torch.Tensor) -> _Prefill | None:
        """The prompt of a call over an empty cache."""
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        features = visual_features(kwargs, self._anatomy.family.features)
        earlier = self._thread.uncached if cache is None else None
        if earlier is not None and not earlier.may_grow_into(input_ids, features):
            earlier = None
        query = self._query if earlier is None else None
        own_length = self._thread.prompt_length if cache is not None else None
        guesses = 0 if own_length is None else max(0, input_ids.shape[1] - own_length)
        prompt, valid = read_prompt(self._anatomy, input_ids, mask, cache, query, guesses)
        if prompt is None:
            if features:
                reason = "images came over a cache that is not empty; only prompts in one call are pruned"
                self._leave_alone(torch.ones_like(input_ids, dtype=torch.bool), None, reason)
            return None
        if earlier is not None and not earlier.grows_into(prompt):
            self._thread.uncached = None
            return self._read(kwargs, input_ids)
        self._thread.uncached = earlier
        return _Prefill(prompt, valid, features, kwargs)

    def _leave_alone(self, keep_mask: torch.Tensor, prompt: Prompt | None, reason: str) -> None:
        scores = torch.full(keep_mask.shape, -math.inf, dtype=torch.float32, device=keep_mask.device)
        samples = () if prompt is None else sample_stats(prompt, None, self._per_image, reason)
        length = keep_mask.shape[1] if prompt is None else prompt.length
        self._publish(length, (keep_mask, scores, torch.zeros_like(keep_mask)), samples, reason)

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
                    "model: the text model was called by itself with inputs_embeds inside a prune block, where nobody "
                    "can tell which tokens are visual; call the model that was given to prune, and not a compiled "
                    "wrapper of it, or leave the block"
                )
            if self._thread.prefill is not None:
                packed = self._prefill(self._thread.prefill, embeds, kwargs)
                return None if packed is None else ((), packed)
        if self._hiding is not None:
            self._hiding.resume(cache)
        record = cached_prompt(cache)
        if record is None:
            return None
        # masks over pairs were made for the whole prompt: a growing cache gets its own from the caller's mask
        pairs = self._anatomy.family.pair_masks and record.constant_mask is None
        given = self._thread.mask if pairs else kwargs.get("attention_mask")
        mask = record.mask_for(cache, given, *embeds.shape[:2])
        return (), {**kwargs, "attention_mask": mask}

    def _prefill(self, prefill: _Prefill, embeds: torch.Tensor, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The text model's arguments for the tokens that stay, or None where all do."""
        if self._image_watch is not None:
            lengths = self._image_watch.lengths(prefill.arguments)
            prefill.prompt = prefill.prompt.with_images(lengths, self._anatomy.kinds)
        prompt, device = prefill.prompt, embeds.device
        if embeds.shape[:2] != prompt.ids.shape:
            raise ValueError(
                f"inputs_embeds: expected one embedding for each of the {list(prompt.ids.shape)} input_ids, got shape "
                f"{list(embeds.shape)}; a model that inserts tokens between the two is not supported"
            )
        valid = upload(prompt.valid, device) if prefill.valid is None else prefill.valid.to(device)
        hiding = self._hiding
        if hiding is not None:
            hiding.start(nn.functional.pad(valid[:, : prompt.length], (0, valid.shape[1] - prompt.length)))
        earlier = self._thread.uncached
        if earlier is not None:
            prefill.kept, prefill.counts = earlier.extended(valid, prompt.valid)
        elif not prompt.visual.any():
            prefill.kept, prefill.counts = valid, prompt.valid.sum(axis=1).tolist()
            self._leave_alone(valid, prompt, "no visual tokens")
        elif hiding is not None:
            hiding.choose_inside(partial(self._hidden_tokens, prefill, valid))
            return None
        else:
            context = self._context(prefill, embeds, kwargs)
            prefill.kept, prefill.counts = self._choose(prompt, embeds, self._anatomy.projections, context)
        if prefill.counts == prompt.valid.sum(axis=1).tolist():
            return None
        if hiding is not None:
            hiding.hide(valid & ~prefill.kept)
            return None
        axes = self._anatomy.family.position_axes
        positions = kwargs.get("position_ids")
        splits = splits_at_gaps(self._anatomy.text, len(embeds), positions, axes)
        prefill.packing = Packing(embeds, prefill.kept, prefill.counts, positions, extra=int(splits))
        packed, prefill.following = prefill.packing.pack_arguments(kwargs, axes)
        packed |= packed_features(kwargs, prompt, prefill.kept, prefill.packing)
        if self._anatomy.family.pair_masks:
            packed["attention_mask"] = packed_pair_masks(
                kwargs.get("attention_mask"),
                prefill.packing,
                kwargs.get("past_key_values"),
                getattr(self._anatomy.text.config, "layer_types", None),
            )
        return packed

    def _choose(
        self, prompt: Prompt, states: torch.Tensor, projections: LayerProjections, context: Context
    ) -> tuple[torch.Tensor, list[int]]:
        """Choose by what enters the scoring layer, `[B, T, hidden]`, and show it: the kept tokens and their numbers."""
        choice = choose_tokens(
            states, prompt, self._method, self._keep_ratio, self._per_image, projections, self._head_weights, context
        )
        samples = sample_stats(prompt, choice.budgets, self._per_image, None)
        masks = (choice.kept, choice.scores, upload(prompt.query, states.device))
        self._publish(prompt.length, masks, samples, None)
        if self._thread.prefill is not None and self._thread.result is not None:
            encoded = self._encoding_watch.encoded(self._thread.prefill.arguments)
            self._thread.result = self._latest = replace(self._thread.result, prompt=prompt, encoded=encoded)
        return choice.kept, choice.counts

    def _hidden_tokens(
        self,
        prefill: _Prefill,
        valid: torch.Tensor,
        states: torch.Tensor,
        projections: LayerProjections,
        context: Context,
    ) -> torch.Tensor | None:
        """Choose inside the stack; the tokens to hide from the layers behind, bool `[B, T]`, None for none."""
        kept, prefill.counts = self._choose(prefill.prompt, states, projections, context)
        prefill.kept = kept
        return None if prefill.counts == prefill.prompt.valid.sum(axis=1).tolist() else valid & ~kept

    def _context(self, prefill: _Prefill, embeds: torch.Tensor, kwargs: dict[str, Any]) -> Context:
        """What the method may want to know before the first layer."""
        frames, rotary = None, None
        if self._method.uses_grids:
            frames = partial(frames_of_prompt, self._anatomy, prefill.prompt, prefill.arguments)
        if self._method.uses_positions:
            rotary = rotary_of_first_layer(self._anatomy, embeds, kwargs.get("position_ids"))
        return Context(attention=self._recorded(prefill), frames=frames, rotary=rotary)

    def _recorded(self, prefill: _Prefill) -> PromptAttention | None:
        """What the vision encoder attended to, for a method that asks."""
        if self._recorder is None:
            return None
        recordings = self._recorder.recordings(prefill.arguments)
        return attention_of_prompt(recordings, prefill.prompt, self._anatomy.kinds)

    def _after_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        embeds = kwargs.get("inputs_embeds")
        if embeds is None or embeds.shape[1] == 1:
            return None
        prefill = self._thread.prefill
        if prefill is None or prefill.kept is None:
            return None
        prompt, packing, cache = prefill.prompt, prefill.packing, output.past_key_values
        if self._hiding is not None:
            self._hiding.finish(cache)
        if cache is None and self._thread.uncached is None:
            self._thread.uncached = UncachedPrompt(prompt, prefill.features, prefill.kept, prefill.counts)
        if packing is None or prefill.following is None:
            return None
        if cache is not None:
            CachedPrompt(
                full_length=prompt.ids.shape[1],
                mask=packing.mask,
                is_full=packing.is_full,
                next_position=prefill.following,
                constant_mask=constant_mask(cache, packing.mask),
            ).attach(cache)
        wanted = self._thread.logits_to_keep
        if wanted and prompt.ends_in_text(wanted):
            return None
        output["last_hidden_state"] = packing.unpack(output.last_hidden_state)
        return output

    def _after_multimodal(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._thread.is_inside, self._thread.prefill, self._thread.mask = False, None, None
        self._thread.logits_to_keep = 0


@dataclass(frozen=True)
class _Result:
    keep_mask: torch.Tensor
    scores: torch.Tensor
    query_mask: torch.Tensor
    stats: PruningStats
    prompt: Prompt | None = None
    encoded: dict[str, Encoded] = field(default_factory=dict)


@dataclass
class _Prefill:
    """A prompt on its way from the multimodal model to the text model and back.

    The text model fills in which tokens stay, their number in each row and, where some were dropped, how the rest were
    packed and the position ids of what follows.
    """

    prompt: Prompt
    valid: torch.Tensor | None
    features: tuple[Any, ...]
    arguments: dict[str, Any]
    kept: torch.Tensor | None = None
    counts: list[int] = field(default_factory=list)
    packing: Packing | None = None
    following: torch.Tensor | None = None


class _ThreadState(threading.local):
    is_inside: bool = False
    prefill: _Prefill | None = None
    mask: Any = None
    logits_to_keep: int = 0
    # of the prompt that generate was called with
    prompt_length: int | None = None
    uncached: UncachedPrompt | None = None
    result: _Result | None = None


def _encoder_recorder(anatomy: Anatomy, method: Method) -> VisionRecorder | None:
    """Records the vision encoder for a method that looks into it."""
    if not method.uses_encoder_attention:
        return None
    encoder = ENCODERS.get(anatomy.family.model_type)
    if encoder is None:
        supported = ", ".join(sorted(ENCODERS))
        raise TypeError(
            f"method: expected one that leaves the vision encoder of {anatomy.family.model_type} alone, got "
            f"{method.name!r}, which reads its attention; that works for {supported}"
        )
    return VisionRecorder(encoder(anatomy.multimodal), method.object_layer)


def _checked_keep_ratio(keep_ratio: float | int) -> float | int:
    expected = "keep_ratio: expected a float in (0, 1] (the fraction kept) or an int >= 1 (a budget)"
    if isinstance(keep_ratio, bool) or not isinstance(keep_ratio, numbers.Real):
        remedy = "read it first: keep_ratio.item()" if hasattr(keep_ratio, "item") else "0.2 keeps a fifth"
        raise TypeError(f"{expected}, got {type(keep_ratio).__name__}; {remedy}")
    if isinstance(keep_ratio, numbers.Integral):
        if keep_ratio < 1:
            raise ValueError(f"{expected}, got {keep_ratio}; to keep everything use 1.0")
        return int(keep_ratio)
    if not 0.0 < keep_ratio <= 1.0:
        remedy = "it is the fraction kept, not the fraction removed"
        if keep_ratio > 1.0 and math.isfinite(keep_ratio):
            remedy += f"; for a budget pass the int {max(1, round(keep_ratio))}"
        raise ValueError(f"{expected}, got {keep_ratio}; {remedy}")
    return as_written(keep_ratio)
