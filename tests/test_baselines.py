"""The compared methods: each keeps what its literal twin keeps, and removing equals hiding, whatever the batch."""

import copy
import itertools
import re
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import csrc_ref
from hawk_kernels import prune
from hawk_kernels.hf.anatomy import dissect
from hawk_kernels.hf.families import FAMILIES
from hawk_kernels.hf.rotary import rotary_of_first_layer
from hawk_kernels.methods import METHODS, FastV, LastQuery, resolve_method
from hawk_kernels.methods.dart import dart_select
from hawk_kernels.methods.downsample import evenly_spread
from hawk_kernels.methods.random import random_scores
from hawk_kernels.selection import kept_count
from tests.family_checks import compiled_decoding, compiled_example, generate, model_of, needs, prompts, watched
from tests.tiny_families import BY_NAME, batch, tiny_model
from tests.tiny_models import (
    BEGIN,
    END_OF_TURN,
    FIRST_WORD,
    IMAGE,
    VIDEO,
    VOCABULARY,
    Picture,
    hide,
    question,
    qwen_batch,
    qwen_vl,
    words,
)

TOLERANCE = 1e-4
REMOVING = ("hawk_rope", "divprune", "cdpruner", "dart", "key_norm", "random", "downsample")
RAGGED = [
    question([Picture(3, 3), Picture(2, 5)]),
    question(Picture(4, 3), seed=3, after=2),
    [BEGIN, *words(9), END_OF_TURN],
    question([Picture(2, 3, frames=4), Picture(1, 2)], seed=5),
]
GREEDY = {
    "max_new_tokens": 4,
    "do_sample": False,
    "suppress_tokens": list(range(FIRST_WORD)),
    "eos_token_id": VOCABULARY + 1,
}


def options_of(method):
    return {"head_weights": "uniform"} if METHODS[method].uses_head_weights else {}


@pytest.fixture(scope="module")
def model():
    return qwen_vl(layers=3)


class Literal:
    """What the first layer sees of a batch, one token after the other, by the model's own modules."""

    def __init__(self, model, inputs, query_mask):
        _, self.embeds, self.positions = watched(model, lambda: model(**inputs))
        layer = model.model.language_model.layers[0]
        normed = layer.input_layernorm(self.embeds)
        self.queries, self.keys = (
            projection(normed).unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(1, 2)
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
        ids = inputs["input_ids"]
        self.visual, self.text = (ids == IMAGE) | (ids == VIDEO), query_mask

    def images(self, row):
        """Places of the visual tokens of each image."""
        places = self.visual[row].nonzero().flatten()
        return places.tensor_split((places.diff() > 1).nonzero().flatten() + 1)

    def rotated(self, heads, row):
        positions = self.positions[-3:].expand(3, len(self.embeds), -1)[:, row]
        return csrc_ref.rotated(heads[row], positions, sections=[2, 3, 3])


def literal_scores_of_rows(method, literal):
    """Scores `[B, T]` of the methods that score token by token."""
    scores = torch.full(literal.visual.shape, -torch.inf)
    for row, visual in enumerate(literal.visual):
        if not visual.any():
            continue
        if method == "key_norm":
            scores[row, visual] = torch.tensor(csrc_ref.key_norm_scores(literal.keys[row][:, visual]))
        if method == "hawk_rope":
            queries, keys = (literal.rotated(x, row) for x in (literal.queries, literal.keys))
            weights = torch.full((queries.shape[0],), 1 / queries.shape[0])
            of_row = csrc_ref.score_tokens(queries[:, literal.text[row]], keys[:, visual], weights, normalize="l2")
            scores[row, visual] = of_row
    return scores


def literal_choice(method, literal, row, places, budget, image_sides):
    """Which of the tokens at `places` the literal twin keeps."""
    visual, text = literal.embeds[row, places], literal.embeds[row, literal.text[row]]
    everything, all_text = torch.ones(1, len(visual)).bool(), torch.ones(1, len(text)).bool()
    if method == "divprune":
        return csrc_ref.greedy_max_min(visual, budget).mask
    if method == "cdpruner":
        quality = csrc_ref.cdpruner_quality(visual[None], text[None], mask=everything, text_mask=all_text)
        return csrc_ref.greedy_dpp(visual, quality[0], budget).mask
    if method == "dart":
        norms = (literal.keys[row][:, where].abs().sum(dim=(0, 2))[None] for where in (places, literal.text[row]))
        visual_norm, text_norm = norms
        masks = {"mask": everything, "text_mask": all_text}
        return csrc_ref.dart_select(visual[None], visual_norm, text[None], text_norm, budget, **masks).mask[0]
    kept = torch.zeros(len(places), dtype=torch.bool)
    kept[csrc_ref.evenly_spread(image_sides, budget)] = True
    return kept


@pytest.mark.parametrize("keep_ratio", [0.3, 0.6, 3])
@pytest.mark.parametrize("budget", ["shared", "per_image"])
@pytest.mark.parametrize("method", ["divprune", "cdpruner", "dart", "downsample", "key_norm", "hawk_rope"])
@torch.no_grad()
def test_kept_tokens_are_those_of_the_literal_twin(model, method, budget, keep_ratio):
    inputs = qwen_batch(*RAGGED)
    with prune(model, keep_ratio, method=method, budget=budget, **options_of(method)) as pruning:
        model(**inputs)
    literal = Literal(model, inputs, pruning.query_mask)
    pictures = [[item for item in row if isinstance(item, Picture)] for row in RAGGED]
    by_score = method in ("key_norm", "hawk_rope")
    if by_score:
        scores = literal_scores_of_rows(method, literal)
        assert torch.allclose(pruning.scores, scores, atol=1e-4, rtol=1e-4)
    for row, of_row in enumerate(pictures):
        images = literal.images(row) if of_row else []
        units = list(zip(images, [[picture] for picture in of_row], strict=True))
        if budget == "shared" and of_row:
            units = [(torch.cat(images), of_row)]
        for places, inside in units:
            count = kept_count(keep_ratio, len(places))
            if by_score:
                expected = csrc_ref.select_topk(scores[row, places], count).mask
            else:
                sides = [(picture.height, picture.width) for picture in inside for _ in range(picture.frames)]
                expected = literal_choice(method, literal, row, places, count, sides)
            assert torch.equal(pruning.keep_mask[row, places], expected)
            assert int(expected.sum()) == count


@pytest.mark.parametrize("budget", ["shared", "per_image"])
@pytest.mark.parametrize("method", REMOVING)
@torch.no_grad()
def test_removing_equals_hiding(model, method, budget):
    inputs = qwen_batch(*RAGGED)
    with prune(model, 0.3, method=method, budget=budget, **options_of(method)) as pruning:
        pruned = model(**inputs).logits
        said = model.generate(**inputs, **GREEDY)
    kept = pruning.keep_mask
    hidden = hide(model, inputs, kept)
    assert (pruned - model(**hidden).logits)[kept].abs().max() < TOLERANCE
    assert torch.equal(said, model.generate(**hidden, **GREEDY))
    visual = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
    assert torch.equal(pruning.scores.isfinite(), visual)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_every_budget_is_met_exactly_and_everything_is_identical(model, method):
    inputs = qwen_batch(*RAGGED)
    visual = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
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


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_prompt_keeps_the_same_tokens_alone_in_a_batch_and_with_any_padding(model, method):
    rows = [RAGGED[0], RAGGED[1]]
    pixels = qwen_batch(*rows)["pixel_values"]
    kept = {}
    for name, inputs in {
        "left": qwen_batch(*rows),
        "right": qwen_batch(*rows, padding="right"),
        "with text": {**qwen_batch(*rows, RAGGED[2]), "pixel_values": pixels},
        "alone": {**qwen_batch(rows[0]), "pixel_values": pixels[: 19 * 4]},
    }.items():
        with prune(model, 0.3, method=method, **options_of(method)) as pruning:
            model(**inputs)
        visual = inputs["input_ids"] == IMAGE
        kept[name] = [pruning.keep_mask[row, visual[row]] for row in range(len(visual))]
    for rows_of in (kept["right"], kept["with text"]):
        assert all(torch.equal(one, other) for one, other in zip(kept["left"], rows_of, strict=False))
    assert torch.equal(kept["alone"][0], kept["left"][0])


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_the_beams_of_a_sample_keep_the_same_tokens(model, method):
    with prune(model, 0.3, method=method, **options_of(method)) as pruning:
        model.generate(**qwen_batch(*RAGGED), **GREEDY, num_beams=2)
    rows = pruning.keep_mask.view(len(RAGGED), 2, -1)
    assert torch.equal(rows[:, 0], rows[:, 1])


class TestRandom:
    @given(seed=st.integers(0, 2**64 - 1), key=st.integers(0, 2**32 - 1), count=st.integers(0, 40))
    def test_scores_are_those_of_whole_numbers(self, seed, key, count):
        assert random_scores(seed, key, count).tolist() == csrc_ref.random_scores(seed, key, count)

    @torch.no_grad()
    def test_seeds_and_questions_differ_and_repeat(self, model):
        inputs = qwen_batch(question(Picture(6, 6)), question(Picture(6, 6), seed=1))
        kept = []
        for seed in (0, 1, 0):
            with prune(model, 0.5, method="random", seed=seed) as pruning:
                model(**inputs)
            kept.append(pruning.keep_mask)
        assert torch.equal(kept[0], kept[2])
        assert not torch.equal(kept[0], kept[1])
        places = (inputs["input_ids"] == IMAGE)[0]
        assert not torch.equal(kept[0][0, places], kept[0][1, places])

    def test_every_token_is_as_likely(self):
        picked = torch.zeros(16)
        for key in range(4000):
            picked[torch.tensor(random_scores(7, key, 16)).topk(4).indices] += 1
        # 1000 expected each, standard deviation 27
        assert picked.min() > 870
        assert picked.max() < 1130


class TestDownsample:
    @given(
        frames=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=5),
        share=st.floats(0, 1),
    )
    def test_places_are_those_of_exact_fractions(self, frames, share):
        total = sum(height * width for height, width in frames)
        count = max(1, round(share * total))
        places = evenly_spread(frames, count)
        assert places == csrc_ref.evenly_spread(frames, count)
        assert len(places) == count
        assert places == sorted(set(places))
        assert places[0] >= 0
        assert places[-1] < total

    def test_a_quarter_of_a_square_is_every_second_token_of_every_second_line(self):
        assert evenly_spread([(4, 4)], 4) == [5, 7, 13, 15]
        assert evenly_spread([(4, 4)], 1) == [10]
        assert evenly_spread([(2, 8)], 4) == [9, 11, 13, 15]
        # frames of a video share a budget, and where it is short, frames are left out evenly
        assert evenly_spread([(2, 2)] * 4, 4) == [3, 7, 11, 15]
        assert evenly_spread([(2, 2)] * 4, 2) == [7, 15]

    @pytest.mark.parametrize("name", ["llava", "qwen3_vl", "llava_onevision", "gemma3", "video_llama_3"])
    @torch.no_grad()
    def test_other_families(self, name):
        tiny = model_of(name)
        for prompt in ("padded batch", *(["video"] if BY_NAME[name].video else [])):
            with prune(tiny, 0.3, method="downsample") as pruning:
                tiny(**batch(name, *prompts(name)[prompt]))
            assert all(sample.visual_tokens_after for sample in pruning.stats.samples)

    @torch.no_grad()
    def test_frames_that_are_set_apart_by_text_are_one_video(self):
        tiny, inputs = model_of("qwen3_vl"), batch("qwen3_vl", question(Picture(2, 3, frames=6)))
        with prune(tiny, 3, method="downsample", budget="per_image") as pruning:
            tiny(**inputs)
        visual = inputs["input_ids"][0] == VIDEO
        of_frames = pruning.keep_mask[0, visual].view(3, -1).sum(1)
        assert pruning.stats.samples[0].budget_per_image == [3]
        assert of_frames.tolist() == [1, 1, 1]


@given(
    seed=st.integers(0, 2**20),
    num_tokens=st.integers(1, 14),
    num_words=st.integers(0, 6),
    pivots=st.integers(1, 5),
    text_pivots=st.integers(0, 5),
    r=st.one_of(st.floats(0.01, 1.0), st.integers(1, 14)),
)
def test_dart_is_its_literal_twin(seed, num_tokens, num_words, pivots, text_pivots, r):
    generator = torch.Generator().manual_seed(seed)
    visual, text = (torch.randn(3, count, 6, generator=generator) for count in (num_tokens, num_words))
    norms = [torch.rand(3, count, generator=generator).mul(8).round() for count in (num_tokens, num_words)]
    mask, text_mask = (torch.rand(3, count, generator=generator) < 0.7 for count in (num_tokens, num_words))
    arguments = (visual, norms[0], text, norms[1], r)
    options = {"mask": mask, "text_mask": text_mask, "pivots": pivots, "text_pivots": text_pivots}
    found, expected = dart_select(*arguments, **options), csrc_ref.dart_select(*arguments, **options)
    assert torch.equal(found.mask, expected.mask)
    assert torch.equal(found.indices, expected.indices)
    assert torch.allclose(found.scores, expected.scores, atol=1e-5)


@torch.no_grad()
def test_cdpruner_negate_turns_relevance_around(model):
    inputs = qwen_batch(question(Picture(5, 5)))
    kept = {}
    for negate in (False, True):
        with prune(model, 1, method="cdpruner", negate=negate) as pruning:
            model(**inputs)
        kept[negate] = pruning.keep_mask
    literal = Literal(model, inputs, pruning.query_mask)
    similarity = csrc_ref.cdpruner_quality(
        literal.embeds, literal.embeds, mask=literal.visual, text_mask=literal.text
    ).masked_fill(~literal.visual, torch.nan)
    (best,) = (kept[False] & literal.visual)[0].nonzero().flatten().tolist()
    (worst,) = (kept[True] & literal.visual)[0].nonzero().flatten().tolist()
    assert similarity[0, best] == similarity[0][literal.visual[0]].max()
    assert similarity[0, worst] == similarity[0][literal.visual[0]].min()


@torch.no_grad()
def test_key_norm_keeps_the_shortest_or_the_longest(model):
    inputs = qwen_batch(question(Picture(5, 5)))
    visual, kept = inputs["input_ids"] == IMAGE, {}
    for keep in ("shortest", "longest"):
        with prune(model, 12, method="key_norm", keep=keep) as pruning:
            model(**inputs)
        kept[keep] = pruning.keep_mask & visual
    assert (kept["shortest"] & kept["longest"]).sum() == 0
    assert (kept["shortest"] | kept["longest"]).sum() == 24


# layers without attention see tokens in another way; these rotate in another way
HYBRID = {"qwen3_5", "qwen3_5_moe", "lfm2_vl", "lfm3_vl", "minicpmv4_6", "minicpmv4_7", "minicpm_ocr"}
OTHERWISE = {"gemma4", "gemma4_unified", "hunyuan_vl", "kimi_k25", "llama4"}
# one family of each kind of text model; the rest is a tail that may run elsewhere
CORE = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "qwen3_5", "cohere2_vision", "exaone4_5", "muse_glimmer")


def families(names):
    marked = [pytest.param(name, marks=() if name in CORE else pytest.mark.long_tail) for name in names]
    return pytest.mark.parametrize("name", marked)


ROTATING = [name for name in BY_NAME if name not in OTHERWISE]


@contextmanager
def without_tokens(model, layer, kept):
    """The layers from `layer` on, counted from 0, get the kept tokens of one row alone, and what goes with them."""

    def take(module, args, kwargs):
        kwargs = {**kwargs, "past_key_values": None}
        for name, value in kwargs.items():
            if isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape == (1, len(kept)):
                kwargs[name] = value[:, kept]
        if kwargs.get("position_embeddings") is not None:
            kwargs["position_embeddings"] = tuple(angle[:, kept] for angle in kwargs["position_embeddings"])
        if kwargs.get("position_ids") is not None and kwargs["position_ids"].dim() == 3:
            kwargs["position_ids"] = kwargs["position_ids"][..., kept]
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = kwargs["attention_mask"][:, :, kept][..., kept]
        return (args[0][:, kept], *args[1:]), kwargs

    def put_back(module, args, output):
        whole = output.new_zeros(1, len(kept), output.shape[-1])
        whole[:, kept] = output
        return whole

    hooks = []
    for module in dissect(model).text.layers[layer:]:
        hooks += [module.register_forward_pre_hook(take, with_kwargs=True), module.register_forward_hook(put_back)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def of_text(model, embeds, positions):
    """Logits of the text model of a Qwen for one row, without a cache."""
    text = model.model.language_model
    return model.lm_head(text(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state)[0]


class TestFastV:
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("padding", ["left", "right"])
    @torch.no_grad()
    def test_hiding_equals_removing_inside_the_stack(self, attention, padding):
        tiny = qwen_vl(layers=4, attention=attention)
        inputs = qwen_batch(*RAGGED, padding=padding)
        for layer in (1, 2, 3):
            with prune(tiny, 0.3, method="fastv", layer=layer) as pruning:
                logits = tiny(**inputs).logits
            kept, valid = pruning.keep_mask, inputs["attention_mask"].bool()
            whole = tiny(**inputs).logits
            assert (logits - whole)[kept].abs().max() > 100 * TOLERANCE
            _, embeds, positions = watched(tiny, lambda: tiny(**inputs))
            for row in range(len(kept)):
                stays, at = kept[row, valid[row]], positions[-3:, row : row + 1, valid[row]]
                with without_tokens(tiny, layer, stays):
                    expected = of_text(tiny, embeds[row : row + 1, valid[row]], at)
                assert (expected[stays] - logits[row, kept[row]]).abs().max() < TOLERANCE

    @torch.no_grad()
    def test_scores_are_the_softmax_of_the_last_query(self):
        tiny = qwen_vl(layers=3, attention="eager")
        inputs = qwen_batch(*RAGGED)
        for layer in (1, 2):
            with prune(tiny, 0.3, method="fastv", layer=layer) as pruning:
                tiny(**inputs)
            attention = tiny(**inputs, output_attentions=True).attentions[layer - 1]
            expected = attention[:, :, -1].mean(dim=1)
            visual = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
            assert torch.allclose(pruning.scores[visual], expected[visual], atol=1e-6)
            assert (pruning.scores[~visual] == -torch.inf).all()
            kept = csrc_ref.select_topk(expected, 0.3, mask=visual).mask
            assert torch.equal(pruning.keep_mask & visual, kept)

    @families([name for name in ROTATING if name not in HYBRID])
    @torch.no_grad()
    def test_scores_of_other_families_in_layers_with_and_without_positions(self, name):
        needs(name)
        tiny, inputs = tiny_model(name, attention="eager"), batch(name, *prompts(name)["padded batch"])
        attentions = tiny(**inputs, output_attentions=True).attentions
        for layer in range(1, len(attentions)):
            with prune(tiny, 0.3, method="fastv", layer=layer) as pruning:
                tiny(**inputs)
            visual = pruning.scores.isfinite()
            expected = attentions[layer - 1][:, :, -1].mean(dim=1)
            assert torch.allclose(pruning.scores[visual], expected[visual], atol=1e-6)

    def test_the_softmax_is_that_of_the_literal_twin(self):
        query, keys = torch.randn(2, 4, 1, 8) * 6, torch.randn(2, 2, 20, 8) * 6
        visible = torch.rand(2, 20) < 0.6
        visible[:, -1] = True
        source = torch.where(visible, torch.arange(20), 19)
        copies = keys.gather(2, source[:, None, :, None].expand_as(keys))

        class View:
            candidates = visible

            @staticmethod
            def last_query():
                return LastQuery(query, copies, visible, torch.arange(20).expand(2, -1), 0.4)

        expected = csrc_ref.fastv_scores(query[:, :, 0], keys, visible=visible, scale=0.4)
        assert torch.allclose(FastV().score(View)[visible], expected[visible], atol=1e-6)

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"use_cache": False},
            {"cache_implementation": "static"},
            {"num_beams": 3},
            {"do_sample": True, "temperature": 1.5},
        ],
        ids=str,
    )
    @torch.no_grad()
    def test_every_way_to_generate_hides_the_same_tokens(self, model, changes):
        inputs = qwen_batch(*RAGGED)
        torch.manual_seed(3)
        with prune(model, 0.3, method="fastv") as pruning:
            said = model.generate(**inputs, **{**GREEDY, **changes})
        kept = pruning.keep_mask.unflatten(0, (len(RAGGED), -1))[:, 0]
        assert said.shape == (len(RAGGED), inputs["input_ids"].shape[1] + GREEDY["max_new_tokens"])
        if changes.get("num_beams") or changes.get("do_sample"):
            return
        # token by token, with everything in the sequence that was said before
        prompt = inputs["input_ids"].shape[1]
        _, embeds, positions = watched(model, lambda: model(**inputs))
        valid = inputs["attention_mask"].bool()
        for row in range(len(RAGGED)):
            for step in range(GREEDY["max_new_tokens"]):
                tail = model.get_input_embeddings()(said[row, prompt : prompt + step])[None]
                sequence = torch.cat([embeds[row : row + 1, valid[row]], tail], dim=1)
                at = positions[-3:, row : row + 1, valid[row]]
                at = torch.cat([at, at[..., -1:] + 1 + torch.arange(step)], dim=-1)
                stays = torch.cat([kept[row, valid[row]], torch.ones(step, dtype=torch.bool)])
                with without_tokens(model, 2, stays):
                    logits = of_text(model, sequence, at)[-1].index_fill(-1, torch.arange(FIRST_WORD), -torch.inf)
                assert int(logits.argmax()) == int(said[row, prompt + step])

    @pytest.mark.parametrize("changes", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2}], ids=str)
    @torch.no_grad()
    def test_modes_agree_with_and_without_a_cache(self, model, changes):
        inputs = qwen_batch(RAGGED[0])
        with prune(model, 0.3, method="fastv") as pruning:
            said = model.generate(**inputs, **GREEDY, **changes)
            mask = pruning.keep_mask[:1]
            plain = {"use_cache": False, **changes} if "num_beams" in changes else {}
            assert torch.equal(said, model.generate(**inputs, **GREEDY, **plain))
        assert torch.equal(mask, pruning.keep_mask[:1])

    @torch.no_grad()
    def test_a_conversation_goes_on_over_the_cache(self, model):
        from transformers import DynamicCache

        inputs, cache = qwen_batch(RAGGED[0]), DynamicCache(config=model.config.get_text_config())
        more = torch.tensor([words(4, 11)])
        _, embeds, positions = watched(model, lambda: model(**inputs))
        following = positions[-3:, :, -1:] + 1 + torch.arange(4)
        with prune(model, 0.3, method="fastv") as pruning:
            model(**inputs, past_key_values=cache)
            later = model(input_ids=more, position_ids=following, past_key_values=cache).logits
        stays = torch.cat([pruning.keep_mask[0], torch.ones(4, dtype=torch.bool)])
        sequence = torch.cat([embeds, model.get_input_embeddings()(more)], dim=1)
        with without_tokens(model, 2, stays):
            expected = of_text(model, sequence, torch.cat([positions[-3:], following], dim=-1))
        assert (expected[-4:] - later[0]).abs().max() < TOLERANCE

    @torch.no_grad()
    def test_a_cache_that_is_filled_anew_forgets(self, model):
        from transformers import StaticCache

        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
        text = torch.tensor([[BEGIN, *words(9), END_OF_TURN, 20]])
        positions = torch.arange(12).expand(3, 1, -1)
        expected = model(input_ids=text, position_ids=positions).logits
        with prune(model, 0.3, method="fastv"):
            model(**qwen_batch(RAGGED[0]), past_key_values=cache)
            cache.reset()
            prompt = model(input_ids=text[:, :-1], position_ids=positions[..., :-1], past_key_values=cache).logits
            following = model(input_ids=text[:, -1:], position_ids=positions[..., -1:], past_key_values=cache).logits
        assert torch.allclose(torch.cat([prompt, following], dim=1), expected, atol=1e-5)

    @torch.no_grad()
    def test_an_error_inside_leaves_nothing_behind(self, model):
        inputs = qwen_batch(RAGGED[0])
        whole = model(**inputs).logits
        hook = model.model.language_model.layers[1].self_attn.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"), prune(model, 0.3, method="fastv"):
            model(**inputs)
        hook.remove()
        assert torch.equal(model(**inputs).logits, whole)
        with prune(model, 0.3, method="fastv") as pruning:
            assert not torch.equal(model(**inputs).logits, whole)
        assert pruning.stats.method_options == {"layer": 2, "rounding": "floor"}

    @torch.no_grad()
    def test_compiled_decoding_takes_no_more_graphs_than_unpruned(self):
        tiny, inputs, positions = compiled_example("llava")
        _, graphs = compiled_decoding(tiny, inputs, positions)
        with prune(tiny, 0.3, method="fastv", layer=1):
            expected = generate(tiny, inputs)[:, inputs["input_ids"].shape[1] :]
            said, hidden_graphs = compiled_decoding(tiny, inputs, positions)
        assert torch.equal(said, expected)
        assert hidden_graphs == graphs

    @families([name for name in ROTATING if name not in HYBRID])
    @torch.no_grad()
    def test_other_families(self, name):
        needs(name)
        tiny, inputs = model_of(name), batch(name, *prompts(name)["one image"])
        depth = len(dissect(tiny).text.layers)
        for layer in (1, depth - 1):
            with prune(tiny, 0.3, method="fastv", layer=layer) as pruning:
                logits = tiny(**inputs).logits
                said = tiny.generate(**inputs, **GREEDY)
                assert torch.equal(said, tiny.generate(**inputs, **GREEDY))
            kept = pruning.keep_mask[0]
            assert int((~kept).sum()) > 0
            with without_tokens(tiny, layer, kept):
                expected = tiny(**inputs, use_cache=False).logits
            assert (logits - expected)[0, kept].abs().max() < TOLERANCE

    @torch.no_grad()
    def test_windows_shorter_than_the_prompt(self):
        changes = {"sliding_window": 6}
        tiny = tiny_model("gemma3", text_changes=changes)
        inputs = batch("gemma3", *prompts("gemma3")["one image"])
        with prune(tiny, 0.3, method="fastv", layer=1) as pruning:
            logits = tiny(**inputs).logits
            said = tiny.generate(**inputs, **GREEDY)
            assert torch.equal(said, tiny.generate(**inputs, **GREEDY, cache_implementation="static"))
        with without_tokens(tiny, 1, pruning.keep_mask[0]):
            expected = tiny(**inputs, use_cache=False).logits
        assert (logits - expected)[pruning.keep_mask].abs().max() < TOLERANCE

    def test_what_it_cannot_do_is_refused(self, model):
        with pytest.raises(
            ValueError, match=re.escape("layer: expected 1 to 2, since tokens are hidden from the layers")
        ):
            prune(model, 0.3, method="fastv", layer=3)
        with pytest.raises(TypeError, match="qwen3_5 has layers without attention masks"):
            prune(model_of("qwen3_5"), 0.3, method="fastv", layer=1)
        flash = qwen_vl(layers=3)
        with prune(flash, 0.3, method="fastv"):
            flash.model.language_model.config._attn_implementation = "flash_attention_2"
            with pytest.raises(ValueError, match="attn_implementation: expected 'sdpa' or 'eager'"):
                flash(**qwen_batch(RAGGED[0]))


def fail(*_):
    raise RuntimeError("on purpose")


class TestPositions:
    @families(ROTATING)
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

    @pytest.mark.parametrize("method", ["hawk_rope", "fastv"])
    @pytest.mark.parametrize("name", sorted(OTHERWISE))
    def test_families_that_rotate_otherwise_are_refused(self, name, method):
        needs(name)
        known = ", ".join(family.model_type for family in FAMILIES if family.model_type not in OTHERWISE)
        with pytest.raises(TypeError, match=f"rotary position embeddings of {name}, got '{method}'.*{known}"):
            prune(model_of(name), 0.3, method=method, **options_of(method))

    @torch.no_grad()
    def test_rope_changes_what_is_kept(self, model):
        inputs, kept = qwen_batch(question(Picture(6, 6))), []
        for method in ("hawk", "hawk_rope"):
            with prune(model, 0.3, method=method, head_weights="uniform") as pruning:
                model(**inputs)
            kept.append(pruning.keep_mask)
        assert not torch.equal(*kept)


@pytest.mark.parametrize(("name", "method"), [*itertools.product(["llava", "qwen3_vl", "gemma3", "qwen3_5"], REMOVING)])
@torch.no_grad()
def test_other_families_keep_the_same_number(name, method):
    tiny, inputs = model_of(name), batch(name, *prompts(name)["padded batch"])
    with prune(tiny, 2, method=method, budget="per_image", **options_of(method)) as pruning:
        assert tiny(**inputs).logits[pruning.keep_mask].isfinite().all()
    assert [sample.budget_per_image for sample in pruning.stats.samples] == [[2, 2], [2]]


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_bfloat16_and_float64(method):
    for dtype in (torch.bfloat16, torch.float64):
        tiny = qwen_vl(layers=3, dtype=dtype)
        with prune(tiny, 0.3, method=method, **options_of(method)) as pruning:
            assert tiny(**qwen_batch(*RAGGED, dtype=dtype)).logits.isfinite().all()
        assert pruning.scores.dtype == torch.float32


@pytest.mark.parametrize("budget", ["shared", "per_image"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_budget_beyond_every_tensor_keeps_everything(model, method, budget):
    inputs = qwen_batch(*RAGGED)
    with prune(model, 10**30, method=method, budget=budget, **options_of(method)) as pruning:
        model(**inputs)
    assert torch.equal(pruning.keep_mask, inputs["attention_mask"].bool())


@pytest.mark.parametrize("method", ["cdpruner", "dart", "hawk_rope"])
def test_methods_that_read_the_question_ask_for_one(model, method):
    inputs = qwen_batch([Picture(3, 3)])
    nothing = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
    with (
        pytest.raises(ValueError, match="query: expected text in row 0"),
        prune(model, 0.3, method=method, query=nothing, **options_of(method)),
    ):
        model(**inputs)


@pytest.mark.parametrize("method", ["divprune", "cdpruner", "dart", "downsample"])
def test_methods_that_choose_jointly_have_no_scores_before(method):
    with pytest.raises(NotImplementedError, match=f"method '{method}' has no scores before it has chosen"):
        METHODS[method]().score(None)


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("random", {"seed": 1.5}, TypeError, "seed: expected an int, got float"),
        ("random", {"seed": True}, TypeError, "seed: expected an int, got bool"),
        ("random", {"seed": -1}, ValueError, "seed: expected an int in [0, 2**64), got -1"),
        (
            "key_norm",
            {"keep": "long"},
            ValueError,
            "keep: expected 'longest' or 'shortest' (arXiv 2406.11430), got 'long'",
        ),
        ("cdpruner", {"negate": 1}, TypeError, "negate: expected a bool, got int"),
        ("dart", {"pivots": 0}, ValueError, "pivots: expected an int >= 1, got 0"),
        ("dart", {"text_pivots": -1}, ValueError, "text_pivots: expected an int >= 0, got -1"),
        ("dart", {"pivots": 2.0}, TypeError, "pivots: expected an int >= 1, got float"),
        ("fastv", {"layer": 0}, ValueError, "layer: expected the last layer that sees every token, counted from 1"),
        ("fastv", {"layer": "2"}, TypeError, "layer: expected the last layer that sees every token, counted from 1"),
        ("fastv", {"k": 2}, TypeError, "method 'fastv' has no option 'k'; its options are 'layer', 'rounding'"),
        *((name, {"rounding": "up"}, ValueError, "rounding: expected 'floor'") for name in METHODS),
    ],
)
def test_options_are_checked(method, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        resolve_method(method, options)
