"""Inputs that `prune` refuses or warns about, and saving inside a block."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from transformers import GenerationConfig

from hawk_kernels import prune
from hawk_kernels.methods import Method
from tests.test_prune_contract import GREEDY, Downsample, snapshot
from tests.tiny_models import BEGIN, END_OF_TURN, Picture, question, qwen_batch, qwen_vl, words

PRUNED = {"keep_ratio": 0.25, "head_weights": "uniform"}
INPUTS = qwen_batch(question(Picture(4, 4)), question(Picture(2, 3), seed=2))


@pytest.fixture(scope="module")
def model():
    return qwen_vl(layers=2)


def test_the_int_1_keeps_one_token_and_says_so(model):
    with pytest.warns(UserWarning, match="the int 1 keeps a single visual token; the float 1.0 keeps all") as said:
        pruning = prune(model, 1, head_weights="uniform")
    assert said[0].filename == __file__
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        with pruning:
            model(**INPUTS)
        prune(model, 1.0, head_weights="uniform")
    assert [sample.visual_tokens_after for sample in pruning.stats.samples] == [1, 1]


@pytest.mark.parametrize(("budget", "warns"), [(2, True), (3, False), (0.001, False)])
def test_a_budget_below_one_percent_is_reported_on_leaving(model, budget, warns):
    inputs = qwen_batch(question(Picture(15, 20)))
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always")
        with prune(model, budget, head_weights="uniform"):
            model(**inputs)
            model(**inputs)
    expected = [
        "keep_ratio: a budget of 2 kept less than 1 % of 300 visual tokens; a float in (0, 1] is the fraction kept"
    ]
    assert [str(warning.message) for warning in said] == expected * warns


def test_head_weights_with_nan_are_refused(model):
    with pytest.raises(ValueError, match=r"head_weights: expected .*finite"):
        prune(model, 0.25, head_weights=torch.tensor([1.0, float("nan"), 1.0, 1.0]))


class Answers(Downsample):
    """A method that returns what it is told."""

    name = "answers"

    def __init__(self, change):
        self._change = change

    def score(self, view):
        return self._change(super().score(view).clone())


class Selects(Answers):
    def select(self, view, r):
        return self._change(super(Answers, self).select(view, r))

    score = Downsample.score


def one_row_nan(scores):
    scores[1] = float("nan")
    return scores


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (Answers(lambda scores: scores * float("nan")), ValueError, "got NaN for every visual token of a row"),
        (Answers(one_row_nan), ValueError, "got NaN for every visual token of a row"),
        (Answers(lambda scores: scores[:, :-1]), ValueError, r"scores of shape \[2, 16\], got shape \[2, 15\]"),
        (Answers(lambda scores: scores.double()), TypeError, r"got torch.float64; return scores.float\(\)"),
        (Answers(lambda scores: scores.tolist()), TypeError, "got list; return a tensor"),
        (Selects(lambda selection: selection.mask), TypeError, "expected a Selection, got Tensor"),
        (Selects(lambda selection: selection._replace(mask=selection.mask.int())), ValueError, "got torch.int32 of"),
        (Selects(lambda selection: selection._replace(mask=selection.mask[:1])), ValueError, r"of shape \[1, 16\]"),
        (Selects(lambda selection: selection._replace(scores=selection.scores[0])), ValueError, r"shape \[16\]"),
    ],
)
def test_a_method_with_useless_answers_is_named(model, method, error, message):
    assert isinstance(method, Method)
    with prune(model, 0.25, method=method), pytest.raises(error, match=f"method 'answers': .*{message}"):
        model(**INPUTS)
    # a few NaN rank last
    with (
        torch.no_grad(),
        prune(model, 2, method=Answers(lambda scores: scores.index_fill(1, torch.tensor(0), torch.nan))),
    ):
        model(**INPUTS)


@torch.no_grad()
def test_a_model_with_nan_weights_is_refused():
    model = qwen_vl(layers=1)
    model.model.language_model.layers[0].self_attn.k_proj.weight.fill_(float("nan"))
    model.model.language_model.layers[0].input_layernorm.weight.fill_(float("nan"))
    with prune(model, 0.25, method="key_norm"), pytest.raises(ValueError, match="method 'key_norm': expected finite"):
        model(**INPUTS)


@pytest.mark.parametrize("shape", [(1, 0), (0, 5), (0, 0)])
def test_empty_ids_are_refused(model, shape):
    ids = torch.empty(shape, dtype=torch.long)
    with prune(model, **PRUNED):
        for call in (model, model.model, model.generate):
            with pytest.raises(ValueError, match=rf"input_ids: expected .* got shape \[{shape[0]}, {shape[1]}\]"):
                call(input_ids=ids)


def test_continuous_batching_reads_text_and_refuses_images(model):
    if not hasattr(model, "generate_batch"):
        pytest.skip("this transformers has no continuous batching")
    before = snapshot(model)
    request = [BEGIN, *words(5), END_OF_TURN, 7]
    refused = pytest.raises(ValueError, match=r"visual tokens in request 1; .* call generate for prompts with images")
    with prune(model, **PRUNED), refused:
        model.generate_batch(inputs=[request, INPUTS["input_ids"][0].tolist()])
    assert snapshot(model) == before
    continuous = pytest.importorskip("transformers.generation.configuration_utils").ContinuousBatchingConfig
    options = {
        "inputs": [request],
        "generation_config": GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0),
        "continuous_batching_config": continuous(num_blocks=8, max_batch_tokens=64),
        "warmup": False,
    }

    def said():
        return [answer.generated_tokens for answer in model.generate_batch(**options).values()]

    with prune(model, **PRUNED):
        pruned = said()
    assert pruned == said()
    assert len(pruned[0]) == 3


@torch.no_grad()
def test_what_can_be_saved_inside_a_block(model, tmp_path):
    before = snapshot(model)
    outside = {name: value.clone() for name, value in model.state_dict().items()}
    with prune(model, **PRUNED):
        expected = model.generate(**INPUTS, **GREEDY)
        assert model.state_dict().keys() == outside.keys()
        torch.save(model.state_dict(), tmp_path / "state.pt")
        model.save_pretrained(tmp_path)
        for save in (copy.deepcopy, pickle.dumps, lambda each: torch.save(each, io.BytesIO())):
            with pytest.raises(TypeError, match="cannot copy or save a model inside prune; leave the block first"):
                save(model)
    assert snapshot(model) == before
    again = type(model).from_pretrained(tmp_path).eval()
    assert all(torch.equal(value, outside[name]) for name, value in again.state_dict().items())
    again.generation_config = model.generation_config
    with prune(again, **PRUNED):
        assert torch.equal(again.generate(**INPUTS, **GREEDY), expected)


def test_a_method_without_a_name_is_refused(model):
    class Nameless(Method):
        def score(self, view):
            return view.visual_embeddings().norm(dim=-1)

    with pytest.raises(ValueError, match="name: expected a string, got none; Nameless must say what errors"):
        prune(model, 0.5, method=Nameless())
