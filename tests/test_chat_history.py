"""A chat loop: `generate` gets the whole conversation again, over the cache that a pruned turn has left."""

import copy

import pytest
import torch
from torch.nn.functional import pad

from hawk_kernels import prune
from tests.method_checks import options_of
from tests.tiny_families import batch, tiny_model
from tests.tiny_models import (
    END_OF_TURN,
    IMAGE,
    PAD,
    VISION_END,
    VISION_START,
    Picture,
    hide,
    question,
    qwen_batch,
    qwen_vl,
    words,
)

TOLERANCE = 1e-4
OF_TOKENS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
NO_MARKERS = [PAD, VISION_START, VISION_END, IMAGE, IMAGE + 1, END_OF_TURN]
GREEDY = {
    "max_new_tokens": 3,
    "do_sample": False,
    "suppress_tokens": NO_MARKERS,
    "return_dict_in_generate": True,
    "output_logits": True,
}
PRUNED = {"keep_ratio": 0.3, "head_weights": "uniform"}
ROWS = [question(Picture(4, 4)), question([Picture(2, 3), Picture(2, 2)], seed=2, after=7)]
TURNS = {
    "text": qwen_batch([*words(4, 7)], [*words(4, 8)]),
    "one token": qwen_batch([15], [16]),
    "a picture in each row": qwen_batch(
        question(Picture(2, 3), seed=3), [*words(3, 1), *question(Picture(1, 3), seed=3)], seed=1
    ),
    "a picture in one row": qwen_batch(question(Picture(2, 3), seed=3), [*words(8, 1), *question([], seed=3)], seed=1),
}


@pytest.fixture(scope="module")
def model():
    return qwen_vl(layers=2)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def pictures_of(inputs):
    return {name: value for name, value in inputs.items() if name not in OF_TOKENS}


def continued(inputs, sequences, new):
    """The tokens of a conversation: those of the first turn, what was said, and those of the new turn."""
    said = sequences.shape[1] - inputs["input_ids"].shape[1]
    tokens = {"input_ids": torch.cat([sequences, new["input_ids"]], dim=1)}
    for name in OF_TOKENS[1:]:
        if name in inputs:
            earlier = pad(inputs[name], (0, said), value=int(name == "attention_mask"))
            tokens[name] = torch.cat([earlier, new.get(name, torch.zeros_like(new["input_ids"]))], dim=1)
    return tokens


def in_order(inputs, new):
    """The pictures of both turns, row by row, as a processor that gets the whole conversation returns them."""
    both = [], []
    starts = [0, 0]
    places = [0, 0]
    for row in range(len(inputs["input_ids"])):
        for number, each in enumerate((inputs, new)):
            left = int((each["input_ids"][row] == IMAGE).sum())
            while left:
                grid = each["image_grid_thw"][places[number]]
                count = int(grid.prod())
                both[0].append(each["pixel_values"][starts[number] : starts[number] + count])
                both[1].append(grid)
                places[number] += 1
                starts[number] += count
                left -= count // 4
    return {"pixel_values": torch.cat(both[0]), "image_grid_thw": torch.stack(both[1])}


def check_hidden(model, out, conversation, kept):
    """Every step says what the unpruned model says over the whole conversation with the dropped tokens hidden."""
    length = conversation["input_ids"].shape[1]
    for step, logits in enumerate(out.logits):
        inputs = {
            name: pad(conversation[name], (0, step), value=int(name == "attention_mask")) for name in OF_TOKENS[:3]
        }
        inputs["input_ids"] = out.sequences[:, : length + step]
        inputs |= pictures_of(conversation)
        shown = inputs["attention_mask"].bool()
        shown[:, : kept.shape[1]] &= kept
        expected = model(**hide(model, inputs, shown)).logits[:, -1]
        assert (logits - expected).abs().max() < TOLERANCE
        expected[:, NO_MARKERS] = -torch.inf
        assert torch.equal(out.sequences[:, length + step], expected.argmax(-1))


# transformers places a new picture by the grids of all of them, so that these come again
@pytest.mark.parametrize(
    ("turn", "again"), [(turn, again) for turn in TURNS for again in (False, True) if again or "picture" not in turn]
)
@pytest.mark.parametrize("rows", [1, 2])
def test_the_old_tokens_keep_their_choice_and_the_new_ones_are_read(model, turn, rows, again):
    inputs = qwen_batch(*ROWS[:rows])
    new = {name: value[:rows] for name, value in TURNS[turn].items() if name in OF_TOKENS}
    shows = bool((new["input_ids"] == IMAGE).any())
    if shows:
        images = 1 if rows == 1 or turn == "a picture in one row" else 2
        grids = TURNS[turn]["image_grid_thw"][:images]
        new |= {"image_grid_thw": grids, "pixel_values": TURNS[turn]["pixel_values"][: grids.prod(dim=1).sum()]}
    with prune(model, **PRUNED) as pruning:
        first = model.generate(**inputs, **GREEDY)
        kept = pruning.keep_mask
        conversation = continued(inputs, first.sequences, new)
        pictures = in_order(inputs, new) if shows else pictures_of(inputs)
        given = pictures if again else {}
        out = model.generate(**conversation, **given, past_key_values=first.past_key_values, **GREEDY)
        reason = pruning.stats.reason
    assert kept.sum() < inputs["attention_mask"].sum()
    check_hidden(model, out, {**conversation, **pictures}, kept)
    assert (reason is not None) == shows
    if shows:
        assert "images came over a cache that is not empty" in reason


def test_three_turns_without_masks(model):
    inputs = qwen_batch(ROWS[0])
    with prune(model, **PRUNED) as pruning:
        out = model.generate(**inputs, **GREEDY)
        for seed in (7, 8, 9):
            history = continued(inputs, out.sequences, qwen_batch(words(4, seed)))
            cache = out.past_key_values
            out = model.generate(input_ids=history["input_ids"], past_key_values=cache, **GREEDY)
    check_hidden(model, out, {**history, **pictures_of(inputs)}, pruning.keep_mask)


@pytest.mark.parametrize("method", ["hawk", "fastv"])
@pytest.mark.parametrize("name", ["qwen3_vl", "llava", "gemma3", "lfm2_vl", "qwen3_5", "minicpmv4_6"])
def test_families_read_a_conversation_as_they_read_its_new_tokens(name, method):
    model = tiny_model(name)
    inputs = batch(name, question(Picture(3, 3)))
    with prune(model, 0.3, method=method, **options_of(method)):
        first = model.generate(**inputs, **GREEDY)
        conversation = continued(inputs, first.sequences, qwen_batch(words(4, 7)))
        start = first.sequences.shape[1] - 1
        expected = model.generate(
            input_ids=conversation["input_ids"][:, start:],
            attention_mask=conversation["attention_mask"],
            past_key_values=copy.deepcopy(first.past_key_values),
            **GREEDY,
        )
        for pictures in ({}, pictures_of(inputs)):
            cache = copy.deepcopy(first.past_key_values)
            out = model.generate(**conversation, **pictures, past_key_values=cache, **GREEDY)
            assert torch.equal(out.sequences[:, start:], expected.sequences)
            assert (torch.stack(out.logits) - torch.stack(expected.logits)).abs().max() < TOLERANCE


def test_a_cache_tells_its_own_length_between_the_turns(model):
    inputs = qwen_batch(ROWS[0])
    with prune(model, **PRUNED) as pruning:
        first = model.generate(**inputs, **GREEDY)
        cache = first.past_key_values
        history = continued(inputs, first.sequences, qwen_batch(words(4, 7)))
        held = int(pruning.keep_mask.sum()) + GREEDY["max_new_tokens"] - 1
        assert cache.get_seq_length() == held
        wrong = {**history, "image_grid_thw": torch.tensor([[1, 2, 2]]), "pixel_values": torch.zeros(4, 7)}
        with pytest.raises(RuntimeError):
            model.generate(**wrong, past_key_values=cache, **GREEDY)
        assert cache.get_seq_length() == held
        model.generate(**history, past_key_values=cache, **GREEDY)
        assert cache.get_seq_length() == held + 1 + 4 + GREEDY["max_new_tokens"] - 1


def test_what_does_not_continue_the_cache_is_refused(model):
    inputs = qwen_batch(ROWS[0])
    with prune(model, **PRUNED):
        first = model.generate(**inputs, **GREEDY)
        cache, length = first.past_key_values, first.sequences.shape[1]
        with pytest.raises(ValueError, match=f"of which {length - 1} tokens, counted before pruning, .* got 4 tokens"):
            model.generate(input_ids=torch.tensor([words(4)]), past_key_values=cache, **GREEDY)
        history = continued(inputs, first.sequences, qwen_batch(words(4, 7)))
        with pytest.raises(ValueError, match="Only generate over a cache that grows"):
            model(**history, past_key_values=cache)


def test_pictures_that_are_not_those_of_the_conversation_are_refused():
    model = tiny_model("gemma3")
    inputs, new, other = (batch("gemma3", question([Picture(1, 9)] * count)) for count in (1, 1, 3))
    with prune(model, **PRUNED):
        first = model.generate(**inputs, **GREEDY)
        conversation = continued(inputs, first.sequences, new)
        with pytest.raises(
            ValueError, match=r"for the 18 visual tokens of the history, or for the 9 new ones .* of 27"
        ):
            model.generate(**conversation, **pictures_of(other), past_key_values=first.past_key_values, **GREEDY)
