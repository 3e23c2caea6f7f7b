"""Watches what a method may read besides the prompt: images as they are encoded, the vision encoder, RoPE."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from hawk_kernels.hf.anatomy import Anatomy, first_attention_layer
from hawk_kernels.hf.choose_tokens import Chooser, Context
from hawk_kernels.hf.encoder_stage import check_projector, merged_before_projector
from hawk_kernels.hf.encoders.recorder import PromptAttention, VisionRecorder, attention_of_prompt, recorder_for
from hawk_kernels.hf.hooks import Handle, WatchedMethod, check_parts_run
from hawk_kernels.hf.projections import LayerProjections, check_key_lengths
from hawk_kernels.hf.prompt import Prompt
from hawk_kernels.hf.rotary import check_rotates, rotary_of_first_layer
from hawk_kernels.selection import Merge

if TYPE_CHECKING:
    from hawk_kernels.hf.call_state import Prefill

_ATTRIBUTE = "_hawk_kernels_encoded"
_KINDS = ("image", "video")
# these have one entry for each token and do not describe an image
_OF_TOKENS = ("input_ids", "attention_mask", "position_ids", "labels", "token_type_ids", "mm_token_type_ids")


class Sources:
    """Watches what a method asks for besides the prompt: the vision encoder, the images, RoPE."""

    def __init__(self, anatomy: Anatomy, chooser: Chooser | None, budget: str) -> None:
        self._anatomy = anatomy
        self._chooser = chooser
        method = None if chooser is None else chooser.method
        self._rotates = method is not None and method.uses_positions
        if method is not None and self._rotates:
            check_rotates(anatomy, method.name)
        if method is not None and method.uses_key_lengths:
            check_key_lengths(anatomy.projections, anatomy.family.model_type, method.name)
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
            ValueError: those layers would run only on the ranks whose prompts hold images.
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

    def context(self, prefill: Prefill, text_arguments: dict[str, Any]) -> Context:
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
            from hawk_kernels.hf.frames import frames_of_prompt

            frames = partial(frames_of_prompt, self._anatomy, prefill.prompt, prefill.encoded)
        if self._rotates:
            embeds = text_arguments["inputs_embeds"]
            rotary = rotary_of_first_layer(self._anatomy, embeds, text_arguments.get("position_ids"))
        return Context(attention=attention, frames=frames, rotary=rotary, states=states)

    def merged_before_projector(
        self, prefill: Prefill, kept: torch.Tensor, counts: list[int], merge: Merge, inputs_embeds: torch.Tensor
    ) -> torch.Tensor:
        """Return the embeddings with those of kept visual tokens projected from merged rows of the encoder."""
        recorder = self._recorder
        assert recorder is not None
        recorded, project = self._attention(recorder, prefill), recorder.encoder.project
        return merged_before_projector(inputs_embeds, prefill.prompt, kept, counts, merge, recorded, project)

    def _attention(self, recorder: VisionRecorder, prefill: Prefill) -> PromptAttention:
        return attention_of_prompt(recorder.recordings(prefill.arguments), prefill.prompt, self._anatomy.kinds)


@dataclass(frozen=True)
class Encoded:
    """The images, or the videos, of one call of the multimodal model.

    Attributes:
        arguments: what the encoder was told. Integer tensors, numbers and lists are kept as they are; of every other
            tensor, the pixels above all, only the shape is kept.
        lengths: visual tokens of each entry that the encoder returned; empty where it returned no entries.
    """

    arguments: dict[str, Any]
    lengths: list[int]


class EncodingWatch:
    """Notes what the encoder was told about its inputs, because `generate` passes on the features alone.

    It keeps references and reads no values, so that it never waits for a device.

    Args:
        multimodal: the model that has `get_image_features` or `get_video_features`.
    """

    def __init__(self, multimodal: Any) -> None:
        self._multimodal = multimodal
        self._thread = _ThreadState()

    def attach(self) -> list[Handle]:
        """Watch the encoding; removing the handles ends that."""
        return [
            WatchedMethod(self._multimodal, f"get_{kind}_features", partial(self._watch, kind))
            for kind in _KINDS
            if hasattr(self._multimodal, f"get_{kind}_features")
        ]

    def start(self) -> None:
        """Forget what earlier calls of the multimodal model encoded."""
        self._thread.seen = {}

    def encoded(self, arguments: dict[str, Any]) -> dict[str, Encoded]:
        """Collect what was encoded for a call of the multimodal model, by kind, "image" and "video".

        Args:
            arguments: those of the call; `generate` encodes beforehand and hands over the features in them.
        """
        features = arguments.get("mm_encoder_outputs") or {}
        told, found = _small(arguments), dict(self._thread.seen)
        for kind in _KINDS:
            given = features.get(kind)
            if given is not None:
                found[kind] = getattr(given, _ATTRIBUTE, None) or Encoded({}, _lengths(given))
        return {kind: Encoded({**told, **run.arguments}, run.lengths) for kind, run in found.items()}

    @contextmanager
    def _watch(self, kind: str, arguments: dict[str, Any]) -> Iterator[Callable[[Any], None]]:
        """Surround a call of `get_image_features` or `get_video_features`; one may call the other."""
        thread = self._thread
        is_inner, thread.is_encoding = thread.is_encoding, True

        def keep(features: Any) -> None:
            if is_inner:
                return
            run = thread.seen[kind] = Encoded(_small(arguments), _lengths(features))
            # a plain tuple or tensor cannot carry an attribute of ours, and no model accepts one back
            if not isinstance(features, tuple | list | torch.Tensor):
                setattr(features, _ATTRIBUTE, run)

        try:
            yield keep
        finally:
            thread.is_encoding = is_inner


def _small(arguments: dict[str, Any]) -> dict[str, Any]:
    """Keep the arguments that describe images: integer tensors, numbers and lists; the shapes of all other tensors."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            is_count = not value.is_floating_point() and value.dtype != torch.bool
            found[name] = value if is_count and name not in _OF_TOKENS else value.shape
        elif isinstance(value, int | float) or (
            isinstance(value, list | tuple) and not any(isinstance(entry, torch.Tensor) for entry in value)
        ):
            found[name] = value
    return found


def _lengths(features: Any) -> list[int]:
    """Count the visual tokens of each entry of what an encoder returned; none where it does not tell."""
    pooled = getattr(features, "pooler_output", features)
    if isinstance(pooled, torch.Tensor) and pooled.dim() < 3:
        return []
    if not isinstance(pooled, torch.Tensor | list | tuple) or not all(isinstance(x, torch.Tensor) for x in pooled):
        return []
    return [entry.shape[:-1].numel() for entry in pooled]


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.is_encoding = False
        self.seen: dict[str, Encoded] = {}
