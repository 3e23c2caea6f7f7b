"""Hiding visual tokens from one head: equal to attention that is computed key by key and leaves those keys out."""

import contextlib

import pytest
import torch

from hawk_kernels.calibration.decoding import answers_with_masked_heads, rows_per_pass
from hawk_kernels.calibration.masking import attention_modules, hide_visual_tokens
from hawk_kernels.hf.anatomy import dissect
from tests.tiny_families import BY_NAME, batch, tiny_model
from tests.tiny_models import END_OF_TURN, FIRST_WORD, VOCABULARY, Picture, question, qwen_batch, qwen_vl, words

TOLERANCE = 2e-4
NUM_HEADS = 4


class Literal:
    """Attention of the text model head by head and query by query, over a list of the keys that are left."""

    def __init__(self, model, heads, layers, visual):
        self.text = dissect(model).text
        self.hidden_in = set(attention_modules(dissect(model), layers))
        self.heads, self.visual, self.read = heads, visual, visual.shape[1]

    def __enter__(self):
        from transformers.masking_utils import AttentionMaskInterface, eager_mask
        from transformers.modeling_utils import AttentionInterface

        self.registries = (AttentionInterface, AttentionMaskInterface)
        for registry, function in zip(self.registries, (self, eager_mask), strict=True):
            registry.register("literal", function)
        self.before, self.text.config._attn_implementation = self.text.config._attn_implementation, "literal"

    def __exit__(self, *exception):
        self.text.config._attn_implementation = self.before
        for registry in self.registries:
            del registry._global_mapping["literal"]

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        rows, num_heads, length, head_dim = query.shape
        num_keys, groups = key.shape[2], num_heads // key.shape[1]
        scaling = head_dim**-0.5 if scaling is None else scaling
        output = torch.zeros(rows, length, num_heads, value.shape[-1], dtype=torch.float64)
        for row in range(rows):
            for head in range(num_heads):
                k, v = key[row, head // groups].double(), value[row, head // groups].double()
                for t in range(length):
                    position = num_keys - length + t
                    allowed = [s for s in range(num_keys) if s <= position or not module.is_causal]
                    if attention_mask is not None:
                        sees = attention_mask[row % len(attention_mask), 0, t]
                        allowed = [
                            s for s in range(num_keys) if (sees[s] if sees.dtype == torch.bool else sees[s] > -1)
                        ]
                    if self.heads[row] == head and module in self.hidden_in:
                        # the visual tokens of the prompt, counted from its last token on
                        text = [s for s in allowed if not self.is_visual(row, num_keys, s)]
                        allowed = text or [s for s in allowed if s == position]
                    if allowed:
                        weights = torch.softmax(k[allowed] @ query[row, head, t].double() * scaling, dim=0)
                        output[row, t, head] = weights @ v[allowed]
        return output.to(query.dtype), None

    def is_visual(self, row, num_keys, s):
        position = self.read - num_keys + s
        return position < self.visual.shape[1] and bool(self.visual[row, position])


def steps(model, inputs, tokens, literal=None):
    """Logits of the prompt's last token and of each of `tokens` `[B, steps]` after it."""
    output = model(**inputs, use_cache=True)
    found = [output.logits[:, -1]]
    for step in range(tokens.shape[1]):
        if literal is not None:
            literal.read += 1
        padding = torch.cat([inputs["attention_mask"], torch.ones(len(tokens), step + 1, dtype=torch.long)], dim=1)
        mask = {} if bool(padding.all()) else {"attention_mask": padding}
        output = model(
            input_ids=tokens[:, step : step + 1], past_key_values=output.past_key_values, use_cache=True, **mask
        )
        found.append(output.logits[:, -1])
    return torch.stack(found, dim=1)


def prompt_of(name, rows):
    picture = BY_NAME[name].picture or Picture(2, 3)
    inputs = batch(name, *[question(picture, before=2, after=3)] * rows)
    if name == "paligemma":
        # as its processor does; without them SDPA sees both ways and eager attention does not
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return inputs


def visual_tokens(model, inputs):
    return torch.isin(inputs["input_ids"], torch.tensor(dissect(model).visual_token_ids))


@pytest.mark.parametrize("layers", ["first", "all"])
@pytest.mark.parametrize("name", BY_NAME)
@torch.no_grad()
def test_a_hidden_head_attends_as_if_the_visual_keys_were_not_there(name, layers):
    model = tiny_model(name)
    inputs = prompt_of(name, 3)
    heads, tokens = [None, 0, NUM_HEADS - 1], torch.tensor([words(2)] * 3)
    literal = Literal(model, heads, layers, visual_tokens(model, inputs))
    with literal:
        expected = steps(model, inputs, tokens, literal)
    with hide_visual_tokens(model, heads, layers=layers):
        hidden = steps(model, inputs, tokens)
    assert torch.allclose(hidden, expected, atol=TOLERANCE, rtol=TOLERANCE)
    whole = steps(model, inputs, tokens)
    assert torch.allclose(hidden[0], whole[0], atol=TOLERANCE, rtol=TOLERANCE)
    assert not torch.allclose(hidden[1], whole[1], atol=10 * TOLERANCE)


@pytest.mark.parametrize("name", BY_NAME)
@torch.no_grad()
def test_answers_are_those_of_generate_with_one_head_hidden_after_the_other(name):
    """All heads in one batch that the vision encoder sees once, with logits and positions as `generate` has them."""
    model = tiny_model(name)
    # only ordinary words, and no early end, so that all logits can be compared
    model.generation_config.eos_token_id = VOCABULARY + 1
    model.get_output_embeddings().weight[:FIRST_WORD] = 0
    heads = [None, *range(NUM_HEADS)]
    calls, logits = [], []
    watching = [
        dissect(model).multimodal.register_forward_pre_hook(lambda *_: calls.append(1)),
        model.register_forward_hook(lambda module, args, output: logits.append(output.logits[:, -1])),
    ]
    answers = answers_with_masked_heads(
        dissect(model), prompt_of(name, 1), heads, layers="first", max_new_tokens=3, batch_size=len(heads)
    )
    for hook in watching:
        hook.remove()
    assert len(calls) == len(logits) == 3
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for row, head in enumerate(heads):
        with hide_visual_tokens(model, [head]):
            out = model.generate(**prompt_of(name, 1), **options)
        assert answers[row] == out.sequences[0, -3:].tolist()
        for found, expected in zip(logits, out.logits, strict=True):
            assert torch.allclose(found[row], expected[0], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("layers", ["first", "all"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_padded_rows_of_several_pictures(attention, layers):
    """Rows of different lengths, one with two pictures, one without: each hides its own visual tokens."""
    model = qwen_vl(attention=attention)
    rows = [
        question([Picture(2, 2), Picture(1, 3)], before=1, after=2),
        question(Picture(2, 3), seed=4, before=3, after=4),
        [6, *words(5), END_OF_TURN],
    ]
    inputs = qwen_batch(*rows)
    assert not inputs["attention_mask"].all()
    heads = [2, 1, 0]
    with Literal(model, heads, layers, visual_tokens(model, inputs)):
        expected = model(**inputs).logits
    with hide_visual_tokens(model, heads, layers=layers):
        hidden = model(**inputs).logits
    whole = model(**inputs).logits
    valid = inputs["attention_mask"].bool()
    assert torch.allclose(hidden[valid], expected[valid], atol=TOLERANCE, rtol=TOLERANCE)
    assert not torch.allclose(hidden[0, -1], whole[0, -1], atol=10 * TOLERANCE)
    assert torch.allclose(hidden[2], whole[2], atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
def test_a_prompt_that_begins_with_its_picture():
    """The first visual tokens have no text to look at: they keep themselves, and nothing is NaN."""
    model = qwen_vl()
    inputs = qwen_batch([Picture(2, 2), *words(3)])
    inputs = {
        name: value[:, 1:] if name in ("input_ids", "attention_mask", "mm_token_type_ids") else value
        for name, value in inputs.items()
    }
    visual = visual_tokens(model, inputs)
    assert visual[0, 0]
    with Literal(model, [1], "all", visual):
        expected = model(**inputs).logits
    with hide_visual_tokens(model, [1], layers="all"):
        hidden = model(**inputs).logits
    assert torch.isfinite(hidden).all()
    assert torch.allclose(hidden, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["aya_vision", "gemma3", "mistral3"])
@torch.no_grad()
def test_windows_shorter_than_the_prompt(name, attention):
    """With a sliding window, the columns of a mask are the last keys, not all."""
    model = tiny_model(name, attention=attention, text_changes={"sliding_window": 7})
    inputs = prompt_of(name, 2)
    heads, tokens = [3, None], torch.tensor([words(4)] * 2)
    literal = Literal(model, heads, "all", visual_tokens(model, inputs))
    with literal:
        expected = steps(model, inputs, tokens, literal)
    with hide_visual_tokens(model, heads, layers="all"):
        hidden = steps(model, inputs, tokens)
    assert torch.allclose(hidden, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert not torch.allclose(hidden[0], hidden[1], atol=10 * TOLERANCE)


@pytest.mark.parametrize("batch_size", [1, 2])
@torch.no_grad()
def test_generate_hides_in_every_step(batch_size):
    model = qwen_vl()
    model.generation_config.eos_token_id = VOCABULARY + 1
    inputs = qwen_batch(question(Picture(3, 3)), question(Picture(3, 3)))
    with hide_visual_tokens(model, [None, 1], layers="all"):
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    alone = qwen_batch(question(Picture(3, 3)))
    answers = answers_with_masked_heads(
        dissect(model), alone, [None, 1], layers="all", max_new_tokens=5, batch_size=batch_size
    )
    assert answers == out[:, inputs["input_ids"].shape[1] :].tolist()
    assert answers[0] != answers[1]


@torch.no_grad()
def test_an_answer_ends_before_the_end_of_its_turn():
    model = qwen_vl()
    model.generation_config.eos_token_id = VOCABULARY + 1
    inputs = qwen_batch(question(Picture(3, 3)))
    (whole,) = answers_with_masked_heads(dissect(model), inputs, [None], layers="first", max_new_tokens=5)
    model.generation_config.eos_token_id = [VOCABULARY + 1, whole[2]]
    (ended,) = answers_with_masked_heads(dissect(model), inputs, [None], layers="first", max_new_tokens=5)
    assert ended == whole[: whole.index(whole[2])]


@torch.no_grad()
def test_hiding_every_head_of_every_layer_leaves_nothing_of_the_picture():
    """Text that no head may look from at a picture is the same whatever the picture shows."""
    model = qwen_vl()
    first, second = (qwen_batch(question(Picture(2, 3)), seed=seed) for seed in (1, 2))
    last = []
    for inputs in (first, second):
        with contextlib.ExitStack() as stack:
            for head in range(NUM_HEADS):
                stack.enter_context(hide_visual_tokens(model, [head], layers="all"))
            last.append(model(**inputs).logits[0, -1])
    assert torch.allclose(*last, atol=1e-5)
    assert not torch.allclose(model(**first).logits[0, -1], model(**second).logits[0, -1], atol=1e-2)


def test_leaving_the_block_leaves_no_trace():
    model = qwen_vl()
    modules = list(model.modules())
    inputs = qwen_batch(question(Picture(2, 2)))
    with torch.no_grad():
        before = model(**inputs).logits
        with pytest.raises(RuntimeError), hide_visual_tokens(model, [0], layers="all"):
            model(**{**inputs, "pixel_values": inputs["pixel_values"][:, :1]})
        assert torch.equal(model(**inputs).logits, before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules)


def test_what_cannot_be_hidden_is_refused():
    model = qwen_vl()
    inputs = qwen_batch(question(Picture(2, 2)))
    with pytest.raises(ValueError, match="heads: expected None or a head from 0 to 3, got 4"):
        hide_visual_tokens(model, [4])
    with pytest.raises(ValueError, match=r"layers: expected 'first' \(the scoring layer\) or 'all', got 'last'"):
        hide_visual_tokens(model, [0], layers="last")
    with pytest.raises(TypeError, match="model: expected one of the 58 supported vision-language families"):
        hide_visual_tokens(torch.nn.Linear(1, 1), [0])
    with (
        pytest.raises(ValueError, match="expected one entry for each of the 1 rows of the batch, got 2"),
        hide_visual_tokens(model, [0, 1]),
    ):
        model(**inputs)
    with pytest.raises(ValueError, match="input_ids: expected the token ids"), hide_visual_tokens(model, [0]):
        model(inputs_embeds=torch.zeros(1, 4, 64))
    with pytest.raises(ValueError, match="expected a cache that grows"), hide_visual_tokens(model, [0]):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="expected a prompt that began inside"), hide_visual_tokens(model, [0]):
        model(input_ids=torch.tensor([[20]]), past_key_values=cache)
    dissect(model).text.config._attn_implementation = "flash_attention_2"
    with pytest.raises(TypeError, match=r"expected attention 'sdpa' or 'eager'.*got 'flash_attention_2'; load"):
        hide_visual_tokens(model, [0])


def test_prompts_that_cannot_be_answered_singly_are_refused():
    anatomy = dissect(qwen_vl())
    several = qwen_batch(question(Picture(2, 2)), question(Picture(2, 2)))
    with pytest.raises(ValueError, match="inputs: expected one prompt, batch size 1, got 2"):
        answers_with_masked_heads(anatomy, several, [0], layers="first", max_new_tokens=1)
    padded = qwen_batch(question(Picture(2, 2)))
    padded["attention_mask"][0, 0] = 0
    with pytest.raises(ValueError, match="attention_mask: expected a prompt without padding"):
        answers_with_masked_heads(anatomy, padded, [0], layers="first", max_new_tokens=1)


def test_long_prompts_are_read_in_fewer_rows():
    assert rows_per_pass(8, 28, 1000) == 8
    assert rows_per_pass(8, 28, 3000) == 4
    assert rows_per_pass(8, 28, 100_000) == 1
    assert rows_per_pass(1, 28, 10) == 1
