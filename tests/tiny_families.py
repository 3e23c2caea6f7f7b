"""One tiny model with random weights for each supported family, and batches of prompts for it.

A table: each entry says how the config is made small, what its processor would hand over for a picture, and how many
placeholders stand for one. Everything else is the same for all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

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

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 4, 2, 16, 3


@dataclass(frozen=True)
class TinyFamily:
    """How one family is made small.

    Attributes:
        model_type: the family.
        config: keyword arguments of its config.
        pixels: the images of a batch, row by row, as the model's own arguments.
        tokens: placeholders of one picture.
        token_types: arguments that mark visual tokens with 1 (videos with 2).
        hides: whether masking a token out hides it; a linear-attention or convolution layer sees it all the same.
        video: how a video stands in a prompt: "" (not at all), "run" of placeholders, or "frames" set apart by text.
        video_token: the placeholder of a video.
        first_position: position id of the first token.
        attention: the implementation of attention.
        picture: the size that fixed-size families always take.
    """

    model_type: str
    config: dict[str, Any]
    pixels: Pixels
    tokens: Callable[[Picture], int] = lambda picture: picture.tokens
    token_types: tuple[str, ...] = ()
    hides: bool = True
    video: str = ""
    video_token: int = VIDEO
    first_position: int = 0
    attention: str = "sdpa"
    picture: Picture | None = None


def text(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 4096,
        "bos_token_id": BEGIN,
        "eos_token_id": END_OF_TURN,
        "pad_token_id": PAD,
        **changes,
    }


def vision(model_type: str, image_size: int, patch_size: int, **changes: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": patch_size,
        **changes,
    }


def fixed(count: int) -> dict[str, Any]:
    return {"tokens": lambda picture: count, "picture": Picture(1, count)}


CLIP = vision("clip_vision_model", 12, 4, projection_dim=32)
SIGLIP = vision("siglip_vision_model", 24, 4)
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
HALF_MROPE = {**MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
IMAGE_INDEX = {"image_token_index": IMAGE}
IMAGE_ID = {"image_token_id": IMAGE}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
GLM_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": VISION_START,
    "image_end_token_id": VISION_END,
    "video_start_token_id": 7,
    "video_end_token_id": 8,
}
QWEN3_VISION = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": HIDDEN,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1, 2],
}
GLM_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "image_size": 24,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": HIDDEN,
}
WINDOWED_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "window_size": 16,
    "out_hidden_size": HIDDEN,
    "fullatt_block_indexes": [1],
}
AUDIO = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "num_mel_bins": 8,
    "output_dim": HIDDEN,
    "n_window": 4,
}
AUDIO_IDS = {"audio_token_id": 9, "audio_start_token_id": 7, "audio_end_token_id": 8}
COHERE = text(
    model_type="cohere2",
    num_hidden_layers=4,
    sliding_window=512,
    layer_types=["sliding_attention", "full_attention"] * 2,
)
QWEN3_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
LINEAR = {
    "num_hidden_layers": 4,
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {**MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25},
}
QWEN_GRIDS = grids(3 * 2 * 4 * 4)

TINY = (
    TinyFamily("llava", {"vision_config": CLIP, "text_config": text(), **IMAGE_INDEX}, squares(12), **fixed(9)),
    TinyFamily(
        "vipllava",
        {"vision_config": CLIP, "text_config": text(), "vision_feature_layers": [-1, -2], **IMAGE_INDEX},
        squares(12),
        **fixed(9),
    ),
    TinyFamily(
        "llava_next",
        {
            "vision_config": vision("clip_vision_model", 16, 8, projection_dim=32),
            "text_config": text(),
            "image_grid_pinpoints": [[16, 32]],
            **IMAGE_INDEX,
        },
        squares(16, 3, image_sizes=lambda count: torch.tensor([[16, 32]] * count)),
        **fixed(14),
    ),
    TinyFamily(
        "llava_next_video",
        {
            "vision_config": vision("clip_vision_model", 16, 8, projection_dim=32),
            "text_config": text(),
            "image_grid_pinpoints": [[16, 32]],
            "video_token_index": VIDEO,
            **IMAGE_INDEX,
        },
        with_clips(squares(16, 3, image_sizes=lambda count: torch.tensor([[16, 32]] * count)), 16),
        tokens=lambda picture: 14 if picture.frames == 1 else picture.frames,
        video="run",
        picture=Picture(1, 14),
    ),
    TinyFamily(
        "llava_onevision",
        {
            "vision_config": vision("siglip_vision_model", 16, 8, vision_use_head=False),
            "text_config": text(model_type="qwen2"),
            "image_grid_pinpoints": [[16, 32]],
            "video_token_index": VIDEO,
            **IMAGE_INDEX,
        },
        with_clips(squares(16, 3, image_sizes=lambda count: torch.tensor([[16, 32]] * count)), 16),
        tokens=lambda picture: 14 if picture.frames == 1 else picture.frames + 1,
        video="run",
        picture=Picture(1, 14),
    ),
    TinyFamily(
        "internvl",
        {
            "vision_config": vision("internvl_vision", [24, 24], [4, 4]),
            "text_config": text(model_type="qwen2"),
            **IMAGE_ID,
        },
        squares(24),
        **fixed(9),
    ),
    TinyFamily(
        "qianfan_ocr",
        {
            "vision_config": vision("qianfan_ocr_vision", [24, 24], [4, 4]),
            "text_config": text(model_type="qwen3"),
            **IMAGE_ID,
        },
        squares(24),
        **fixed(9),
    ),
    TinyFamily(
        "idefics3",
        {"vision_config": vision("idefics3_vision", 24, 4), "text_config": text(), "scale_factor": 2, **IMAGE_ID},
        padded_squares(24),
        **fixed(9),
    ),
    TinyFamily(
        "idefics2",
        {
            "vision_config": vision("idefics2_vision", 24, 4),
            "perceiver_config": {
                "hidden_size": HIDDEN,
                "resampler_n_latents": 9,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 16,
                "num_key_value_heads": 2,
            },
            "text_config": text(model_type="mistral"),
            **IMAGE_ID,
        },
        padded_squares(24),
        **fixed(9),
    ),
    TinyFamily(
        "smolvlm",
        {"vision_config": vision("smolvlm_vision", 24, 4), "text_config": text(), "scale_factor": 2, **IMAGE_ID},
        padded_squares(24),
        **fixed(9),
    ),
    TinyFamily(
        "mistral3",
        {
            "vision_config": vision("pixtral", 24, 4, head_dim=16),
            "text_config": text(model_type="mistral"),
            **IMAGE_INDEX,
        },
        squares(24, image_sizes=lambda count: torch.tensor([[24, 24]] * count)),
        **fixed(9),
    ),
    TinyFamily(
        "lighton_ocr",
        {"vision_config": vision("pixtral", 24, 4, head_dim=16), "text_config": text(model_type="qwen3"), **IMAGE_ID},
        squares(24, image_sizes=lambda count: torch.tensor([[24, 24]] * count)),
        **fixed(9),
    ),
    TinyFamily("aya_vision", {"vision_config": SIGLIP, "text_config": COHERE, **IMAGE_INDEX}, squares(24), **fixed(9)),
    TinyFamily(
        "cohere2_vision",
        {"vision_config": SIGLIP, "text_config": COHERE, "alignment_intermediate_size": 64, **IMAGE_ID},
        squares(24),
        **fixed(9),
    ),
    TinyFamily(
        "ovis2",
        {
            "vision_config": {**vision("ovis2_vision", 12, 4), "vocab_size": 40, "num_visual_indicator_tokens": 5},
            "text_config": text(model_type="qwen2"),
            "visual_indicator_token_ids": [111, 112, 113, 114, 115],
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            **IMAGE_ID,
        },
        squares(12),
        **fixed(9),
    ),
    TinyFamily(
        "got_ocr2",
        {
            "vision_config": {
                "hidden_size": 32,
                "output_channels": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 48,
                "patch_size": 4,
                "window_size": 4,
                "global_attn_indexes": [1],
                "mlp_dim": 48,
            },
            "text_config": text(model_type="qwen2"),
            **IMAGE_INDEX,
        },
        squares(48),
        attention="eager",
        **fixed(9),
    ),
    TinyFamily(
        "janus",
        {
            "vision_config": vision("janus_vision_model", 12, 4, projection_dim=HIDDEN, num_image_tokens=9),
            "vq_config": {
                "embed_dim": 8,
                "num_embeddings": 32,
                "latent_channels": 8,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "num_patches": 3,
                "projection_dim": HIDDEN,
                "image_token_embed_dim": HIDDEN,
            },
            "text_config": text(),
            **IMAGE_ID,
        },
        squares(12),
        **fixed(9),
    ),
    TinyFamily(
        "deepseek_vl",
        {"vision_config": vision("siglip_vision_model", 12, 4), "text_config": text(), **IMAGE_ID},
        squares(12),
        **fixed(9),
    ),
    TinyFamily(
        "aria",
        {
            "vision_config": vision("idefics3_vision", 24, 4),
            "text_config": text(model_type="aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
            "projector_patch_to_query_dict": {36: 9},
            **IMAGE_INDEX,
        },
        squares(24, pixel_mask=lambda count: torch.ones(count, 24, 24).bool()),
        **fixed(9),
    ),
    TinyFamily(
        "llama4",
        {
            "vision_config": {
                **vision("llama4_vision_model", 24, 4),
                "intermediate_size": 128,
                "vision_output_dim": 48,
                "projector_input_dim": 48,
                "projector_output_dim": 48,
            },
            "text_config": text(
                model_type="llama4_text",
                num_hidden_layers=4,
                intermediate_size_mlp=48,
                num_local_experts=2,
                attention_chunk_size=512,
                pad_token_id=PAD,
            ),
            **IMAGE_INDEX,
        },
        squares(24),
        **fixed(9),
    ),
    TinyFamily(
        "video_llama_3",
        {
            "vision_config": vision("video_llama_3_vision", 24, 4),
            "text_config": text(model_type="qwen2"),
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
        },
        grids(3 * 4 * 4, sizes=True),
        video="run",
    ),
    TinyFamily(
        "paddleocr_vl",
        {
            "vision_config": vision("paddleocr_vl_vision", 24, 4),
            "text_config": text(model_type="paddleocr_vl_text", rope_parameters=MROPE),
            **QWEN_IDS,
        },
        grids(3, 4, 4),
        token_types=("mm_token_type_ids",),
    ),
    *(
        TinyFamily(
            kind,
            {
                "vision_config": GLM_VISION,
                "text_config": text(model_type=text_type, rope_parameters=HALF_MROPE, **more),
                **GLM_IDS,
            },
            QWEN_GRIDS,
            token_types=("mm_token_type_ids",),
            video="frames",
            video_token=IMAGE,
        )
        for kind, text_type, more in (
            ("glm4v", "glm4v_text", {}),
            ("glm46v", "glm4v_text", {}),
            (
                "glm4v_moe",
                "glm4v_moe_text",
                {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
            ),
        )
    ),
    TinyFamily(
        "glm_ocr",
        {"vision_config": GLM_VISION, "text_config": text(model_type="glm_ocr_text", rope_parameters=MROPE), **GLM_IDS},
        QWEN_GRIDS,
        token_types=("mm_token_type_ids",),
        video="frames",
        video_token=IMAGE,
    ),
    TinyFamily(
        "qwen3_vl",
        {
            "vision_config": QWEN3_VISION,
            "text_config": text(model_type="qwen3_vl_text", rope_parameters=MROPE),
            **QWEN_IDS,
        },
        QWEN_GRIDS,
        token_types=("mm_token_type_ids",),
        video="frames",
    ),
    TinyFamily(
        "qwen3_vl_moe",
        {
            "vision_config": QWEN3_VISION,
            "text_config": text(model_type="qwen3_vl_moe_text", rope_parameters=MROPE, **QWEN3_MOE),
            **QWEN_IDS,
        },
        QWEN_GRIDS,
        token_types=("mm_token_type_ids",),
        video="frames",
    ),
    TinyFamily(
        "gemma3",
        {
            "vision_config": SIGLIP,
            "text_config": text(
                model_type="gemma3_text",
                num_hidden_layers=4,
                sliding_window=512,
                layer_types=["sliding_attention", "full_attention"] * 2,
                query_pre_attn_scalar=16,
            ),
            "mm_tokens_per_image": 9,
            "boi_token_index": VISION_START,
            "eoi_token_index": VISION_END,
            **IMAGE_INDEX,
        },
        squares(24),
        token_types=("token_type_ids",),
        **fixed(9),
    ),
    TinyFamily(
        "paligemma",
        {
            "vision_config": vision("siglip_vision_model", 12, 4, vision_use_head=False),
            "text_config": text(model_type="gemma"),
            "projection_dim": HIDDEN,
            **IMAGE_INDEX,
        },
        squares(12),
        first_position=1,
        **fixed(9),
    ),
    TinyFamily(
        "ernie4_5_vl_moe",
        {
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "num_heads": 2,
                "patch_size": 4,
                "intermediate_size": 48,
                "spatial_merge_size": 2,
                "temporal_merge_size": 2,
            },
            "text_config": text(
                model_type="ernie4_5_vl_moe_text",
                moe_intermediate_size=[24, 16],
                moe_k=2,
                moe_num_experts=4,
                moe_num_shared_experts=1,
                rope_parameters={**MROPE, "mrope_section": [3, 3, 2]},
            ),
            **GLM_IDS,
        },
        grids(3 * 4 * 4),
        tokens=lambda picture: picture.tokens // (1 if picture.frames == 1 else 2),
        video="run",
        token_types=("mm_token_type_ids", "moe_mm_token_type_ids"),
    ),
    TinyFamily(
        "qwen3_5",
        {
            "vision_config": {k: v for k, v in QWEN3_VISION.items() if k != "deepstack_visual_indexes"},
            "text_config": text(model_type="qwen3_5_text", **LINEAR),
            **QWEN_IDS,
        },
        QWEN_GRIDS,
        token_types=("mm_token_type_ids",),
        hides=False,
        video="frames",
    ),
    TinyFamily(
        "qwen3_5_moe",
        {
            "vision_config": {k: v for k, v in QWEN3_VISION.items() if k != "deepstack_visual_indexes"},
            "text_config": text(
                model_type="qwen3_5_moe_text", shared_expert_intermediate_size=24, **QWEN3_MOE, **LINEAR
            ),
            **QWEN_IDS,
        },
        QWEN_GRIDS,
        token_types=("mm_token_type_ids",),
        hides=False,
        video="frames",
    ),
    TinyFamily(
        "kimi_k25",
        {
            "vision_config": {
                **vision("kimi_k25_vision", 24, 4),
                "pos_emb_height": 8,
                "pos_emb_width": 8,
                "merge_kernel_size": [2, 2],
            },
            "text_config": {
                **text(model_type="deepseek_v3", num_key_value_heads=HEADS, head_dim=8),
                "kv_lora_rank": 16,
                "q_lora_rank": 24,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 8,
                "v_head_dim": 16,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "moe_intermediate_size": 24,
                "first_k_dense_replace": 1,
            },
            "projection_hidden_size": 32,
            **QWEN_IDS,
        },
        grids(3, 4, 4),
    ),
    TinyFamily(
        "exaone4_5",
        {
            "vision_config": {**WINDOWED_VISION, "num_key_value_heads": 1},
            "text_config": text(
                model_type="exaone4",
                sliding_window=512,
                layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            ),
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
        },
        QWEN_GRIDS,
        video="run",
    ),
    TinyFamily(
        "hyperclovax_vision_v2",
        {
            "vision_config": {"model_type": "qwen2_5_vl_vision", **WINDOWED_VISION},
            "text_config": text(model_type="hyperclovax"),
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
        },
        QWEN_GRIDS,
        video="run",
    ),
    TinyFamily(
        "cosmos3_omni",
        {
            "vision_config": {"model_type": "qwen3_vl_vision", **QWEN3_VISION},
            "text_config": text(model_type="qwen3_vl_text", rope_parameters=MROPE),
            **QWEN_IDS,
        },
        QWEN_GRIDS,
        token_types=("mm_token_type_ids",),
        video="frames",
    ),
    TinyFamily(
        "cohere_compass",
        {
            "vision_config": QWEN3_VISION,
            "text_config": {
                **COHERE,
                "model_type": "cohere_compass_text",
                "rope_parameters": {"sliding_attention": MROPE, "full_attention": MROPE},
            },
            **QWEN_IDS,
        },
        QWEN_GRIDS,
        token_types=("mm_token_type_ids",),
        video="frames",
    ),
    TinyFamily(
        "deepseek_vl_hybrid",
        {
            "vision_config": vision("siglip_vision_model", 12, 4),
            "high_res_vision_config": {
                "hidden_size": 32,
                "output_channels": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 48,
                "patch_size": 4,
                "window_size": 4,
                "global_attn_indexes": [1],
                "mlp_dim": 48,
            },
            "text_config": text(),
            **IMAGE_ID,
        },
        named_squares(12, "pixel_values", "high_res_pixel_values"),
        attention="eager",
        **fixed(9),
    ),
    TinyFamily(
        "hunyuan_vl",
        {
            "vision_config": vision(
                "hunyuan_vl_vision",
                24,
                4,
                num_key_value_heads=2,
                out_hidden_size=HIDDEN,
                text_hidden_size=HIDDEN,
                spatial_merge_size=2,
                max_image_size=32,
                min_image_size=8,
            ),
            "text_config": text(
                model_type="hunyuan_vl_text",
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2, 2]},
            ),
            **IMAGE_ID,
        },
        grids(3 * 4 * 4),
        tokens=lambda picture: picture.height * (picture.width + 1) + 2,
        token_types=("mm_token_type_ids",),
    ),
    TinyFamily(
        "granite_docling",
        {
            "vision_config": vision(
                "granite_docling_vision",
                24,
                4,
                out_hidden_size=HIDDEN,
                scale_factor=2,
                num_hidden_layers=4,
                deepstack_visual_indexes=[0, 1],
                use_fine_route=False,
            ),
            "text_config": text(model_type="granite_docling_text"),
            **IMAGE_ID,
        },
        padded_squares(24, tiles=True),
        **fixed(9),
    ),
    TinyFamily(
        "video_llava",
        {"vision_config": CLIP, "text_config": text(), "video_token_index": VIDEO, **IMAGE_INDEX},
        with_clips(named_squares(12, "pixel_values_images"), 12),
        tokens=lambda picture: 9 if picture.frames == 1 else 10 * picture.frames,
        video="run",
        picture=Picture(1, 9),
    ),
    TinyFamily(
        "fast_vlm",
        {
            "vision_config": {
                "model_type": "resnet",
                "embedding_size": 16,
                "hidden_sizes": [16, 32],
                "depths": [1, 1],
                "hidden_size": 32,
            },
            "text_config": text(model_type="qwen2"),
            **IMAGE_INDEX,
        },
        squares(24),
        **fixed(9),
        attention="eager",
    ),
    TinyFamily(
        "perception_lm",
        {
            "vision_config": {
                **vision("siglip_vision_model", 12, 4, vision_use_head=False),
                "model_args": {"embed_dim": 32},
            },
            "text_config": text(),
            "vision_use_cls_token": False,
            **QWEN_IDS,
        },
        with_clips(squares(12, 1), 12),
        tokens=lambda picture: 9 * picture.frames,
        video="run",
        picture=Picture(1, 9),
    ),
    TinyFamily(
        "lfm2_vl",
        {
            "vision_config": {**vision("siglip2_vision_model", 24, 4, vision_use_head=False), "num_patches": 36},
            "text_config": text(
                model_type="lfm2", num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2, block_multiple_of=8
            ),
            "projector_hidden_size": 48,
            **IMAGE_ID,
        },
        patch_rows(48, shape="spatial_shapes", mask="pixel_attention_mask"),
        hides=False,
        **fixed(9),
    ),
    TinyFamily(
        "gemma4",
        {
            "vision_config": {
                **vision("gemma4_vision", 24, 4),
                "num_key_value_heads": 2,
                "head_dim": 16,
                "pooling_kernel_size": 2,
                "position_embedding_size": 32,
            },
            "text_config": text(
                model_type="gemma4_text",
                num_hidden_layers=4,
                sliding_window=512,
                layer_types=["sliding_attention", "full_attention"] * 2,
                per_layer_config={},
                hidden_size_per_layer_input=8,
                vocab_size_per_layer_input=VOCABULARY,
                use_bidirectional_attention="vision",
            ),
            "audio_config": None,
            "audio_token_id": 9,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "boi_token_id": VISION_START,
            "eoi_token_id": VISION_END,
        },
        patch_rows(48, positions="image_position_ids"),
        tokens=lambda picture: 9 * picture.frames,
        token_types=("mm_token_type_ids",),
        video="run",
        picture=Picture(1, 9),
    ),
    TinyFamily(
        "minicpmv4_6",
        {
            "vision_config": {**vision("minicpmv4_6_vision", 24, 4), "num_hidden_layers": 3, "insert_layer_id": 1},
            "text_config": text(model_type="qwen3_5_text", **LINEAR),
            "insert_layer_id": 1,
            "patch_size": 4,
            "downsample_mode": "4x",
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
        },
        patch_strip(4, 6),
        tokens=lambda picture: 9 * picture.frames,
        hides=False,
        video="run",
        picture=Picture(1, 9),
    ),
    TinyFamily(
        "qwen2_5_vl",
        {
            "vision_config": WINDOWED_VISION,
            "text_config": text(model_type="qwen2_5_vl_text", rope_parameters=MROPE),
            **QWEN_IDS,
        },
        QWEN_GRIDS,
        token_types=("mm_token_type_ids",),
        video="run",
    ),
    TinyFamily(
        "qwen2_vl",
        {
            "vision_config": {
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": HIDDEN,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 4,
            },
            "text_config": text(model_type="qwen2_vl_text", rope_parameters=MROPE),
            **QWEN_IDS,
        },
        QWEN_GRIDS,
        token_types=("mm_token_type_ids",),
        video="run",
    ),
    TinyFamily(
        "qwen2_5_omni_thinker",
        {
            "vision_config": WINDOWED_VISION,
            "audio_config": AUDIO,
            "text_config": text(model_type="qwen2_5_omni_text", rope_parameters=MROPE),
            **QWEN_IDS,
            **AUDIO_IDS,
        },
        grids(3 * 2 * 4 * 4, seconds=True),
        video="run",
    ),
    TinyFamily(
        "qwen3_omni_moe_thinker",
        {
            "vision_config": QWEN3_VISION,
            "audio_config": {**AUDIO, "downsample_hidden_size": 8},
            "text_config": text(model_type="qwen3_omni_moe_text", rope_parameters=MROPE, **QWEN3_MOE),
            **QWEN_IDS,
            **AUDIO_IDS,
        },
        grids(3 * 2 * 4 * 4, seconds=True),
        video="run",
    ),
    TinyFamily(
        "cosmos3_edge",
        {
            "vision_config": {**vision("cosmos3_edge_vision", 24, 4), "num_patches": 36},
            "text_config": text(model_type="cosmos3_edge_text", rope_parameters=MROPE),
            "projector_hidden_size": 48,
            **QWEN_IDS,
        },
        grids(3 * 4 * 4),
        token_types=("mm_token_type_ids",),
        video="frames",
    ),
    TinyFamily(
        "step3p7",
        {
            "vision_config": {**vision("step3p5_vision", 48, 4), "max_position_embeddings": 144},
            "text_config": text(
                model_type="step3p5",
                num_hidden_layers=4,
                sliding_window=512,
                num_sliding_attention_heads=4,
                layer_types=["full_attention", "sliding_attention"] * 2,
                moe_intermediate_size=24,
                n_routed_experts=4,
                num_local_experts=4,
                num_experts_per_tok=2,
                share_expert_dim=24,
            ),
            **IMAGE_ID,
        },
        squares(48),
        **fixed(9),
    ),
    TinyFamily(
        "muse_glimmer",
        {
            "vision_config": {
                **vision("muse_glimmer_vision", 24, 4),
                "pos_emb_height": 8,
                "pos_emb_width": 8,
                "patch_temporal": 2,
                "merge_size": 2,
            },
            "text_config": text(
                model_type="muse_glimmer_text",
                num_hidden_layers=4,
                sliding_window=512,
                layer_types=["sliding_attention", "full_attention"] * 2,
            ),
            "out_hidden_size": 128,
            "projector_hidden_size": 48,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
        },
        QWEN_GRIDS,
    ),
    TinyFamily(
        "lfm3_vl",
        {
            "vision_config": {
                **vision("lfm3_vl_vision", 24, 4),
                "num_key_value_heads": 1,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
            "text_config": text(
                model_type="lfm3",
                num_hidden_layers=4,
                sliding_window=512,
                layer_types=["conv", "full_attention", "conv", "sliding_attention"],
            ),
            "projector_hidden_size": 48,
            **QWEN_IDS,
        },
        QWEN_GRIDS,
        hides=False,
    ),
    TinyFamily(
        "gemma4_unified",
        {
            "vision_config": {
                "patch_size": 4,
                "pooling_kernel_size": 1,
                "mm_embed_dim": 32,
                "output_proj_dims": 32,
                "mm_posemb_size": 16,
            },
            "text_config": text(
                model_type="gemma4_unified_text",
                num_hidden_layers=4,
                sliding_window=512,
                layer_types=["sliding_attention", "full_attention"] * 2,
                per_layer_config={},
            ),
            "audio_config": None,
            "audio_token_id": 9,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "boi_token_id": VISION_START,
            "eoi_token_id": VISION_END,
        },
        patch_rows(48, positions="image_position_ids"),
        token_types=("mm_token_type_ids",),
        **fixed(36),
    ),
    *(
        TinyFamily(
            name,
            {
                "vision_config": {**vision(f"{name}_vision", 24, 4), "num_hidden_layers": 3, "insert_layer_id": 1},
                "text_config": text(model_type="qwen3_5_text", **LINEAR),
                "insert_layer_id": 1,
                "patch_size": 4,
                "downsample_mode": "4x",
                "image_token_id": IMAGE,
                "video_token_id": VIDEO,
                **ids,
            },
            patch_strip(4, 6),
            tokens=lambda picture: 9 * picture.frames,
            token_types=("mm_token_type_ids",) if ids else (),
            hides=False,
            picture=Picture(1, 9),
        )
        for name, ids in (
            ("minicpm_ocr", {}),
            (
                "minicpmv4_7",
                {
                    "image_start_id": VISION_START,
                    "image_end_id": VISION_END,
                    "slice_start_id": 7,
                    "slice_end_id": 8,
                    "newline_id": 9,
                },
            ),
        )
    ),
)

BY_NAME = {family.model_type: family for family in TINY}


def tiny_model(
    name: str, seed: int = 0, attention: str | None = None, text_changes: dict[str, Any] | None = None
) -> nn.Module:
    """The tiny model of a family, with its usual implementation of attention or another, or another text config."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText

    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    family = BY_NAME[name]
    arguments = copy.deepcopy({"tie_word_embeddings": False, **family.config})
    arguments["text_config"] = {**arguments["text_config"], **(text_changes or {})}
    config = AutoConfig.for_model(name, **arguments)
    torch.manual_seed(seed)
    model = sharpen(
        AutoModelForImageTextToText.from_config(config, attn_implementation=attention or family.attention), seed
    )
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
