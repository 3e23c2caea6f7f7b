"""What methods read of the vision encoder: the attention of its CLS token, and the rows that enter the projector."""

from functools import partial

import pytest
import torch

from hawk_kernels import prune
from hawk_kernels.hf.encoders.recorder import VisionRecorder
from hawk_kernels.hf.families import ENCODERS
from tests.encoder_oracles import eager_columns
from tests.method_checks import CORE, Reads
from tests.test_hiprune_families import GREEDY, KINDS, encode, model_of, pictures, prompts
from tests.tiny_families import BY_NAME, batch, tiny_model
from tests.tiny_models import IMAGE, VIDEO, Picture, question, qwen_batch, qwen_vl

WITH_CLS = ("llava", "vipllava", "llava_next", "internvl", "qianfan_ocr")
READABLE = [
    pytest.param(name, kind, id=f"{name}-{kind}", marks=() if name in CORE else pytest.mark.long_tail)
    for name, kind in KINDS
]
every_kind = pytest.mark.parametrize(("name", "kind"), READABLE)


def inputs_of(name, kind):
    return batch(name, question(pictures(name) if kind == "image" else Picture(2, 3, frames=6)))


@torch.no_grad()
def recording(encoder, kind, inputs, cls_layer=None, reads=("cls", "features")):
    """One run of the encoder: what was recorded, and the embeddings that it made, `[visual tokens, hidden]`."""
    recorder = VisionRecorder(encoder, None, cls_layer, reads)
    handles = recorder.attach()
    embeddings = encode(encoder.multimodal, kind, inputs)
    for handle in handles:
        handle.remove()
    return recorder.recordings({})[kind], embeddings


@every_kind
def test_a_row_that_enters_the_projector_is_recorded_for_the_visual_tokens_that_it_becomes(name, kind):
    encoder, inputs = ENCODERS[name](model_of(name).base_model), inputs_of(name, kind)
    usual, embeddings = recording(encoder, kind, inputs)
    is_separator = torch.cat([torch.from_numpy(piece.is_separator) for piece in usual.pieces])[: len(embeddings)]
    entered = []

    def push(token, module, args, kwargs):
        rows = args[0].reshape(-1, args[0].shape[-1]).clone()
        entered.append(rows)
        rows[token % len(rows)] += torch.linspace(1, 3, rows.shape[1])
        return (rows.view(args[0].shape), *args[1:]), kwargs

    torch.manual_seed(0)
    touched = torch.zeros(len(usual.values["features"]), dtype=torch.bool)
    for token in torch.randint(0, 10_000, (8,)).tolist():
        handle = encoder.projector.register_forward_pre_hook(partial(push, token), with_kwargs=True)
        nudged, moved = recording(encoder, kind, inputs)
        handle.remove()
        changed = (nudged.values["features"] != usual.values["features"]).any(dim=1)
        assert torch.equal(changed, (moved - embeddings).abs().amax(dim=1)[~is_separator] > 1e-6)
        touched |= changed
    assert touched.any()
    # every number that entered is recorded once where frames are not interpolated
    if (name, kind) != ("llava_onevision", "video"):
        assert torch.equal(nudged.values["features"].flatten().sort().values, entered[-1].flatten().sort().values)


@every_kind
def test_cls_attention_is_its_row_of_the_eager_weights_or_what_all_rows_give(name, kind):
    encoder, inputs = ENCODERS[name](model_of(name).base_model), inputs_of(name, kind)
    assert encoder.has_cls == (name in (*WITH_CLS, "llava_next_video"))
    for layer in range(1, encoder.depth + 1):
        run, _ = recording(encoder, kind, inputs, layer, ("deep", "cls"))
        assert run.layers == (encoder.deep_layer, layer)
        if not encoder.has_cls:
            if layer == encoder.deep_layer:
                assert torch.equal(run.values["cls"], run.values["deep"])
            continue
        with torch.no_grad(), eager_columns(encoder.tower, of_first=True) as received:
            encode(encoder.multimodal, kind, inputs)
        patches = torch.cat(received[encoder.attentions[layer - 1]])[:, 1:]
        if name in ("llava", "vipllava"):
            assert torch.allclose(run.values["cls"], patches.flatten(), atol=1e-6)
        # what patches of a merged square share is averaged, and no patch is lost
        share = len(run.values["cls"]) / patches.numel()
        assert run.values["cls"].sum().item() == pytest.approx(patches.sum().item() * share, abs=1e-4)


def test_the_default_layer_is_that_of_the_visual_features():
    model, inputs = model_of("llava"), inputs_of("llava", "image")
    with torch.no_grad(), prune(model, 3, method=Reads()) as pruning:
        model(**inputs)
    depth, taken = len(model.model.vision_tower.encoder.layers), model.config.vision_feature_layer
    options = pruning.stats.method_options
    assert options["cls_layer"] == depth + 1 + taken
    assert options["cls_queries"] == "CLS"


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "internvl", "gemma3"])
@torch.no_grad()
def test_a_batch_of_prompts_gives_each_visual_token_its_own(name):
    model, inputs = model_of(name), batch(name, *prompts(name)["padded batch"])
    run, _ = recording(ENCODERS[name](model.base_model), "image", inputs)
    method = Reads()
    with prune(model, 0.4, method=method) as pruning:
        logits = model(**inputs).logits
        model.generate(**inputs, **GREEDY, num_beams=2)
    assert logits.isfinite().any()
    # the beams repeat each row
    attention, rows, candidates = (tensor[::2] for tensor in method._seen)
    assert torch.allclose(attention[candidates], run.values["cls"])
    assert torch.allclose(rows[candidates], run.values["features"])
    assert attention.dtype == torch.float32
    scored = pruning.scores[::2][:, : inputs["input_ids"].shape[1]]
    visual = (inputs["input_ids"] == IMAGE) & scored.isfinite()
    assert torch.equal(scored[visual], attention[candidates])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_rows_keep_the_dtype_of_the_encoder(dtype):
    model, inputs = qwen_vl(dtype=dtype), qwen_batch(question([Picture(3, 3), Picture(2, 4)]), dtype=dtype)
    method = Reads()
    with prune(model, 0.4, method=method):
        assert model(**inputs).logits.isfinite().all()
    attention, rows, _ = method._seen
    assert (attention.dtype, rows.dtype) == (torch.float32, dtype)


@torch.no_grad()
def test_a_batch_of_images_and_videos():
    model = qwen_vl()
    inputs = qwen_batch(question(Picture(2, 3, frames=4)), question([Picture(3, 3), Picture(2, 2)], seed=2))
    method = Reads()
    with prune(model, 0.4, method=method, budget="per_image"):
        model(**inputs)
    visual = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
    attention, rows, candidates = method._seen
    assert candidates.sum(1).tolist() == visual.sum(1).tolist()
    assert rows.shape[:2] == attention.shape == candidates.shape


class TestErrors:
    @pytest.mark.parametrize("name", ["cls_attention", "encoder_features"])
    def test_what_was_not_declared_is_not_given(self, name):
        class Undeclared(Reads):
            uses_cls_attention = name != "cls_attention"
            uses_encoder_features = name != "encoder_features"

        model, inputs = qwen_vl(), qwen_batch(question(Picture(4, 4)))
        with (
            prune(model, 0.5, method=Undeclared()),
            torch.no_grad(),
            pytest.raises(ValueError, match=rf"cannot read {name} in a method .* set uses_{name} = True"),
        ):
            model(**inputs)

    def test_neither_declared(self):
        class Undeclared(Reads):
            uses_cls_attention = uses_encoder_features = False

        model, inputs = qwen_vl(), qwen_batch(question(Picture(4, 4)))
        with (
            prune(model, 0.5, method=Undeclared()),
            torch.no_grad(),
            pytest.raises(ValueError, match="cannot read cls_attention"),
        ):
            model(**inputs)

    def test_a_layer_that_the_encoder_lacks(self):
        with pytest.raises(ValueError, match=r"cls_layer: expected 1 to 2, the layers .* got 3; None takes layer 2"):
            prune(qwen_vl(), 0.5, method=Reads(cls_layer=3))

    def test_a_family_whose_encoder_cannot_be_read(self):
        class Rows(Reads):
            uses_cls_attention = False

        for method, what in ((Reads(), "its attention"), (Rows(), "what enters its projector")):
            with pytest.raises(TypeError, match=f"encoder of llama4 alone, got 'reads', which reads {what}; .*llava"):
                prune(tiny_model("llama4"), 0.5, method=method)

    def test_a_compiled_projector(self):
        model = tiny_model("llava")
        model.model.multi_modal_projector.compile(backend="eager")
        with pytest.raises(ValueError, match="method 'reads' with compiled layers in the vision encoder"):
            prune(model, 0.5, method=Reads()).__enter__()
        with prune(model, 3, method="fastervlm"), torch.no_grad():
            model(**inputs_of("llava", "image"))

    def test_features_that_were_encoded_for_a_method_that_reads_less(self):
        model, inputs = qwen_vl(), qwen_batch(question(Picture(4, 4)))
        with torch.no_grad(), pytest.warns(UserWarning, match="not called"), prune(model, 0.5, method="hiprune"):
            features = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        with (
            torch.no_grad(),
            prune(model, 0.5, method=Reads()),
            pytest.raises((ValueError, TypeError), match="mm_encoder_outputs"),
        ):
            model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                mm_encoder_outputs={"image": features},
            )


def test_the_readable_families_are_those_of_the_table():
    assert set(WITH_CLS) < set(ENCODERS) <= set(BY_NAME)
