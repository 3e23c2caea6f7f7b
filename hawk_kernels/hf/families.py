"""All that is specific to a model family, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from hawk_kernels.hf.projections import LatentProjections, LayerProjections, SeparateProjections
from hawk_kernels.hf.vision_attention import QwenVisionEncoder

MODES = (
    "several images",
    "padded batch",
    "text rows",
    "video",
    "beams",
    "sampling",
    "use_cache=False",
    "static cache",
    "prompt lookup",
)


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
        video: whether it takes videos as such, not as images.
        without: modes that the unpruned model does not have, or has wrong.
        position_axes: rows of position ids that RoPE reads, where it reads several.
        pair_masks: whether visual tokens see each other both ways, by masks over pairs of tokens that the multimodal
            model makes; elsewhere the text model makes its own.
        encoder: how attention is read in the vision encoder `visual` of the multimodal model, where it can be.
    """

    model_type: str
    classes: tuple[str, ...]
    visual_token_ids: tuple[str, ...] = ("image_token_id", "video_token_id")
    vision_end: str | None = None
    end_of_turn_ids: tuple[int, ...] = ()
    projections: Callable[[nn.Module], LayerProjections] = SeparateProjections
    features: tuple[str, ...] = ("pixel_values", "pixel_values_videos")
    video: bool = False
    without: tuple[str, ...] = ()
    position_axes: int = 3
    pair_masks: bool = False
    encoder: Callable[[nn.Module], QwenVisionEncoder] | None = None

    @property
    def modes(self) -> tuple[str, ...]:
        """What is supported, out of `MODES`."""
        missing = {*self.without, *(() if self.video else ("video",))}
        return tuple(mode for mode in MODES if mode not in missing)


_IM_END = 151645

FAMILIES: tuple[Family, ...] = (
    Family(
        model_type="qwen2_5_vl",
        video=True,
        classes=("Qwen2_5_VLForConditionalGeneration",),
        vision_end="vision_end_token_id",
        encoder=QwenVisionEncoder,
        end_of_turn_ids=(_IM_END,),
    ),
    Family(
        model_type="qwen2_vl",
        video=True,
        classes=("Qwen2VLForConditionalGeneration",),
        vision_end="vision_end_token_id",
        encoder=QwenVisionEncoder,
        end_of_turn_ids=(_IM_END,),
    ),
    Family("qwen3_vl", ("Qwen3VLForConditionalGeneration",), video=True, vision_end="vision_end_token_id"),
    Family("qwen3_vl_moe", ("Qwen3VLMoeForConditionalGeneration",), video=True, vision_end="vision_end_token_id"),
    Family("cosmos3_omni", ("Cosmos3OmniForConditionalGeneration",), video=True, vision_end="vision_end_token_id"),
    Family("cohere_compass", ("CohereCompassForConditionalGeneration",), video=True, vision_end="vision_end_token_id"),
    Family(
        "qwen3_5",
        ("Qwen3_5ForConditionalGeneration",),
        without=("prompt lookup",),
        video=True,
        vision_end="vision_end_token_id",
    ),
    Family(
        "qwen3_5_moe",
        ("Qwen3_5MoeForConditionalGeneration",),
        without=("prompt lookup",),
        video=True,
        vision_end="vision_end_token_id",
    ),
    Family("aria", ("AriaForConditionalGeneration",)),
    Family("aya_vision", ("AyaVisionForConditionalGeneration",)),
    Family("cohere2_vision", ("Cohere2VisionForConditionalGeneration",)),
    Family("deepseek_vl", ("DeepseekVLForConditionalGeneration",)),
    Family(
        "deepseek_vl_hybrid",
        ("DeepseekVLHybridForConditionalGeneration",),
        features=("pixel_values", "high_res_pixel_values"),
    ),
    Family(
        "ernie4_5_vl_moe",
        ("Ernie4_5_VLMoeForConditionalGeneration",),
        video=True,
        without=("use_cache=False",),
        vision_end="image_end_token_id",
    ),
    Family(
        "exaone4_5",
        ("Exaone4_5_ForConditionalGeneration",),
        video=True,
        projections=partial(SeparateProjections, norm=None),
    ),
    Family("fast_vlm", ("FastVlmForConditionalGeneration",)),
    Family("gemma3", ("Gemma3ForConditionalGeneration",), vision_end="eoi_token_index", pair_masks=True),
    Family("gemma4", ("Gemma4ForConditionalGeneration",), video=True, vision_end="eoi_token_id", pair_masks=True),
    Family(
        "gemma4_unified",
        ("Gemma4UnifiedForConditionalGeneration",),
        vision_end="eoi_token_id",
        pair_masks=True,
    ),
    Family(
        "glm4v", ("Glm4vForConditionalGeneration",), without=("beams",), video=True, vision_end="image_end_token_id"
    ),
    Family(
        "glm4v_moe",
        ("Glm4vMoeForConditionalGeneration",),
        without=("beams",),
        video=True,
        vision_end="image_end_token_id",
    ),
    Family(
        "glm46v", ("Glm46VForConditionalGeneration",), without=("beams",), video=True, vision_end="image_end_token_id"
    ),
    Family(
        "glm_ocr", ("GlmOcrForConditionalGeneration",), without=("beams",), video=True, vision_end="image_end_token_id"
    ),
    Family("got_ocr2", ("GotOcr2ForConditionalGeneration",)),
    Family("granite_docling", ("GraniteDoclingForConditionalGeneration",)),
    Family(
        "hunyuan_vl",
        ("HunYuanVLForConditionalGeneration",),
        vision_end="im_end_id",
        position_axes=4,
        projections=partial(SeparateProjections, head_norms=("query_layernorm", "key_layernorm")),
    ),
    Family("hyperclovax_vision_v2", ("HyperCLOVAXVisionV2ForConditionalGeneration",), video=True),
    Family("idefics2", ("Idefics2ForConditionalGeneration",)),
    Family("idefics3", ("Idefics3ForConditionalGeneration",)),
    Family("internvl", ("InternVLForConditionalGeneration",)),
    Family("janus", ("JanusForConditionalGeneration",)),
    Family(
        "kimi_k25",
        ("Kimi_K25ForConditionalGeneration",),
        vision_end="vision_end_token_id",
        projections=LatentProjections,
    ),
    Family(
        "lfm2_vl",
        ("Lfm2VlForConditionalGeneration",),
        projections=partial(SeparateProjections, norm="operator_norm", head_norms=("q_layernorm", "k_layernorm")),
    ),
    Family(
        "lfm3_vl",
        ("Lfm3VlForConditionalGeneration",),
        vision_end="vision_end_token_id",
        projections=partial(SeparateProjections, norm="operator_norm"),
    ),
    Family("lighton_ocr", ("LightOnOcrForConditionalGeneration",)),
    Family(
        "llama4",
        ("Llama4ForConditionalGeneration",),
        without=("beams",),
        vision_end="eoi_token_index",
        # its norm comes behind RoPE, which it commutes with
        projections=partial(SeparateProjections, head_norms=("qk_norm", "qk_norm")),
    ),
    Family("llava", ("LlavaForConditionalGeneration",)),
    Family("llava_next", ("LlavaNextForConditionalGeneration",)),
    Family("llava_next_video", ("LlavaNextVideoForConditionalGeneration",), video=True),
    Family("llava_onevision", ("LlavaOnevisionForConditionalGeneration",), video=True),
    Family("minicpmv4_6", ("MiniCPMV4_6ForConditionalGeneration",), video=True, without=("prompt lookup",)),
    Family(
        "minicpmv4_7", ("MiniCPMV4_7ForConditionalGeneration",), vision_end="image_end_id", without=("prompt lookup",)
    ),
    Family("minicpm_ocr", ("MiniCPMOcrForConditionalGeneration",), without=("prompt lookup",)),
    Family("mistral3", ("Mistral3ForConditionalGeneration",)),
    Family(
        "muse_glimmer",
        ("MuseGlimmerForConditionalGeneration",),
        projections=partial(SeparateProjections, head_norms=("qk_norm", "qk_norm")),
    ),
    Family("ovis2", ("Ovis2ForConditionalGeneration",)),
    Family("paddleocr_vl", ("PaddleOCRVLForConditionalGeneration",), vision_end="vision_end_token_id"),
    Family("paligemma", ("PaliGemmaForConditionalGeneration",), pair_masks=True),
    Family("perception_lm", ("PerceptionLMForConditionalGeneration",), video=True),
    Family("qianfan_ocr", ("QianfanOCRForConditionalGeneration",)),
    Family("smolvlm", ("SmolVLMForConditionalGeneration",)),
    Family("video_llama_3", ("VideoLlama3ForConditionalGeneration",), video=True),
    Family(
        "video_llava",
        ("VideoLlavaForConditionalGeneration",),
        video=True,
        features=("pixel_values_images", "pixel_values_videos"),
    ),
    Family("vipllava", ("VipLlavaForConditionalGeneration",)),
)

OUT_OF_REACH: dict[tuple[str, ...], str] = {
    (
        "blip",
        "evolla",
        "florence2",
        "idefics",
        "mllama",
        "pix2struct",
        "pp_formulanet",
        "t5gemma2",
        "udop",
        "vision-encoder-decoder",
    ): "its text reads images through cross-attention or an encoder, so no visual tokens stand in the prompt",
    (
        "chameleon",
        "emu3",
        "fuyu",
        "git",
        "kosmos-2",
        "kosmos-2.5",
    ): "its images do not stand in the prompt as placeholders that one module replaces by features",
}


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
        encoder: the vision encoder, or None where its attention cannot be read.
        kinds: for each visual placeholder whether it stands for an "image" or a "video".
    """

    family: Family
    head: nn.Module
    multimodal: nn.Module
    text: nn.Module
    projections: LayerProjections
    visual_token_ids: tuple[int, ...]
    vision_end_id: int | None
    end_of_turn_ids: tuple[int, ...]
    encoder: QwenVisionEncoder | None
    kinds: dict[int, str]


def dissect(model: Any) -> Anatomy:
    """Find the parts of `model`.

    Raises:
        TypeError: a model of a family that is not supported.
    """
    family = _family_of(model)
    text = _text_module(model)
    config = model.config
    ids = {name.removesuffix("_token_id"): getattr(config, name, None) for name in family.visual_token_ids}
    return Anatomy(
        family=family,
        head=model,
        multimodal=model.base_model,
        text=text,
        projections=family.projections(_first_attention_layer(text)),
        visual_token_ids=tuple(dict.fromkeys(token_id for token_id in ids.values() if token_id is not None)),
        vision_end_id=getattr(config, family.vision_end, None) if family.vision_end else None,
        end_of_turn_ids=_end_of_turn_ids(model, family),
        encoder=None if family.encoder is None else family.encoder(model.base_model.visual),
        kinds={token_id: kind for kind, token_id in ids.items() if token_id is not None},
    )


def _family_of(model: object) -> Family:
    names = {cls.__name__ for cls in type(model).__mro__}
    for family in FAMILIES:
        if names & set(family.classes):
            return family
    supported = ", ".join(family.model_type for family in FAMILIES)
    known = getattr(getattr(type(model), "config_class", None), "model_type", None)
    reason = next((f" ({reason})" for types, reason in OUT_OF_REACH.items() if known in types), "")
    raise TypeError(
        f"model: expected a supported vision-language model, got {type(model).__name__}{reason}; supported families: "
        f"{supported}. Pass the transformers model itself, not a wrapper around it"
    )


def _text_module(model: Any) -> nn.Module:
    module = model.get_decoder()
    while not hasattr(module, "layers"):
        module = module.model
    return module


def _first_attention_layer(text: Any) -> nn.Module:
    """The first layer with attention; hybrid models begin with linear-attention or convolution layers."""
    return next(layer for layer in text.layers if hasattr(layer, "self_attn"))


def _end_of_turn_ids(model: Any, family: Family) -> tuple[int, ...]:
    found: list[int] = list(family.end_of_turn_ids)
    for config in (getattr(model, "generation_config", None), model.config, model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        if isinstance(ids, torch.Tensor):
            ids = ids.tolist()
        found += [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return tuple(dict.fromkeys(found))
