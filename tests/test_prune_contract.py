"""What `prune` promises besides the right logits: results, cost, errors, and that leaving the block leaves no trace."""

import copy
import json
import pickle
import threading

import numpy as np
import pytest
import torch
import torch._dynamo
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast

from csrc_ref import score_tokens as reference_scores
from csrc_ref import select_topk
from hawk_kernels import prune
from hawk_kernels.methods import Hawk, Method
from tests.tiny_families import BY_NAME, batch, tiny_model
from tests.tiny_models import (
    BEGIN,
    END_OF_TURN,
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

GREEDY = {
    "max_new_tokens": 5,
    "do_sample": False,
    "suppress_tokens": [VISION_START, VISION_END, IMAGE, IMAGE + 1, END_OF_TURN],
}
RAGGED = [
    question([Picture(3, 3), Picture(2, 4)]),
    question(Picture(2, 3), seed=3, after=2),
    [BEGIN, *words(9), END_OF_TURN],
]


@pytest.fixture(scope="module")
def model():
    return qwen_vl(layers=2)


def literal_scores(model, inputs, query_mask, head_weights, normalize):
    """The scores of the paper: every token projected by the first layer's own modules, then the reference."""
    layer = model.model.language_model.layers[0]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    visual = inputs["input_ids"] == IMAGE
    features = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    embeds[visual] = torch.cat(list(features))
    normed = layer.input_layernorm(embeds)
    queries, keys = (
        projection(normed).unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(1, 2)
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    return reference_scores(queries, keys, head_weights, q_mask=query_mask, k_mask=visual, normalize=normalize)


@pytest.mark.parametrize("normalize", ["l2", None, "softmax", "minmax"])
def test_scores_and_kept_tokens_are_those_of_the_reference(model, normalize):
    inputs = qwen_batch(*RAGGED)
    weights = torch.tensor([0.1, 0.0, 2.0, 0.7])
    with torch.no_grad():
        with prune(model, 0.3, head_weights=weights, normalize=normalize, rounding="ceil") as pruning:
            model(**inputs)
        expected = literal_scores(model, inputs, pruning.query_mask, weights, normalize)
    has_image = (inputs["input_ids"] == IMAGE).any(1)
    assert torch.allclose(pruning.scores[has_image], expected[has_image], atol=1e-5, rtol=1e-4)
    visual = inputs["input_ids"] == IMAGE
    kept = select_topk(pruning.scores, 0.3, mask=visual, rounding="ceil").mask
    assert torch.equal(pruning.keep_mask & visual, kept)
    assert torch.equal(pruning.keep_mask & ~visual, inputs["attention_mask"].bool() & ~visual)


def test_result_shapes_and_dtypes(model):
    inputs = qwen_batch(*RAGGED)
    with prune(model, 0.3, head_weights="uniform") as pruning:
        assert pruning.keep_mask is None
        assert pruning.scores is None
        assert pruning.query_mask is None
        assert pruning.stats.samples == ()
        model.generate(**inputs, **GREEDY)
    shape = inputs["input_ids"].shape
    visual = inputs["input_ids"] == IMAGE
    assert (pruning.keep_mask.shape, pruning.keep_mask.dtype) == (shape, torch.bool)
    assert (pruning.query_mask.shape, pruning.query_mask.dtype) == (shape, torch.bool)
    assert (pruning.scores.shape, pruning.scores.dtype) == (shape, torch.float32)
    assert torch.equal(pruning.scores.isfinite(), visual)
    assert (pruning.scores[~visual] == -torch.inf).all()
    assert not pruning.query_mask[2].any()


def test_stats_tell_sample_by_sample_what_happened(model):
    with prune(model, 0.3, head_weights="uniform") as pruning:
        model.generate(**qwen_batch(*RAGGED), **GREEDY)
    stats = pruning.stats
    assert [sample.visual_tokens_before for sample in stats.samples] == [17, 6, 0]
    assert [sample.visual_tokens_after for sample in stats.samples] == [5, 1, 0]
    assert [sample.budget for sample in stats.samples] == [5, 1, 0]
    assert [sample.prompt_tokens_before for sample in stats.samples] == [33, 17, 11]
    assert [sample.prompt_tokens_after for sample in stats.samples] == [21, 12, 11]
    assert [sample.query_tokens for sample in stats.samples] == [5, 2, 0]
    assert [sample.reason for sample in stats.samples] == [None, None, "no visual tokens"]
    as_dict = json.loads(json.dumps(stats.to_dict()))
    assert as_dict["method"] == "hawk"
    assert as_dict["method_options"] == {"normalize": "l2", "rounding": "floor"}
    assert as_dict["head_weights"] == "uniform"
    assert as_dict["samples"][0]["visual_tokens_after"] == 5
    assert "visual tokens 17 -> 5, prompt tokens 33 -> 21" in repr(stats)


def test_a_call_without_images_is_left_alone_and_says_so(model):
    inputs = qwen_batch([BEGIN, *words(9)], [BEGIN, *words(4)])
    plain = model.generate(**inputs, **GREEDY)
    with prune(model, 0.1, head_weights="uniform") as pruning:
        assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    assert pruning.stats.reason == "no visual tokens"
    assert torch.equal(pruning.keep_mask, inputs["attention_mask"].bool())
    assert "left alone: no visual tokens" in repr(pruning)


def test_budget_per_image(model):
    inputs = qwen_batch(question([Picture(4, 4), Picture(2, 3), Picture(1, 1)]), question(Picture(3, 3), seed=4))
    visual = inputs["input_ids"] == IMAGE
    for keep_ratio, budgets in ((0.25, [[4, 1, 1], [2]]), (3, [[3, 3, 1], [3]])):
        with torch.no_grad(), prune(model, keep_ratio, head_weights="uniform", budget="per_image") as pruning:
            pruned = model(**inputs).logits
        assert [sample.budget_per_image for sample in pruning.stats.samples] == budgets
        for row, per_image in enumerate(budgets):
            positions = visual[row].nonzero().flatten()
            images = positions.tensor_split((positions.diff() > 1).nonzero().flatten() + 1)
            for image, budget in zip(images, per_image, strict=True):
                expected = select_topk(pruning.scores[row, image], budget).mask
                assert torch.equal(pruning.keep_mask[row, image], expected)
        with torch.no_grad():
            hidden = model(**hide(model, inputs, pruning.keep_mask)).logits
        assert (pruned - hidden)[pruning.keep_mask].abs().max() < 1e-4
    with torch.no_grad(), prune(model, 0.25, head_weights="uniform") as shared:
        model(**inputs)
    assert shared.stats.samples[0].budget_per_image is None
    assert shared.stats.samples[0].budget == 5


def test_text_before_the_image_only_falls_back_to_all_text(model):
    inputs = qwen_batch([BEGIN, *words(6), Picture(3, 3)], [BEGIN, *words(2), Picture(2, 2), END_OF_TURN, *words(2)])
    with prune(model, 0.3, head_weights="uniform") as pruning:
        model.generate(**inputs, **GREEDY)
    valid, visual = inputs["attention_mask"].bool(), inputs["input_ids"] == IMAGE
    first = valid & (valid.cumsum(1) == 1)
    assert torch.equal(pruning.query_mask, valid & ~visual & ~first)
    assert all("after the first token" in sample.query_source for sample in pruning.stats.samples)


def test_query_takes_a_mask_or_a_callable(model):
    inputs = qwen_batch(question(Picture(3, 3)), question(Picture(2, 4), seed=2))
    mask = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
    mask[:, -4:-2] = True
    for query in (mask, lambda input_ids: mask):
        with torch.no_grad(), prune(model, 0.3, head_weights="uniform", query=query) as pruning:
            model(**inputs)
            expected = literal_scores(model, inputs, mask, torch.full((4,), 0.25), "l2")
        assert torch.equal(pruning.query_mask, mask)
        assert torch.allclose(pruning.scores, expected, atol=1e-5)
        assert pruning.stats.samples[0].query_source == "given by query="
    with prune(model, 0.3, head_weights="uniform", query=mask) as pruning:
        model.generate(**inputs, **GREEDY, num_beams=2)
        model.generate(**inputs, **GREEDY, use_cache=False)
    assert torch.equal(pruning.query_mask, mask)


def test_the_beams_of_a_sample_keep_the_same_tokens(model):
    with prune(model, 0.3, head_weights="uniform") as pruning:
        model.generate(**qwen_batch(*RAGGED), **GREEDY, num_beams=3)
    rows = pruning.keep_mask.view(3, 3, -1)
    assert torch.equal(rows, rows[:, :1].expand(-1, 3, -1))


def test_only_what_the_score_needs_is_projected(model):
    layer = model.model.language_model.layers[0]
    rows = {layer.self_attn.q_proj: [], layer.self_attn.k_proj: []}
    entered = []

    def enter(*_):
        entered.append(True)

    def count(projection, args):
        if not entered:
            rows[projection].append(args[0][..., 0].numel())

    hooks = [layer.register_forward_pre_hook(enter)]
    hooks += [projection.register_forward_pre_hook(count) for projection in rows]
    inputs = qwen_batch(*RAGGED)
    with torch.no_grad(), prune(model, 0.3, head_weights="uniform"):
        model(**inputs)
    for hook in hooks:
        hook.remove()
    assert rows[layer.self_attn.k_proj] == [int((inputs["input_ids"] == IMAGE).sum())]
    assert sum(rows[layer.self_attn.q_proj]) <= len(RAGGED)


class HostReads(TorchDispatchMode):
    """Counts operators that make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal.default")
        boolean_index = "index.Tensor" in str(func) and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += boolean_index or any(name in str(func) for name in waits)
        return func(*args, **(kwargs or {}))


def test_one_host_read_at_prefill_and_none_at_decode(model, monkeypatch):
    from hawk_kernels.hf import prompt

    fetches = []
    fetch = prompt._fetch
    monkeypatch.setattr(prompt, "_fetch", lambda *tensors: fetches.append(1) or fetch(*tensors))
    inputs = qwen_batch(*RAGGED)

    def reads():
        with torch.no_grad(), HostReads() as counter:
            model.generate(**inputs, **GREEDY)
        return counter.count

    reads()
    whole = reads()
    with prune(model, 0.3, head_weights="uniform"):
        pruned = reads()
    # nothing but the ids is read, neither at the prefill nor in four decoding steps
    assert pruned == whole
    assert len(fetches) == 1


def snapshot(model):
    """Everything that hangs on the modules, except what upstream itself keeps there."""
    return {
        name: {
            key: dict(value) if isinstance(value, dict) else id(value)
            for key, value in vars(module).items()
            if key != "rope_deltas"
        }
        for name, module in model.named_modules()
    }


def test_leaving_the_block_leaves_no_trace(model):
    inputs = qwen_batch(*RAGGED)
    plain = model.generate(**inputs, **GREEDY)
    before = snapshot(model)
    with prune(model, 0.3, head_weights="uniform"):
        model.generate(**inputs, **GREEDY)
        model(**inputs)
    assert snapshot(model) == before

    def leave_by_an_exception():
        with prune(model, 0.3, head_weights="uniform"):
            model.generate(**inputs, **GREEDY)
            raise RuntimeError("from inside")

    with pytest.raises(RuntimeError, match="from inside"):
        leave_by_an_exception()
    assert snapshot(model) == before
    assert torch.equal(model.generate(**inputs, **GREEDY), plain)


def test_a_call_that_fails_leaves_the_next_one_right(model):
    inputs = qwen_batch(*RAGGED)

    def fail(*_):
        raise RuntimeError("out of memory")

    with prune(model, 0.3, head_weights="uniform") as pruning:
        expected = model.generate(**inputs, **GREEDY)
        for part in (model.model.visual, model.model.language_model.layers[1]):
            hook = part.register_forward_pre_hook(fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                model(**inputs)
            hook.remove()
            with pytest.raises(ValueError, match="cannot call the text model by itself inside prune"):
                model.model.language_model(inputs_embeds=torch.zeros(1, 3, 64))
        assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    assert pruning.stats.samples[0].visual_tokens_after == 5


def test_the_object_can_be_entered_again_and_two_models_at_once(model):
    inputs, other = qwen_batch(question(Picture(4, 4))), qwen_vl("qwen2_vl", layers=2)
    pruning = prune(model, 0.25, head_weights="uniform")
    with pruning:
        once = model.generate(**inputs, **GREEDY)
    with pruning, prune(other, 0.5, head_weights="uniform") as second:
        other.generate(**inputs, **GREEDY)
        assert torch.equal(model.generate(**inputs, **GREEDY), once)
    assert pruning.stats.samples[0].visual_tokens_after == 4
    assert second.stats.samples[0].visual_tokens_after == 8


def test_a_model_cannot_be_pruned_twice_at_once(model):
    pruning = prune(model, 0.25, head_weights="uniform")
    before = snapshot(model)
    with pruning:
        for again in (pruning, prune(model, 0.5, head_weights="uniform")):
            with pytest.raises(ValueError, match="being pruned already"):
                again.__enter__()
    assert snapshot(model) == before


def test_two_threads_share_a_pruned_model(model):
    batches = [qwen_batch(question(Picture(4, 4))), qwen_batch(*RAGGED), qwen_batch(question(Picture(2, 5), seed=8))]
    results, errors = {}, []
    with prune(model, 0.25, head_weights="uniform") as pruning:
        expected = [model.generate(**batch, **GREEDY) for batch in batches]

        def serve(name):
            try:
                for turn in range(6):
                    which = (turn + name) % len(batches)
                    assert torch.equal(model.generate(**batches[which], **GREEDY), expected[which])
                    assert pruning.keep_mask.shape == batches[which]["input_ids"].shape
                    results[name, turn] = which
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=serve, args=(name,)) for name in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert len(results) == 18


def test_copied_and_interleaved_caches(model):
    batches = [qwen_batch(question(Picture(4, 4))), qwen_batch(question(Picture(2, 5), seed=8, after=7))]
    with torch.no_grad(), prune(model, 0.25, head_weights="uniform"):
        outputs = [model(**batch, use_cache=True) for batch in batches]
        states = [(output.past_key_values, output.logits[:, -1:].argmax(-1)) for output in outputs]
        states += [(copy.deepcopy(cache), token) for cache, token in states]
        said = [[] for _ in states]
        for _ in range(4):
            for number, (cache, token) in enumerate(states):
                said[number].append(token.item())
                logits = model(input_ids=token, past_key_values=cache).logits
                states[number] = (cache, logits[:, -1:].argmax(-1))
        expected = [model.generate(**batch, max_new_tokens=4, do_sample=False)[0, -4:].tolist() for batch in batches]
    assert said == expected * 2


def test_plain_decoding_with_and_without_masks_goes_on_at_the_right_positions(model):
    inputs = qwen_batch(question(Picture(4, 4)), question(Picture(2, 5), seed=8, after=7))
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    with torch.no_grad(), prune(model, 0.25, head_weights="uniform"):
        expected = model.generate(**inputs, **options)[:, length:]
        output, mask, said = model(**inputs, use_cache=True), inputs["attention_mask"], []
        for _ in range(4):
            said.append(output.logits[:, -1:].argmax(-1))
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            output = model(input_ids=said[-1], attention_mask=mask, past_key_values=output.past_key_values)
    assert torch.equal(torch.cat(said, dim=1), expected)


def test_a_cache_cropped_into_the_prompt(model):
    # unequal counts and no mask, so that the padding of the packed rows is known to the cache alone
    inputs = qwen_batch(question(Picture(4, 4)), question(Picture(2, 4), seed=3, after=13))
    assert inputs.pop("attention_mask").all()
    with torch.no_grad(), prune(model, 0.25, head_weights="uniform"):
        output = model(**inputs, use_cache=True)
        cache = output.past_key_values
        cache.crop(-3)
        tokens = inputs["input_ids"][:, -3:].split([1, 2], dim=1)
        again = torch.cat([model(input_ids=token, past_key_values=cache).logits for token in tokens], dim=1)
    assert (again - output.logits[:, -3:]).abs().max() < 1e-4


def first_turn(model, inputs):
    out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    return out.sequences, out.past_key_values


def test_a_second_turn_takes_the_new_tokens_with_a_mask_over_everything(model):
    inputs = qwen_batch(question(Picture(4, 4)))
    new = torch.tensor([words(4, 7)])
    with prune(model, 0.25, head_weights="uniform") as pruning:
        sequence, cache = first_turn(model, inputs)
        everything = torch.ones(1, sequence.shape[1] + 4, dtype=torch.long)
        tokens = torch.cat([sequence[:, -1:], new], dim=1)
        second = model.generate(input_ids=tokens, attention_mask=everything, past_key_values=cache, **GREEDY)
    hidden = hide(model, inputs, pruning.keep_mask)
    sequence, cache = first_turn(model, hidden)
    mask = torch.cat([hidden["attention_mask"], everything[:, inputs["input_ids"].shape[1] :]], dim=1)
    positions = hidden["position_ids"][..., -1:] + GREEDY["max_new_tokens"] + torch.arange(tokens.shape[1])
    expected = model.generate(
        input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, **GREEDY
    )
    assert torch.equal(second, expected)


@pytest.mark.parametrize("chunk", [1, 4, 10, 25])
def test_chunked_prefill_is_refused(model, chunk):
    inputs = qwen_batch(question(Picture(4, 4)))
    try:
        model.generate(**inputs, **GREEDY, prefill_chunk_size=chunk)
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"this transformers cannot do it unpruned either: {error}")
    with prune(model, 0.25, head_weights="uniform"), pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(**inputs, **GREEDY, prefill_chunk_size=chunk)


def test_a_prompt_that_fits_one_chunk_is_read(model):
    inputs = qwen_batch(question(Picture(4, 4)))
    try:
        unpruned = model.generate(**inputs, **GREEDY, prefill_chunk_size=64)
    except ValueError as error:
        pytest.skip(f"this transformers cannot do it unpruned either: {error}")
    if not torch.equal(unpruned, model.generate(**inputs, **GREEDY)):
        pytest.skip("this transformers reads other images in chunks, unpruned as well")
    with prune(model, 0.25, head_weights="uniform") as pruning:
        expected = model.generate(**inputs, **GREEDY)
        assert torch.equal(model.generate(**inputs, **GREEDY, prefill_chunk_size=64), expected)
    assert pruning.stats.samples[0].visual_tokens_after == 4


def test_plain_calls_with_the_arguments_of_generate_are_whole_prompts(model):
    """Neither logits of several tokens nor position ids cut out of longer ones make a prompt end earlier."""
    from transformers import DynamicCache

    inputs = qwen_batch(question(Picture(4, 4)))
    with torch.no_grad(), prune(model, 0.25, head_weights="uniform") as pruning:
        expected = model(**inputs).logits[:, -20:]
        keep_mask, stats = pruning.keep_mask, pruning.stats
        positions = hide(model, inputs, inputs["attention_mask"])["position_ids"]
        longer = torch.cat([positions, positions[..., -1:] + 1], dim=-1)
        for more in (
            {"position_ids": positions, "past_key_values": DynamicCache(config=model.config.get_text_config())},
            {"position_ids": longer[..., :-1], "return_dict": True},
        ):
            logits = model(**inputs, **more, logits_to_keep=20).logits
            assert torch.equal(pruning.keep_mask, keep_mask)
            assert pruning.stats == stats
            assert (logits - expected).abs().max() < 1e-5


def test_embeddings_without_ids_are_refused(model):
    embeds = model.get_input_embeddings()(qwen_batch(question(Picture(4, 4)))["input_ids"])
    with prune(model, 0.25, head_weights="uniform"):
        with pytest.raises(ValueError, match="got inputs_embeds only"):
            model(inputs_embeds=embeds)
        with pytest.raises(ValueError, match="got inputs_embeds only"):
            model.generate(inputs_embeds=embeds, **GREEDY)


# gemma3 scales the rows of its table
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "gemma3"])
@torch.no_grad()
def test_embeddings_of_text_need_no_ids(name):
    model = tiny_model(name)
    embeds = model.get_input_embeddings()(torch.tensor([words(7), words(7, 1)]))
    logits = model(inputs_embeds=embeds).logits
    spoilt = embeds.clone()
    spoilt[1, 3, 5] += 1e-3
    with prune(model, 0.25, head_weights="uniform") as pruning:
        assert torch.equal(model(inputs_embeds=embeds).logits, logits)
        assert pruning.stats.reason == "no visual tokens: the embeddings are those of text"
        assert pruning.keep_mask.shape == embeds.shape[:2]
        for other in (spoilt, embeds.double()):
            with pytest.raises(
                ValueError, match=r"got inputs_embeds only.*exactly those of model.get_input_embeddings"
            ):
                model(inputs_embeds=other)


def test_generation_from_embeddings_of_text(model):
    embeds = model.get_input_embeddings()(torch.tensor([words(7), words(7, 1)]))
    expected = model.generate(inputs_embeds=embeds, **GREEDY)
    with prune(model, 0.25, head_weights="uniform"):
        assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), expected)


def test_a_mask_of_pairs_of_ones_own_is_refused(model):
    inputs = qwen_batch(question(Picture(4, 4)))
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    with (
        prune(model, 0.25, head_weights="uniform"),
        pytest.raises(ValueError, match=r"expected a \[batch, length\] mask"),
    ):
        model(**inputs, position_ids=torch.arange(length)[None])


def test_an_image_without_any_text_is_refused(model):
    inputs = qwen_batch([Picture(3, 3)])
    inputs = {
        name: value[:, 1:-1] if name in ("input_ids", "attention_mask", "mm_token_type_ids") else value
        for name, value in inputs.items()
    }
    with prune(model, 0.25, head_weights="uniform"), pytest.raises(ValueError, match="row 0 to rank its visual tokens"):
        model(**inputs)


def test_calls_without_mask_positions_or_types_and_by_position(model):
    inputs = qwen_batch(question(Picture(4, 4)))
    bare = {name: inputs[name] for name in ("input_ids", "pixel_values", "image_grid_thw")}
    with torch.no_grad(), prune(model, 0.25, head_weights="uniform") as pruning:
        for call in (model, model.model):
            one = call(**bare)[0]
            two = call(
                bare["input_ids"], inputs["attention_mask"], **{k: v for k, v in bare.items() if k != "input_ids"}
            )[0]
            assert pruning.stats.samples[0].visual_tokens_after == 4
            assert torch.equal(one, two)
            assert one.shape[1] == inputs["input_ids"].shape[1]


class Packed8Bit(torch.nn.Module):
    """Stands for a quantised projection: a forward, but no plain weight to read."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.packed = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.offset = linear.bias.detach()

    def forward(self, hidden_states):
        return torch.nn.functional.linear(hidden_states, self.packed * self.scale, self.offset)


def test_projections_that_are_no_linear_layers():
    model = qwen_vl(layers=2)
    attention = model.model.language_model.layers[0].self_attn
    attention.q_proj, attention.k_proj = Packed8Bit(attention.q_proj), Packed8Bit(attention.k_proj)
    inputs = qwen_batch(*RAGGED)
    with torch.no_grad():
        with prune(model, 0.3, head_weights="uniform") as pruning:
            pruned = model(**inputs).logits
        expected = literal_scores(model, inputs, pruning.query_mask, torch.full((4,), 0.25), "l2")
        hidden = model(**hide(model, inputs, pruning.keep_mask)).logits
    has_image = (inputs["input_ids"] == IMAGE).any(1)
    assert torch.allclose(pruning.scores[has_image], expected[has_image], atol=1e-5)
    assert (pruned - hidden)[pruning.keep_mask].abs().max() < 1e-4


def test_images_of_a_later_turn_stay_whole_and_are_reported(model):
    first, later = qwen_batch(question(Picture(4, 4))), qwen_batch(question(Picture(2, 3), seed=3), seed=1)
    with torch.no_grad(), prune(model, 0.25, head_weights="uniform") as pruning:
        cache = model(**first, use_cache=True).past_key_values
        keep_mask, length = pruning.keep_mask, first["input_ids"].shape[1]
        mask = torch.ones(1, length + later["input_ids"].shape[1], dtype=torch.long)
        positions = 500 + torch.arange(later["input_ids"].shape[1])
        arguments = {**later, "position_ids": positions.expand(3, 1, -1)}
        pruned = model(**{**arguments, "attention_mask": mask}, past_key_values=cache).logits
    assert "images came over a cache that is not empty" in pruning.stats.reason
    assert pruning.keep_mask.all()
    with torch.no_grad():
        cache = model(**hide(model, first, keep_mask), use_cache=True).past_key_values
        mask = torch.cat([keep_mask.long(), mask[:, length:]], dim=1)
        hidden = model(**{**arguments, "attention_mask": mask}, past_key_values=cache).logits
    assert (pruned - hidden).abs().max() < 1e-4


class Downsample(Method):
    """Keeps the first tokens of a row, whatever the text says."""

    name = "downsample"

    def score(self, view):
        return -torch.arange(view.candidates.shape[1], dtype=torch.float32).expand(view.candidates.shape)


def test_a_method_of_ones_own_needs_no_head_weights_and_no_text(model):
    inputs = qwen_batch([Picture(3, 3)], [BEGIN, *words(4), Picture(2, 3)])
    with torch.no_grad(), prune(model, 2, method=Downsample()) as pruning:
        model(**inputs)
    visual = inputs["input_ids"] == IMAGE
    assert torch.equal(pruning.keep_mask & visual, visual & (visual.cumsum(1) <= 2))
    assert pruning.stats.head_weights is None
    with torch.no_grad(), prune(model, 0.3, method=Hawk(normalize=None), head_weights="uniform") as pruning:
        model(**inputs)
    assert pruning.stats.method_options == {"normalize": None, "rounding": "floor"}


def test_methods_see_the_visual_embeddings(model):
    seen = []

    class Look(Downsample):
        def score(self, view):
            seen.append((view.visual_embeddings(), view.text_queries(), view.visual_keys(), view.candidates))
            return super().score(view)

    inputs = qwen_batch(question(Picture(3, 3)), question(Picture(2, 2), seed=1))
    with torch.no_grad(), prune(model, 2, method=Look()) as pruning:
        model(**inputs)
        features = torch.cat(
            list(model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output)
        )
    embeddings, (queries, query_mask), keys, candidates = seen[0]
    assert torch.allclose(embeddings[candidates], features)
    assert queries.shape == (2, 4, 5, 16)
    assert keys.shape == (2, 2, 9, 16)
    assert query_mask.sum().item() == pruning.query_mask.sum().item()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"keep_ratio": 0.0}, ValueError, r"expected a float in \(0, 1\].*got 0.0; it is the fraction kept"),
        ({"keep_ratio": 1.5}, ValueError, "got 1.5"),
        ({"keep_ratio": 64.0}, ValueError, "got 64.0; .* for a budget pass the int 64"),
        ({"keep_ratio": float("nan")}, ValueError, "got nan"),
        ({"keep_ratio": 0}, ValueError, "got 0; to keep everything use 1.0"),
        ({"keep_ratio": True}, TypeError, "got bool; 0.2 keeps a fifth"),
        ({"keep_ratio": "0.2"}, TypeError, "got str; 0.2 keeps a fifth"),
        ({"keep_ratio": torch.tensor(0.2)}, TypeError, r"got Tensor; read it first: keep_ratio.item\(\)"),
        ({"method": "eagle"}, ValueError, "expected one of .*'hawk'.* or an object, got 'eagle'"),
        ({"method": Hawk}, TypeError, "got the class Hawk; pass an instance"),
        ({"method": object()}, TypeError, "derive it from hawk_kernels.methods.Method"),
        ({"alpha": 0.1}, TypeError, "method 'hawk' has no option 'alpha'; its options are 'normalize', 'rounding'"),
        ({"method": Hawk(), "normalize": "l2"}, TypeError, "brings its own"),
        ({"normalize": "l1"}, ValueError, "got 'l1'"),
        ({"rounding": "up"}, ValueError, "got 'up'"),
        (
            {"budget": "each"},
            ValueError,
            "'shared' or 'per_image' or 'per_tile', got 'each'; keep_ratio sets how many tokens stay",
        ),
        ({"query": "question"}, ValueError, "expected 'release', a bool mask .* or a processor, got 'question'; leave"),
        ({"query": 3}, TypeError, "expected 'release', a bool mask .*, a callable or a processor, got int; use"),
        (
            {"budget": "per_tile"},
            TypeError,
            "for qwen2_5_vl, got 'per_tile'; pictures are cut into tiles in .*internvl",
        ),
        ({"positions": "new"}, ValueError, "positions: expected 'original' or 'packed', got 'new'"),
        (
            {"positions": "packed"},
            TypeError,
            "'original' for qwen2_5_vl, got 'packed'; its position ids tell time, row",
        ),
        ({"recipe": "hawk"}, ValueError, "recipe: expected one of .*'hawk-release'.*, got 'hawk'"),
        ({"recipe": "hawk-release", "method": "random"}, ValueError, "recipe: expected method 'hawk' .*, got 'random'"),
        ({"query": np.ones((1, 3), dtype=bool)}, TypeError, "got ndarray; use torch.as_tensor"),
        ({"head_weights": None}, ValueError, "hawk-kernels calibrate.*head_weights='uniform'"),
        ({"head_weights": [1.0, 2.0]}, ValueError, "expected 4 weights.*got 2"),
        ({"head_weights": np.ones((4, 1))}, ValueError, r"shape \[4\], got \[4, 1\]; pass one weight a head"),
        ({"head_weights": np.array(1.0)}, ValueError, r"shape \[4\], got \[\]; pass one weight a head"),
        ({"head_weights": b"abcd"}, TypeError, "got bytes"),
        ({"method": Downsample()}, TypeError, "method 'downsample' uses none"),
    ],
)
def test_errors_name_what_came_and_the_remedy(model, arguments, error, message):
    arguments = {"keep_ratio": 0.2, "head_weights": "uniform", **arguments}
    with pytest.raises(error, match=message):
        prune(model, **arguments)


def test_models_that_are_not_supported_are_refused_by_name():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    for other, name in (
        (LlamaForCausalLM(config), "LlamaForCausalLM"),
        (torch.nn.Linear(2, 2), "Linear"),
        ("gpt", "str"),
    ):
        with pytest.raises(TypeError, match=rf"docs/families.md lists them\), got {name}\b"):
            prune(other, 0.2)


def test_a_part_of_a_supported_model_is_refused_with_the_whole_one_as_the_remedy(model):
    with pytest.raises(TypeError, match=r"got Qwen2_5_VLModel; pass the whole Qwen2_5_VLForConditionalGeneration"):
        prune(model.model, 0.2)


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        (torch.ones(1, 5, dtype=torch.bool), ValueError, r"expected shape \[1, 30\] like input_ids, got \[1, 5\]"),
        (lambda ids: ids, TypeError, "expected a bool tensor"),
        (lambda ids: ids > 1000, ValueError, "expected text in row 0"),
    ],
)
def test_queries_that_do_not_fit_are_refused(model, query, error, message):
    with prune(model, 0.2, head_weights="uniform", query=query), pytest.raises(error, match=message):
        model.generate(**qwen_batch(question(Picture(4, 4))), **GREEDY)


def test_code_compiled_without_hooks_is_refused(model):
    """What generate compiled for a static cache outside would run inside without pruning its masks."""
    model._compiled_call = model.__call__
    try:
        with pytest.raises(ValueError, match="skip_nnmodule_hook_guards = False before the first generate"):
            prune(model, 0.5, head_weights="uniform").__enter__()
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False), prune(model, 0.5, head_weights="uniform"):
            pass
        assert "_compiled_call" in vars(model)
    finally:
        del model._compiled_call


def test_a_model_that_is_compiled_as_a_whole_is_refused(model):
    model.compile(backend="eager")
    try:
        with pytest.raises(ValueError, match=r"model.compile\(\).*_compiled_call_impl = None"):
            prune(model, 0.5, head_weights="uniform").__enter__()
    finally:
        model._compiled_call_impl = None
    with prune(model, 0.5, head_weights="uniform"):
        pass


def test_a_prompt_inside_compiled_code_is_refused():
    model = tiny_model("llava", text_changes={"num_hidden_layers": 1})
    compiled = torch.compile(model, backend="eager")
    with (
        torch.no_grad(),
        prune(model, 0.5, head_weights="uniform"),
        pytest.raises(ValueError, match="not a compiled wrapper"),
    ):
        compiled(**batch("llava", question(BY_NAME["llava"].picture)))
    torch._dynamo.reset()


def test_a_model_is_copied_and_saved_outside_its_block_only(model):
    inputs = qwen_batch(question(Picture(4, 4)))
    before = snapshot(model)
    with prune(model, 0.25, head_weights="uniform"):
        for copy_of in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="leave the block first, and prune the copy in a block of its own"):
                copy_of(model)
        expected = model.generate(**inputs, **GREEDY)
    assert snapshot(model) == before
    twin = copy.deepcopy(model)
    with prune(twin, 0.25, head_weights="uniform"), prune(model, 0.5, head_weights="uniform"):
        assert torch.equal(twin.generate(**inputs, **GREEDY), expected)


def test_a_tokenizer_shows_where_the_question_stands(model):
    template = (
        "{% for m in messages %}[{{m.role}}] {% for part in m.content %}{{part.text}}{% endfor %} [end] {% endfor %}"
    )
    names = {
        BEGIN: "[user]",
        END_OF_TURN: "[end]",
        VISION_START: "<s>",
        IMAGE: "<i>",
        VISION_END: "</s>",
        7: "[assistant]",
    }
    vocabulary = {names.get(index, f"w{index}"): index for index in range(120)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="w0")))
    tokenizer.add_special_tokens({"additional_special_tokens": list(names.values())})
    tokenizer.chat_template = template
    turn = [BEGIN, *words(2), Picture(3, 3), *words(3, 1), END_OF_TURN]
    inputs = qwen_batch([*turn, 7, *words(4, 2), END_OF_TURN, BEGIN, *words(5, 3), END_OF_TURN, 7], turn)
    with torch.no_grad(), prune(model, 0.3, head_weights="uniform", query=tokenizer) as pruning:
        model(**inputs)
    asked = [inputs["input_ids"][row, mask].tolist() for row, mask in enumerate(pruning.query_mask)]
    assert asked == [words(5, 3), words(3, 1)]


def test_compiled_code_of_the_block_does_not_outlive_it(model):
    with prune(model, 0.5, head_weights="uniform"):
        model._compiled_call = model.__call__
    assert "_compiled_call" not in vars(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_another_default_dtype_changes_nothing(model, dtype):
    inputs = qwen_batch(question(Picture(4, 4)))
    with torch.no_grad(), prune(model, 0.25, head_weights="uniform") as pruning:
        expected = model(**inputs).logits
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(model(**inputs).logits, expected)
        finally:
            torch.set_default_dtype(torch.float32)
    assert pruning.scores.dtype == torch.float32


def test_a_float64_model_is_scored_in_float32(model):
    inputs = qwen_batch(question(Picture(4, 4)))
    with torch.no_grad(), prune(model, 0.25, head_weights="uniform") as pruning:
        model(**inputs)
        kept = pruning.keep_mask
        copy_of_model = type(model)(model.config).double()
    copy_of_model.load_state_dict(model.state_dict())
    with torch.no_grad(), prune(copy_of_model, 0.25, head_weights="uniform") as pruning:
        copy_of_model(**inputs)
    assert torch.equal(pruning.keep_mask, kept)


def test_compiled_decoding_is_one_graph(model):
    from transformers import StaticCache

    inputs = qwen_batch(question(Picture(4, 4)), question(Picture(2, 3), seed=2))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), prune(model, 0.25, head_weights="uniform") as pruning:
        expected = model.generate(**inputs, **options)[:, length:]
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
        output = model(**inputs, past_key_values=cache, logits_to_keep=1)
        position = hide(model, inputs, pruning.keep_mask)["position_ids"][..., -1:]
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        said = [output.logits[:, -1:].argmax(-1)]
        for step in range(1, 4):
            logits = compiled(input_ids=said[-1], past_key_values=cache, position_ids=position + step).logits
            said.append(logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(said, dim=1), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
