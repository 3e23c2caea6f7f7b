"""One tiny model with random weights for each supported family, and batches of prompts for it.

A model is its family's default config made small by the rules below. The table holds what the rules do not give: how
the family is an exception, what its processor would hand over for a picture, and how many placeholders stand for one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText, PretrainedConfig

from tests.tiny_models import (
    BEGIN,
    END_OF_TURN,
    IMAGE,
    PAD,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCABULARY,
    Picture,
    sharpen,
)
from tests.tiny_pixels import (
    Pixels,
    flat,
    grids,
    named_squares,
    padded_squares,
    patch_rows,
    patch_strip,
    squares,
    with_clips,
)

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "bos_token_id": BEGIN,
    "eos_token_id": END_OF_TURN,
    "pad_token_id": PAD,
}
"""What every text model is made with."""

WHERE_PRESENT = {
    "text_config": {
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "num_experts": 4,
        "num_local_experts": 4,
        "n_routed_experts": 4,
        "moe_num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_num_shared_experts": 1,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "decoder_sparse_step": 1,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "vision_config": {
        "depth": 2,
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_heads": 2,
        "image_size": 24,
        "patch_size": 4,
        "num_patches": 36,
        "num_position_embeddings": 64,
        "pos_emb_height": 8,
        "pos_emb_width": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "audio_config": {
        "d_model": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "num_mel_bins": 8,
        "output_dim": 64,
        "n_window": 4,
        "downsample_hidden_size": 8,
    },
    "": {
        "projector_hidden_size": 48,
        "image_token_id": IMAGE,
        "image_token_index": IMAGE,
        "video_token_id": VIDEO,
        "video_token_index": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "image_start_token_id": VISION_START,
        "image_end_token_id": VISION_END,
        "video_start_token_id": 7,
        "video_end_token_id": 8,
        "boi_token_id": VISION_START,
        "eoi_token_id": VISION_END,
        "audio_token_id": 9,
        "audio_start_token_id": 7,
        "audio_end_token_id": 8,
    },
}
"""What makes the parts of a config small, and the config itself (""), where the default has a value of that name."""
WHERE_PRESENT["high_res_vision_config"] = WHERE_PRESENT["vision_config"]


@dataclass(frozen=True)
class TinyFamily:
    """How one family is made small.

    Attributes:
        model_type: the family.
        pixels: makes the images of a batch, row by row, as the model's own arguments.
        text: exceptions from the rules in the config of the text model.
        vision: exceptions in the config of the vision encoder.
        others: exceptions in the config itself and in its other parts.
        tokens: counts the placeholders of one picture.
        token_types: arguments that mark visual tokens with 1 (videos with 2).
        hides: whether masking a token out hides it; a linear-attention or convolution layer sees it all the same.
        video: how a video stands in a prompt: "" (not at all), "run" of placeholders, or "frames" set apart by text.
        video_token: the placeholder of a video.
        first_position: position id of the first token.
        attention: the implementation of attention.
        picture: the size that fixed-size families always take.
    """

    model_type: str
    pixels: Pixels
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    tokens: Callable[[Picture], int] = lambda picture: picture.tokens
    token_types: tuple[str, ...] = ()
    hides: bool = True
    video: str = ""
    video_token: int = VIDEO
    first_position: int = 0
    attention: str = "sdpa"
    picture: Picture | None = None


def fixed(count: int) -> dict[str, Any]:
    return {"tokens": lambda picture: count, "picture": Picture(1, count)}


def rope(*mrope_section: int, **more: float) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": list(mrope_section),
            **more,
        }
    }


SLIDING = {"num_hidden_layers": 4, "sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"] * 2}
LINEAR = {
    "num_hidden_layers": 4,
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    **rope(2, 1, 1, partial_rotary_factor=0.25),
}
MROPE = rope(2, 3, 3)
HALF_MROPE = rope(2, 1, 1, partial_rotary_factor=0.5)
DEEPSTACK = {"depth": 4, "deepstack_visual_indexes": [0, 1, 2]}
WINDOWED = {"window_size": 16, "fullatt_block_indexes": [1]}
SAM = {"output_channels": 16, "image_size": 48, "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 48}
TILES_OF_16 = {"image_size": 16, "patch_size": 8}
QWEN_GRIDS = grids(3 * 2 * 4 * 4)

TINY = (
    TinyFamily("llava", squares(12), vision={"image_size": 12, "projection_dim": 32}, **fixed(9)),
    TinyFamily(
        "vipllava",
        squares(12),
        vision={"image_size": 12, "projection_dim": 32},
        others={"vision_feature_layers": [-1, -2]},
        **fixed(9),
    ),
    TinyFamily(
        "llava_next",
        squares(16, 3, image_sizes=lambda count: torch.tensor([[16, 32]] * count)),
        vision={**TILES_OF_16, "projection_dim": 32},
        others={"image_grid_pinpoints": [[16, 32]]},
        **fixed(14),
    ),
    TinyFamily(
        "llava_next_video",
        with_clips(squares(16, 3, image_sizes=lambda count: torch.tensor([[16, 32]] * count)), 16),
        vision={**TILES_OF_16, "projection_dim": 32},
        others={"image_grid_pinpoints": [[16, 32]]},
        tokens=lambda picture: 14 if picture.frames == 1 else picture.frames,
        video="run",
        picture=Picture(1, 14),
    ),
    TinyFamily(
        "llava_onevision",
        with_clips(squares(16, 3, image_sizes=lambda count: torch.tensor([[16, 32]] * count)), 16),
        vision={**TILES_OF_16, "vision_use_head": False},
        others={"image_grid_pinpoints": [[16, 32]]},
        tokens=lambda picture: 14 if picture.frames == 1 else picture.frames + 1,
        video="run",
        picture=Picture(1, 14),
    ),
    TinyFamily("internvl", squares(24), **fixed(9)),
    TinyFamily("qianfan_ocr", squares(24), **fixed(9)),
    TinyFamily("idefics3", padded_squares(24), **fixed(9)),
    TinyFamily(
        "idefics2",
        padded_squares(24),
        others={
            "perceiver_config": {
                "resampler_n_latents": 9,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 16,
                "num_key_value_heads": 2,
            }
        },
        **fixed(9),
    ),
    TinyFamily("smolvlm", padded_squares(24), **fixed(9)),
    TinyFamily("mistral3", squares(24, image_sizes=lambda count: torch.tensor([[24, 24]] * count)), **fixed(9)),
    TinyFamily("lighton_ocr", squares(24, image_sizes=lambda count: torch.tensor([[24, 24]] * count)), **fixed(9)),
    TinyFamily("aya_vision", squares(24), text=SLIDING, **fixed(9)),
    TinyFamily("cohere2_vision", squares(24), text=SLIDING, others={"alignment_intermediate_size": 64}, **fixed(9)),
    TinyFamily(
        "ovis2",
        squares(12),
        vision={"image_size": 12, "vocab_size": 40},
        others={"visual_indicator_token_ids": [111, 112, 113, 114, 115], "vocab_size": VOCABULARY, "hidden_size": 64},
        **fixed(9),
    ),
    TinyFamily("got_ocr2", squares(48), vision=SAM, attention="eager", **fixed(9)),
    TinyFamily(
        "janus",
        squares(12),
        vision={"image_size": 12, "projection_dim": 64, "num_image_tokens": 9},
        others={
            "vq_config": {
                "num_embeddings": 32,
                "latent_channels": 8,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "projection_dim": 64,
                "image_token_embed_dim": 64,
            }
        },
        **fixed(9),
    ),
    TinyFamily("deepseek_vl", squares(12), vision={"image_size": 12}, **fixed(9)),
    TinyFamily(
        "aria",
        squares(24, pixel_mask=lambda count: torch.ones(count, 24, 24).bool()),
        others={"projector_patch_to_query_dict": {36: 9}},
        **fixed(9),
    ),
    TinyFamily(
        "llama4",
        squares(24),
        text={
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 512,
        },
        vision={
            "intermediate_size": 128,
            "vision_output_dim": 48,
            "projector_input_dim": 48,
            "projector_output_dim": 48,
        },
        **fixed(9),
    ),
    TinyFamily("video_llama_3", grids(3 * 4 * 4, sizes=True), video="run"),
    TinyFamily("paddleocr_vl", grids(3, 4, 4), text=MROPE, token_types=("mm_token_type_ids",)),
    TinyFamily(
        "glm4v", QWEN_GRIDS, text=HALF_MROPE, token_types=("mm_token_type_ids",), video="frames", video_token=IMAGE
    ),
    TinyFamily(
        "glm46v", QWEN_GRIDS, text=HALF_MROPE, token_types=("mm_token_type_ids",), video="frames", video_token=IMAGE
    ),
    TinyFamily(
        "glm4v_moe", QWEN_GRIDS, text=HALF_MROPE, token_types=("mm_token_type_ids",), video="frames", video_token=IMAGE
    ),
    TinyFamily(
        "glm_ocr", QWEN_GRIDS, text=MROPE, token_types=("mm_token_type_ids",), video="frames", video_token=IMAGE
    ),
    TinyFamily(
        "qwen3_vl", QWEN_GRIDS, text=MROPE, vision=DEEPSTACK, token_types=("mm_token_type_ids",), video="frames"
    ),
    TinyFamily(
        "qwen3_vl_moe", QWEN_GRIDS, text=MROPE, vision=DEEPSTACK, token_types=("mm_token_type_ids",), video="frames"
    ),
    TinyFamily(
        "gemma3",
        squares(24),
        text={**SLIDING, "query_pre_attn_scalar": 16},
        others={"mm_tokens_per_image": 9, "boi_token_index": VISION_START, "eoi_token_index": VISION_END},
        token_types=("token_type_ids",),
        **fixed(9),
    ),
    TinyFamily(
        "paligemma",
        squares(12),
        vision={"image_size": 12, "vision_use_head": False},
        others={"projection_dim": 64},
        first_position=1,
        **fixed(9),
    ),
    TinyFamily(
        "ernie4_5_vl_moe",
        grids(3 * 4 * 4),
        text={
            "moe_intermediate_size": [24, 16],
            "moe_k": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
        },
        tokens=lambda picture: picture.tokens // (1 if picture.frames == 1 else 2),
        video="run",
        token_types=("mm_token_type_ids", "moe_mm_token_type_ids"),
    ),
    TinyFamily(
        "qwen3_5",
        QWEN_GRIDS,
        text=LINEAR,
        vision={"depth": 4},
        token_types=("mm_token_type_ids",),
        hides=False,
        video="frames",
    ),
    TinyFamily(
        "qwen3_5_moe",
        QWEN_GRIDS,
        text={**LINEAR, "decoder_sparse_step": 1},
        vision={"depth": 4},
        token_types=("mm_token_type_ids",),
        hides=False,
        video="frames",
    ),
    TinyFamily(
        "kimi_k25",
        grids(3, 4, 4),
        text={
            "num_key_value_heads": 4,
            "head_dim": 8,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        others={"projection_hidden_size": 32},
    ),
    TinyFamily(
        "exaone4_5",
        QWEN_GRIDS,
        text={"sliding_window": 512, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
        vision={**WINDOWED, "num_key_value_heads": 1},
        video="run",
    ),
    TinyFamily("hyperclovax_vision_v2", QWEN_GRIDS, vision=WINDOWED, video="run"),
    TinyFamily(
        "cosmos3_omni", QWEN_GRIDS, text=MROPE, vision=DEEPSTACK, token_types=("mm_token_type_ids",), video="frames"
    ),
    TinyFamily(
        "cohere_compass",
        QWEN_GRIDS,
        text={
            **SLIDING,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
                "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            },
        },
        vision=DEEPSTACK,
        token_types=("mm_token_type_ids",),
        video="frames",
    ),
    TinyFamily(
        "deepseek_vl_hybrid",
        named_squares(12, "pixel_values", "high_res_pixel_values"),
        vision={"image_size": 12},
        others={"high_res_vision_config": SAM},
        attention="eager",
        **fixed(9),
    ),
    TinyFamily(
        "hunyuan_vl",
        grids(3 * 4 * 4),
        text={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2, 2]}},
        vision={
            "num_key_value_heads": 2,
            "text_hidden_size": 64,
            "temporal_patch_size": 1,
            "max_image_size": 32,
            "min_image_size": 8,
        },
        tokens=lambda picture: picture.height * (picture.width + 1) + 2,
        token_types=("mm_token_type_ids",),
    ),
    TinyFamily(
        "granite_docling",
        padded_squares(24, tiles=True),
        vision={"num_hidden_layers": 4, "scale_factor": 2, "deepstack_visual_indexes": [0, 1], "use_fine_route": False},
        **fixed(9),
    ),
    TinyFamily(
        "video_llava",
        with_clips(named_squares(12, "pixel_values_images"), 12),
        vision={"image_size": 12, "projection_dim": 32},
        tokens=lambda picture: 9 if picture.frames == 1 else 10 * picture.frames,
        video="run",
        picture=Picture(1, 9),
    ),
    TinyFamily(
        "fast_vlm",
        squares(24),
        vision={
            "model_type": "resnet",
            "hidden_size": 32,
            "embedding_size": 16,
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
        },
        **fixed(9),
        attention="eager",
    ),
    TinyFamily(
        "perception_lm",
        with_clips(squares(12, 1), 12),
        vision={
            "model_type": "siglip_vision_model",
            "image_size": 12,
            "vision_use_head": False,
            "model_args": {"embed_dim": 32},
        },
        others={
            "vision_use_cls_token": False,
            "vision_start_token_id": VISION_START,
            "vision_end_token_id": VISION_END,
        },
        tokens=lambda picture: 9 * picture.frames,
        video="run",
        picture=Picture(1, 9),
    ),
    TinyFamily(
        "lfm2_vl",
        patch_rows(48, shape="spatial_shapes", mask="pixel_attention_mask"),
        text={
            "num_hidden_layers": 4,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "block_multiple_of": 8,
        },
        vision={"vision_use_head": False},
        hides=False,
        **fixed(9),
    ),
    TinyFamily(
        "gemma4",
        patch_rows(48, positions="image_position_ids"),
        text={
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "per_layer_config": {},
            "use_bidirectional_attention": "vision",
        },
        vision={
            "model_type": "gemma4_vision",
            "image_size": 24,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "pooling_kernel_size": 2,
            "position_embedding_size": 32,
        },
        tokens=lambda picture: 9 * picture.frames,
        token_types=("mm_token_type_ids",),
        video="run",
        picture=Picture(1, 9),
    ),
    TinyFamily(
        "minicpmv4_6",
        patch_strip(4, 6),
        text=LINEAR,
        vision={"num_hidden_layers": 3},
        others={
            "insert_layer_id": VISION_START,
            "downsample_mode": "4x",
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
        },
        tokens=lambda picture: 9 * picture.frames,
        hides=False,
        video="run",
        picture=Picture(1, 9),
    ),
    TinyFamily("qwen2_5_vl", QWEN_GRIDS, text=MROPE, vision=WINDOWED, token_types=("mm_token_type_ids",), video="run"),
    TinyFamily(
        "qwen2_vl",
        QWEN_GRIDS,
        text=MROPE,
        vision={"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
        token_types=("mm_token_type_ids",),
        video="run",
    ),
    TinyFamily(
        "qwen2_5_omni_thinker",
        grids(3 * 2 * 4 * 4, seconds=True),
        text=MROPE,
        vision=WINDOWED,
        others={"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END, "audio_token_id": 9},
        video="run",
    ),
    TinyFamily(
        "qwen3_omni_moe_thinker",
        grids(3 * 2 * 4 * 4, seconds=True),
        text=MROPE,
        vision=DEEPSTACK,
        others={"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END, "audio_end_token_id": 8},
        video="run",
    ),
    TinyFamily(
        "cosmos3_edge",
        grids(3 * 4 * 4),
        text=MROPE,
        vision={"image_size": 24},
        token_types=("mm_token_type_ids",),
        video="frames",
    ),
    TinyFamily(
        "step3p7",
        squares(48),
        text={
            "num_hidden_layers": 4,
            "sliding_window": 512,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "share_expert_dim": 24,
        },
        vision={"image_size": 48, "max_position_embeddings": 144},
        **fixed(9),
    ),
    TinyFamily("muse_glimmer", QWEN_GRIDS, text=SLIDING, vision={"image_size": 24}, others={"out_hidden_size": 128}),
    TinyFamily(
        "lfm3_vl",
        QWEN_GRIDS,
        text={
            "num_hidden_layers": 4,
            "sliding_window": 512,
            "layer_types": ["conv", "full_attention", "conv", "sliding_attention"],
        },
        vision={"image_size": 24, "num_key_value_heads": 1},
        hides=False,
    ),
    TinyFamily(
        "gemma4_unified",
        patch_rows(48, positions="image_position_ids"),
        text={**SLIDING, "per_layer_config": {}},
        vision={
            "pooling_kernel_size": 1,
            "patch_size": 4,
            "mm_embed_dim": 32,
            "output_proj_dims": 32,
            "mm_posemb_size": 16,
        },
        others={"audio_config": None},
        token_types=("mm_token_type_ids",),
        **fixed(36),
    ),
    TinyFamily(
        "minicpm_ocr",
        patch_strip(4, 6),
        text=LINEAR,
        vision={"num_hidden_layers": 3},
        others={"insert_layer_id": VISION_START, "image_token_id": IMAGE, "video_token_id": VIDEO},
        tokens=lambda picture: 9 * picture.frames,
        hides=False,
        picture=Picture(1, 9),
    ),
    TinyFamily(
        "minicpmv4_7",
        patch_strip(4, 6),
        text=LINEAR,
        vision={"num_hidden_layers": 3},
        others={
            "insert_layer_id": VISION_START,
            "downsample_mode": "4x",
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "image_start_id": VISION_START,
            "image_end_id": VISION_END,
            "slice_start_id": 7,
            "slice_end_id": 8,
            "newline_id": 9,
        },
        tokens=lambda picture: 9 * picture.frames,
        token_types=("mm_token_type_ids",),
        hides=False,
        picture=Picture(1, 9),
    ),
)

BY_NAME = {family.model_type: family for family in TINY}


def tiny_config(name: str, text_changes: dict[str, Any] | None = None) -> PretrainedConfig:
    """The default config of a family made small, with another text config where `text_changes` has some."""
    family = BY_NAME[name]
    default = AutoConfig.for_model(name).to_dict()
    exceptions = {
        **family.others,
        "text_config": {**family.text, **(text_changes or {})},
        "vision_config": family.vision,
    }
    arguments = {"tie_word_embeddings": False, **_present(WHERE_PRESENT[""], default), **exceptions}
    for part in {*WHERE_PRESENT, *exceptions}:
        own = exceptions.get(part, {})
        if part.endswith("_config") and own is not None and (own or default.get(part)):
            arguments[part] = _small_part(part, default.get(part) or {}, own)
    return AutoConfig.for_model(name, **copy.deepcopy(arguments))


def _small_part(part: str, default: dict[str, Any], exceptions: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a config inside the config; another `model_type` among the exceptions has other defaults."""
    model_type = exceptions.get("model_type", default.get("model_type"))
    if model_type != default.get("model_type"):
        default = CONFIG_MAPPING[model_type]().to_dict()
    always = TEXT if part == "text_config" else {}
    named = {} if model_type is None else {"model_type": model_type}
    return {**named, **always, **_present(WHERE_PRESENT.get(part, {}), default), **exceptions}


def _present(rules: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in rules.items() if default.get(name) is not None}


def tiny_model(
    name: str, seed: int = 0, attention: str | None = None, text_changes: dict[str, Any] | None = None
) -> nn.Module:
    """The tiny model of a family, with its usual implementation of attention or another, or another text config."""
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    config = tiny_config(name, text_changes)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention or BY_NAME[name].attention)
    model = sharpen(model, seed)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = END_OF_TURN
    return model


def batch(name: str, *rows: list[int | Picture], seed: int = 0) -> dict[str, torch.Tensor]:
    """Left-padded model inputs for rows of token ids and pictures, as the processor of a family makes them."""
    family = BY_NAME[name]
    generator = torch.Generator().manual_seed(seed)
    expanded, marked = [], []
    for row in rows:
        ids: list[int] = []
        types: list[int] = []
        for item in row:
            run, kind = [item], 0
            if isinstance(item, Picture):
                kind = 1 if item.frames == 1 else 2
                token = IMAGE if kind == 1 else family.video_token
                run = [token] * family.tokens(item)
                pieces = item.frames if family.video == "frames" else 1
                size = len(run) // pieces
                run = [t for _ in range(pieces) for t in (VISION_START, *run[:size], VISION_END)]
            ids += run
            types += [kind * (token_id in (IMAGE, VIDEO)) for token_id in run]
        expanded.append(ids)
        marked.append(types)
    longest = max(map(len, expanded))
    input_ids = torch.full((len(rows), longest), PAD)
    attention_mask, kinds = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
    for row, ids in enumerate(expanded):
        input_ids[row, longest - len(ids) :] = torch.tensor(ids)
        kinds[row, longest - len(ids) :] = torch.tensor(marked[row])
        attention_mask[row, longest - len(ids) :] = 1
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    for name_of_types in family.token_types:
        inputs[name_of_types] = kinds.int()
    pictures = [[item for item in row if isinstance(item, Picture)] for row in rows]
    if flat(pictures):
        inputs |= family.pixels(pictures, generator)
    return inputs
