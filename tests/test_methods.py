"""What holds for every method: budgets, hiding equals removing, padding, beams, dtypes, options, and the registry."""

import copy
import re
from pathlib import Path

import pytest
import torch

import hawk_kernels.methods
from hawk_kernels import prune
from hawk_kernels.hf.anatomy import dissect
from hawk_kernels.hf.families import FAMILIES
from hawk_kernels.hf.rotary import rotary_of_first_layer
from hawk_kernels.methods import METHODS, JointMethod, LocalAttention, Method, register, resolve_method
from hawk_kernels.selection import kept_count
from tests.family_checks import model_of, needs, prompts, watched
from tests.host_reads import HostReads
from tests.method_checks import (
    GREEDY,
    RAGGED,
    ROTATE_OTHERWISE,
    TOLERANCE,
    GivenView,
    families,
    options_of,
    rotating_families,
    visual_tokens,
)
from tests.tiny_families import batch
from tests.tiny_models import IMAGE, Picture, hide, qwen_batch, qwen_vl

every_method = pytest.mark.parametrize("method", METHODS)
every_budget = pytest.mark.parametrize("budget", ["shared", "per_image"])
# what is merged is not hidden: the tests of such methods compare with models that are handed the sums
REMOVING = [
    name
    for name, method in METHODS.items()
    if list(resolve_method(name, {}).stages(0.3, 12)) == [0] and method.stage == "decoder"
]
JOINT = [name for name, method in METHODS.items() if issubclass(method, JointMethod)]
READING = [name for name, method in METHODS.items() if method.uses_text]
ROTATING = [name for name, method in METHODS.items() if method.uses_positions]


@every_budget
@pytest.mark.parametrize("method", REMOVING)
@torch.no_grad()
def test_removing_equals_hiding(three_layers, method, budget):
    model, inputs = three_layers, qwen_batch(*RAGGED)
    with prune(model, 0.3, method=method, budget=budget, **options_of(method)) as pruning:
        pruned = model(**inputs).logits
        said = model.generate(**inputs, **GREEDY)
    kept = pruning.keep_mask
    hidden = hide(model, inputs, kept)
    assert (pruned - model(**hidden).logits)[kept].abs().max() < TOLERANCE
    assert torch.equal(said, model.generate(**hidden, **GREEDY))
    assert torch.equal(pruning.scores.isfinite(), visual_tokens(inputs))


@every_method
@torch.no_grad()
def test_every_budget_is_met_exactly_and_everything_is_identical(three_layers, method):
    model, inputs = three_layers, qwen_batch(*RAGGED)
    visual = visual_tokens(inputs)
    for keep_ratio in (1, 4, 7, 0.05, 0.5, 0.95, 1000):
        with prune(model, keep_ratio, method=method, **options_of(method)) as pruning:
            model(**inputs)
        expected = [kept_count(keep_ratio, int(count)) for count in visual.sum(1)]
        assert (pruning.keep_mask & visual).sum(1).tolist() == expected
        assert [sample.visual_tokens_after for sample in pruning.stats.samples] == expected
    whole = model.generate(**inputs, **GREEDY)
    before = copy.deepcopy(model.state_dict())
    with prune(model, 1.0, method=method, **options_of(method)):
        assert torch.equal(model.generate(**inputs, **GREEDY), whole)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@every_method
@torch.no_grad()
def test_a_prompt_keeps_the_same_tokens_alone_in_a_batch_and_with_any_padding(three_layers, method):
    rows = [RAGGED[0], RAGGED[1]]
    pixels = qwen_batch(*rows)["pixel_values"]
    kept = {}
    for name, inputs in {
        "left": qwen_batch(*rows),
        "right": qwen_batch(*rows, padding="right"),
        "with text": {**qwen_batch(*rows, RAGGED[2]), "pixel_values": pixels},
        "alone": {**qwen_batch(rows[0]), "pixel_values": pixels[: 19 * 4]},
    }.items():
        with prune(three_layers, 0.3, method=method, **options_of(method)) as pruning:
            three_layers(**inputs)
        visual = inputs["input_ids"] == IMAGE
        kept[name] = [pruning.keep_mask[row, visual[row]] for row in range(len(visual))]
    for rows_of in (kept["right"], kept["with text"]):
        assert all(torch.equal(one, other) for one, other in zip(kept["left"], rows_of, strict=False))
    assert torch.equal(kept["alone"][0], kept["left"][0])


@every_method
@torch.no_grad()
def test_the_beams_of_a_sample_keep_the_same_tokens(three_layers, method):
    with prune(three_layers, 0.3, method=method, **options_of(method)) as pruning:
        three_layers.generate(**qwen_batch(*RAGGED), **GREEDY, num_beams=2)
    rows = pruning.keep_mask.view(len(RAGGED), 2, -1)
    assert torch.equal(rows[:, 0], rows[:, 1])


@pytest.mark.parametrize("method", REMOVING)
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3", "qwen3_5"])
@torch.no_grad()
def test_other_families_keep_the_same_number(name, method):
    tiny, inputs = model_of(name), batch(name, *prompts(name)["padded batch"])
    with prune(tiny, 2, method=method, budget="per_image", **options_of(method)) as pruning:
        assert tiny(**inputs).logits[pruning.keep_mask].isfinite().all()
    assert [sample.budget_per_image for sample in pruning.stats.samples] == [[2, 2], [2]]


@every_method
@torch.no_grad()
def test_dtypes_of_models(method):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        tiny = qwen_vl(layers=3, dtype=dtype)
        with prune(tiny, 0.3, method=method, **options_of(method)) as pruning:
            assert tiny(**qwen_batch(*RAGGED, dtype=dtype)).logits.isfinite().all()
        assert pruning.scores.dtype == torch.float32


@every_budget
@every_method
@torch.no_grad()
def test_no_method_waits_for_the_device(three_layers, method, budget):
    folder = Path(hawk_kernels.methods.__file__).parent
    files = tuple(f"{path.name}:" for path in folder.glob("*.py"))
    inputs = qwen_batch(*RAGGED)
    with prune(three_layers, 0.3, method=method, budget=budget, **options_of(method)), HostReads() as reads:
        three_layers(**inputs)
    assert not [place for place in reads.places if place.startswith(files)]


@every_budget
@pytest.mark.parametrize(
    "method", ["divprune", "cdpruner", "evs", "vidcom2", "mmtok", "fastervlm", "vispruner", "holov", "vscan"]
)
def test_everything_stays_on_the_device_of_the_model(method, budget):
    """A tensor of the device "meta" has no values to read, and does not mix with those of the host."""
    meta, images = {"device": "meta"}, None if budget == "shared" else [[8, 12], [12]]
    view = GivenView(
        [20, 12],
        images,
        0.4,
        embeddings=torch.empty(2, 20, 6, **meta),
        features=torch.empty(2, 20, 5, **meta),
        attention=torch.empty(2, 20, **meta),
        local=LocalAttention(torch.empty(2, 20, **meta), [[[(2, 2, 2)], [(1, 3, 4)]], [[(3, 2, 2)]]], True),
        text=(torch.empty(2, 3, 6, **meta), torch.empty(2, 3, dtype=torch.bool, **meta)),
        frames=[[[(2, 2)] * 2, [(3, 4)]], [[(2, 2)] * 3]],
    ).to("meta")
    selection = METHODS[method]().select(view, 0.4)
    assert {tensor.device.type for tensor in selection} == {"meta"}
    assert selection.mask.shape == (2, 20)
    assert selection.indices.shape == (2, 8 if images is None else 7)


@every_budget
@every_method
@torch.no_grad()
def test_a_budget_beyond_every_tensor_keeps_everything(three_layers, method, budget):
    inputs = qwen_batch(*RAGGED)
    with prune(three_layers, 10**30, method=method, budget=budget, **options_of(method)) as pruning:
        three_layers(**inputs)
    assert torch.equal(pruning.keep_mask, inputs["attention_mask"].bool())


@pytest.mark.parametrize("method", READING)
def test_methods_that_read_the_question_ask_for_one(three_layers, method):
    inputs = qwen_batch([Picture(3, 3)])
    nothing = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
    with (
        pytest.raises(ValueError, match="query: expected text in row 0"),
        prune(three_layers, 0.3, method=method, query=nothing, **options_of(method)),
    ):
        three_layers(**inputs)


@pytest.mark.parametrize("method", JOINT)
def test_methods_that_choose_jointly_have_no_scores_before(method):
    with pytest.raises(NotImplementedError, match=f"method '{method}' cannot score tokens before it has chosen"):
        METHODS[method]().score(None)


@every_method
def test_roundings_are_checked(method):
    with pytest.raises(ValueError, match="rounding: expected 'floor'"):
        resolve_method(method, {"rounding": "up"})


class TestPositions:
    @families(rotating_families())
    @torch.no_grad()
    def test_rotated_keys_are_those_of_the_cache(self, name):
        needs(name)
        tiny, inputs = model_of(name), batch(name, *prompts(name)["padded batch"])
        anatomy, seen = dissect(tiny), []
        index, layer = next((i, one) for i, one in enumerate(anatomy.text.layers) if hasattr(one, "self_attn"))
        hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        output, embeds, positions = watched(tiny, lambda: tiny(**inputs, use_cache=True))
        hook.remove()
        rotary = rotary_of_first_layer(anatomy, embeds, positions)
        keys = anatomy.projections.keys(anatomy.projections.normalize(seen[0])).transpose(1, 2)
        length = torch.arange(embeds.shape[1]).expand(len(embeds), -1)
        found, expected = rotary.rotated(keys, length), output.past_key_values.layers[index].keys
        valid = inputs["attention_mask"].bool()[:, None, :, None]
        assert torch.allclose(found * valid, expected * valid, atol=1e-5)
        assert not torch.allclose(keys * valid, expected * valid, atol=1e-2)

    @pytest.mark.parametrize("method", ROTATING)
    @pytest.mark.parametrize("name", sorted(ROTATE_OTHERWISE))
    def test_families_that_rotate_otherwise_are_refused(self, name, method):
        needs(name)
        known = ", ".join(family.model_type for family in FAMILIES if family.model_type not in ROTATE_OTHERWISE)
        with pytest.raises(TypeError, match=f"rotary position embeddings of {name}, got '{method}'.*{known}"):
            prune(model_of(name), 0.3, method=method, **options_of(method))


class TestRegistry:
    @pytest.fixture(autouse=True)
    def _registry_as_it_was(self):
        kept = dict(METHODS)
        yield
        METHODS.clear()
        METHODS.update(kept)

    def test_every_file_of_the_folder_registers_the_method_of_its_name(self):
        folder = Path(hawk_kernels.methods.__file__).parent
        files = {path.stem for path in folder.glob("*.py") if "\n@register\n" in path.read_text()}
        assert files == set(METHODS)
        shared = {path.stem for path in folder.glob("*.py")} - files
        assert shared == {"__init__", "base", "prefill_view"}

    @every_method
    def test_every_method_has_a_test_that_holds_it_to_its_reference(self, repository, method):
        files = (repository / "tests" / f"test_{prefix}{method}.py" for prefix in ("method_", ""))
        assert any("csrc_ref" in file.read_text() for file in files if file.exists())

    @every_method
    def test_a_method_says_what_tables_tell_of_it(self, method):
        found = METHODS[method]
        assert found.name == method
        assert re.fullmatch(r"[A-Z][a-z]+s .{20,120}\.", found.summary), found.summary
        assert found.signal
        assert found.paper is None or re.fullmatch(r"\d{4}\.\d{5}", found.paper)
        assert getattr(hawk_kernels.methods, found.__name__) is found

    def test_a_class_of_ones_own_may_register(self, three_layers):
        @register
        class First(Method):
            name = "first"

            def score(self, view):
                ranks = torch.arange(view.candidates.shape[1]).neg().float()
                return ranks.expand(view.candidates.shape).masked_fill(~view.candidates, -torch.inf)

        inputs = qwen_batch(RAGGED[0])
        with torch.no_grad(), prune(three_layers, 3, method="first") as pruning:
            three_layers(**inputs)
        places = visual_tokens(inputs)[0].nonzero().flatten()
        assert pruning.keep_mask[0, places].tolist() == [True] * 3 + [False] * (len(places) - 3)
        with pytest.raises(ValueError, match=r"method: expected one of .*'first'.*, got 'second'"):
            resolve_method("second", {})

    def test_a_class_that_is_defined_again_replaces_the_earlier_one(self):
        def define():
            @register
            class Mine(Method):
                name = "mine"

                def score(self, view):
                    raise NotImplementedError

            return Mine

        first, second = define(), define()
        assert first is not second
        assert METHODS["mine"] is second

    def test_a_name_belongs_to_one_method(self):
        class Other(METHODS["random"]):
            pass

        with pytest.raises(
            ValueError, match=r"name: expected one that no method has yet, got 'random'.*random\.Random"
        ):
            register(Other)

    def test_what_is_no_method_is_refused(self):
        class Unfinished(Method):
            name = "unfinished"

        class Nameless(Method):
            def score(self, view):
                raise NotImplementedError

        for wrong, got in ((int, "int"), (METHODS["random"](), "Random")):
            with pytest.raises(TypeError, match=f"derived from hawk_kernels.methods.Method, got {got}"):
                register(wrong)
        with pytest.raises(TypeError, match="got Unfinished; define score"):
            register(Unfinished)
        with pytest.raises(ValueError, match="name: expected a string, got None; Nameless must say"):
            register(Nameless)

    def test_an_unknown_attribute_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="has no attribute 'Unknown'"):
            hawk_kernels.methods.Unknown  # noqa: B018
        assert {"HiPrune", "METHODS"} <= set(dir(hawk_kernels.methods))
