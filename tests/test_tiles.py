"""`prune(budget="per_tile")`: each tile of a picture has its own budget, wherever its tokens stand in the prompt."""

import numpy as np
import pytest
import torch

from hawk_kernels import prune
from hawk_kernels.hf.families import FAMILIES
from hawk_kernels.selection import kept_count
from tests.family_checks import generate, model_of, prompts
from tests.method_checks import options_of
from tests.test_hiprune_families import any_resolution_model
from tests.tiny_families import batch, tiny_model
from tests.tiny_models import BEGIN, END_OF_TURN, IMAGE, words

TILED = [family.model_type for family in FAMILIES if family.tiles is not None]


def kept_of(model, inputs, keep_ratio, **options):
    with torch.no_grad(), prune(model, keep_ratio, budget="per_tile", **options) as pruning:
        model(**inputs)
    return pruning


def any_resolution(name, sizes):
    """A model with four pinpoints, and a prompt of pictures `(height, width)` as its processor would make it."""
    model = any_resolution_model(name)
    config = model.config
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    tiles = [image_size_to_num_patches(list(size), config.image_grid_pinpoints, 16) for size in sizes]
    pixels = torch.randn(len(sizes), max(tiles), 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    with torch.no_grad():
        features = model.model.get_image_features(**images).pooler_output
    runs = [token for feature in features for token in (*words(2), *[IMAGE] * len(feature))]
    ids = torch.tensor([[BEGIN, *runs, *words(4), END_OF_TURN]])
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}, [len(f) for f in features]


@pytest.mark.parametrize(
    "method",
    [
        "divprune",
        "random",
        "cdpruner",
        "downsample",
        "key_norm",
        "hiprune",
        "vispruner",
        "fastervlm",
        "holov",
        "visionzip",
        "prumerge",
        "vscan",
    ],
)
def test_tiles_of_a_mosaic_keep_their_own_budgets(method):
    """LLaVA-NeXT: the picture's 2 x 2 tokens, then two tiles side by side, whose lines alternate, with newlines."""
    model, inputs = model_of("llava_next"), batch("llava_next", *prompts("llava_next")["padded batch"])
    pruning = kept_of(model, inputs, 0.5, method=method, **options_of(method))
    for row, ids in enumerate(inputs["input_ids"]):
        places = (ids == IMAGE).nonzero().flatten()
        for image in places.split(14):
            kept = pruning.keep_mask[row, image]
            base, grid = kept[:4], kept[4:].view(2, 5)
            assert base.sum() == grid[:, :2].sum() == grid[:, 2:4].sum() == 2
            assert grid[:, 4].all(), "newlines stay and count for no tile"
    # the newlines count for the tile before them
    assert [sample.budget_per_image for sample in pruning.stats.samples] == [[2, 2, 4, 2, 2, 4], [2, 2, 4]]


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("size", [(30, 30), (10, 40), (40, 10), (9, 16), (16, 48), (31, 20)])
def test_the_tiles_of_a_picture_are_where_the_model_lays_them(name, size):
    """What a tile's tokens are shows in the features: of each tile they change when its pixels alone change."""
    model, inputs, (length,) = any_resolution(name, [size])
    pruning = kept_of(model, inputs, 1, method="random")
    prompt = pruning._outcome.prompt
    visual = np.flatnonzero(prompt.all_placeholders()[0])
    tiles, newlines = prompt.tiles[0, visual], prompt.separators[0, visual]
    assert len(visual) == length
    with torch.no_grad():
        whole = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output[0]
        number = 0
        for tile in range(inputs["pixel_values"].shape[1]):
            changed = inputs["pixel_values"].clone()
            changed[:, tile] += 1
            features = model.model.get_image_features(changed, inputs["image_sizes"]).pooler_output[0]
            moved = ((features - whole).abs().amax(-1) > 1e-6).view(-1).numpy()
            if not moved.any():
                continue
            # a grid that was scaled down mixes neighbours at its seams
            ours = (tiles == number) & ~newlines
            assert not (ours & ~moved).any()
            assert (moved & newlines).sum() == 0
            number += 1
    assert number == tiles.max() + 1
    assert (pruning.keep_mask[0, visual].numpy() & ~newlines).sum() == number


@pytest.mark.parametrize("name", TILED)
def test_every_tiled_family_tells_its_tiles(name):
    model, inputs = model_of(name), batch(name, *prompts(name)["padded batch"])
    pruning = kept_of(model, inputs, 2, method="divprune")
    per_image = 3 if "llava_" in name else 1
    assert [len(sample.budget_per_image) for sample in pruning.stats.samples] == [2 * per_image, per_image]
    kept = pruning._outcome.prompt
    for row in range(2):
        for unit in kept.candidates().units(row):
            assert pruning.keep_mask[row, unit].sum() == 2


def test_tiles_that_follow_each_other():
    """An InternVL picture is one run of placeholders for all of its tiles."""
    model = model_of("internvl")
    ids = torch.tensor([[BEGIN, *[IMAGE] * 27, *words(4), *[IMAGE] * 9, *words(2), END_OF_TURN]])
    generator = torch.Generator().manual_seed(0)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["pixel_values"] = torch.randn(4, 3, 24, 24, generator=generator)
    for method in ("hiprune", "cdpruner"):
        pruning = kept_of(model, inputs, 0.4, method=method)
        assert pruning.stats.samples[0].budget_per_image == [3, 3, 3, 3]
        places = (ids[0] == IMAGE).nonzero().flatten()
        assert pruning.keep_mask[0, places].view(4, 9).sum(1).tolist() == [3, 3, 3, 3]
    with torch.no_grad(), prune(model, 0.4, method="divprune", budget="per_image") as by_image:
        model(**inputs)
    assert by_image.stats.samples[0].budget_per_image == [10, 3]


def test_a_tile_is_chosen_from_as_a_picture_of_its_own():
    """HiPrune on one tile of several keeps what it keeps of a picture that is this tile alone."""
    model = model_of("internvl")
    pixels = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    kept = []
    for tiles in (pixels, *pixels.split(1)):
        ids = torch.tensor([[BEGIN, *[IMAGE] * 9 * len(tiles), *words(4), END_OF_TURN]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": tiles}
        pruning = kept_of(model, inputs, 4, method="hiprune", alpha=2.5)
        kept.append(pruning.keep_mask[0, ids[0] == IMAGE])
    assert torch.equal(kept[0], torch.cat(kept[1:]))


def test_budgets_of_tiles_inside_the_stack():
    model = tiny_model("llava_next", text_changes={"num_hidden_layers": 3})
    inputs = batch("llava_next", *prompts("llava_next")["padded batch"])
    with torch.no_grad(), prune(model, {0: 0.75, 1: 0.5}, method="key_norm", budget="per_tile") as pruning:
        model(**inputs)
    places = (inputs["input_ids"][1] == IMAGE).nonzero().flatten()
    grid = pruning.keep_mask[1, places[4:]].view(2, 5)
    assert grid[:, :2].sum() == grid[:, 2:4].sum() == 2
    assert grid[:, 4].all()


def test_copies_of_a_sample_have_its_tiles():
    model, inputs = model_of("llava_next"), batch("llava_next", *prompts("llava_next")["several images"])
    pruning = kept_of(model, inputs, 2, method="divprune")
    with torch.no_grad(), prune(model, 2, method="divprune", budget="per_tile") as beams:
        generate(model, inputs, num_beams=2)
    assert torch.equal(beams.keep_mask, pruning.keep_mask.repeat_interleave(2, 0))


def test_every_ratio_counts_for_each_tile():
    model, inputs = model_of("internvl"), batch("internvl", *prompts("internvl")["several images"])
    for rounding in ("floor", "ceil", "nearest"):
        pruning = kept_of(model, inputs, 0.5, method="divprune", rounding=rounding)
        assert set(pruning.stats.samples[0].budget_per_image) == {kept_count(0.5, 9, rounding)}


def test_families_without_tiles_are_refused_by_name():
    untiled = tiny_model("qwen2_5_vl")
    with pytest.raises(
        TypeError, match=r"budget: expected .* for qwen2_5_vl, got 'per_tile'; .* tiles in .*llava_next"
    ):
        prune(untiled, 0.5, method="random", budget="per_tile")
