"""Several samples in one row, without padding: refused where there are images, left alone where there are none."""

import pytest
import torch

from hawk_kernels import prune
from tests.tiny_families import batch, tiny_model
from tests.tiny_models import BEGIN, END_OF_TURN, Picture, hide, question, qwen_batch, qwen_vl, words

SAMPLES = [question(Picture(3, 3)), question(Picture(2, 3), seed=3, after=2)]


@pytest.fixture(scope="module")
def model():
    return qwen_vl(layers=2)


def packed(model, rows):
    """Qwen inputs with all samples in one row, numbered as `get_rope_index` numbers each of them."""
    apart = [qwen_batch(row) for row in rows]
    positions = [hide(model, inputs, inputs["attention_mask"].bool())["position_ids"] for inputs in apart]
    joined = {
        name: torch.cat(
            [inputs[name] for inputs in apart if name in inputs], dim=1 if name.startswith(("input", "mm")) else 0
        )
        for name in {name for inputs in apart for name in inputs} - {"attention_mask"}
    }
    return {**joined, "position_ids": torch.cat(positions, dim=-1)}


@pytest.mark.parametrize("mask", [False, True], ids=["no mask", "a mask of ones"])
@torch.no_grad()
def test_samples_that_share_a_row_are_refused(model, mask):
    inputs = packed(model, SAMPLES)
    if mask:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    model(**inputs, use_cache=False)
    with (
        prune(model, 0.3, head_weights="uniform"),
        pytest.raises(ValueError, match=r"start again in row 0.*pass one sample a row, padded, with an attention_mask"),
    ):
        model(**inputs, use_cache=False)


@torch.no_grad()
def test_families_that_count_positions_in_one_row():
    model = tiny_model("llava")
    one, two = (batch("llava", question(Picture(1, 9), after=after)) for after in (5, 3))
    inputs = {
        "input_ids": torch.cat([one["input_ids"], two["input_ids"]], dim=1),
        "pixel_values": torch.cat([one["pixel_values"], two["pixel_values"]]),
        "position_ids": torch.cat([torch.arange(x["input_ids"].shape[1]) for x in (one, two)])[None],
    }
    with prune(model, 0.3, head_weights="uniform"), pytest.raises(ValueError, match="start again in row 0"):
        model(**inputs, use_cache=False)


@torch.no_grad()
def test_the_bounds_of_flash_attention_are_refused(model):
    inputs = {name: value for name, value in packed(model, SAMPLES).items() if name != "position_ids"}
    with (
        prune(model, 0.3, head_weights="uniform"),
        pytest.raises(ValueError, match="cu_seq_lens_q: expected one sample in each row"),
    ):
        model(**inputs, cu_seq_lens_q=torch.tensor([0, 22, 39]))


@torch.no_grad()
def test_packed_text_is_left_alone(model):
    rows = [[BEGIN, *words(9), END_OF_TURN], [BEGIN, *words(5, seed=1), END_OF_TURN]]
    inputs = packed(model, rows)
    expected = model(**inputs, use_cache=False).logits
    apart = [model(**qwen_batch(row), use_cache=False).logits for row in rows]
    assert torch.allclose(expected, torch.cat(apart, dim=1), atol=1e-4)
    with prune(model, 0.3, head_weights="uniform") as pruning:
        assert torch.equal(model(**inputs, use_cache=False).logits, expected)
    assert pruning.stats.reason == "no visual tokens"


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_positions_that_start_after_padding_are_those_of_one_sample(model, padding):
    inputs = qwen_batch(*SAMPLES, padding=padding)
    with prune(model, 0.3, head_weights="uniform") as pruning:
        expected = model(**inputs).logits
        numbered = hide(model, inputs, inputs["attention_mask"].bool())
        numbered["position_ids"][0] = (inputs["attention_mask"].cumsum(-1) - 1).masked_fill(
            inputs["attention_mask"] == 0, 1
        )
        assert torch.allclose(model(**numbered).logits[pruning.keep_mask], expected[pruning.keep_mask], atol=1e-4)
