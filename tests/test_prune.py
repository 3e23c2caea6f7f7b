"""Removing tokens equals hiding them: the pruned model against the whole model with the dropped tokens masked out."""

import pytest
import torch
import transformers

from hawk_kernels import prune
from tests.tiny_models import (
    BEGIN,
    END_OF_TURN,
    FIRST_WORD,
    IMAGE,
    VISION_END,
    VISION_START,
    Picture,
    hide,
    question,
    qwen_batch,
    qwen_vl,
    words,
)

NO_MARKERS = [VISION_START, VISION_END, IMAGE, IMAGE + 1]
TOLERANCE = 1e-4

PROMPTS = {
    "one image": [question(Picture(4, 4))],
    "left-padded, different sizes": [question(Picture(5, 4)), question(Picture(2, 3), seed=3, after=2)],
    "equal lengths, different counts": [question(Picture(4, 4)), question(Picture(2, 4), seed=3, after=13)],
    "several images in a row": [question([Picture(3, 3), Picture(2, 4), Picture(1, 2)])],
    "different image counts": [
        question([Picture(3, 3), Picture(2, 2)]),
        question(Picture(4, 3), seed=5),
        question([Picture(1, 2)] * 3, seed=7, after=3),
    ],
    "text row beside image rows": [question(Picture(4, 4)), [BEGIN, *words(9), END_OF_TURN], question(Picture(2, 2))],
    "text between images": [
        [BEGIN, Picture(3, 2), *words(4, 3), Picture(2, 2), *words(5, 4), END_OF_TURN, *words(2, 9)]
    ],
    "image last": [[BEGIN, *words(6), Picture(4, 3)]],
    "video": [question(Picture(3, 2, frames=3))],
    "video beside image": [question(Picture(2, 2, frames=2)), question(Picture(3, 3), seed=2)],
}


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen2_vl"])
def model(request):
    return qwen_vl(request.param)


def check_logits(model, inputs, keep_ratio, **options):
    """Logits of kept tokens equal those of the model that hides the rest; returns how far dropping moves them."""
    with torch.no_grad():
        with prune(model, keep_ratio, head_weights="uniform", **options) as pruning:
            pruned = model(**inputs).logits
        whole = model(**inputs).logits
        hidden = model(**hide(model, inputs, pruning.keep_mask)).logits
    kept = pruning.keep_mask
    assert pruned.shape == whole.shape
    assert (pruned - hidden)[kept].abs().max() < TOLERANCE
    return (pruned - whole)[kept].abs().max()


def check_generation(model, inputs, keep_ratio, **options):
    """Generation with pruning equals that of the whole model that hides the rest, and differs from the whole."""
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": NO_MARKERS, **options}
    with prune(model, keep_ratio, head_weights="uniform") as pruning:
        torch.manual_seed(1)
        pruned = model.generate(**inputs, **options)
    torch.manual_seed(1)
    hidden = model.generate(**hide(model, inputs, pruning.keep_mask), **options)
    assert torch.equal(pruned, hidden)
    length, per_sample = inputs["input_ids"].shape[1], len(pruning.keep_mask) // len(inputs["input_ids"])
    is_text = inputs["attention_mask"].bool() & (inputs["mm_token_type_ids"] == 0)
    kept_text = pruning.keep_mask[::per_sample] & (inputs["mm_token_type_ids"] == 0)
    assert torch.equal(kept_text, is_text)
    assert torch.equal(pruned[:: len(pruned) // len(inputs["input_ids"]), :length], inputs["input_ids"])
    return pruning


@pytest.mark.parametrize("rows", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize("keep_ratio", [0.2, 0.5, 3])
def test_logits_equal_those_with_hidden_tokens(model, rows, keep_ratio):
    moved = check_logits(model, qwen_batch(*rows), keep_ratio)
    assert moved > 100 * TOLERANCE


@pytest.mark.parametrize("rows", PROMPTS.values(), ids=PROMPTS.keys())
def test_greedy_generation_equals_that_with_hidden_tokens(model, rows):
    check_generation(model, qwen_batch(*rows), 0.3)


@pytest.mark.parametrize("rows", PROMPTS.values(), ids=PROMPTS.keys())
def test_keeping_everything_is_token_identical(model, rows):
    inputs = qwen_batch(*rows)
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": NO_MARKERS}
    whole = model.generate(**inputs, **options)
    for keep_ratio in (1.0, 1000):
        with prune(model, keep_ratio, head_weights="uniform") as pruning:
            assert torch.equal(model.generate(**inputs, **options), whole)
        assert torch.equal(pruning.keep_mask, inputs["attention_mask"].bool())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 1), (3, 3), (6, 2)])
def test_head_counts_and_attention_implementations(attention, heads, kv_heads):
    model = qwen_vl(heads=heads, kv_heads=kv_heads, layers=2, seed=heads, attention=attention)
    inputs = qwen_batch(*PROMPTS["different image counts"])
    moved = check_logits(model, inputs, 0.3)
    assert moved > 100 * TOLERANCE
    check_generation(model, inputs, 0.3)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "temperature": 1.5},
        {"do_sample": True, "num_return_sequences": 2},
        {"use_cache": False},
        {"use_cache": False, "num_beams": 2},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 2},
        {"cache_implementation": "offloaded"} if torch.cuda.is_available() else {"repetition_penalty": 1.3},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()),
)
def test_generation_modes(options):
    model = qwen_vl(layers=2)
    check_generation(model, qwen_batch(*PROMPTS["left-padded, different sizes"]), 0.25, **options)
    # without padding generate passes no mask at all
    pruning = check_generation(model, qwen_batch(*PROMPTS["one image"]), 0.25, **options)
    assert {sample.visual_tokens_after for sample in pruning.stats.samples} == {4}


def test_generation_steps_without_cache_keep_the_selection_of_the_prompt():
    model = qwen_vl(layers=2)
    # there is no end of turn, so generated tokens could be taken for queries
    inputs = qwen_batch([BEGIN, *words(3), Picture(4, 4), *words(5)])
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [*NO_MARKERS, END_OF_TURN]}
    with prune(model, 0.2, head_weights="uniform") as pruning:
        with_cache = model.generate(**inputs, **options)
        keep_mask, scores = pruning.keep_mask, pruning.scores
        assert torch.equal(model.generate(**inputs, **options, use_cache=False), with_cache)
        assert torch.equal(pruning.keep_mask, keep_mask)
        # another question about the same pixels is a new prompt, even if it is only one token longer
        length = inputs["input_ids"].shape[1]
        other = dict(inputs)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            other[name] = torch.cat([inputs[name], inputs[name][:, -1:]], dim=1)
        model(**inputs, use_cache=False)
        other["input_ids"][0, -2:] = torch.tensor(words(2, 77))
        model(**other, use_cache=False)
        assert pruning.query_mask.shape == (1, length + 1)
        assert not torch.equal(pruning.scores[:, :length], scores)


needs_relative_crop = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 14),
    reason="before 5.14 a cache was cropped to a length of the whole prompt; pruned, that is refused",
)


@pytest.mark.parametrize("rows", [[question(Picture(2, 2))], [[BEGIN, *words(7)]]], ids=["image", "text"])
def test_generation_without_cache_shows_the_prompt_when_nothing_is_dropped(rows):
    model, inputs = qwen_vl(layers=2), qwen_batch(*rows)
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [*NO_MARKERS, END_OF_TURN]}
    whole = model.generate(**inputs, **options)
    with prune(model, 9, head_weights="uniform") as pruning:
        assert torch.equal(model.generate(**inputs, **options, use_cache=False), whole)
    assert torch.equal(pruning.keep_mask, inputs["attention_mask"].bool())


@needs_relative_crop
def test_prompt_lookup_decoding():
    model = qwen_vl(layers=2)
    phrase = words(4, 8)
    inputs = qwen_batch([BEGIN, *phrase, *phrase, Picture(4, 3), *phrase, *phrase])
    # with padding the mask is a tensor, without padding it is None; both are cropped into when guesses are wrong
    padding = {name: inputs[name].new_zeros(1, 3) for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    padded = {**inputs, **{name: torch.cat([zeros, inputs[name]], dim=1) for name, zeros in padding.items()}}
    for prompt in (inputs, padded):
        pruning = check_generation(model, prompt, 0.25, prompt_lookup_num_tokens=3, max_new_tokens=10)
        keep_mask, stats = pruning.keep_mask, pruning.stats
        check_generation(model, prompt, 0.25, max_new_tokens=10)
        assert keep_mask.shape == prompt["input_ids"].shape
        # the first call brings guesses along, which are not part of the question
        with prune(model, 0.25, head_weights="uniform") as pruning:
            model.generate(**prompt, max_new_tokens=1)
        assert torch.equal(pruning.keep_mask, keep_mask)
        assert pruning.stats == stats


@needs_relative_crop
def test_assisted_decoding():
    model, assistant = qwen_vl(layers=2), qwen_vl(layers=1, seed=4)
    check_generation(model, qwen_batch(question(Picture(4, 3))), 0.25, assistant_model=assistant, max_new_tokens=8)


@pytest.mark.parametrize("stages", [0.25, {1: ("key_norm", 0.25)}], ids=["before", "inside"])
@pytest.mark.parametrize("seed", [0, 4])
def test_an_assistant_may_be_pruned_as_well(seed, stages):
    """One that guesses as the model does saves calls, so its guesses are those of a cache that is cropped rightly."""
    model, assistant = qwen_vl(layers=2), qwen_vl(layers=2, seed=seed)
    settings = {"num_assistant_tokens": 5, "assistant_confidence_threshold": 0}
    assistant.generation_config.update(**settings, num_assistant_tokens_schedule="constant")
    inputs = qwen_batch(question(Picture(4, 4)))
    options = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": [*range(FIRST_WORD)]}
    weights = {"head_weights": "uniform"} if stages == 0.25 else {}
    calls = []
    model.register_forward_pre_hook(lambda *arguments: calls.append(1))
    with prune(model, stages, **weights), prune(assistant, stages, **weights):
        expected = model.generate(**inputs, **options)
        alone, calls[:] = len(calls), []
        assert torch.equal(model.generate(**inputs, **options, assistant_model=assistant), expected)
    assert seed or len(calls) < alone - 5


@pytest.mark.parametrize("padding", ["left", "right"])
def test_plain_forward_aligns_logits_labels_and_loss(padding):
    model = qwen_vl(layers=2)
    inputs = qwen_batch(*PROMPTS["left-padded, different sizes"], padding=padding)
    with prune(model, 0.3, head_weights="uniform") as pruning:
        every = model(**inputs).logits
        # the text after the last image: its predictions come from tokens that stay
        labels = torch.where(pruning.query_mask, inputs["input_ids"], -100)
        loss = model(**inputs, labels=labels).loss
        last = model(**inputs, logits_to_keep=20).logits
    hidden = model(**hide(model, inputs, pruning.keep_mask), labels=labels)
    assert torch.allclose(loss, hidden.loss, atol=TOLERANCE)
    kept = pruning.keep_mask
    assert (every - hidden.logits)[kept].abs().max() < TOLERANCE
    assert not every[~kept].any()
    assert (last - every[:, -20:])[kept[:, -20:]].abs().max() < TOLERANCE
    loss.backward()
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    model.zero_grad()


def test_masks_of_pairs_of_tokens_of_a_static_cache_give_back_the_padding():
    from transformers import StaticCache

    model = qwen_vl(layers=2)
    inputs = qwen_batch(*PROMPTS["left-padded, different sizes"])
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    with torch.no_grad(), prune(model, 0.3, head_weights="uniform") as pruning:
        plain = model(**inputs).logits
        static = model(**inputs, past_key_values=cache).logits
    assert (plain - static)[pruning.keep_mask].abs().max() < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_keeps_the_same_number(dtype):
    model = qwen_vl(layers=2, dtype=dtype)
    inputs = qwen_batch(*PROMPTS["different image counts"], dtype=dtype)
    with prune(model, 0.3, head_weights="uniform") as pruning:
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=NO_MARKERS)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3
    assert pruning.scores.dtype == torch.float32
    assert [sample.visual_tokens_after for sample in pruning.stats.samples] == [3, 3, 1]


def test_autocast():
    model = qwen_vl(layers=2)
    inputs = qwen_batch(*PROMPTS["left-padded, different sizes"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), prune(model, 0.3, head_weights="uniform") as pruning:
        assert model(**inputs).logits.isfinite().all()
    assert [sample.visual_tokens_after for sample in pruning.stats.samples] == [6, 1]
