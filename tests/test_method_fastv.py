"""FastV scores what its literal reference scores, and hiding tokens equals removing them inside the stack."""

import re
from contextlib import contextmanager

import pytest
import torch

import csrc_ref
from csrc_ref.fastv_scores import fastv_scores
from hawk_kernels import prune
from hawk_kernels.hf.anatomy import dissect
from hawk_kernels.methods import FastV, LastQuery, resolve_method
from tests.family_checks import compiled_decoding, compiled_example, generate, model_of, needs, prompts, watched
from tests.method_checks import GREEDY, RAGGED, TOLERANCE, families, rotating_families
from tests.tiny_families import batch, tiny_model
from tests.tiny_models import BEGIN, END_OF_TURN, FIRST_WORD, IMAGE, VIDEO, qwen_batch, qwen_vl, words

# families some of whose layers have no attention, so that no mask can hide tokens from them
WITHOUT_ATTENTION = {"qwen3_5", "qwen3_5_moe", "lfm2_vl", "lfm3_vl", "minicpmv4_6", "minicpmv4_7", "minicpm_ocr"}


@contextmanager
def without_tokens(model, layer, kept):
    """The layers from `layer` on, counted from 0, get the kept tokens of one row alone, and what goes with them."""

    def take(module, args, kwargs):
        kwargs = {**kwargs, "past_key_values": None}
        for name, value in kwargs.items():
            if isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape == (1, len(kept)):
                kwargs[name] = value[:, kept]
        if kwargs.get("position_embeddings") is not None:
            kwargs["position_embeddings"] = tuple(angle[..., kept, :] for angle in kwargs["position_embeddings"])
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


def fail(*_):
    raise RuntimeError("on purpose")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_hiding_equals_removing_inside_the_stack(attention, padding):
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
def test_scores_are_the_softmax_of_the_last_query():
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


@families([name for name in rotating_families() if name not in WITHOUT_ATTENTION])
@torch.no_grad()
def test_scores_of_other_families_in_layers_with_and_without_positions(name):
    needs(name)
    tiny, inputs = tiny_model(name, attention="eager"), batch(name, *prompts(name)["padded batch"])
    attentions = tiny(**inputs, output_attentions=True).attentions
    for layer in range(1, len(attentions)):
        with prune(tiny, 0.3, method="fastv", layer=layer) as pruning:
            tiny(**inputs)
        visual = pruning.scores.isfinite()
        expected = attentions[layer - 1][:, :, -1].mean(dim=1)
        assert torch.allclose(pruning.scores[visual], expected[visual], atol=1e-6)


def test_the_softmax_is_that_of_the_literal_twin():
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

    expected = fastv_scores(query[:, :, 0], keys, visible=visible, scale=0.4)
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
def test_every_way_to_generate_hides_the_same_tokens(three_layers, changes):
    inputs = qwen_batch(*RAGGED)
    torch.manual_seed(3)
    with prune(three_layers, 0.3, method="fastv") as pruning:
        said = three_layers.generate(**inputs, **{**GREEDY, **changes})
    kept = pruning.keep_mask.unflatten(0, (len(RAGGED), -1))[:, 0]
    assert said.shape == (len(RAGGED), inputs["input_ids"].shape[1] + GREEDY["max_new_tokens"])
    if changes.get("num_beams") or changes.get("do_sample"):
        return
    # token by token, with everything in the sequence that was said before
    prompt = inputs["input_ids"].shape[1]
    _, embeds, positions = watched(three_layers, lambda: three_layers(**inputs))
    valid = inputs["attention_mask"].bool()
    for row in range(len(RAGGED)):
        for step in range(GREEDY["max_new_tokens"]):
            tail = three_layers.get_input_embeddings()(said[row, prompt : prompt + step])[None]
            sequence = torch.cat([embeds[row : row + 1, valid[row]], tail], dim=1)
            at = positions[-3:, row : row + 1, valid[row]]
            at = torch.cat([at, at[..., -1:] + 1 + torch.arange(step)], dim=-1)
            stays = torch.cat([kept[row, valid[row]], torch.ones(step, dtype=torch.bool)])
            with without_tokens(three_layers, 2, stays):
                logits = of_text(three_layers, sequence, at)[-1].index_fill(-1, torch.arange(FIRST_WORD), -torch.inf)
            assert int(logits.argmax()) == int(said[row, prompt + step])


@pytest.mark.parametrize("changes", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2}], ids=str)
@torch.no_grad()
def test_modes_agree_with_and_without_a_cache(three_layers, changes):
    inputs = qwen_batch(RAGGED[0])
    with prune(three_layers, 0.3, method="fastv") as pruning:
        said = three_layers.generate(**inputs, **GREEDY, **changes)
        mask = pruning.keep_mask[:1]
        plain = {"use_cache": False, **changes} if "num_beams" in changes else {}
        assert torch.equal(said, three_layers.generate(**inputs, **GREEDY, **plain))
    assert torch.equal(mask, pruning.keep_mask[:1])


@torch.no_grad()
def test_a_conversation_goes_on_over_the_cache(three_layers):
    from transformers import DynamicCache

    inputs, cache = qwen_batch(RAGGED[0]), DynamicCache(config=three_layers.config.get_text_config())
    more = torch.tensor([words(4, 11)])
    _, embeds, positions = watched(three_layers, lambda: three_layers(**inputs))
    following = positions[-3:, :, -1:] + 1 + torch.arange(4)
    with prune(three_layers, 0.3, method="fastv") as pruning:
        three_layers(**inputs, past_key_values=cache)
        later = three_layers(input_ids=more, position_ids=following, past_key_values=cache).logits
    stays = torch.cat([pruning.keep_mask[0], torch.ones(4, dtype=torch.bool)])
    sequence = torch.cat([embeds, three_layers.get_input_embeddings()(more)], dim=1)
    with without_tokens(three_layers, 2, stays):
        expected = of_text(three_layers, sequence, torch.cat([positions[-3:], following], dim=-1))
    assert (expected[-4:] - later[0]).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_cache_that_is_filled_anew_forgets(three_layers):
    from transformers import StaticCache

    cache = StaticCache(config=three_layers.config.get_text_config(), max_cache_len=64)
    text = torch.tensor([[BEGIN, *words(9), END_OF_TURN, 20]])
    positions = torch.arange(12).expand(3, 1, -1)
    expected = three_layers(input_ids=text, position_ids=positions).logits
    with prune(three_layers, 0.3, method="fastv"):
        three_layers(**qwen_batch(RAGGED[0]), past_key_values=cache)
        cache.reset()
        prompt = three_layers(input_ids=text[:, :-1], position_ids=positions[..., :-1], past_key_values=cache).logits
        following = three_layers(input_ids=text[:, -1:], position_ids=positions[..., -1:], past_key_values=cache).logits
    assert torch.allclose(torch.cat([prompt, following], dim=1), expected, atol=1e-5)


@torch.no_grad()
def test_an_error_inside_leaves_no_trace(three_layers):
    inputs = qwen_batch(RAGGED[0])
    whole = three_layers(**inputs).logits
    hook = three_layers.model.language_model.layers[1].self_attn.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"), prune(three_layers, 0.3, method="fastv"):
        three_layers(**inputs)
    hook.remove()
    assert torch.equal(three_layers(**inputs).logits, whole)
    with prune(three_layers, 0.3, method="fastv") as pruning:
        assert not torch.equal(three_layers(**inputs).logits, whole)
    assert pruning.stats.method_options == {"layer": 2, "rounding": "floor"}


@torch.no_grad()
def test_compiled_decoding_takes_no_more_graphs_than_unpruned():
    tiny, inputs, positions = compiled_example("llava")
    _, graphs = compiled_decoding(tiny, inputs, positions)
    with prune(tiny, 0.3, method="fastv", layer=1):
        expected = generate(tiny, inputs)[:, inputs["input_ids"].shape[1] :]
        said, hidden_graphs = compiled_decoding(tiny, inputs, positions)
    assert torch.equal(said, expected)
    assert hidden_graphs == graphs


@families([name for name in rotating_families() if name not in WITHOUT_ATTENTION])
@torch.no_grad()
def test_other_families(name):
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
def test_windows_shorter_than_the_prompt():
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


def test_what_it_cannot_do_is_refused(three_layers):
    with pytest.raises(ValueError, match=re.escape("layer: expected 1 to 2, since tokens leave before the layer")):
        prune(three_layers, 0.3, method="fastv", layer=3)
    with pytest.raises(TypeError, match="qwen3_5 has layers without attention masks"):
        prune(model_of("qwen3_5"), 0.3, method="fastv", layer=2, mode="hide")
    flash = qwen_vl(layers=3)
    with prune(flash, 0.3, method="fastv"):
        flash.model.language_model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="attn_implementation: expected 'sdpa' or 'eager'"):
            flash(**qwen_batch(RAGGED[0]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer": 0}, ValueError, "layer: expected the last layer that sees every token, counted from 1"),
        ({"layer": "2"}, TypeError, "layer: expected the last layer that sees every token, counted from 1"),
        ({"k": 2}, TypeError, "method 'fastv' has no option 'k'; its options are 'layer', 'rounding'"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        resolve_method("fastv", options)
