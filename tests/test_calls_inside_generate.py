"""Calls of the model besides those of one generation: contrasted prompts, interrupted calls, calls of its parts."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from hawk_kernels import prune
from tests.tiny_models import (
    BEGIN,
    END_OF_TURN,
    IMAGE,
    VISION_END,
    VISION_START,
    Picture,
    question,
    qwen_batch,
    qwen_vl,
    words,
)

PRUNED = {"keep_ratio": 0.25, "head_weights": "uniform"}
NO_MARKERS = [VISION_START, VISION_END, IMAGE, IMAGE + 1, END_OF_TURN]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": NO_MARKERS}

CONTRASTS = {
    "another picture, longer": qwen_batch(question(Picture(3, 5), seed=4, after=9), seed=4),
    "the same length": qwen_batch(question(Picture(4, 4), seed=6), seed=6),
    "shorter": qwen_batch(question(Picture(2, 3), seed=5, after=2), seed=5),
    "text alone": qwen_batch([BEGIN, *words(40, 3), END_OF_TURN]),
}


@pytest.fixture(scope="module")
def model():
    return qwen_vl(layers=2)


class Contrast(LogitsProcessor):
    """Subtracts the logits that the model gives for another prompt and the same answer."""

    def __init__(self, model, inputs, use_cache):
        self._model, self._inputs, self._use_cache = model, dict(inputs), use_cache
        self._cache, self._step = None, 0

    def __call__(self, input_ids, scores):
        if self._step:
            new = input_ids[:, -1:]
            for name, value in (("input_ids", new), ("attention_mask", torch.ones_like(new))):
                self._inputs[name] = torch.cat([self._inputs[name], value], dim=1)
            kinds = self._inputs["mm_token_type_ids"]
            self._inputs["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(kinds[:, :1])], dim=1)
        if self._step and self._use_cache:
            output = self._model(input_ids=new, past_key_values=self._cache)
        else:
            output = self._model(**self._inputs, use_cache=self._use_cache)
        self._cache, self._step = output.past_key_values, self._step + 1
        return 1.5 * scores - 0.5 * output.logits[:, -1].float()


def expected_answer(model, inputs, contrast):
    """What greedy decoding says with two caches, each of which is continued by itself."""
    processor = Contrast(model, contrast, use_cache=True)
    output, said = model(**inputs, use_cache=True), inputs["input_ids"]
    for _ in range(GREEDY["max_new_tokens"]):
        scores = processor(said, output.logits[:, -1].float())
        scores[:, NO_MARKERS] = -torch.inf
        said = torch.cat([said, scores.argmax(-1, keepdim=True)], dim=1)
        output = model(input_ids=said[:, -1:], past_key_values=output.past_key_values)
    return said


# without a cache Qwen counts the positions of a text prompt on from the images of the other, unpruned as well
@pytest.mark.parametrize(
    ("name", "use_cache"),
    [(name, use_cache) for name in CONTRASTS for use_cache in (True, False) if use_cache or name != "text alone"],
)
@torch.no_grad()
def test_a_contrasted_prompt_keeps_tokens_of_its_own(model, name, use_cache):
    contrast = CONTRASTS[name]
    inputs = qwen_batch(question(Picture(4, 4)))
    with prune(model, **PRUNED) as pruning:
        model(**contrast)
        alone = pruning.keep_mask
    with prune(model, **PRUNED) as pruning:
        expected = expected_answer(model, inputs, contrast)
        assert torch.equal(pruning.keep_mask, alone)
        processors = LogitsProcessorList([Contrast(model, contrast, use_cache)])
        said = model.generate(**inputs, **GREEDY, logits_processor=processors, use_cache=use_cache)
        assert torch.equal(said, expected)
        # what is shown is the prompt that generate was called with
        assert pruning.keep_mask.shape == inputs["input_ids"].shape
        assert pruning.stats.samples[0].visual_tokens_after == 4


@torch.no_grad()
def test_two_loops_without_a_cache_take_turns(model):
    batches = [qwen_batch(question(Picture(4, 4))), CONTRASTS["another picture, longer"]]
    with prune(model, **PRUNED):
        expected = [model.generate(**each, **GREEDY) for each in batches]
        states = [dict(each) for each in batches]
        for _ in range(GREEDY["max_new_tokens"]):
            for state in states:
                scores = model(**state, use_cache=False).logits[:, -1]
                scores[:, NO_MARKERS] = -torch.inf
                new = scores.argmax(-1, keepdim=True)
                for name, value in (("input_ids", new), ("attention_mask", torch.ones_like(new))):
                    state[name] = torch.cat([state[name], value], dim=1)
                state["mm_token_type_ids"] = torch.nn.functional.pad(state["mm_token_type_ids"], (0, 1))
    for state, each in zip(states, expected, strict=True):
        assert torch.equal(state["input_ids"], each)


@pytest.mark.parametrize("where", ["vision encoder", "text model"])
@torch.no_grad()
def test_an_interrupted_call_leaves_nothing_to_the_next(model, where):
    """For a KeyboardInterrupt torch skips the hooks that end a call."""
    inputs = qwen_batch(question(Picture(4, 4)))

    def interrupt(*_):
        raise KeyboardInterrupt

    part = model.model.visual if where == "vision encoder" else model.model.language_model.layers[1]
    with prune(model, **PRUNED) as pruning:
        expected = model.model(**inputs).last_hidden_state
        logits = model(**inputs).logits
        hook = part.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**inputs, logits_to_keep=1)
        hook.remove()
        assert torch.equal(model.model(**inputs).last_hidden_state, expected)
        assert torch.equal(model(**inputs).logits, logits)
    assert pruning.stats.samples[0].visual_tokens_after == 4
    assert not model._forward_pre_hooks
    assert not model.model._forward_pre_hooks
