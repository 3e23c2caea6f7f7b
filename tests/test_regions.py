"""Where visual tokens stand on a picture: one spot is painted, and the tokens that change must lie on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from hawk_kernels import prune
from tests.picture_oracles import (
    BREAK,
    FAKE,
    FIRST_TILE,
    GLOBAL,
    NEWLINE,
    NEXT_COLUMN,
    NEXT_ROW,
    blank,
    changed_tokens,
    painted,
)
from tests.tiny_families import BY_NAME, batch, tiny_model
from tests.tiny_models import BEGIN, END_OF_TURN, IMAGE, VIDEO, VISION_END, VISION_START, Picture, words

Ids = list[int]
Grid = tuple[int, int]


def one_run(grid: Grid, tokens: list[int]) -> Ids:
    return [VISION_START, *[IMAGE] * sum(tokens), VISION_END]


def a_run_a_tile(grid: Grid, tokens: list[int]) -> Ids:
    """Gemma 3: each crop is an image of its own."""
    return [i for count in tokens for i in (VISION_START, *[IMAGE] * count, VISION_END)]


def idefics(grid: Grid, tokens: list[int]) -> Ids:
    *tiles, last = tokens
    rows, columns = grid
    ids = []
    for row in range(rows if tiles else 0):
        for column in range(columns):
            ids += [FAKE, FIRST_TILE + row * 6 + column, *[IMAGE] * tiles[row * columns + column]]
        ids.append(NEWLINE)
    return [*ids, *([NEWLINE] if tiles else []), FAKE, GLOBAL, *[IMAGE] * last, FAKE]


def granite(grid: Grid, tokens: list[int]) -> Ids:
    if len(tokens) > 1:
        return idefics(grid, tokens)
    return [FAKE, FIRST_TILE, *[IMAGE] * tokens[0], NEWLINE]


def aya(grid: Grid, tokens: list[int]) -> Ids:
    *tiles, last = tokens
    # the number of a tile from ten on is two tokens
    marks = [[FIRST_TILE, *([70 + i] if i < 10 else [70 + i // 10, 70 + i % 10])] for i in range(1, len(tiles) + 1)]
    ids = [i for mark, count in zip(marks, tiles, strict=True) for i in (*mark, *[IMAGE] * count)]
    return [VISION_START, *ids, GLOBAL, *[IMAGE] * last, VISION_END]


def ovis(grid: Grid, tokens: list[int]) -> Ids:
    first, *tiles = tokens
    ids = [111, *[IMAGE] * first, 112]
    for place, count in enumerate(tiles, 1):
        ids += [IMAGE] * count
        if place < len(tiles):
            ids.append(NEXT_ROW if place % grid[1] == 0 else NEXT_COLUMN)
    return [*ids, 113]


def minicpm(grid: Grid, tokens: list[int]) -> Ids:
    first, *tiles = tokens
    ids = [VISION_START, *[IMAGE] * first, VISION_END]
    for place, count in enumerate(tiles, 1):
        ids += [7, *[IMAGE] * count, 8]
        if place < len(tiles) and place % grid[1] == 0:
            ids.append(NEWLINE)
    return ids


def lines(grid: Grid, tokens: list[int]) -> Ids:
    """Pixtral: a break after each row of tokens."""
    rows, columns = grid
    return [i for _ in range(rows) for i in (*[IMAGE] * columns, BREAK)]


@dataclass(frozen=True)
class Case:
    """A family, a real image processor that is set to the tiny model's sizes, and the text around its tokens."""

    family: str
    processor: str
    settings: dict[str, Any]
    text: Callable[[Grid, list[int]], Ids] = one_run
    sizes: tuple[tuple[int, int], ...] = ((96, 96), (140, 70), (61, 130))
    model: dict[str, Any] = field(default_factory=dict)


QWEN = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": {"shortest_edge": 64, "longest_edge": 8192}}
NO_TIME = {**QWEN, "temporal_patch_size": 1}
SIDE_24 = {"size": {"height": 24, "width": 24}}
SIDE_12 = {"size": {"height": 12, "width": 12}}
TILES_24 = {**SIDE_24, "crop_to_patches": True, "max_patches": 12}
IDEFICS = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 24}, "return_row_col_info": True}
CLIP_12 = {"size": {"shortest_edge": 12}, "crop_size": {"height": 12, "width": 12}}
ANYRES = {
    "size": {"shortest_edge": 16},
    "crop_size": {"height": 16, "width": 16},
    "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32], [16, 48], [48, 16]],
}

CASES = (
    Case("qwen2_5_vl", "Qwen2VLImageProcessorPil", QWEN),
    Case("qwen2_vl", "Qwen2VLImageProcessorPil", QWEN),
    Case("qwen3_vl", "Qwen2VLImageProcessorPil", QWEN),
    Case("qwen3_5", "Qwen2VLImageProcessorPil", QWEN),
    Case("exaone4_5", "Qwen2VLImageProcessorPil", QWEN),
    Case("glm4v", "Glm4vImageProcessorPil", {**QWEN, "size": {"shortest_edge": 256, "longest_edge": 32768}}),
    Case("glm46v", "Glm46VImageProcessorPil", {**QWEN, "size": {"shortest_edge": 256, "longest_edge": 32768}}),
    Case("cosmos3_edge", "Cosmos3EdgeImageProcessorPil", NO_TIME),
    Case("cohere_compass", "CohereCompassImageProcessorPil", QWEN),
    Case("ernie4_5_vl_moe", "Ernie4_5_VLMoeImageProcessorPil", NO_TIME),
    Case("paddleocr_vl", "PaddleOCRVLImageProcessorPil", NO_TIME),
    Case("video_llama_3", "VideoLlama3ImageProcessorPil", NO_TIME),
    Case("hunyuan_vl", "HunYuanVLImageProcessorPil", NO_TIME),
    Case("internvl", "GotOcr2ImageProcessorPil", TILES_24),
    Case("qianfan_ocr", "GotOcr2ImageProcessorPil", TILES_24),
    Case("aya_vision", "GotOcr2ImageProcessorPil", TILES_24, aya),
    Case("granite_docling", "GraniteDoclingImageProcessorPil", TILES_24, granite),
    Case("idefics3", "Idefics3ImageProcessorPil", IDEFICS, idefics),
    Case("smolvlm", "SmolVLMImageProcessorPil", IDEFICS, idefics),
    Case("gemma3", "Gemma3ImageProcessorPil", {**SIDE_24, "do_pan_and_scan": False}, a_run_a_tile),
    Case(
        "gemma3",
        "Gemma3ImageProcessorPil",
        {**SIDE_24, "do_pan_and_scan": True, "pan_and_scan_min_crop_size": 20, "pan_and_scan_max_num_crops": 4}
        | {"pan_and_scan_min_ratio_to_activate": 1.2},
        a_run_a_tile,
    ),
    Case("paligemma", "SiglipImageProcessorPil", SIDE_12),
    Case("llava", "CLIPImageProcessorPil", CLIP_12),
    Case("vipllava", "CLIPImageProcessorPil", CLIP_12),
    Case("deepseek_vl", "DeepseekVLImageProcessorPil", {**SIDE_12, "min_size": 2}),
    Case("janus", "JanusImageProcessorPil", {**SIDE_12, "min_size": 2}),
    Case(
        "llava_next",
        "LlavaNextImageProcessorPil",
        ANYRES,
        model={"image_grid_pinpoints": ANYRES["image_grid_pinpoints"]},
    ),
    Case(
        "llava_onevision",
        "LlavaOnevisionImageProcessorPil",
        {**ANYRES, "size": {"height": 16, "width": 16}},
        model={"image_grid_pinpoints": ANYRES["image_grid_pinpoints"]},
    ),
    Case(
        "llava_next",
        "LlavaNextImageProcessorPil",
        {**ANYRES, "image_grid_pinpoints": [[48, 48]], "do_pad": True},
        sizes=((140, 50), (45, 130), (100, 90)),
        model={"image_grid_pinpoints": [[48, 48]]},
    ),
    Case("ovis2", "Ovis2ImageProcessorPil", {**SIDE_12, "crop_to_patches": True, "max_patches": 9}, ovis),
    Case(
        "minicpmv4_6",
        "MiniCPMV4_6ImageProcessorPil",
        {"scale_resolution": 48, "patch_size": 4, "downsample_mode": "4x"},
        minicpm,
    ),
    Case("gemma4", "Gemma4ImageProcessorPil", {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}),
    Case("mistral3", "PixtralImageProcessorPil", {"size": {"longest_edge": 80}, "patch_size": 8}, lines),
    Case("lighton_ocr", "PixtralImageProcessorPil", {"size": {"longest_edge": 80}, "patch_size": 8}, lines),
)


def processed(case: Case, picture: Image.Image) -> tuple[Any, dict[str, Any], Grid]:
    """The real processor's output, and rows and columns of tiles (of tokens for Pixtral)."""
    processor = getattr(transformers, case.processor)(**case.settings)
    output = dict(processor(images=[picture], return_tensors="pt"))
    grid = (1, 1)
    if "rows" in output:
        grid = (int(np.ravel(output["rows"])[0]), int(np.ravel(output["cols"])[0]))
    elif "grids" in output:
        grid = tuple(int(n) for n in np.ravel(output["grids"])[:2])
    elif "image_sizes" in output and case.text is lines:
        height, width = output["image_sizes"][0].tolist()
        grid = (height // 8, width // 8)
    return processor, output, grid


def model_inputs(case: Case, model: Any, output: dict[str, Any], grid: Grid) -> dict[str, Any]:
    """A prompt about the picture, as the family's processor writes it."""
    import inspect

    base = model.base_model
    accepted = set(inspect.signature(base.forward).parameters)
    pixels = {name: value for name, value in output.items() if name in accepted and isinstance(value, torch.Tensor)}
    told = {
        name: value for name, value in pixels.items() if name in inspect.signature(base.get_image_features).parameters
    }
    with torch.no_grad():
        pooled = base.get_image_features(**told, return_dict=True).pooler_output
    tokens = [entry.shape[:-1].numel() for entry in pooled]
    if case.text in (idefics, granite):
        tiles = int(output["pixel_values"].shape[1])
        tokens = [tokens[0] // tiles] * tiles
    ids = [BEGIN, *words(3), *case.text(grid, tokens), *words(4, 1), END_OF_TURN]
    input_ids = torch.tensor([ids])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **pixels}
    return inputs | {name: (input_ids == IMAGE).int() for name in BY_NAME[case.family].token_types}


def made_model(case: Case) -> Any:
    model = tiny_model(case.family)
    for name, value in case.model.items():
        setattr(model.config, name, value)
    return model


def box_of_cell(sheet: Any, row: int, column: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a cell in pixels of the picture."""
    rows, columns = sheet.tokens.shape
    left, top, right, bottom = sheet.box
    width, height = (right - left) * size[0] / columns, (bottom - top) * size[1] / rows
    x, y = left * size[0] + column * width, top * size[1] + row * height
    return x, y, x + width, y + height


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}-{len(case.settings)}")
def test_tokens_that_change_lie_where_the_picture_was_painted(case):
    model = made_model(case)
    rng = np.random.default_rng(0)
    for size in case.sizes:
        _, plain, grid = processed(case, blank(size))
        inputs = model_inputs(case, model, plain, grid)
        with prune(model, 0.5, method="random") as pruning, torch.no_grad():
            model(**inputs)
        (regions,) = pruning._pruned_prompt.regions(blank(size), 0, None)
        assert regions.note is None
        placeholders = np.flatnonzero(inputs["input_ids"][0].numpy() == IMAGE)
        assert regions.positions.tolist() == placeholders.tolist()
        on_sheets = np.concatenate([sheet.tokens.ravel() for sheet in regions.sheets])
        assert len(np.unique(on_sheets)) == len(on_sheets)
        for _ in range(3):
            width, height = size[0] // 3, size[1] // 3
            left, top = rng.integers(0, size[0] - width), rng.integers(0, size[1] - height)
            spot = (int(left), int(top), int(left) + width, int(top) + height)
            changed = changed_tokens(model, "image", plain, processed(case, painted(size, spot))[1])
            has_changed = dict(zip(placeholders.tolist(), changed.tolist(), strict=True))
            for sheet in regions.sheets:
                for (row, column), token in np.ndenumerate(sheet.tokens):
                    x0, y0, x1, y1 = box_of_cell(sheet, row, column, size)
                    w, h = x1 - x0, y1 - y0
                    x, y = (x0 + x1) / 2, (y0 + y1) / 2
                    where = (
                        f"{case.family} {size} {sheet.name} cell {row}, {column} of {sheet.tokens.shape}, spot {spot}"
                    )
                    if spot[0] < x < spot[2] and spot[1] < y < spot[3]:
                        assert has_changed[token], where
                    # resampling blurs the edge
                    far = x1 + 0.7 * w < spot[0] or x0 - 0.7 * w > spot[2] or y1 + 0.7 * h < spot[1]
                    if far or y0 - 0.7 * h > spot[3]:
                        assert not has_changed[token], where


def test_every_family_has_a_geometry():
    from hawk_kernels.hf.families import FAMILIES
    from hawk_kernels.pictures.families import GEOMETRIES

    for family in FAMILIES:
        assert set(GEOMETRIES[family.model_type]) >= {"image", *(["video"] if family.video else [])}, family.model_type


def from_source(path: str, *names: str) -> dict[str, Any]:
    """Functions of a module of transformers that cannot be imported without torchvision, from their source."""
    import ast
    import math
    from collections import defaultdict
    from functools import lru_cache, reduce
    from pathlib import Path

    source = (Path(transformers.__file__).parent / "models" / path).read_text()
    wanted = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            node.decorator_list, node.returns = [], None
            for argument in [*node.args.args, *node.args.kwonlyargs]:
                argument.annotation = None
            wanted.append(node)
    space = {
        "math": math,
        "np": np,
        "torch": torch,
        "defaultdict": defaultdict,
        "reduce": reduce,
        "lru_cache": lru_cache,
    }
    exec(compile(ast.Module(body=wanted, type_ignores=[]), path, "exec"), space)
    assert {node.name for node in wanted} == set(names)
    return space


class _Side:
    def __init__(self, side):
        self.height = self.width = side


def llama4_tiles(size, tile, most):
    code = from_source("llama4/image_processing_llama4.py", "get_factors", "find_supported_resolutions", "get_best_fit")
    resolutions = torch.tensor(code["find_supported_resolutions"](most, _Side(tile)))
    height, width = code["get_best_fit"]((size[1], size[0]), resolutions).tolist()
    return height // tile, width // tile


def cohere_tiles(size, tile, most):
    code = from_source(
        "cohere2_vision/image_processing_cohere2_vision.py",
        "get_all_supported_aspect_ratios",
        "get_optimal_tiled_canvas",
    )
    columns, rows = code["get_optimal_tiled_canvas"]((size[1], size[0]), (tile, tile), 1, most)
    return rows, columns


def perception_tiles(size, tile, most):
    names = ("_factors", "_find_supported_aspect_ratios", "_get_image_height_width", "_fit_image_to_canvas")
    code = from_source("perception_lm/image_processing_perception_lm.py", *names, "_find_closest_aspect_ratio")

    class Processor:
        max_num_tiles = most
        _factors = staticmethod(code["_factors"])

    for name in (*names[1:], "_find_closest_aspect_ratio"):
        setattr(Processor, name, code[name])
    processor = Processor()
    found = processor._fit_image_to_canvas(size[0], size[1], tile)
    columns, rows = found or processor._find_closest_aspect_ratio(size[0], size[1], tile)
    return rows, columns


def lfm2_tiles(size, tile, most):
    code = from_source("lfm2_vl/image_processing_lfm2_vl.py", "find_closest_aspect_ratio")
    ratios = sorted(
        {(w, h) for w in range(1, most + 1) for h in range(1, most + 1) if 2 <= w * h <= most},
        key=lambda x: x[0] * x[1],
    )
    columns, rows = code["find_closest_aspect_ratio"](size[0] / size[1], ratios, size[0], size[1], tile)
    return rows, columns


def internvl_tiles(size, tile, most):
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    columns, rows = get_optimal_tiled_canvas((size[1], size[0]), (tile, tile), 1, most)
    return rows, columns


def ovis_tiles(size, tile, most):
    from transformers.models.ovis2.image_processing_pil_ovis2 import get_min_tile_covering_grid

    columns, rows = get_min_tile_covering_grid((size[1], size[0]), tile, most, 0.9)
    return rows, columns


@pytest.mark.parametrize(
    ("real", "ours"),
    [
        (llama4_tiles, "least_upscaling"),
        (cohere_tiles, "least_upscaling"),
        (perception_tiles, "largest_fit"),
        (lfm2_tiles, "closest_ratio"),
        (internvl_tiles, "closest_ratio"),
        (ovis_tiles, "covering"),
    ],
)
def test_tiles_are_arranged_as_the_processor_arranges_them(real, ours):
    from hawk_kernels.pictures import sheets

    arrange = getattr(sheets, ours)
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(150):
        size = tuple(int(side) for side in np.exp(rng.uniform(np.log(20), np.log(900), 2)))
        rows, columns = real(size, 100, 12)
        if rows * columns > 1:
            seen.add((rows, columns))
            assert arrange(size, rows * columns, 100) == (rows, columns), size
    assert len(seen) > 8


# Families whose processors need torchvision: a spot in a tile's own pixels.
SPOTS = (
    ("llama4", "image", 24),
    ("cohere2_vision", "image", 24),
    ("perception_lm", "image", 12),
    ("perception_lm", "video", 12),
    ("llava_onevision", "video", 16),
    ("llava_next_video", "video", 16),
    ("video_llava", "image", 12),
    ("video_llava", "video", 12),
)


@pytest.mark.parametrize(("name", "kind", "side"), SPOTS)
def test_tokens_of_a_tile_are_its_rows_and_columns(name, kind, side):
    family, model = BY_NAME[name], tiny_model(name)
    frames = 4 if kind == "video" else 1
    picture = Picture(1, 9, frames) if kind == "video" else family.picture
    inputs = batch(name, [BEGIN, *words(2), picture, *words(3), END_OF_TURN])
    with prune(model, 0.5, method="random") as pruning, torch.no_grad():
        model(**inputs)
    shown = blank((side, side))
    (regions,) = pruning._pruned_prompt.regions([[shown] * 4] if kind == "video" else shown, 0, None)
    assert regions.note is None
    pixels = "pixel_values_videos" if kind == "video" else "pixel_values"
    encoder = "image" if name == "perception_lm" else kind
    placeholders = np.flatnonzero(np.isin(inputs["input_ids"][0].numpy(), (IMAGE, VIDEO)))
    told = dict(inputs)
    if name == "perception_lm" and kind == "video":
        told["pixel_values"] = told[pixels]
    if name == "video_llava" and kind == "image":
        pixels, told["pixel_values"] = "pixel_values_images", told["pixel_values_images"]
    source = "pixel_values" if encoder == "image" else pixels
    for frame, sheet in enumerate(regions.sheets):
        rows, columns = sheet.tokens.shape
        for row, column in ((0, columns - 1), (rows - 1, 0), (rows // 2, columns // 2)):
            values = told[source].clone()
            of_frame = values.flatten(0, -4)[frame]
            y, x = (int((place + 0.5) * side / count) for place, count in ((row, rows), (column, columns)))
            of_frame[:, y : y + 1, x : x + 1] += 50
            changed = changed_tokens(model, encoder, told, {**told, source: values})
            found = set(placeholders[np.flatnonzero(changed)].tolist())
            assert int(sheet.tokens[row, column]) in found, (frame, row, column)
            nearby = {int(t) for (r, c), t in np.ndenumerate(sheet.tokens) if abs(r - row) < 2 and abs(c - column) < 2}
            assert found <= nearby | set(regions.others().tolist()), (frame, row, column)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("idefics3", ((140, 70), (20, 20), (61, 130))),
        ("smolvlm", ((61, 130), (140, 70))),
        ("aya_vision", ((140, 70), (24, 24), (61, 130))),
        ("internvl", ((24, 24), (140, 70), (61, 130))),
        ("ovis2", ((61, 130), (12, 12), (140, 70))),
        ("minicpmv4_6", ((140, 70), (40, 40), (61, 130))),
        ("granite_docling", ((24, 24), (140, 70))),
        ("qwen2_5_vl", ((140, 70), (61, 130))),
        ("llava_next", ((140, 70), (61, 130), (30, 30))),
    ],
)
def test_several_pictures_of_a_row_get_their_own_tiles(name, sizes):
    case = next(case for case in CASES if case.family == name)
    model = made_model(case)
    pictures = [blank(size) for size in sizes]
    parts = []
    for picture in pictures:
        _, output, grid = processed(case, picture)
        parts.append(model_inputs(case, model, output, grid))
    alone = []
    for picture, inputs in zip(pictures, parts, strict=True):
        with prune(model, 0.5, method="random") as pruning, torch.no_grad():
            model(**inputs)
        (regions,) = pruning._pruned_prompt.regions(picture, 0, None)
        alone.append([(sheet.name, sheet.tokens.shape, sheet.box) for sheet in regions.sheets])
    together = {"input_ids": torch.cat([part["input_ids"] for part in parts], dim=1)}
    together["attention_mask"] = torch.ones_like(together["input_ids"])
    for key in set(parts[0]) - set(together):
        # Idefics takes the tiles of a row as its second size, LLaVA-NeXT those of each picture
        if key in BY_NAME[name].token_types or (
            name in ("idefics3", "smolvlm", "granite_docling") and key != "input_ids"
        ):
            together[key] = torch.cat([part[key] for part in parts], dim=1)
        elif name == "llava_next" and key == "pixel_values":
            most = max(part[key].shape[1] for part in parts)
            padded = [torch.nn.functional.pad(p[key], (0,) * 7 + (most - p[key].shape[1],)) for p in parts]
            together[key] = torch.cat(padded)
        else:
            together[key] = torch.cat(
                [part[key] for part in parts], dim=3 if name == "minicpmv4_6" and key == "pixel_values" else 0
            )
    with prune(model, 0.5, method="random") as pruning, torch.no_grad():
        model(**together)
    found = pruning._pruned_prompt.regions(pictures, 0, None)
    assert [[(s.name, s.tokens.shape, s.box) for s in regions.sheets] for regions in found] == alone
    assert [regions.name for regions in found] == [f"image {n + 1}" for n in range(len(pictures))]
    with pytest.raises(ValueError, match=f"expected {len(pictures)} pictures for row 0, got {len(pictures) - 1}"):
        pruning._pruned_prompt.regions(pictures[1:], 0, None)


def test_a_picture_that_other_tiles_fit_better_is_refused():
    case = next(case for case in CASES if case.family == "internvl")
    model = made_model(case)
    _, output, grid = processed(case, blank((140, 20)))
    with prune(model, 0.5, method="random") as pruning, torch.no_grad():
        model(**model_inputs(case, model, output, grid))
    assert pruning._pruned_prompt.regions(blank((280, 40)), 0, None)[0].sheets[1].name == "1 x 7 tiles"
    with pytest.raises(
        ValueError, match=r"cut into 7 tiles, got one of 60 x 60 pixels, which .* fit better.*; pass the"
    ):
        pruning._pruned_prompt.regions(blank((60, 60)), 0, None)


@pytest.mark.parametrize("name", ["idefics3", "llava_next", "gemma4", "mistral3", "minicpmv4_6"])
def test_a_picture_of_another_shape_is_refused(name):
    case = next(case for case in CASES if case.family == name)
    model = made_model(case)
    _, output, grid = processed(case, blank((140, 70)))
    with prune(model, 0.5, method="random") as pruning, torch.no_grad():
        model(**model_inputs(case, model, output, grid))
    assert pruning._pruned_prompt.regions(blank((280, 140)), 0, None)[0].note is None
    with pytest.raises(
        ValueError, match=r"^image: expected a picture .*got one of 50 x 300 pixels for image 1; pass the"
    ):
        pruning._pruned_prompt.regions(blank((50, 300)), 0, None)


def test_frames_that_are_encoded_as_images_make_up_a_video():
    case = next(case for case in CASES if case.family == "minicpmv4_6")
    model = made_model(case)
    _, output, grid = processed(case, blank((140, 70)))
    one = model_inputs(case, model, output, grid)
    rows, columns = grid
    frame = one["input_ids"][:, 4:-5]
    ids = torch.cat([torch.tensor([[BEGIN]]), frame, frame, torch.tensor([[*words(4), END_OF_TURN]])], dim=1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.cat([one["pixel_values"]] * 2, dim=3),
        "target_sizes": torch.cat([one["target_sizes"]] * 2),
    }
    with prune(model, 0.5, method="random") as pruning, torch.no_grad():
        model(**inputs)
    frames = [painted((140, 70), (0, 0, 20 * n + 1, 30)) for n in range(2)]
    (video,) = pruning._pruned_prompt.regions([frames], 0, None)
    names = [sheet.name for sheet in video.sheets]
    assert names == [
        f"frame {n} of 2, {what}" for n in (1, 2) for what in ("whole picture", f"{rows} x {columns} tiles")
    ]
    assert [frames.index(video.frame_of(sheet)) for sheet in video.sheets] == [0, 0, 1, 1]


def test_dropped_padding_of_whole_tokens_leaves_the_rest_where_it_is():
    """140 x 50 pixels become 48 x 18 of 48 x 48, from line 15 on; the tokens of lines 16 to 31 stay, 8 lines each."""
    case = next(case for case in CASES if case.model == {"image_grid_pinpoints": [[48, 48]]})
    model = made_model(case)
    for size, box in (((140, 50), (0, 1 / 18, 1, 17 / 18)), ((50, 140), (1 / 18, 0, 17 / 18, 1))):
        _, output, grid = processed(case, blank(size))
        with prune(model, 0.5, method="random") as pruning, torch.no_grad():
            model(**model_inputs(case, model, output, grid))
        (regions,) = pruning._pruned_prompt.regions(blank(size), 0, None)
        assert sorted(regions.sheets[1].tokens.shape) == [2, 6]
        assert regions.sheets[1].box == pytest.approx(box)
