"""All that is specific to a model family, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hawk_kernels.hf.projections import LayerProjections, SeparateProjections


@dataclass(frozen=True)
class Family:
    """How one family of vision-language models is laid out.

    Attributes:
        model_type: `config.model_type`, and the name in messages and statistics.
        classes: names of the model classes that are supported.
        visual_token_ids: config attributes that hold the placeholder ids of images and videos.
        vision_end: config attribute with the id of the token that closes an image, where there is one.
        end_of_turn_ids: ids that end a turn besides the end-of-sequence ids of the model's configs.
        projections: how queries and keys come out of a decoder layer.
        features: arguments of the multimodal model that bring images or videos.
    """

    model_type: str
    classes: tuple[str, ...]
    visual_token_ids: tuple[str, ...] = ("image_token_id", "video_token_id")
    vision_end: str | None = None
    end_of_turn_ids: tuple[int, ...] = ()
    projections: Callable[[nn.Module], LayerProjections] = SeparateProjections
    features: tuple[str, ...] = ("pixel_values", "pixel_values_videos")


_IM_END = 151645

FAMILIES: tuple[Family, ...] = (
    Family(
        model_type="qwen2_5_vl",
        classes=("Qwen2_5_VLForConditionalGeneration",),
        vision_end="vision_end_token_id",
        end_of_turn_ids=(_IM_END,),
    ),
    Family(
        model_type="qwen2_vl",
        classes=("Qwen2VLForConditionalGeneration",),
        vision_end="vision_end_token_id",
        end_of_turn_ids=(_IM_END,),
    ),
)


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model that pruning touches.

    Attributes:
        family: the family the model belongs to.
        head: the module the caller calls, with the language-model head.
        multimodal: the module below it that merges text and images and sees `input_ids`.
        text: the decoder that sees `inputs_embeds`.
        projections: queries and keys of the first attention layer of `text`.
        visual_token_ids: ids of the visual placeholders.
        vision_end_id: id of the token that closes an image, or None.
        end_of_turn_ids: ids that end a turn.
    """

    family: Family
    head: nn.Module
    multimodal: nn.Module
    text: nn.Module
    projections: LayerProjections
    visual_token_ids: tuple[int, ...]
    vision_end_id: int | None
    end_of_turn_ids: tuple[int, ...]


def dissect(model: Any) -> Anatomy:
    """Find the parts of `model`.

    Raises:
        TypeError: a model of a family that is not supported.
    """
    family = _family_of(model)
    text = _text_module(model)
    config = model.config
    ids = (getattr(config, name, None) for name in family.visual_token_ids)
    return Anatomy(
        family=family,
        head=model,
        multimodal=model.base_model,
        text=text,
        projections=family.projections(_first_attention_layer(text)),
        visual_token_ids=tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None)),
        vision_end_id=getattr(config, family.vision_end, None) if family.vision_end else None,
        end_of_turn_ids=_end_of_turn_ids(model, family),
    )


def _family_of(model: object) -> Family:
    names = {cls.__name__ for cls in type(model).__mro__}
    for family in FAMILIES:
        if names & set(family.classes):
            return family
    supported = "; ".join(f"{family.model_type} ({', '.join(family.classes)})" for family in FAMILIES)
    raise TypeError(
        f"model: expected a supported vision-language model, got {type(model).__name__}; supported families: "
        f"{supported}. Pass the transformers model itself, not a wrapper around it"
    )


def _text_module(model: Any) -> nn.Module:
    module = model.get_decoder()
    while not hasattr(module, "layers"):
        module = module.model
    return module


def _first_attention_layer(text: Any) -> nn.Module:
    """The first layer with attention over all tokens; hybrid models begin with linear-attention layers."""
    kinds = getattr(text.config, "layer_types", None) or []
    attention = [i for i, kind in enumerate(kinds) if kind in ("full_attention", "sliding_attention")]
    return text.layers[attention[0] if attention else 0]


def _end_of_turn_ids(model: Any, family: Family) -> tuple[int, ...]:
    found: list[int] = list(family.end_of_turn_ids)
    for config in (getattr(model, "generation_config", None), model.config, model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        if isinstance(ids, torch.Tensor):
            ids = ids.tolist()
        found += [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return tuple(dict.fromkeys(found))
