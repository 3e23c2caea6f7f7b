"""Dropping tokens after some layers equals hiding them from the layers that follow, in every family and every mode."""

import copy
import re

import pytest
import torch
from transformers import DynamicCache

from hawk_kernels import prune
from hawk_kernels.hf.anatomy import dissect
from hawk_kernels.methods import Hawk, Method, PyramidDrop
from tests.family_checks import SUPPORTED, generate, model_of, needs, prompts, together, watched
from tests.method_checks import GREEDY, RAGGED, TOLERANCE, families
from tests.test_method_fastv import WITHOUT_ATTENTION, without_tokens
from tests.tiny_families import BY_NAME, batch, tiny_model
from tests.tiny_models import Picture, question, qwen_batch, qwen_vl, words

STAGES = {1: 0.6, 3: 0.2}


@pytest.fixture(scope="module")
def four_layers():
    return qwen_vl(layers=4)


def method_of(name):
    """A method that ranks inside the stack of a family; families take turns with those that read its rotation."""
    reading = ("fastv", "pyramiddrop", "sparsevlm")
    return reading[list(BY_NAME).index(name) % 3] if SUPPORTED[name].plain_rope else "dart"


def both(model, stages, call, **options):
    """What `call` returns while tokens are dropped and while they are hidden, and the pruning that drops."""
    results = []
    for mode in ("hide", "drop"):
        torch.manual_seed(1)
        with prune(model, stages, mode=mode, **options) as pruning:
            results.append((call(), pruning.keep_mask, pruning.scores))
    (hidden, kept_of_hidden, _), (dropped, kept, _) = results
    assert torch.equal(kept, kept_of_hidden)
    return dropped, hidden, pruning


def check_logits(model, inputs, stages, **options):
    dropped, hidden, pruning = both(model, stages, lambda: model(**inputs).logits, **options)
    assert dropped.shape == hidden.shape
    assert (dropped - hidden)[pruning.keep_mask].abs().max() < TOLERANCE
    assert int((inputs["attention_mask"].bool() & ~pruning.keep_mask).sum()) > 0
    return pruning


def check_tokens(model, inputs, stages, options, **of_prune):
    dropped, hidden, _ = both(model, stages, lambda: generate(model, inputs, **options), **of_prune)
    assert torch.equal(dropped, hidden)


@families([name for name in BY_NAME if name not in WITHOUT_ATTENTION])
@torch.no_grad()
def test_dropping_equals_hiding_in_each_family(name):
    needs(name)
    model, inputs = model_of(name), batch(name, *prompts(name)["padded batch"])
    stages = {1: 0.6, len(dissect(model).text.layers) - 1: 0.3}
    check_logits(model, inputs, stages, method=method_of(name), budget="per_image")
    check_tokens(model, inputs, stages, {}, method=method_of(name))


@families(sorted(WITHOUT_ATTENTION))
@torch.no_grad()
def test_dropping_equals_removing_where_layers_have_no_attention(name):
    needs(name)
    model, inputs = model_of(name), batch(name, *prompts(name)["one image"])
    padded = batch(name, *prompts(name)["padded batch"])
    with prune(model, {2: 0.3}, method="fastv") as pruning:
        logits = model(**inputs).logits
        kept = pruning.keep_mask[0]
        assert torch.equal(generate(model, padded), generate(model, padded, use_cache=False))
        of_rows = model(**padded).logits
        alone = model(**batch(name, prompts(name)["padded batch"][0])).logits
    with without_tokens(model, 2, kept):
        expected = model(**inputs, use_cache=False).logits
    assert 0 < int(kept.sum()) < len(kept)
    assert (logits - expected)[0, kept].abs().max() < TOLERANCE
    if not name.startswith("minicpm"):  # where the pixels of all rows are drawn at once
        assert torch.allclose(of_rows[0, -3:], alone[0, -3:], atol=TOLERANCE)


MODES = {
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 1.5, "num_return_sequences": 2},
    "without a cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "static cache of beams": {"cache_implementation": "static", "num_beams": 2},
}
ONE_ROW = {"prompt lookup": {"prompt_lookup_num_tokens": 2}, "assisted": {"assistant_model": None}}


@pytest.mark.parametrize("stages", [{2: 0.3}, STAGES, {0: ("downsample", 0.7), 2: 4}], ids=str)
@pytest.mark.parametrize("mode", [*MODES, *ONE_ROW])
@torch.no_grad()
def test_every_way_to_generate(four_layers, mode, stages):
    inputs = qwen_batch(*(RAGGED if mode in MODES else RAGGED[:1]))
    options = {**MODES, **ONE_ROW}[mode]
    if mode == "assisted":
        options = {"assistant_model": qwen_vl(layers=2, seed=1)}
    check_tokens(four_layers, inputs, stages, options, method="fastv")


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_eager_attention_and_either_padding(padding):
    model, inputs = qwen_vl(layers=4, attention="eager"), qwen_batch(*RAGGED, padding=padding)
    check_logits(model, inputs, STAGES, method="fastv")
    if padding == "left":
        check_tokens(model, inputs, STAGES, {}, method="fastv")


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        # shorter than what follows the images, and longer: then tokens of the images are seen while text is generated
        ("gemma3", {"sliding_window": 6}),
        ("cohere2_vision", {"sliding_window": 14}),
        ("exaone4_5", {"sliding_window": 14}),
        ("llama4", {"attention_chunk_size": 12}),
    ],
)
@torch.no_grad()
def test_windows_shorter_than_the_prompt_are_measured_in_the_whole_row(name, changes, options):
    """A window that counted the slots that are left would see more; and masks are made for layers that hold more."""
    model, inputs = tiny_model(name, text_changes=changes), batch(name, *prompts(name)["padded batch"])
    depth = len(dissect(model).text.layers)
    for layer in (1, 2, depth - 1):
        check_logits(model, inputs, {layer: 0.3}, method=method_of(name))
        check_tokens(model, inputs, {layer: 0.3}, options, method=method_of(name))


@torch.no_grad()
def test_stages_keep_fractions_of_the_original_tokens(four_layers):
    inputs = qwen_batch(*RAGGED)
    visual = [19, 12, 0, 26]
    with prune(four_layers, {0: ("random", 0.75), 1: ("key_norm", 0.5), 3: 0.25}, method="fastv") as pruning:
        four_layers(**inputs)
    stats = pruning.stats
    expected = [(int(0.75 * n), int(0.5 * n), int(0.5 * n), max(1, int(0.25 * n)) * (n > 0)) for n in visual]
    assert [sample.visual_tokens_by_layer for sample in stats.samples] == expected
    assert [sample.visual_tokens_after for sample in stats.samples] == [row[-1] for row in expected]
    assert [(stage.layer, stage.method, stage.keep) for stage in stats.stages] == [
        (0, "random", 0.75),
        (1, "key_norm", 0.5),
        (3, "fastv", 0.25),
    ]
    kept = pruning.keep_mask & pruning.scores.new_ones(()).bool()
    assert [int(row.sum()) for row in kept] == [sample.prompt_tokens_after for sample in stats.samples]
    assert "after layer 3: fastv drops all but 0.25" in repr(stats)
    assert stats.to_dict()["stages"][1]["method"] == "key_norm"


@torch.no_grad()
def test_each_image_keeps_its_fraction_of_its_original_tokens(four_layers):
    inputs = qwen_batch(*RAGGED)
    with prune(four_layers, {1: 0.6, 2: 0.3}, method="key_norm", budget="per_image") as pruning:
        four_layers(**inputs)
    assert [sample.budget_per_image for sample in pruning.stats.samples] == [[2, 3], [3], [], [7, 1]]


@torch.no_grad()
def test_the_cache_holds_what_is_left_and_its_bytes_are_told(four_layers):
    inputs = qwen_batch(*RAGGED)
    whole = four_layers(**inputs, use_cache=True).past_key_values
    with prune(four_layers, {1: 12, 3: 3}, method="fastv") as pruning:
        cache = four_layers(**inputs, use_cache=True).past_key_values
    text = inputs["attention_mask"].sum(1) - torch.tensor([19, 12, 0, 26])
    length = inputs["input_ids"].shape[1]
    expected = [length, *[int((text + torch.tensor([k, k, 0, k])).max()) for k in (12, 12, 3)]]
    assert [layer.keys.shape[2] for layer in cache.layers] == expected

    def held(cache):
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    assert pruning.stats.cache_bytes_saved == held(whole) - held(cache) > 0
    for options, saved in (({"mode": "hide"}, 0), ({}, 0)):
        with prune(four_layers, {1: 12}, method="fastv", **options) as pruning:
            four_layers.generate(**inputs, **GREEDY, cache_implementation="static")
        assert pruning.stats.cache_bytes_saved == saved
    with prune(four_layers, {1: 12}, method="fastv") as pruning:
        four_layers(**inputs, use_cache=False)
    assert pruning.stats.cache_bytes_saved is None


@torch.no_grad()
def test_a_second_turn_and_copies_of_the_cache(four_layers):
    inputs, more = qwen_batch(*RAGGED[:2]), torch.tensor([words(4, 11), words(4, 12)])
    _, _, positions = watched(four_layers, lambda: four_layers(**inputs))
    following = positions[-3:, :, -1:] + 1 + torch.arange(4)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
    # of the second row's turn two tokens are padding
    mask[1, -4:-2] = 0

    def two_turns():
        cache = DynamicCache(config=four_layers.config.get_text_config())
        four_layers(**inputs, past_key_values=cache)
        other = copy.deepcopy(cache)
        turns = {"input_ids": more, "attention_mask": mask, "position_ids": following}
        first, second = (four_layers(**turns, past_key_values=each).logits for each in (cache, other))
        assert torch.equal(first, second)
        cache.batch_select_indices(torch.tensor([1]))
        token = {"input_ids": more[1:, :1], "position_ids": following[:, 1:, -1:] + 1}
        longer = torch.nn.functional.pad(mask[1:], (0, 1), value=1)
        return first, four_layers(**token, attention_mask=longer, past_key_values=cache).logits

    dropped, hidden, _ = both(four_layers, STAGES, two_turns, method="fastv")
    assert (dropped[0] - hidden[0])[mask[:, -4:].bool()].abs().max() < TOLERANCE
    assert (dropped[1] - hidden[1]).abs().max() < TOLERANCE


def test_a_mask_over_pairs_cannot_continue_a_cache(four_layers):
    inputs = qwen_batch(RAGGED[0])
    whole = torch.ones(1, 1, 2, inputs["input_ids"].shape[1] + 2, dtype=torch.bool)
    more = {"input_ids": torch.tensor([[20, 21]]), "position_ids": torch.tensor([[[40, 41]]]).expand(3, 1, 2)}
    with prune(four_layers, {2: 0.3}, method="fastv"), torch.no_grad():
        cache = four_layers(**inputs, use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"attention_mask: expected a .batch, length. mask or None over a"):
            four_layers(**more, attention_mask=whole, past_key_values=cache)


def test_gradients_are_those_of_hiding(four_layers):
    inputs = qwen_batch(*RAGGED)
    gradients = []
    for mode in ("hide", "drop"):
        with prune(four_layers, STAGES, method="fastv", mode=mode) as pruning:
            logits = four_layers(**inputs).logits
            logits[pruning.keep_mask].square().sum().backward()
        gradients.append({name: weight.grad for name, weight in four_layers.named_parameters()})
        four_layers.zero_grad(set_to_none=True)
    hidden, dropped = gradients
    for name, gradient in hidden.items():
        if gradient is not None:
            assert torch.allclose(dropped[name], gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max()), name


@torch.no_grad()
def test_later_layers_compute_fewer_tokens_and_no_trace_is_left(four_layers):
    inputs, lengths = qwen_batch(RAGGED[0]), []
    layers = dissect(four_layers).text.layers
    before = [(dict(layer._forward_pre_hooks), dict(layer._forward_hooks)) for layer in layers]
    with prune(four_layers, STAGES, method="fastv"):
        hooks = [
            layer.mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1])) for layer in layers
        ]
        four_layers(**inputs)
    for hook in hooks:
        hook.remove()
    text = inputs["input_ids"].shape[1] - 19
    assert lengths == [text + 19, text + 11, text + 11, text + 3]
    assert [(dict(layer._forward_pre_hooks), dict(layer._forward_hooks)) for layer in layers] == before


@torch.no_grad()
def test_two_requests_at_once_drop_their_own_tokens(four_layers):
    inputs = [qwen_batch(*RAGGED), qwen_batch(RAGGED[1], seed=3)]
    with prune(four_layers, STAGES, method="fastv"):
        expected = [generate(four_layers, request) for request in inputs]
        said = together(four_layers, inputs)
    assert all(torch.equal(*pair) for pair in zip(said, expected, strict=True))


@torch.no_grad()
def test_keeping_everything_changes_nothing():
    # qwen3_vl adds features to its visual tokens between the layers
    model, inputs = tiny_model("qwen3_vl"), batch("qwen3_vl", *prompts("qwen3_vl")["padded batch"])
    expected = model(**inputs).logits
    with prune(model, {1: 1.0, 2: 1.0}, method="fastv") as pruning:
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-5)
    assert torch.equal(pruning.keep_mask, inputs["attention_mask"].bool())


@torch.no_grad()
def test_head_weights_of_a_later_layer_are_the_callers(four_layers):
    inputs = qwen_batch(*RAGGED)
    with pytest.raises(ValueError, match=r"head_weights: expected those of layer 3 for the stage after layer 2"):
        prune(four_layers, {2: 0.4})
    check_logits(four_layers, inputs, {2: 0.4}, head_weights="uniform")
    check_logits(four_layers, inputs, {0: (Hawk(normalize=None), 0.5), 2: ("pyramiddrop", 0.2)}, head_weights="uniform")


class HidesByItself(Method):
    """Keeps the first tokens, and hides the others."""

    name = "hides_by_itself"
    mode = "hide"

    def score(self, view):
        return -torch.arange(view.candidates.shape[1]).float().expand(view.candidates.shape).clone()


@torch.no_grad()
def test_a_method_says_whether_it_drops_or_hides(four_layers):
    inputs = qwen_batch(RAGGED[0])
    for mode, held in ((None, 35), ("drop", 35 - 19 + 5)):
        with prune(four_layers, {1: 5}, method=HidesByItself(), mode=mode) as pruning:
            cache = four_layers(**inputs, use_cache=True).past_key_values
        assert cache.layers[-1].keys.shape[2] == held
        assert pruning.stats.mode == (mode or "hide")
    with pytest.raises(
        ValueError, match="mode: expected one for all stages, got methods that drop and methods that hide"
    ):
        prune(four_layers, {1: 5, 2: ("fastv", 3)}, method=HidesByItself())


@pytest.mark.parametrize(
    ("stages", "options", "error", "message"),
    [
        ({}, {}, ValueError, "keep_ratio: expected stages {layer: keep} or {layer: (method, keep)}, got none"),
        ({"2": 0.4}, {}, TypeError, "got the layer '2'; count layers from 1"),
        ({True: 0.4}, {}, TypeError, "got the layer True"),
        ({-1: 0.4}, {}, ValueError, "got the layer -1; count layers from 1, 0 is before the first"),
        ({2: 1.4}, {}, ValueError, "keep_ratio[2]: expected a float in (0, 1]"),
        ({2: ("fastv",)}, {}, TypeError, "got 1 values for layer 2; write (method, keep)"),
        ({2: ("fast", 0.5)}, {}, ValueError, "method: expected one of"),
        ({1: 0.3, 2: 0.4}, {}, ValueError, "keep_ratio[2]: expected at most 0.3, which stays after layer 1, got 0.4"),
        ({1: 3, 2: 4}, {}, ValueError, "keep_ratio[2]: expected at most 3, which stays after layer 1, got 4"),
        ({2: 0.4}, {"layer": 2}, TypeError, "options 'layer' came beside stages, which say the same; leave them out"),
        ({2: ("fastv", 0.4)}, {"rounding": "ceil"}, TypeError, "options 'rounding' came beside stages that name their"),
        ({2: 0.4}, {"mode": "mask"}, ValueError, "mode: expected 'drop' or 'hide', got 'mask'"),
        ({0: 0.4}, {}, TypeError, "method: expected one that can choose before the first layer for stage 0"),
        ({4: 0.4}, {}, ValueError, "layer: expected 1 to 3, since tokens leave before the layer after it, got 4 of 4"),
        ({2: ("hiprune", 0.4)}, {}, TypeError, "it reads whole images and can only choose before the first layer"),
        ({2: ("downsample", 0.4)}, {}, TypeError, "got 'downsample' after layer 2"),
    ],
)
def test_stages_are_checked(four_layers, stages, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        prune(four_layers, stages, **{"method": "fastv", **options})


def test_a_method_of_before_stages_is_told_what_to_write(four_layers):
    class Old(HidesByItself):
        hidden_from_layer = 2

    with pytest.raises(TypeError, match=r"hidden_from_layer: expected none in Old, .* let `stages` return"):
        prune(four_layers, 0.3, method=Old())


@torch.no_grad()
def test_what_cannot_be_right_is_refused_by_name():
    needs("lfm2_vl")
    with pytest.raises(
        ValueError, match="layer: expected one of 2, since layer 3 of a lfm2_vl has no attention to rank"
    ):
        prune(model_of("lfm2_vl"), {3: 0.4}, method="fastv")
    with pytest.raises(
        ValueError, match="layer: expected 2 or more to drop tokens after, got 1; the first layer of a lfm2"
    ):
        prune(model_of("lfm2_vl"), {1: 0.4}, method="random")
    moe, inputs = tiny_model("qwen3_vl_moe"), batch("qwen3_vl_moe", *prompts("qwen3_vl_moe")["one image"])
    refused = pytest.raises(ValueError, match="output_router_logits: expected False while tokens are dropped inside")
    with prune(moe, {1: 0.4}, method="fastv"), refused:
        moe(**inputs, output_router_logits=True)
    shared = tiny_model("gemma4", text_changes={"num_kv_shared_layers": 2})
    with pytest.raises(TypeError, match="the last 2 layers of this gemma4 read keys of earlier layers"):
        prune(shared, {1: 0.4}, method="key_norm")


@torch.no_grad()
def test_an_image_that_is_gone_and_rows_of_text_alone(four_layers):
    """With one budget for the row an image may lose all its tokens before the next stage."""
    inputs = qwen_batch(question([Picture(4, 4), Picture(1, 1)]), [*words(5)])
    check_logits(four_layers, inputs, {1: 3, 2: 2, 3: 1}, method="key_norm")
    assert PyramidDrop().stages(0.125, 32) == pytest.approx({8: 0.5, 16: 0.25, 24: 0.125})
