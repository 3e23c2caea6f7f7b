"""Tells vLLM's front end how many placeholders a pruned picture has, and which prompts may share cached results."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLMultiModalProcessor
from vllm.model_executor.models.qwen2_vl import Qwen2VLMultiModalProcessor
from vllm.model_executor.models.qwen3_vl import Qwen3VLMultiModalProcessor
from vllm.multimodal.processing import PromptReplacement, PromptUpdate

from hawk_kernels.vllm.settings import Settings, read_settings


class PrunedPlaceholders:
    """Adds pruning to a processor of vLLM; it stands before vLLM's own class among the base classes."""

    info: Any

    @cached_property
    def _settings(self) -> Settings:
        return read_settings(self.info.get_hf_config(), self.info.ctx.get_mm_config().video_pruning_rate)

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        processor = self.info.get_hf_processor(**hf_processor_mm_kwargs)
        vocabulary = self.info.get_tokenizer().get_vocab()
        merged = self.info.get_image_processor(**hf_processor_mm_kwargs).merge_size ** 2
        placeholders = {"image": vocabulary[processor.image_token], "video": vocabulary[processor.video_token]}

        def replacement(item: int, modality: str) -> list[int]:
            values = out_mm_kwargs[modality][item]
            self._settings.check_pixels(modality, values)
            patches = int(values[f"{modality}_grid_thw"].data.prod())
            return [placeholders[modality]] * self._settings.kept_count(patches // merged) + self._texts_within(values)

        return [
            PromptReplacement(modality=modality, target=[token], replacement=partial(replacement, modality=modality))
            for modality, token in placeholders.items()
        ]

    def _texts_within(self, values: Mapping[str, Any]) -> list[int]:
        """Return the ids of the texts that stand between the frames of a video.

        They follow the placeholders of all its frames: how many of a frame stay is not known yet, and the model puts
        rows where the frames and texts belong.

        Args:
            values: what the processor of transformers says of a picture or video.
        """
        return []

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Name each picture for the caches; where the prompt decides what stays, the name holds that prompt's hash.

        The prefix cache finds blocks of keys and values by these names. By the picture's name alone, a second question
        about a picture would silently be answered from the tokens that the first one kept.
        """
        # the processor of vLLM that comes next has it
        hashes = super()._get_mm_hashes(inputs)  # type: ignore[misc]
        if not self._settings.reads_prompt:
            return hashes
        prompt = prompt_hash(inputs.prompt)
        return {modality: [f"{name}-{prompt}" for name in names] for modality, names in hashes.items()}


def prompt_hash(ids: Sequence[int]) -> str:
    """Return a hash of a prompt's token ids."""
    return hashlib.blake2b(np.asarray(ids, dtype="<i8").tobytes(), digest_size=16).hexdigest()


def frame_texts(tokenizer: Any, timestamps: Iterable[float], start: int, end: int) -> list[list[int]]:
    """Return the ids of the text before each frame of a Qwen3-VL video, and last of the text after all frames.

    Args:
        tokenizer: turns a timestamp into ids.
        timestamps: of the frames, in seconds.
        start, end: ids that open and close a frame.
    """
    opened = [[*tokenizer.encode(f"<{time:.1f} seconds>", add_special_tokens=False), start] for time in timestamps]
    first, *others = opened
    return [first, *([end, *text] for text in others), [end]]


class Qwen2VLProcessor(PrunedPlaceholders, Qwen2VLMultiModalProcessor):
    """Qwen2-VL's processor with pruning."""


class Qwen2_5_VLProcessor(PrunedPlaceholders, Qwen2_5_VLMultiModalProcessor):  # noqa: N801
    """Qwen2.5-VL's processor with pruning."""


class Qwen3VLProcessor(PrunedPlaceholders, Qwen3VLMultiModalProcessor):
    """Qwen3-VL's processor with pruning."""

    def _texts_within(self, values: Mapping[str, Any]) -> list[int]:
        if "timestamps" not in values:
            return []
        config = self.info.get_hf_config()
        texts = frame_texts(
            self.info.get_tokenizer(),
            values["timestamps"].data,
            config.vision_start_token_id,
            config.vision_end_token_id,
        )
        return [token for text in texts for token in text]
