"""`prune(recipe=...)` and `query="release"`: the settings of the authors' releases, by name."""

import re

import numpy as np
import pytest
import torch

from hawk_kernels import prune
from hawk_kernels.hf.question import AS_RELEASED, NO_VISUAL, Markers, find_markers, released_queries, text_queries
from hawk_kernels.methods import METHODS, DivPrune
from hawk_kernels.recipes import RECIPES, Recipe, followed
from tests.family_checks import model_of, prompts
from tests.method_checks import options_of
from tests.tiny_families import batch
from tests.tiny_models import BEGIN, END_OF_TURN, Picture, qwen_batch, qwen_vl, words

every_recipe = pytest.mark.parametrize("name", RECIPES)
NOTHING = {"method": None, "budget": None, "query": None, "positions": None}


def pruned(name, model, inputs, **more):
    given = options_of(RECIPES[name].method)
    with torch.no_grad(), prune(model, 0.4, recipe=name, **{**given, **more}) as pruning:
        model(**inputs)
    return pruning


@every_recipe
def test_a_recipe_is_what_it_says(name):
    """On LLaVA, for which most of the releases are written."""
    recipe = RECIPES[name]
    model, inputs = model_of("llava"), batch("llava", *prompts("llava")["several images"])
    pruning = pruned(name, model, inputs)
    stats = pruning.stats
    assert stats.method == recipe.method
    assert recipe.options.items() <= stats.method_options.items()
    assert (stats.budget, stats.positions) == tuple(
        recipe.arguments.get(key, usual) for key, usual in (("budget", "shared"), ("positions", "original"))
    )
    said = "query" in recipe.arguments
    assert {sample.query_source == AS_RELEASED for sample in stats.samples} == {said}
    given = {**options_of(recipe.method), **recipe.arguments, **recipe.options}
    with torch.no_grad(), prune(model, 0.4, method=recipe.method, **given) as spelled_out:
        model(**inputs)
    assert torch.equal(spelled_out.keep_mask, pruning.keep_mask)


@every_recipe
def test_every_recipe_differs_from_the_defaults_and_names_its_source(name):
    recipe = RECIPES[name]
    usual = METHODS[recipe.method]().options()
    assert recipe.arguments or any(usual.get(key, key) != value for key, value in recipe.options.items())
    assert recipe.arguments.keys() <= {"budget", "query", "positions"}
    assert re.fullmatch(r"github\.com/[\w-]+/[\w-]+", recipe.source)
    assert recipe.differs.endswith(".")


def test_what_is_passed_counts_more_than_the_recipe():
    model, inputs = model_of("llava"), batch("llava", *prompts("llava")["several images"])
    stats = pruned("divprune-release", model, inputs, rounding="ceil", positions="original").stats
    assert (stats.method_options["rounding"], stats.positions) == ("ceil", "original")
    stats = pruned("cdpruner-release", model, inputs, budget="shared", theta=0.5).stats
    assert stats.budget == "shared"
    assert stats.method_options["theta"] == 0.5
    assert stats.method_options["scale_over"] == "prompt"


def test_a_method_object_brings_its_own_options():
    given, options = followed("divprune-release", {**NOTHING, "method": DivPrune("ceil")}, {})
    assert given["positions"] == "packed"
    assert options == {}
    assert given["method"].rounding == "ceil"


def test_a_recipe_is_refused_by_name():
    known = ", ".join(map(repr, sorted(RECIPES)))
    for wrong in ("fastv", None, 3):
        with pytest.raises(ValueError, match=re.escape(f"recipe: expected one of {known}, got {wrong!r}")):
            followed(wrong, NOTHING, {})
    for other in ("hawk", METHODS["random"]()):
        with pytest.raises(ValueError, match=r"expected method 'divprune' or none beside 'divprune-release', got '"):
            followed("divprune-release", {**NOTHING, "method": other}, {})


def test_a_family_that_a_recipe_does_not_fit_says_which_argument_to_pass():
    model, inputs = qwen_vl(layers=2), qwen_batch([BEGIN, Picture(4, 4), *words(4), END_OF_TURN])
    with pytest.raises(TypeError, match=r"positions: expected 'original' for qwen2_5_vl"):
        prune(model, 0.5, recipe="divprune-release")
    stats = pruned("divprune-release", model, inputs, positions="original").stats
    assert stats.method_options == {"rounding": "nearest"}


def test_every_recipe_is_in_the_docs():
    from pathlib import Path

    page = (Path(__file__).parents[1] / "docs/methods.md").read_text()
    for name, recipe in RECIPES.items():
        assert f"| `{name}` |" in page
        assert recipe.source in page
    assert isinstance(recipe, Recipe)


END, CLOSE = 2, 3
# a system prompt, a picture (50), what closes it (3), and three turns that follow it
CONVERSATION = [[1, 8, 9, END, 7, 50, 50, CLOSE, 10, 11, END, 12, 13, END, 14, 15, END, 16]]


def queries_of(ids, find=released_queries, turn_ends=(END,)):
    ids = np.array(ids)
    markers = Markers(vision_ends=(CLOSE,), turn_ends=turn_ends)
    found, sources = find(ids, ids != 0, ids == 50, markers)
    return [np.flatnonzero(row).tolist() for row in found], sources


def test_the_release_ranks_by_all_turns_after_the_image():
    assert queries_of(CONVERSATION) == ([list(range(8, 16))], [AS_RELEASED])
    ours, _ = queries_of(CONVERSATION, text_queries)
    assert ours == [[14, 15]]


def test_the_release_takes_the_rest_where_no_turn_ends():
    assert queries_of([[1, 50, CLOSE, 10, 11, 12]])[0] == [[3, 4, 5]]
    assert queries_of([[1, 50, 10, 11, END]])[0] == [[2, 3]]


def test_the_release_starts_after_the_last_of_several_images_and_knows_padding():
    ids = [[0, 0, 50, CLOSE, 9, 50, CLOSE, 10, END, 11], [1, 8, 9, 9, 9, 9, 9, 9, END, 9], [50] * 9 + [CLOSE]]
    found, sources = queries_of(ids)
    assert found == [[7], [], []]
    assert sources == [AS_RELEASED, NO_VISUAL, AS_RELEASED]


def test_prune_takes_the_queries_of_the_release():
    model = qwen_vl(layers=2)
    inputs = qwen_batch([BEGIN, Picture(4, 4), *words(4), END_OF_TURN, *words(3, seed=2), END_OF_TURN, *words(2)])
    with torch.no_grad(), prune(model, 0.5, head_weights="uniform", query="release") as pruning:
        model(**inputs)
    assert END_OF_TURN in find_markers(model).turn_ends
    length = inputs["input_ids"].shape[1]
    # four words, the end of their turn, and three words
    assert pruning.query_mask[0].nonzero().flatten().tolist() == list(range(length - 11, length - 3))
    assert pruning.stats.samples[0].query_source == AS_RELEASED


def test_the_release_has_no_text_for_a_question_before_the_image():
    model, inputs = qwen_vl(layers=2), qwen_batch([BEGIN, *words(4), Picture(4, 4), END_OF_TURN])
    pruning = prune(model, 0.5, head_weights="uniform", query="release")
    with pytest.raises(ValueError, match="query: expected text in row 0"), torch.no_grad(), pruning:
        model(**inputs)
