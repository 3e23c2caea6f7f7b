"""How the vision encoder of each family is laid out, where its attention can be read, as data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hawk_kernels.hf.encoders.base import VisionEncoder
from hawk_kernels.hf.encoders.layouts import any_resolution, pooled_frames
from hawk_kernels.hf.encoders.packed import PackedEncoder
from hawk_kernels.hf.encoders.tiles import TileEncoder

_IN_VISION_MODEL = partial(TileEncoder, tower="vision_model")

ENCODERS: dict[str, Callable[[Any], VisionEncoder]] = {
    "aya_vision": TileEncoder,
    "cohere2_vision": TileEncoder,
    "cohere_compass": PackedEncoder,
    "cosmos3_omni": PackedEncoder,
    "deepseek_vl": _IN_VISION_MODEL,
    "exaone4_5": PackedEncoder,
    "gemma3": TileEncoder,
    "glm46v": PackedEncoder,
    "glm4v": PackedEncoder,
    "glm4v_moe": PackedEncoder,
    "glm_ocr": PackedEncoder,
    "granite_docling": _IN_VISION_MODEL,
    "hyperclovax_vision_v2": partial(PackedEncoder, tower="vision_model"),
    "idefics3": _IN_VISION_MODEL,
    "internvl": TileEncoder,
    "janus": _IN_VISION_MODEL,
    "llava": TileEncoder,
    "llava_next": partial(TileEncoder, images=any_resolution),
    "llava_next_video": partial(TileEncoder, images=any_resolution),
    "llava_onevision": partial(TileEncoder, images=any_resolution, videos=pooled_frames),
    "ovis2": TileEncoder,
    "paligemma": TileEncoder,
    "qianfan_ocr": TileEncoder,
    "qwen2_5_vl": PackedEncoder,
    "qwen2_vl": PackedEncoder,
    "qwen3_5": PackedEncoder,
    "qwen3_5_moe": PackedEncoder,
    "qwen3_vl": PackedEncoder,
    "qwen3_vl_moe": PackedEncoder,
    "smolvlm": _IN_VISION_MODEL,
    "vipllava": TileEncoder,
}
"""By `model_type` of the family: from the multimodal model to its encoder."""
