"""All that is specific to a model family, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from hawk_kernels.hf.markers import find_markers
from hawk_kernels.hf.projections import LatentProjections, LayerProjections, SeparateProjections
from hawk_kernels.hf.queries import Markers

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
    "assisted",
    "copied caches",
    "threads",
    "labels",
    "eager",
    "float16",
    "bfloat16",
    "autocast",
    "quantised",
    "device_map",
    "compiled decoding",
)
"""What is tested of each family, besides a prompt with one image and keeping everything."""

OLDEST = "5.5"
"""The oldest transformers that is tested."""

_STATEFUL = ("prompt lookup", "assisted")
_IMAGES, _IMAGES_AND_VIDEOS = ("image",), ("image", "video")


@dataclass(frozen=True)
class Family:
    """How one family of vision-language models is laid out.

    Attributes:
        model_type: `config.model_type`, and the name in messages and statistics.
        classes: names of the model classes that are supported.
        visual_token_ids: config attributes that hold the placeholder ids of images and videos.
        end_of_turn_ids: ids that end a turn besides the end-of-sequence ids of the model's configs.
        projections: how queries and keys come out of a decoder layer.
        features: arguments of the multimodal model that bring images or videos.
        video: whether it takes videos as such, not as images.
        without: modes that the unpruned model does not have, or has wrong.
        since: the oldest of the tested versions of transformers that has the family.
        position_axes: rows of position ids that RoPE reads, where it reads several.
        pair_masks: whether visual tokens see each other both ways, by masks over pairs of tokens that the multimodal
            model makes; elsewhere the text model makes its own.
        encoded_whole: "image" where the encoder returns one entry for each image, however it is laid out in the prompt,
            and "video" likewise. Elsewhere an entry may be a tile or a frame, and an image is a run of placeholders.
    """

    model_type: str
    classes: tuple[str, ...]
    visual_token_ids: tuple[str, ...] = ("image_token_id", "video_token_id")
    end_of_turn_ids: tuple[int, ...] = ()
    projections: Callable[[nn.Module], LayerProjections] = SeparateProjections
    features: tuple[str, ...] = ("pixel_values", "pixel_values_videos")
    video: bool = False
    without: tuple[str, ...] = ()
    since: str = OLDEST
    position_axes: int = 3
    pair_masks: bool = False
    encoded_whole: tuple[str, ...] = ()

    @property
    def modes(self) -> tuple[str, ...]:
        """What is supported, out of `MODES`."""
        missing = {*self.without, *(() if self.video else ("video",))}
        return tuple(mode for mode in MODES if mode not in missing)


_IM_END = 151645

FAMILIES: tuple[Family, ...] = (
    Family(
        model_type="qwen2_5_vl", video=True, classes=("Qwen2_5_VLForConditionalGeneration",), end_of_turn_ids=(_IM_END,)
    ),
    Family(model_type="qwen2_vl", video=True, classes=("Qwen2VLForConditionalGeneration",), end_of_turn_ids=(_IM_END,)),
    Family("qwen3_vl", ("Qwen3VLForConditionalGeneration",), video=True, encoded_whole=_IMAGES_AND_VIDEOS),
    Family("qwen3_vl_moe", ("Qwen3VLMoeForConditionalGeneration",), video=True, encoded_whole=_IMAGES_AND_VIDEOS),
    Family(
        "cosmos3_omni",
        ("Cosmos3OmniForConditionalGeneration",),
        since="5.17",
        video=True,
        encoded_whole=_IMAGES_AND_VIDEOS,
    ),
    Family(
        "cosmos3_edge",
        ("Cosmos3EdgeForConditionalGeneration",),
        since="5.23",
        video=True,
        encoded_whole=_IMAGES_AND_VIDEOS,
    ),
    Family("qwen2_5_omni_thinker", ("Qwen2_5OmniThinkerForConditionalGeneration",), since="5.17", video=True),
    Family("qwen3_omni_moe_thinker", ("Qwen3OmniMoeThinkerForConditionalGeneration",), since="5.17", video=True),
    Family("step3p7", ("Step3p7ForConditionalGeneration",), since="5.23"),
    Family(
        "cohere_compass",
        ("CohereCompassForConditionalGeneration",),
        since="5.17",
        video=True,
        encoded_whole=_IMAGES_AND_VIDEOS,
    ),
    Family(
        "qwen3_5", ("Qwen3_5ForConditionalGeneration",), without=_STATEFUL, video=True, encoded_whole=_IMAGES_AND_VIDEOS
    ),
    Family(
        "qwen3_5_moe",
        ("Qwen3_5MoeForConditionalGeneration",),
        without=_STATEFUL,
        video=True,
        encoded_whole=_IMAGES_AND_VIDEOS,
    ),
    Family("aria", ("AriaForConditionalGeneration",)),
    Family("aya_vision", ("AyaVisionForConditionalGeneration",)),
    Family("cohere2_vision", ("Cohere2VisionForConditionalGeneration",)),
    Family("deepseek_vl", ("DeepseekVLForConditionalGeneration",), encoded_whole=_IMAGES),
    Family(
        "deepseek_vl_hybrid",
        ("DeepseekVLHybridForConditionalGeneration",),
        features=("pixel_values", "high_res_pixel_values"),
        encoded_whole=_IMAGES,
    ),
    Family(
        "ernie4_5_vl_moe",
        ("Ernie4_5_VLMoeForConditionalGeneration",),
        video=True,
        without=("use_cache=False", "assisted"),
    ),
    Family(
        "exaone4_5",
        ("Exaone4_5_ForConditionalGeneration",),
        since="5.10",
        video=True,
        projections=partial(SeparateProjections, norm=None),
    ),
    Family("fast_vlm", ("FastVlmForConditionalGeneration",), encoded_whole=_IMAGES),
    Family("gemma3", ("Gemma3ForConditionalGeneration",), pair_masks=True),
    Family("gemma4", ("Gemma4ForConditionalGeneration",), video=True, pair_masks=True),
    Family("gemma4_unified", ("Gemma4UnifiedForConditionalGeneration",), since="5.10", pair_masks=True),
    Family(
        "glm4v", ("Glm4vForConditionalGeneration",), without=("beams",), video=True, encoded_whole=_IMAGES_AND_VIDEOS
    ),
    Family(
        "glm4v_moe",
        ("Glm4vMoeForConditionalGeneration",),
        without=("beams",),
        video=True,
        encoded_whole=_IMAGES_AND_VIDEOS,
    ),
    Family(
        "glm46v", ("Glm46VForConditionalGeneration",), without=("beams",), video=True, encoded_whole=_IMAGES_AND_VIDEOS
    ),
    Family(
        "glm_ocr", ("GlmOcrForConditionalGeneration",), without=("beams",), video=True, encoded_whole=_IMAGES_AND_VIDEOS
    ),
    Family("got_ocr2", ("GotOcr2ForConditionalGeneration",)),
    Family("granite_docling", ("GraniteDoclingForConditionalGeneration",), since="5.23"),
    Family(
        "hunyuan_vl",
        ("HunYuanVLForConditionalGeneration",),
        since="5.17",
        position_axes=4,
        projections=partial(SeparateProjections, head_norms=("query_layernorm", "key_layernorm")),
    ),
    Family("hyperclovax_vision_v2", ("HyperCLOVAXVisionV2ForConditionalGeneration",), since="5.23", video=True),
    Family("idefics2", ("Idefics2ForConditionalGeneration",)),
    Family("idefics3", ("Idefics3ForConditionalGeneration",)),
    Family("internvl", ("InternVLForConditionalGeneration",)),
    Family("janus", ("JanusForConditionalGeneration",)),
    Family("kimi_k25", ("Kimi_K25ForConditionalGeneration",), since="5.17", projections=LatentProjections),
    Family(
        "lfm2_vl",
        ("Lfm2VlForConditionalGeneration",),
        projections=partial(SeparateProjections, norm="operator_norm", head_norms=("q_layernorm", "k_layernorm")),
    ),
    Family(
        "lfm3_vl",
        ("Lfm3VlForConditionalGeneration",),
        since="5.23",
        projections=partial(SeparateProjections, norm="operator_norm"),
    ),
    Family("lighton_ocr", ("LightOnOcrForConditionalGeneration",), encoded_whole=_IMAGES),
    Family(
        "llama4",
        ("Llama4ForConditionalGeneration",),
        without=("beams",),
        # its norm comes behind RoPE, which it commutes with
        projections=partial(SeparateProjections, head_norms=("qk_norm", "qk_norm")),
    ),
    Family("llava", ("LlavaForConditionalGeneration",), encoded_whole=_IMAGES),
    Family("llava_next", ("LlavaNextForConditionalGeneration",), encoded_whole=_IMAGES),
    Family(
        "llava_next_video", ("LlavaNextVideoForConditionalGeneration",), video=True, encoded_whole=_IMAGES_AND_VIDEOS
    ),
    Family(
        "llava_onevision", ("LlavaOnevisionForConditionalGeneration",), video=True, encoded_whole=_IMAGES_AND_VIDEOS
    ),
    Family("minicpmv4_6", ("MiniCPMV4_6ForConditionalGeneration",), since="5.10", video=True, without=_STATEFUL),
    Family("minicpmv4_7", ("MiniCPMV4_7ForConditionalGeneration",), since="5.23", without=_STATEFUL),
    Family("minicpm_ocr", ("MiniCPMOcrForConditionalGeneration",), since="5.23", without=_STATEFUL),
    Family("mistral3", ("Mistral3ForConditionalGeneration",), encoded_whole=_IMAGES),
    Family(
        "muse_glimmer",
        ("MuseGlimmerForConditionalGeneration",),
        since="5.17",
        projections=partial(SeparateProjections, head_norms=("qk_norm", "qk_norm")),
    ),
    Family("ovis2", ("Ovis2ForConditionalGeneration",)),
    Family("paddleocr_vl", ("PaddleOCRVLForConditionalGeneration",)),
    Family("paligemma", ("PaliGemmaForConditionalGeneration",), pair_masks=True, encoded_whole=_IMAGES),
    Family("perception_lm", ("PerceptionLMForConditionalGeneration",), since="5.23", video=True),
    Family("qianfan_ocr", ("QianfanOCRForConditionalGeneration",), since="5.10"),
    Family("smolvlm", ("SmolVLMForConditionalGeneration",)),
    Family("video_llama_3", ("VideoLlama3ForConditionalGeneration",), video=True, encoded_whole=_IMAGES_AND_VIDEOS),
    Family(
        "video_llava",
        ("VideoLlavaForConditionalGeneration",),
        video=True,
        features=("pixel_values_images", "pixel_values_videos"),
        encoded_whole=_IMAGES,
    ),
    Family("vipllava", ("VipLlavaForConditionalGeneration",), encoded_whole=_IMAGES),
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
    (
        "blip-2",
        "instructblip",
        "instructblipvideo",
    ): "an image is a few learned queries there, which leaves nothing to prune",
    (
        "granite4_vision",
    ): "its visual tokens are empty in the first layer, which ranks them, and are filled in later layers",
    (
        "dots3_note",
        "glm5_next",
        "minimax_m3_vl",
        "mistral_large4",
    ): "its attention picks keys by an index over where they stand, and dropping tokens moves the rest",
    ("inkling2", "inkling_mm_model"): "its attention weighs distances between slots, which dropping tokens changes",
    ("qwen4_exp",): "its layers read the token ids of the whole prompt again",
    ("gemma3n",): "its vision encoder needs timm, and without it no test has run",
    ("diffusion_gemma",): "it writes blocks of tokens by diffusion, not one after the other",
    ("pi0",): "it answers with actions of a robot, not with text",
    ("mistral4",): "it has no vision encoder; prune the model of mistral3 around it",
    ("qwen2_5_omni", "qwen3_omni_moe"): "its parts read and speak by turns; prune the one that reads, model.thinker",
    (
        "deepseek_ocr2",
        "molmo2",
        "muse_spark",
        "nemotron_h_omni",
        "phi4_multimodal",
        "unlimited_ocr",
    ): "no test has shown that removing its tokens equals hiding them",
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
        markers: ids that close images and turns.
        kinds: for each visual placeholder whether it stands for an "image" or a "video".
    """

    family: Family
    head: nn.Module
    multimodal: nn.Module
    text: nn.Module
    projections: LayerProjections
    visual_token_ids: tuple[int, ...]
    markers: Markers
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
        markers=find_markers(model, family.end_of_turn_ids),
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
    whole = next((family.classes[0] for family in FAMILIES if family.model_type == known), None)
    remedy = "the transformers model itself, not a wrapper around it" if whole is None else f"a {whole}"
    raise TypeError(
        f"model: expected a supported vision-language model, got {type(model).__name__}{reason}; supported families: "
        f"{supported}. Pass {remedy}"
    )


def _text_module(model: Any) -> nn.Module:
    module = model.get_decoder()
    while not hasattr(module, "layers"):
        module = module.model
    return module


def _first_attention_layer(text: Any) -> nn.Module:
    """The first layer with attention; hybrid models begin with linear-attention or convolution layers."""
    return next(layer for layer in text.layers if hasattr(layer, "self_attn"))
