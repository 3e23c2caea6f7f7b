"""Ids that close images and turns, from the configs of a model and from what is known of public tokenizers."""

from __future__ import annotations

from typing import Any

import torch

from hawk_kernels.hf.queries import Markers

_VISION_ENDS = (
    "vision_end_token_id",
    "image_end_token_id",
    "video_end_token_id",
    "frame_end_token_id",
    "eoi_token_id",
    "eoi_token_index",
    "im_end_id",
    "image_end_id",
    "slice_end_id",
)
"""Config attributes with the id of a token that closes an image, a video, a frame or a tile."""

_KNOWN_VISION_ENDS = {
    10: 13,  # [IMG_END] of Mistral's Tekken: Pixtral, Mistral 3
    49190: 49189,  # <fake_token_around_image> of SmolVLM
    128257: 128256,  # <fake_token_around_image> of Idefics3
    151667: 151666,  # </img> of InternVL3
    151671: 151670,  # </img> of InternVL3.5
    151859: 151858,  # </img> of GOT-OCR2
}
"""What closes an image where no config says so, by the id of the image's placeholder."""

_REPLY_ENDS = (
    2,  # </s> of Llama 2, Vicuna and Mistral
    100001,  # <|end_of_sentence|> of DeepSeek-VL and Janus
    151336,  # <|user|> of GLM-4, which opens the next question
)
"""End-of-sequence ids behind which the next question stands: nothing closes a question."""

_PUBLIC_VOCABULARY = 32000
"""Vocabularies from this size on are those of public tokenizers, in smaller ones these ids mean something else."""


def find_markers(model: Any, turn_ends: tuple[int, ...] = ()) -> Markers:
    """The ids of a model.

    Args:
        model: has `config` and, usually, `generation_config`.
        turn_ends: ids that end a turn besides the end-of-sequence ids.
    """
    config = model.config
    text = config.get_text_config()
    is_public = getattr(text, "vocab_size", 0) >= _PUBLIC_VOCABULARY
    vision_ends = [getattr(config, name, None) for name in _VISION_ENDS]
    vision_ends.append(_KNOWN_VISION_ENDS.get(getattr(config, "image_token_id", -1)) if is_public else None)
    sources = (getattr(model, "generation_config", None), config, text)
    ends = dict.fromkeys([*turn_ends, *(end for source in sources for end in _ids(source, "eos_token_id"))])
    reply_ends = tuple(end for end in ends if is_public and end in _REPLY_ENDS)
    return Markers(
        vision_ends=tuple(dict.fromkeys(end for end in vision_ends if end is not None)),
        turn_ends=tuple(end for end in ends if end not in reply_ends),
        reply_ends=reply_ends,
    )


def _ids(config: Any, name: str) -> list[int]:
    ids = getattr(config, name, None)
    if isinstance(ids, torch.Tensor):
        ids = ids.tolist()
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
