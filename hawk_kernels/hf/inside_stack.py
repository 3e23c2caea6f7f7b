"""Runs the stages inside the stack: after some layers, a method chooses the tokens that stay and the others leave.

A hook before each layer, from the first ranking layer on, adapts the layer's arguments to the tokens that are left and,
where a stage begins, runs the method of that stage. `layer_cuts.py` drops the tokens that leave; `layer_masks.py` hides
them instead.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import transformers

from hawk_kernels.hf.anatomy import Anatomy, first_attention_layer
from hawk_kernels.hf.call_state import Prefill
from hawk_kernels.hf.choose_tokens import Choice, Chooser, Context, Kept
from hawk_kernels.hf.hooks import Handle
from hawk_kernels.hf.layer_cuts import CutPrompt, LaterCut, PromptCut, cut_features, packed_prompt, reaches_of
from hawk_kernels.hf.layer_masks import LaterMask, MaskedPrompt, PromptMask, states_of
from hawk_kernels.hf.packing import slot_limit
from hawk_kernels.hf.projections import check_key_lengths
from hawk_kernels.hf.prompt import Prompt
from hawk_kernels.hf.pruned_cache import CacheRecords, check_slots
from hawk_kernels.hf.rotary import check_rotates, rotary_of_layer
from hawk_kernels.selection import Merge

_IMPLEMENTATIONS = ("sdpa", "eager")
# since this version of transformers, a layer's hooks run outside the part that gradient checkpointing recomputes
_HOOKS_OUTSIDE_CHECKPOINTS = (5, 18)


@dataclass(frozen=True)
class InnerStage:
    """A stage after the first layer.

    Attributes:
        layer: the last layer that sees what this stage drops, counted from 1.
        chooser: chooses the tokens that stay.
    """

    layer: int
    chooser: Chooser

    @property
    def ranking(self) -> int:
        """The index, from 0, of the layer whose input ranks the tokens."""
        return self.layer - 1 if self.chooser.method.ranks_by == "last" else self.layer


@dataclass(frozen=True)
class Chosen:
    """What a stage inside the stack has chosen.

    Attributes:
        chooser: the chooser of the stage.
        prompt: the prompt that it chose from, on the host.
        choice: what it chose, in the rows of that prompt.
        kept: bool `[B, T]`, the tokens that stay, in the rows that entered the text model.
        scores: float32 `[B, T]`, likewise.
    """

    chooser: Chooser
    prompt: Prompt
    choice: Choice
    kept: torch.Tensor
    scores: torch.Tensor


@dataclass(frozen=True)
class Passage:
    """Describes a prompt that is about to enter the text model.

    Attributes:
        prompt: the prompt on the host, as it enters.
        valid: bool `[B, T]`, its own tokens, False at padding and at guesses after its end.
        original: how many visual tokens each row, or each image of it, had before any were dropped.
        full_length: tokens of a row before any were dropped.
        chosen: called with what each stage has chosen.
        embeds: `[B, T, hidden]`, the embeddings that enter.
        known: what each stage keeps, if an earlier step of a generation without a cache has chosen it; otherwise None.
        known_merges: the merge map of each of these stages; it counts places in the rows that the stage chose from.
    """

    prompt: Prompt
    valid: torch.Tensor
    original: list[list[int]]
    full_length: int
    chosen: Callable[[Chosen], None]
    embeds: torch.Tensor
    known: list[Kept] | None
    known_merges: list[Merge | None]


def passage_of(
    prefill: Prefill,
    inside: InsideStack,
    embeds: torch.Tensor,
    valid: torch.Tensor,
    chosen: Callable[[Chosen], None],
) -> Passage:
    """Describe a prompt after the choice before the first layer, if there was one.

    Args:
        prefill: the prompt on its way.
        inside: the stages that it is about to meet.
        embeds: `[B, P, hidden]`, the embeddings that enter.
        valid: bool `[B, T]`, the tokens of the whole prompt that are not padding.
        chosen: called with what each stage has chosen.
    """
    whole, packing = prefill.prompt, prefill.packing
    known = None if prefill.earlier is None else prefill.kept[-inside.num_stages :]
    # guesses after the prompt are not its own
    own = torch.nn.functional.pad(valid[:, : whole.length], (0, valid.shape[1] - whole.length))
    prompt = whole
    if packing is not None:
        kept, _ = prefill.kept[0]
        own = packing.pack(own)
        if known is None:
            prompt = packed_prompt(whole, kept.cpu().numpy(), packing.length)
        else:
            known = [(packing.pack(kept), counts) for kept, counts in known]
    return Passage(
        prompt=prompt,
        valid=own,
        original=inside.chooser.lengths(whole.candidates()),
        full_length=whole.ids.shape[1],
        chosen=chosen,
        embeds=embeds,
        known=known,
        known_merges=prefill.inner_merges,
    )


class InsideStack:
    """Drops or hides tokens after some layers of a text model while its hooks are attached.

    Args:
        anatomy: the model's parts.
        stages: at least one, ascending.
        mode: "drop" or "hide".

    Raises:
        ValueError: there is no such layer, or no layer after it.
        TypeError: the model or the method cannot serve such a stage.
    """

    def __init__(self, anatomy: Anatomy, stages: tuple[InnerStage, ...], mode: str) -> None:
        text: Any = anatomy.text
        self._text = text
        self._layers: list[Any] = list(text.layers)
        self._stages = stages
        self._drops = mode == "drop"
        self._slot_limit = slot_limit(anatomy)
        self._reaches = reaches_of(text.config, len(self._layers))
        for stage in stages:
            _check_stage(anatomy, stage, self._drops)
        self._first = min(min(stage.ranking, stage.layer) for stage in stages)
        self._projections = [
            anatomy.family.projections(self._layers[stage.ranking])
            if hasattr(self._layers[stage.ranking], "self_attn")
            else anatomy.projections
            for stage in stages
        ]
        for stage, projections in zip(stages, self._projections, strict=True):
            if stage.chooser.method.uses_key_lengths:
                check_key_lengths(projections, anatomy.family.model_type, stage.chooser.method.name)
        self._cut_records = CacheRecords(CutPrompt, text)
        self._masked_records = CacheRecords(MaskedPrompt, text)
        self._thread = _ThreadState()

    @property
    def chooser(self) -> Chooser:
        """The chooser of the first stage; all stages share one kind of budget."""
        return self._stages[0].chooser

    @property
    def num_stages(self) -> int:
        """How many stages there are."""
        return len(self._stages)

    @property
    def served(self) -> str:
        """The name of the cache attribute that holds the kind of record which this object can continue."""
        return (self._cut_records if self._drops else self._masked_records).attribute

    @property
    def methods(self) -> str:
        """The names of the methods, for messages."""
        return ", ".join(dict.fromkeys(stage.chooser.method.name for stage in self._stages))

    def attach(self) -> list[Handle]:
        """Register the hooks; removing the handles ends the dropping."""
        handles: list[Handle] = []
        adds = self._drops and "deepstack_visual_embeds" in inspect.signature(self._text.forward).parameters
        for index in range(self._first, len(self._layers)):
            layer = self._layers[index]
            handles.append(layer.register_forward_pre_hook(partial(self._before_layer, index), with_kwargs=True))
            if adds and index >= self._stages[0].layer:
                handles.append(layer.register_forward_hook(partial(self._after_layer, index)))
        return handles

    def enter(self, passage: Passage, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Prepare for a prompt that is about to enter the text model, and return the text model's arguments for it.

        Raises:
            ValueError: the attention implementation takes no mask over pairs, gradient checkpointing would recompute
                the layers with all tokens, or router logits are wanted while rows get shorter from layer to layer.
        """
        self._check_call(kwargs)
        features = None
        if self._drops:
            kwargs, features = cut_features(kwargs, self._stages[0].layer)
            prompt: PromptCut | PromptMask = PromptCut(self._text, passage.prompt, passage.valid, features)
        else:
            prompt = PromptMask(self._text, passage.prompt, passage.valid)
        self._thread.begin(prompt, passage)
        return kwargs

    def leave(self, cache: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Finish a prompt that has left the text model, and note on `cache`, if there is one, which tokens it holds.

        Returns:
            A function that spreads the last states over the rows that entered, or None if they have these rows already.
        """
        prompt, passage = self._thread.prompt, self._thread.passage
        self._thread.begin(None, None)
        if prompt is None or passage is None:
            return None
        if isinstance(prompt, PromptMask):
            prompt.keep_with(cache, self._masked_records)
            return None
        prompt.keep_with(cache, self._cut_records, passage.full_length)
        return prompt.unpacked

    def resume(self, cache: Any, given: Any, length: int) -> None:
        """Prepare for a call over `cache` that is about to enter the text model.

        Args:
            cache: any cache; only one that a pruned prompt was read into needs preparation.
            given: the caller's mask.
            length: number of new tokens.

        Raises:
            ValueError: rows became longer than the model's attention allows.
        """
        self._thread.begin(None, None)
        if self._drops:
            record = self._cut_records.of(cache)
            if record is not None and record.grows and self._slot_limit is not None:
                before = record.full_length - record.entered
                check_slots(self._slot_limit, before + int(cache.get_seq_length()) + length)
            self._thread.later = None if record is None else LaterCut(self._text, self._reaches, record, given)
        else:
            masked = self._masked_records.of(cache)
            self._thread.later = None if masked is None else LaterMask(self._text, masked, given)

    def _before_layer(
        self, index: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        thread = self._thread
        if thread.later is not None:
            return thread.later.adapted(index, layer, args, kwargs)
        prompt = thread.prompt
        if prompt is None:
            return None
        made = prompt.adapted(index, layer, args, kwargs)
        while thread.next < len(self._stages) and self._begins(index):
            self._run_stage(thread.next, prompt, index, layer, *made)
            thread.next += 1
            # arguments with an entry for each token are cut from the rows that entered, states from the present rows
            made = prompt.adapted(index, layer, (*made[0][:1], *args[1:]), {**kwargs, **_states_alone(made[1])})
        return made

    def _after_layer(self, index: int, layer: Any, args: tuple[Any, ...], output: Any) -> Any:
        prompt = self._thread.prompt
        return None if prompt is None else prompt.after(index, output)

    def _begins(self, index: int) -> bool:
        stage, passage = self._stages[self._thread.next], self._thread.passage
        assert passage is not None
        return index == (stage.ranking if passage.known is None else stage.layer)

    def _run_stage(
        self,
        number: int,
        prompt: PromptCut | PromptMask,
        index: int,
        layer: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Choose the tokens that stay from what enters the ranking layer, or keep those that an earlier step chose."""
        stage, passage = self._stages[number], self._thread.passage
        assert passage is not None
        if passage.known is not None:
            whole, counts = passage.known[number]
            prompt.keep(stage.layer, prompt.of_present(whole), counts, passage.known_merges[number])
            return
        states, valid = states_of(args, kwargs), prompt.valid
        context = _context(layer, states, kwargs, valid) if hasattr(layer, "self_attn") else Context()
        context = replace(context, entered=(passage.embeds, passage.prompt))
        present = prompt.prompt
        projections = self._projections[number]
        if stage.chooser.method.reads_layer:
            projections = projections.gathered(inside=True)
        choice = stage.chooser.choose(states, present, projections, context, passage.original)
        kept = prompt.of_whole(choice.kept, False)
        scores = prompt.of_whole(choice.scores, -torch.inf)
        passage.chosen(Chosen(stage.chooser, present, choice, kept, scores))
        if choice.merge is not None or choice.counts != present.valid.sum(axis=1).tolist():
            prompt.keep(stage.layer, choice.kept, choice.counts, choice.merge)

    def _check_call(self, kwargs: dict[str, Any]) -> None:
        config = self._text.config
        if config._attn_implementation not in _IMPLEMENTATIONS:
            raise ValueError(
                f"attn_implementation: expected 'sdpa' or 'eager', which take a mask for each layer, got "
                f"{config._attn_implementation!r}; call model.set_attn_implementation('sdpa')"
            )
        recomputes = any(getattr(each, "gradient_checkpointing", False) and each.training for each in self._layers)
        if recomputes and torch.is_grad_enabled() and _version() < _HOOKS_OUTSIDE_CHECKPOINTS:
            raise ValueError(
                "cannot drop or hide tokens inside the stack with gradient checkpointing before transformers 5.18, "
                "which computes the layers again with all tokens; upgrade, or call "
                "model.gradient_checkpointing_disable()"
            )
        if self._drops and kwargs.get("output_router_logits", getattr(config, "output_router_logits", False)):
            raise ValueError(
                "output_router_logits: expected False while tokens are dropped inside the stack, got True; the "
                "auxiliary loss of the routers wants equally many tokens in each layer, so leave the option out, or "
                "pass mode='hide'"
            )


def _check_stage(anatomy: Anatomy, stage: InnerStage, drops: bool) -> None:
    text: Any = anatomy.text
    layers, method, family = list(text.layers), stage.chooser.method, anatomy.family.model_type
    depth = len(layers)
    if not 1 <= stage.layer < depth:
        remedy = f"pass {depth - 1} or less" if depth > 1 else "use 0, before the first layer"
        raise ValueError(
            f"layer: expected 1 to {depth - 1}, since tokens leave before the layer after it, got {stage.layer} of "
            f"{depth} layers; {remedy}"
        )
    if method.reads_encoder() or method.uses_grids:
        raise TypeError(
            f"method: expected one that ranks by what enters a layer, got {method.name!r} after layer {stage.layer}; "
            "it reads whole images and can only choose before the first layer, so use it at stage 0"
        )
    if method.uses_positions:
        check_rotates(anatomy, method.name)
    if method.reads_layer and not hasattr(layers[stage.ranking], "self_attn"):
        attending = [index for index, layer in enumerate(layers) if hasattr(layer, "self_attn")]
        shift = stage.layer - stage.ranking
        fitting = [str(index + shift) for index in attending if 1 <= index + shift < depth]
        raise ValueError(
            f"layer: expected one of {', '.join(fitting)}, since layer {stage.ranking + 1} of a {family} has no "
            f"attention to rank tokens by, got {stage.layer}; pass one of those"
        )
    if not drops:
        if not all(hasattr(each, "self_attn") for each in layers[stage.layer - 1 :]):
            raise TypeError(
                f"mode: expected 'drop', got 'hide'; a {family} has layers without attention masks, from which no "
                "token can be hidden, so drop them, or use a method that removes tokens before the first layer"
            )
        return
    shared = getattr(text.config, "num_kv_shared_layers", 0) or 0
    if shared:
        raise TypeError(
            f"mode: expected 'hide', got 'drop'; the last {shared} layers of this {family} read keys of earlier "
            "layers, which keep all tokens, so pass mode='hide', or use a method that removes tokens before the first "
            "layer"
        )
    first, _ = first_attention_layer(text)
    if stage.layer <= first:
        raise ValueError(
            f"layer: expected {first + 1} or more to drop tokens after, got {stage.layer}; the first layer of a "
            f"{family} with attention, layer {first + 1}, counts the tokens of the cache and has to hold them all"
        )


def _context(layer: Any, states: torch.Tensor, kwargs: dict[str, Any], valid: torch.Tensor) -> Context:
    """Collect what the method may want to know of the ranking layer."""
    positions = kwargs.get("position_embeddings")
    rotary = rotary_of_layer(layer, positions, states) if isinstance(positions, (tuple, type(None))) else None
    attention = layer.self_attn
    scaling = getattr(attention, "scaling", None)
    scale = None if scaling is None else scaling * getattr(attention, "qk_scale_factor", 1.0)
    return Context(rotary=rotary, seen=_seen_by_last(kwargs.get("attention_mask"), valid), scale=scale)


def _seen_by_last(mask: torch.Tensor | None, valid: torch.Tensor) -> torch.Tensor:
    """Mark which tokens the last valid one of each row sees in a layer, bool `[B, T]`; all of them without a mask."""
    if mask is None:
        return valid
    length = valid.shape[1]
    last = length - 1 - valid.flip(1).int().argmax(dim=1)
    rows = mask[:, 0].expand(len(valid), -1, -1)[..., :length].to(valid.device)
    row = rows.gather(1, last.view(-1, 1, 1).expand(-1, 1, length)).squeeze(1)
    return valid & (row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2)


def _states_alone(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"hidden_states": kwargs["hidden_states"]} if "hidden_states" in kwargs else {}


def _version() -> tuple[int, ...]:
    return tuple(map(int, transformers.__version__.split(".")[:2]))


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.begin(None, None)

    def begin(self, prompt: PromptCut | PromptMask | None, passage: Passage | None) -> None:
        """Forget the previous call, and begin with this prompt."""
        self.prompt, self.passage = prompt, passage
        self.later: LaterCut | LaterMask | None = None
        # the next stage that has not chosen yet
        self.next = 0
