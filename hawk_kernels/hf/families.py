"""Every fact about a model family, as data: one row for each family, and tables of what several families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from hawk_kernels.hf.encoders import PackedEncoder, TileEncoder, VisionEncoder, any_resolution, pooled_frames
from hawk_kernels.hf.projections import LatentProjections, LayerProjections, SeparateProjections

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


@dataclass(frozen=True)
class Family:
    """How one family of vision-language models is laid out.

    Attributes:
        model_type: `config.model_type`, and the name in messages and statistics.
        classes: names of the model classes that are supported.
        since: the oldest of the tested versions of transformers that has the family.
        video: whether it takes videos as such, and not as images.
        without: modes that the unpruned model does not have, or gets wrong.
        visual_token_ids: config attributes that hold the placeholder ids of images and videos.
        end_of_turn_ids: ids that end a turn besides the end-of-sequence ids of the model's configs.
        features: arguments of the multimodal model that bring images or videos.
        encoded_whole: "image" where the encoder returns one entry for each image, however that is laid out in the
            prompt, and "video" likewise. Elsewhere an entry may be a tile or a frame, and an image is a run of
            placeholders.
        tiles: where the tiles of a picture stand in the prompt: "runs" where text stands between them; "entries" where
            they follow each other and the encoder returns one entry for each; "mosaic" where they are laid out as one
            grid, line by line. None where that is not known.
        pair_masks: whether visual tokens see each other both ways, by masks over pairs of tokens that the multimodal
            model makes; elsewhere the text model makes its own masks.
        position_axes: rows of position ids that RoPE reads, where it reads several.
        plain_rope: whether each attention module rotates whole queries and keys, after all norms, by the function
            `apply_rotary_pos_emb` beside it.
        projections: how queries and keys come out of a decoder layer.
        slot_limit: tells from the config of the text model how many tokens a row may have, padding and generated ones
            included, before attention depends on where in its row a token stands and not on its position id; None means
            that it never does.
        encoder: makes the vision encoder from the multimodal model, where its attention can be read.
    """

    model_type: str
    classes: tuple[str, ...]
    since: str = OLDEST
    video: bool = False
    without: tuple[str, ...] = ()
    visual_token_ids: tuple[str, ...] = ("image_token_id", "video_token_id")
    end_of_turn_ids: tuple[int, ...] = ()
    features: tuple[str, ...] = ("pixel_values", "pixel_values_videos")
    encoded_whole: tuple[str, ...] = ()
    tiles: str | None = None
    pair_masks: bool = False
    position_axes: int = 3
    plain_rope: bool = True
    projections: Callable[[nn.Module], LayerProjections] = SeparateProjections
    slot_limit: Callable[[Any], int | None] | None = None
    encoder: Callable[[Any], VisionEncoder] | None = None

    @property
    def modes(self) -> tuple[str, ...]:
        """What is supported, out of `MODES`."""
        missing = {*self.without, *(() if self.video else ("video",))}
        return tuple(mode for mode in MODES if mode not in missing)


def _before_temperature_rises(text_config: Any) -> int | None:
    """Tell where attention without positions begins to scale its queries by the number of tokens before them."""
    if not text_config.attn_temperature_tuning or all(text_config.no_rope_layers):
        return None
    return int(text_config.floor_scale) - 1


_IM_END = 151645
_STATEFUL = ("prompt lookup", "assisted")
_IMAGES, _IMAGES_AND_VIDEOS = ("image",), ("image", "video")
_WITH_ALIGNER = partial(TileEncoder, tower="vision_model", projector="aligner")
_MERGING_SQUARES = partial(TileEncoder, merges_squares=True)
_WITH_CONNECTOR = partial(_MERGING_SQUARES, tower="vision_model", projector="connector")

FAMILIES: tuple[Family, ...] = (
    Family(
        "qwen2_5_vl",
        ("Qwen2_5_VLForConditionalGeneration",),
        video=True,
        end_of_turn_ids=(_IM_END,),
        encoder=PackedEncoder,
    ),
    Family(
        "qwen2_vl", ("Qwen2VLForConditionalGeneration",), video=True, end_of_turn_ids=(_IM_END,), encoder=PackedEncoder
    ),
    Family(
        "qwen3_vl",
        ("Qwen3VLForConditionalGeneration",),
        video=True,
        encoded_whole=_IMAGES_AND_VIDEOS,
        encoder=PackedEncoder,
    ),
    Family(
        "qwen3_vl_moe",
        ("Qwen3VLMoeForConditionalGeneration",),
        video=True,
        encoded_whole=_IMAGES_AND_VIDEOS,
        encoder=PackedEncoder,
    ),
    Family(
        "cosmos3_omni",
        ("Cosmos3OmniForConditionalGeneration",),
        since="5.17",
        video=True,
        encoded_whole=_IMAGES_AND_VIDEOS,
        encoder=PackedEncoder,
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
        encoder=PackedEncoder,
    ),
    Family(
        "qwen3_5",
        ("Qwen3_5ForConditionalGeneration",),
        video=True,
        without=_STATEFUL,
        encoded_whole=_IMAGES_AND_VIDEOS,
        encoder=PackedEncoder,
    ),
    Family(
        "qwen3_5_moe",
        ("Qwen3_5MoeForConditionalGeneration",),
        video=True,
        without=_STATEFUL,
        encoded_whole=_IMAGES_AND_VIDEOS,
        encoder=PackedEncoder,
    ),
    Family("aria", ("AriaForConditionalGeneration",)),
    Family("aya_vision", ("AyaVisionForConditionalGeneration",), tiles="entries", encoder=_MERGING_SQUARES),
    Family("cohere2_vision", ("Cohere2VisionForConditionalGeneration",), tiles="entries", encoder=_MERGING_SQUARES),
    Family("deepseek_vl", ("DeepseekVLForConditionalGeneration",), encoded_whole=_IMAGES, encoder=_WITH_ALIGNER),
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
        encoder=PackedEncoder,
    ),
    Family("fast_vlm", ("FastVlmForConditionalGeneration",), encoded_whole=_IMAGES),
    Family("gemma3", ("Gemma3ForConditionalGeneration",), pair_masks=True, encoder=_MERGING_SQUARES),
    Family("gemma4", ("Gemma4ForConditionalGeneration",), video=True, pair_masks=True, plain_rope=False),
    Family(
        "gemma4_unified", ("Gemma4UnifiedForConditionalGeneration",), since="5.10", pair_masks=True, plain_rope=False
    ),
    Family(
        "glm4v",
        ("Glm4vForConditionalGeneration",),
        video=True,
        without=("beams",),
        encoded_whole=_IMAGES_AND_VIDEOS,
        encoder=PackedEncoder,
    ),
    Family(
        "glm4v_moe",
        ("Glm4vMoeForConditionalGeneration",),
        video=True,
        without=("beams",),
        encoded_whole=_IMAGES_AND_VIDEOS,
        encoder=PackedEncoder,
    ),
    Family(
        "glm46v",
        ("Glm46VForConditionalGeneration",),
        video=True,
        without=("beams",),
        encoded_whole=_IMAGES_AND_VIDEOS,
        encoder=PackedEncoder,
    ),
    Family(
        "glm_ocr",
        ("GlmOcrForConditionalGeneration",),
        video=True,
        without=("beams",),
        encoded_whole=_IMAGES_AND_VIDEOS,
        encoder=PackedEncoder,
    ),
    Family("got_ocr2", ("GotOcr2ForConditionalGeneration",)),
    Family(
        "granite_docling",
        ("GraniteDoclingForConditionalGeneration",),
        since="5.23",
        tiles="runs",
        encoder=partial(TileEncoder, tower="vision_model", projector="vision_model.connector"),
    ),
    Family(
        "hunyuan_vl",
        ("HunYuanVLForConditionalGeneration",),
        since="5.17",
        position_axes=4,
        plain_rope=False,
        projections=partial(SeparateProjections, head_norms=("query_layernorm", "key_layernorm")),
    ),
    Family(
        "hyperclovax_vision_v2",
        ("HyperCLOVAXVisionV2ForConditionalGeneration",),
        since="5.23",
        video=True,
        encoder=partial(PackedEncoder, tower="vision_model"),
    ),
    Family("idefics2", ("Idefics2ForConditionalGeneration",)),
    Family("idefics3", ("Idefics3ForConditionalGeneration",), tiles="runs", encoder=_WITH_CONNECTOR),
    Family("internvl", ("InternVLForConditionalGeneration",), tiles="entries", encoder=TileEncoder),
    Family("janus", ("JanusForConditionalGeneration",), encoder=_WITH_ALIGNER),
    Family(
        "kimi_k25", ("Kimi_K25ForConditionalGeneration",), since="5.17", plain_rope=False, projections=LatentProjections
    ),
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
        plain_rope=False,  # its norm comes after RoPE, and the two commute
        projections=partial(SeparateProjections, head_norms=("qk_norm", "qk_norm")),
        slot_limit=_before_temperature_rises,
    ),
    Family("llava", ("LlavaForConditionalGeneration",), encoded_whole=_IMAGES, tiles="entries", encoder=TileEncoder),
    Family(
        "llava_next",
        ("LlavaNextForConditionalGeneration",),
        encoded_whole=_IMAGES,
        tiles="mosaic",
        encoder=partial(TileEncoder, images=any_resolution),
    ),
    Family(
        "llava_next_video",
        ("LlavaNextVideoForConditionalGeneration",),
        video=True,
        encoded_whole=_IMAGES_AND_VIDEOS,
        tiles="mosaic",
        encoder=partial(TileEncoder, images=any_resolution),
    ),
    Family(
        "llava_onevision",
        ("LlavaOnevisionForConditionalGeneration",),
        video=True,
        encoded_whole=_IMAGES_AND_VIDEOS,
        tiles="mosaic",
        encoder=partial(TileEncoder, images=any_resolution, videos=pooled_frames),
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
    Family(
        "ovis2",
        ("Ovis2ForConditionalGeneration",),
        encoder=partial(TileEncoder, projector="vision_tower.head_linear"),
    ),
    Family("paddleocr_vl", ("PaddleOCRVLForConditionalGeneration",)),
    Family(
        "paligemma", ("PaliGemmaForConditionalGeneration",), encoded_whole=_IMAGES, pair_masks=True, encoder=TileEncoder
    ),
    Family("perception_lm", ("PerceptionLMForConditionalGeneration",), since="5.23", video=True),
    Family("qianfan_ocr", ("QianfanOCRForConditionalGeneration",), since="5.10", tiles="entries", encoder=TileEncoder),
    Family("smolvlm", ("SmolVLMForConditionalGeneration",), tiles="runs", encoder=_WITH_CONNECTOR),
    Family("video_llama_3", ("VideoLlama3ForConditionalGeneration",), video=True, encoded_whole=_IMAGES_AND_VIDEOS),
    Family(
        "video_llava",
        ("VideoLlavaForConditionalGeneration",),
        video=True,
        features=("pixel_values_images", "pixel_values_videos"),
        encoded_whole=_IMAGES,
    ),
    Family(
        "vipllava", ("VipLlavaForConditionalGeneration",), encoded_whole=_IMAGES, tiles="entries", encoder=TileEncoder
    ),
)

ENCODERS = {family.model_type: family.encoder for family in FAMILIES if family.encoder is not None}
"""Vision encoders whose attention can be read, by `model_type` of the family."""

NO_ENCODER_STAGE: dict[tuple[str, ...], str] = {
    ("granite_docling",): "its projector takes the rows of several layers together",
    ("llava_onevision",): "it interpolates what the projector made, of videos and of pictures with many tiles",
    ("ovis2",): "its projector gives logits over a visual vocabulary, from which the embedding is made later",
    ("hyperclovax_vision_v2",): "a second projection follows its projector",
}
"""Families whose encoder can be read, but whose visual tokens are not what the projector makes of one row each."""

MERGES_BEFORE_PROJECTOR = frozenset(ENCODERS) - {name for names in NO_ENCODER_STAGE for name in names}
"""Families for methods of the stage "encoder"."""

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
"""Families that are refused by name, and why."""

VISUAL_FEATURES = ("deepstack_visual_embeds", "deepstack_features")
"""Arguments of text models with one row for each visual token of the batch, for each of several layers."""

NO_ROPE: dict[str, Callable[[Any], bool]] = {
    "Cohere2": lambda attention: attention.sliding_window is None,
    "Exaone4": lambda attention: bool(attention.sliding_window) and not attention.is_sliding,
}
"""Which attention modules rotate nothing, by how the name of their class begins: these text models mix layers with
windows and layers with full attention and no positions. Others say so by `use_rope`."""

VISION_ENDS = (
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

PUBLIC_VOCABULARY = 32000
"""Vocabularies of this size or more are those of public tokenizers; in smaller ones the ids below mean other things."""

KNOWN_VISION_ENDS = {
    10: 13,  # [IMG_END] of Mistral's Tekken: Pixtral, Mistral 3
    49190: 49189,  # <fake_token_around_image> of SmolVLM
    128257: 128256,  # <fake_token_around_image> of Idefics3
    151667: 151666,  # </img> of InternVL3
    151671: 151670,  # </img> of InternVL3.5
    151859: 151858,  # </img> of GOT-OCR2
}
"""The token that closes an image where no config names it, by the id of the image's placeholder."""

REPLY_ENDS = (
    2,  # </s> of Llama 2, Vicuna and Mistral
    100001,  # <|end_of_sentence|> of DeepSeek-VL and Janus
    151336,  # <|user|> of GLM-4, which opens the next question
)
"""End-of-sequence ids that the next question follows, where nothing closes a question."""
