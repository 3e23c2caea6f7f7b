"""`prune` with selections that carry a merge map: as if the unpruned model had been given the sums."""

import re
import sys
from functools import lru_cache
from importlib import import_module

import pytest
import torch

from hawk_kernels import prune
from hawk_kernels.hf.anatomy import dissect
from hawk_kernels.hf.families import ENCODERS, MERGES_BEFORE_PROJECTOR, VISUAL_FEATURES
from hawk_kernels.methods import Method, resolve_method
from hawk_kernels.ops.select_topk import select_topk
from hawk_kernels.selection import Merge
from tests.family_checks import watched
from tests.host_reads import HostReads
from tests.method_checks import GREEDY, TOLERANCE, visual_tokens
from tests.tiny_families import BY_NAME, batch, tiny_model
from tests.tiny_models import BEGIN, END_OF_TURN, Picture, question, words


class Merging(Method):
    """Keeps tokens at random, and merges by a map of random entries, as `entries` of each kept token."""

    name = "merging"

    def __init__(self, entries=3, stage="decoder", weights=True):
        self.entries, self.stage, self.weights = entries, stage, weights

    def score(self, view):
        generator = torch.Generator().manual_seed(3)
        scores = torch.rand(view.candidates.shape, generator=generator)
        return scores.masked_fill(~view.candidates, -torch.inf)

    def select(self, view, r):
        selection = super().select(view, r)
        generator = torch.Generator().manual_seed(4)
        # one kept token in three has no entry; entries come in no order
        chosen = selection.indices[:, ::3] if self.entries == 1 else selection.indices
        target = chosen.repeat_interleave(self.entries, dim=1)
        if self.entries > 1:
            target = torch.where(torch.arange(target.shape[1]) % 3 == 0, -1, target)
        target = target[:, torch.randperm(target.shape[1], generator=generator)]
        lengths = view.candidates.sum(dim=1, keepdim=True).clamp(min=1)
        source = torch.randint(10**6, target.shape, generator=generator) % lengths
        weight = torch.randn(target.shape, generator=generator) if self.weights else torch.ones(target.shape)
        self.last = Merge(target, source, weight)
        return selection.merging(self.last)


@lru_cache(maxsize=2)
def model_of(name):
    return tiny_model(name)


def ragged(name):
    first = BY_NAME[name].picture or Picture(3, 4)
    second = BY_NAME[name].picture or Picture(2, 3)
    return batch(name, question([first, second]), question(second, seed=3, after=2), [BEGIN, *words(7), END_OF_TURN])


def summed(rows, places, merge):
    """Rows `[B, T, C]` with those of targets replaced, one by one; places `[B][M]` of visual tokens among the T."""
    found = rows.clone()
    for row, where in enumerate(places):
        for target in set(merge.target[row].tolist()) - {-1}:
            entries = (merge.target[row] == target).nonzero().flatten()
            parts = [merge.weight[row, e] * rows[row, where[merge.source[row, e]]] for e in entries]
            found[row, where[target]] = torch.stack(parts).sum(dim=0)
    return found


@torch.no_grad()
def expected_logits(model, inputs, keep_mask, merge, embed=None):
    """Logits of the unpruned model whose text model gets the sums, and whose attention mask hides dropped tokens."""
    visual = visual_tokens(inputs)
    places = [row.nonzero().flatten() for row in visual]
    _, _, positions = watched(model, lambda: model(**inputs))

    def give_sums(module, args, kwargs):
        changed = {"inputs_embeds": summed(kwargs["inputs_embeds"], places, merge) if embed is None else embed(kwargs)}
        for name in VISUAL_FEATURES:
            if kwargs.get(name) is not None:
                layers = []
                for features in kwargs[name]:
                    spread = torch.zeros(*visual.shape, features.shape[1])
                    spread[visual] = features
                    layers.append(summed(spread, places, merge)[visual])
                changed[name] = layers
        return args, {**kwargs, **changed}

    handle = dissect(model).text.register_forward_pre_hook(give_sums, with_kwargs=True)
    try:
        hidden = {**inputs, "attention_mask": keep_mask.long(), "position_ids": positions}
        return model(**hidden).logits
    finally:
        handle.remove()


# M-RoPE, features of deeper layers, masks over pairs of tokens, newlines between tiles
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "llava_next"])
@pytest.mark.parametrize("keep_ratio", [0.4, 1.0])
def test_kept_tokens_are_sums(name, keep_ratio):
    model, inputs, method = model_of(name), ragged(name), Merging()
    with torch.no_grad(), prune(model, keep_ratio, method=method) as pruning:
        logits = model(**inputs).logits
    keep_mask = pruning.keep_mask
    expected = expected_logits(model, inputs, keep_mask, method.last)
    plain = expected_logits(model, inputs, keep_mask, Merge(*(part[:, :0] for part in method.last)))
    assert (keep_mask == inputs["attention_mask"].bool()).all() == (keep_ratio == 1.0)
    assert (logits - expected)[keep_mask].abs().max() < TOLERANCE
    assert (logits - plain)[keep_mask].abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("stage", ["decoder", "encoder"])
def test_generation_goes_on_with_the_sums(name, stage):
    """Without a cache each step merges again; beams repeat the rows."""
    if stage == "encoder" and name not in MERGES_BEFORE_PROJECTOR:
        name = "qwen2_5_vl"
    model, inputs = model_of(name), ragged(name)
    with torch.no_grad(), prune(model, 0.4, method=Merging(stage=stage)):
        said = model.generate(**inputs, **GREEDY)
        again = model.generate(**inputs, **GREEDY, use_cache=False)
    assert torch.equal(said, again)
    with torch.no_grad(), prune(model, 0.4, method=Merging(entries=1, stage=stage, weights=False)):
        model.generate(**inputs, **{**GREEDY, "num_beams": 2})


KINDS = [(name, "image") for name in sorted(MERGES_BEFORE_PROJECTOR)]
KINDS += [(name, "video") for name in sorted(MERGES_BEFORE_PROJECTOR) if BY_NAME[name].video]


@torch.no_grad()
def features_of(model, inputs):
    """What enters the text model: embeddings `[B, T, C]`, and features `[S, C]` for deeper layers."""
    seen = []
    handle = dissect(model).text.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    model(**inputs)
    handle.remove()
    deeper = [features for name in VISUAL_FEATURES for features in seen[0].get(name) or ()]
    return seen[0]["inputs_embeds"], deeper


@pytest.mark.parametrize(("name", "kind"), KINDS, ids=lambda value: value)
def test_rows_reach_the_projector_in_the_order_of_the_tokens(name, kind):
    """A kept token that becomes another one alone gets that one's features, whatever the projector computes."""
    model, method = model_of(name), Merging(entries=1, stage="encoder", weights=False)
    inputs = ragged(name) if kind == "image" else batch(name, question(Picture(2, 3, frames=6)))
    whole, whole_deeper = features_of(model, inputs)
    with prune(model, 0.5, method=method) as pruning:
        packed, packed_deeper = features_of(model, inputs)
    visual, keep_mask = visual_tokens(inputs), pruning.keep_mask
    places = [row.nonzero().flatten() for row in pruning.scores > -torch.inf]
    expected = summed(whole, places, method.last)
    assert (expected - whole)[keep_mask].abs().max() > 100 * TOLERANCE
    for row, kept in enumerate(keep_mask):
        assert (packed[row, -int(kept.sum()) :] - expected[row, kept]).abs().max() < TOLERANCE
    for of_all, of_kept in zip(whole_deeper, packed_deeper, strict=True):
        spread = whole.new_zeros(*visual.shape, of_all.shape[1])
        spread[visual] = of_all
        assert (of_kept - summed(spread, places, method.last)[visual & keep_mask]).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", sorted(set(ENCODERS) - MERGES_BEFORE_PROJECTOR))
def test_other_projectors_are_refused_by_name(name):
    message = (
        rf"does not merge before the projector of {name} \(.*\), got 'merging', whose stage is 'encoder'.* llava, "
    )
    with pytest.raises(TypeError, match=message):
        prune(model_of(name), 0.5, method=Merging(stage="encoder"))


def test_families_whose_encoder_cannot_be_read_are_refused():
    with pytest.raises(TypeError, match="method: expected one"):
        prune(tiny_model("fast_vlm"), 0.5, method=Merging(stage="encoder"))


class Given(Method):
    """Keeps the first tokens and brings a given map."""

    name = "given"

    def __init__(self, merge):
        self.merge = merge

    def score(self, view):
        return (-torch.arange(view.candidates.shape[1]).float()).expand(view.candidates.shape).contiguous()

    def select(self, view, r):
        selection = select_topk(self.score(view), r, mask=view.candidates)
        return selection.merging(self.merge)


def entries(target, source):
    """One entry for each row of images; the last row has none."""
    return Merge(torch.tensor([[target]] * 2 + [[-1]]), torch.tensor([[source]] * 3), torch.ones(3, 1))


@pytest.mark.parametrize(
    ("merge", "error", "message"),
    [
        (
            entries(0, 1)._replace(weight=torch.ones(3, 2)),
            ValueError,
            "method 'given': merge.weight: expected the shape",
        ),
        (
            entries(0, 1)._replace(weight=torch.ones(3, 1).half()),
            TypeError,
            "merge.weight: expected dtype torch.float32",
        ),
        ((1, 2, 3), TypeError, "method 'given': merge: expected a Merge or None, got tuple"),
        (entries(17, 1), ValueError, "merge.target: expected kept tokens, got 17 in row 0, which is dropped"),
        (entries(99, 1), ValueError, "merge.target: expected places of the 18 tokens of a row, from 0 to 17, got 99"),
        (
            entries(0, 17),
            ValueError,
            "merge.source: expected visual tokens of the row, got 17 in row 1, which is padding",
        ),
    ],
)
def test_bad_maps_name_the_method(merge, error, message):
    model, inputs = model_of("qwen2_5_vl"), ragged("qwen2_5_vl")
    refused = pytest.raises(error, match=re.escape(message))
    with torch.no_grad(), prune(model, 0.4, method=Given(merge)), refused:
        model(**inputs)


class BeforeTheProjector(Given):
    stage = "encoder"


def test_a_method_that_merges_before_the_projector_cannot_do_so_inside_the_stack():
    with pytest.raises(TypeError, match=r"got 'given' after layer 1; .*can only choose before the first layer"):
        prune(model_of("qwen2_5_vl"), {1: 0.4}, method=BeforeTheProjector(entries(0, 1)))


@pytest.mark.parametrize("method", ["fastervlm", "holov", "mmtok", "prumerge", "visionzip", "vispruner"])
def test_methods_that_read_the_encoder_choose_before_the_first_layer_alone(method):
    with pytest.raises(TypeError, match=rf"got '{method}' after layer 1; .*can only choose before the first layer"):
        prune(model_of("qwen2_5_vl"), {1: (method, 0.4)})


@pytest.mark.parametrize("method", ["visionzip", "prumerge"])
@pytest.mark.parametrize("budget", ["shared", "per_image"])
def test_merging_reads_the_ids_and_nothing_else(method, budget, monkeypatch):
    """Values that are read on a CPU alone, to check them, are left out, and kernels run as on a GPU."""
    for module in (import_module("hawk_kernels.ops.compact"), import_module("hawk_kernels.methods.base")):
        monkeypatch.setattr(module, "check_entries", lambda *_, **options: None)
    monkeypatch.setattr(import_module("hawk_kernels.ops.compact"), "_check_fits", lambda *_: None)
    for name, module in list(sys.modules.items()):
        if name.startswith("hawk_kernels.") and hasattr(module, "choose_backend"):
            monkeypatch.setattr(module, "choose_backend", lambda *_: "triton")
    model, inputs = model_of("llava"), ragged("llava")
    with torch.no_grad(), prune(model, 0.4, method=method, budget=budget), HostReads() as reads:
        model(**inputs)
    assert reads.places == ["prompt.py: cpu"]


def test_gradients_reach_what_was_merged():
    """With labels, through the sums to the projector; those of the encoder's rows are not recorded."""
    model, inputs = tiny_model("llava"), ragged("llava")
    for stage in ("decoder", "encoder"):
        model.zero_grad()
        with prune(model, 0.4, method=Merging(stage=stage)):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert model.model.multi_modal_projector.linear_1.weight.grad.abs().max() > 0


def test_a_selection_without_a_map_is_the_same_in_either_stage():
    model, inputs = model_of("llava"), ragged("llava")

    class Plain(Merging):
        def select(self, view, r):
            return Method.select(self, view, r)

    found = []
    for stage in ("decoder", "encoder"):
        with torch.no_grad(), prune(model, 0.4, method=Plain(stage=stage)):
            found.append(model(**inputs).logits)
    assert torch.equal(*found)


def test_an_unknown_stage_is_refused():
    with pytest.raises(ValueError, match="stage: expected 'decoder' or 'encoder', got 'projector'; Merging must say"):
        prune(model_of("llava"), 0.4, method=Merging(stage="projector"))


def test_methods_of_the_package_merge_in_the_decoder_unless_they_say_otherwise():
    assert resolve_method("random", {}).stage == "decoder"


def test_keys_of_the_encoder_must_be_declared():
    class Keys(Method):
        """Asks for keys that it has not declared."""

        name = "keys"

        def score(self, view):
            return view.encoder_keys().sum(dim=(2, 3))

    refused = pytest.raises(
        ValueError, match="cannot read encoder_keys in a method that does not declare it; set uses_enc"
    )
    with torch.no_grad(), prune(model_of("llava"), 0.4, method=Keys()), refused:
        model_of("llava")(**ragged("llava"))
