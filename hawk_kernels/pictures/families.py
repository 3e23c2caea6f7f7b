"""Records as data how the visual tokens of each family lie on the caller's pictures."""

from __future__ import annotations

from dataclasses import dataclass

from hawk_kernels.pictures.layouts import (
    Layout,
    OneSquare,
    SquareFrames,
    Tiled,
    ToldShape,
    any_resolution,
    bordered_grid,
    padded_grid,
    resampled,
    split_tiles,
    told_grid,
    told_pixels,
    told_positions,
)
from hawk_kernels.pictures.sheets import (
    centre_square,
    closest_ratio,
    cornered_canvas,
    covering,
    crops_canvas,
    largest_fit,
    least_upscaling,
    letterboxed,
    nearest_shape,
    one_line,
    stretched,
)


@dataclass(frozen=True)
class Geometry:
    """How the entries that an encoder returns become pictures.

    Attributes:
        layout: the sheets of a picture.
        groups: which entries make up a picture. "each": every entry is one. "first": the token in front of the first
            entry of the row stands in front of every picture. "last": the token in front of the last entry of the row
            stands in front of the last entry of every picture. "after": the token after the last entry of the row
            follows every picture. "stack": as many as the second size of the pixels. "one": only the number of
            pictures can tell; either each entry is one, or all together are.
        texts: whether one entry may hold several tiles with text between them.
    """

    layout: Layout
    groups: str = "each"
    texts: bool = False


_GRID = Geometry(told_grid)
_INTERNVL = Geometry(Tiled("last", closest_ratio), "first")
_IDEFICS = Geometry(Tiled("last", nearest_shape, marked=True), "last", texts=True)
_MINICPM = Geometry(
    Tiled("first", nearest_shape, marked=True, grid=ToldShape(("target_sizes", "target_sizes_videos"))), "first"
)
_PIXTRAL = Geometry(told_pixels)
_GEMMA4 = Geometry(told_positions)
_ANY_RESOLUTION = Geometry(any_resolution)
_CROPPED = Geometry(OneSquare(centre_square))
_LETTERBOXED = Geometry(OneSquare(letterboxed))

GEOMETRIES: dict[str, dict[str, Geometry]] = {
    "aria": {"image": Geometry(resampled, "one")},
    "aya_vision": {"image": Geometry(Tiled("last", closest_ratio), "last")},
    "cohere2_vision": {"image": Geometry(Tiled("last", least_upscaling), "first")},
    "cohere_compass": {"image": _GRID, "video": _GRID},
    "cosmos3_edge": {"image": _GRID, "video": _GRID},
    "cosmos3_omni": {"image": _GRID, "video": _GRID},
    "deepseek_vl": {"image": _LETTERBOXED},
    "deepseek_vl_hybrid": {"image": _LETTERBOXED},
    "ernie4_5_vl_moe": {"image": _GRID, "video": _GRID},
    "exaone4_5": {"image": _GRID, "video": _GRID},
    "fast_vlm": {"image": _CROPPED},
    "gemma3": {"image": Geometry(Tiled("first", one_line, canvas=crops_canvas), "one")},
    "gemma4": {"image": _GEMMA4, "video": _GEMMA4},
    "gemma4_unified": {"image": _GEMMA4, "video": _GEMMA4},
    "glm46v": {"image": _GRID, "video": _GRID},
    "glm4v": {"image": _GRID, "video": _GRID},
    "glm4v_moe": {"image": _GRID, "video": _GRID},
    "glm_ocr": {"image": _GRID, "video": _GRID},
    "got_ocr2": {"image": _INTERNVL},
    "granite_docling": {"image": Geometry(Tiled("last", closest_ratio, marked=True), "first", texts=True)},
    "hunyuan_vl": {"image": Geometry(bordered_grid)},
    "hyperclovax_vision_v2": {"image": _GRID, "video": _GRID},
    "idefics2": {"image": Geometry(resampled, "one", texts=True)},
    "idefics3": {"image": _IDEFICS},
    "internvl": {"image": _INTERNVL, "video": _INTERNVL},
    "janus": {"image": _LETTERBOXED},
    "kimi_k25": {"image": Geometry(padded_grid), "video": Geometry(padded_grid)},
    "lfm2_vl": {
        "image": Geometry(
            Tiled("last", closest_ratio, grid=ToldShape(("spatial_shapes", "spatial_shapes")), keeps_shape=True),
            "after",
        )
    },
    "lfm3_vl": {"image": _GRID},
    "lighton_ocr": {"image": _PIXTRAL},
    "llama4": {"image": Geometry(Tiled("last", least_upscaling, marked=True, canvas=cornered_canvas), "last")},
    "llava": {"image": _CROPPED},
    "llava_next": {"image": _ANY_RESOLUTION},
    "llava_next_video": {"image": _ANY_RESOLUTION, "video": Geometry(SquareFrames(centre_square))},
    "llava_onevision": {"image": _ANY_RESOLUTION, "video": Geometry(SquareFrames(stretched, trailing=1))},
    "minicpm_ocr": {"image": _MINICPM, "video": _MINICPM},
    "minicpmv4_6": {"image": _MINICPM, "video": _MINICPM},
    "minicpmv4_7": {"image": _MINICPM, "video": _MINICPM},
    "mistral3": {"image": _PIXTRAL},
    "muse_glimmer": {"image": _GRID},
    "ovis2": {"image": Geometry(Tiled("first", covering, marked=True), "first")},
    "paddleocr_vl": {"image": _GRID},
    "paligemma": {"image": Geometry(OneSquare(stretched))},
    "perception_lm": {
        "image": Geometry(Tiled("first", largest_fit), "stack"),
        "video": Geometry(SquareFrames(stretched), "stack"),
    },
    "qianfan_ocr": {"image": _INTERNVL},
    "qwen2_5_omni_thinker": {"image": _GRID, "video": _GRID},
    "qwen2_5_vl": {"image": _GRID, "video": _GRID},
    "qwen2_vl": {"image": _GRID, "video": _GRID},
    "qwen3_5": {"image": _GRID, "video": _GRID},
    "qwen3_5_moe": {"image": _GRID, "video": _GRID},
    "qwen3_omni_moe_thinker": {"image": _GRID, "video": _GRID},
    "qwen3_vl": {"image": _GRID, "video": _GRID},
    "qwen3_vl_moe": {"image": _GRID, "video": _GRID},
    "smolvlm": {"image": _IDEFICS, "video": _IDEFICS},
    "step3p7": {"image": Geometry(split_tiles(Tiled("last", nearest_shape, marked=True)))},
    "video_llama_3": {"image": _GRID, "video": _GRID},
    "video_llava": {"image": _CROPPED, "video": Geometry(SquareFrames(centre_square), "stack")},
    "vipllava": {"image": _CROPPED},
}
"""By `model_type` of the family, and by kind."""
