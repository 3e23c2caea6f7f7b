"""The tiny VQA task and the model that ships with the package."""

from __future__ import annotations

import json

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from PIL import Image  # noqa: E402

from bench.tinyvqa import data, evaluate, train  # noqa: E402
from bench.tinyvqa.checkpoint import build_config, build_image_processor, build_model, build_tokenizer  # noqa: E402
from hawk_kernels.checkpoint import TINY_MODEL, load_processor  # noqa: E402


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def shipped():
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY_MODEL).eval(), load_processor(str(TINY_MODEL))


def chat(processor, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )


# The task


def test_held_out_digits_are_every_fifth_and_never_trained_on():
    trained, held_out = data.load_digits("train"), data.load_digits("held_out")
    assert not set(trained.source_index) & set(held_out.source_index)
    assert len(trained.source_index) + len(held_out.source_index) == 1797
    assert (held_out.source_index % 5 == 4).all()
    assert set(held_out.labels) == set(range(10))


def test_no_held_out_glyph_is_painted_in_training(monkeypatch):
    asked_for = []
    load = data.load_digits
    monkeypatch.setattr(data, "load_digits", lambda split: (asked_for.append(split), load(split))[1])
    monkeypatch.setattr(train, "CURRICULUM", ())
    train.train(seed=0, final_steps=2, show_progress=False)
    assert set(asked_for) == {"train"}


def test_a_scene_repeats_neither_digit_nor_colour_nor_cell():
    pool = data.load_digits("train")
    for seed in range(50):
        scene = data.draw_scene(rng(seed), pool, 3, 4, 6)
        for values in (scene.digits, scene.colours, scene.cells):
            assert len(set(values)) == 6
        assert all(pool.labels[i] == d for i, d in zip(scene.instances, scene.digits, strict=True))


@pytest.mark.parametrize("objects", [0, 5, 9])
def test_a_scene_that_does_not_fit_is_refused(objects):
    grid = (2, 2) if objects == 5 else (4, 4)
    with pytest.raises(ValueError, match="takes 1 to"):
        data.draw_scene(rng(), data.load_digits("train"), *grid, objects)


def test_every_answer_is_the_one_the_scene_gives():
    for scene, questions in _scenes_with_questions():
        for question in questions:
            words = question.text.lower().replace("?", "").split()
            named_colours = [i for i, c in enumerate(scene.colours) if data.COLOUR_NAMES[c] in words]
            named_digits = [i for i, d in enumerate(scene.digits) if str(d) in words or data.DIGIT_NAMES[d] in words]
            if question.kind == "colour->digit":
                assert (named_colours, named_digits) == ([question.target], [])
                assert question.answer == str(scene.digits[question.target])
            else:
                assert (named_colours, named_digits) == ([], [question.target])
                assert question.answer == data.COLOUR_NAMES[scene.colours[question.target]]


def _scenes_with_questions():
    batch = data.draw_batch(rng(3), "train", 40, (4, 5), 3)
    return zip(batch.scenes, batch.questions, strict=True)


def test_one_seed_gives_one_batch():
    first, again, other = (data.draw_batch(rng(s), "held_out", 3, (4, 6), 3) for s in (7, 7, 8))
    assert torch.equal(first.pictures, again.pictures)
    assert first.scenes == again.scenes
    assert first.questions == again.questions
    assert first.questions != other.questions
    assert not torch.equal(first.pictures, other.pictures)


def test_digits_are_painted_in_their_colour_in_their_cell_and_nowhere_else():
    batch = data.draw_batch(rng(1), "train", 4, (3, 5), 4)
    for picture, scene in zip(batch.pictures.float(), batch.scenes, strict=True):
        cells = picture.view(3, 3, data.CELL, 5, data.CELL).permute(1, 3, 0, 2, 4).flatten(0, 1)
        for cell in range(15):
            brightest = cells[cell].flatten(1)[:, cells[cell].sum(0).flatten().argmax()]
            if cell in scene.cells:
                colour = data.COLOUR_NAMES[scene.colours[scene.cells.index(cell)]]
                assert (brightest - torch.tensor(data.COLOURS[colour]).float()).abs().max() < 60
            else:
                assert brightest.max() < 100


def test_pictures_of_one_batch_share_one_grid():
    pool = data.load_digits("train")
    scenes = [data.draw_scene(rng(), pool, 2, 2, 1), data.draw_scene(rng(), pool, 2, 3, 1)]
    with pytest.raises(ValueError, match="same grid"):
        data.render(scenes, pool, rng())


# Tokenizer and training path


def test_the_tokenizer_knows_every_word_of_the_task():
    tokenizer = build_tokenizer()
    for _, questions in _scenes_with_questions():
        for question in questions:
            assert tokenizer.unk_token_id not in tokenizer(question.text + " " + question.answer).input_ids
    assert tokenizer("WHICH  digit is Red ?").input_ids == tokenizer("which digit is red?").input_ids
    assert tokenizer("blorp").input_ids == [tokenizer.unk_token_id]


def test_training_sees_the_pixels_that_the_image_processor_would_give():
    batch = data.draw_batch(rng(), "train", 2, (3, 5), 3)
    tokenizer = build_tokenizer()
    encoder = train.Encoder(build_model(build_config(tokenizer), 0), tokenizer)
    patches, grid = encoder.pixels(batch.pictures)
    inputs = build_image_processor()([data.to_image(p) for p in batch.pictures], return_tensors="pt")
    assert torch.equal(grid, inputs["image_grid_thw"])
    torch.testing.assert_close(patches, inputs["pixel_values"], atol=1e-5, rtol=0)


def test_questions_sharing_a_prefix_get_the_logits_they_would_get_alone(shipped):
    model, processor = shipped
    encoder = train.Encoder(model, processor.tokenizer)
    batch = data.draw_batch(rng(2), "train", 2, (5, 7), 4)
    with torch.no_grad(), train.batched_vision_attention(model.model.visual):
        logits, labels, _ = train.shared_prefix_pass(model, encoder, batch)
    assert "forward" not in vars(model.model.visual.blocks[0].attn)
    logits = logits[labels != model.config.eos_token_id].view(2, -1, logits.shape[-1])
    for row, (picture, questions) in enumerate(zip(batch.pictures, batch.questions, strict=True)):
        for column, question in enumerate(questions):
            inputs = processor(
                text=[chat(processor, question.text)], images=[data.to_image(picture)], return_tensors="pt"
            )
            with torch.no_grad():
                alone = model(**inputs).logits[0, -1]
            torch.testing.assert_close(logits[row, column], alone, atol=2e-4, rtol=1e-4)


def test_training_repeats_itself(monkeypatch):
    monkeypatch.setattr(train, "CURRICULUM", (train.Stage((2, 3), 4, 2, 2.0),))
    first, again = (train.train(seed=4, final_steps=2, show_progress=False)[0] for _ in range(2))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


# The shipped model


def test_the_shipped_checkpoint_is_small_and_a_real_qwen(shipped):
    from transformers import AutoModelForImageTextToText

    model, _ = shipped
    assert (TINY_MODEL / "model.safetensors").stat().st_size < 5_000_000
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    auto = AutoModelForImageTextToText.from_pretrained(TINY_MODEL)
    assert type(auto).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert model.generation_config.eos_token_id == model.config.eos_token_id


def test_the_training_record_states_a_model_that_passed():
    record = json.loads((TINY_MODEL / "training.json").read_text())
    assert record["held_out"]["split"] == "held_out"
    assert record["held_out"]["accuracy"] >= 0.95
    assert min(record["held_out"]["by_kind"].values()) >= 0.95
    assert {"seed", "steps", "wall_seconds", "cpu_seconds", "versions"} <= record.keys()


def test_it_answers_about_digits_it_never_saw(shipped):
    model, processor = shipped
    right = []
    for grid in ((8, 8), (6, 9)):
        asked = evaluate.ask_held_out(processor, grid, pictures=32, seed=77)
        said = evaluate.generate_answers(model, processor, asked)
        right += [a == s for a, s in zip(asked.answers, said, strict=True)]
    assert np.mean(right) >= 0.95


def test_it_needs_the_picture(shipped):
    model, processor = shipped
    asked = evaluate.ask_held_out(processor, (8, 8), pictures=16, seed=78)
    swapped = evaluate.Asked(asked.images[::-1], asked.texts, asked.kinds, asked.answers)
    said = evaluate.generate_answers(model, processor, swapped)
    assert np.mean([a == s for a, s in zip(asked.answers, said, strict=True)]) < 0.5


def test_a_left_padded_batch_answers_as_its_rows_alone(shipped):
    model, processor = shipped
    images, texts = [], []
    for seed, (grid, question) in enumerate(
        [
            ((8, 8), "Which digit is green?"),
            ((3, 4), "What is the red digit?"),
            ((6, 9), "In which colour is the 3 painted?"),
        ]
    ):
        images.append(data.to_image(data.draw_batch(rng(seed), "held_out", 1, grid, 3).pictures[0]))
        texts.append(chat(processor, question))
    together = processor(text=texts, images=images, padding=True, return_tensors="pt")
    assert together["attention_mask"][1, 0] == 0
    assert together["attention_mask"][:, -1].all()
    with torch.no_grad():
        logits = model(**together).logits[:, -1]
        out = model.generate(**together, max_new_tokens=4)
        for row, (image, text) in enumerate(zip(images, texts, strict=True)):
            alone = processor(text=[text], images=[image], return_tensors="pt")
            torch.testing.assert_close(logits[row], model(**alone).logits[0, -1], atol=1e-4, rtol=1e-4)
            single = model.generate(**alone, max_new_tokens=4)[0, alone["input_ids"].shape[1] :]
            batched = out[row, together["input_ids"].shape[1] :]
            assert batched[: len(single)].tolist() == single.tolist()


def test_it_forgives_other_wordings(shipped):
    model, processor = shipped
    scene = json.loads((TINY_MODEL / "samples" / "samples.json").read_text())["digits_8x8.png"]
    image = Image.open(TINY_MODEL / "samples" / "digits_8x8.png")
    red = next(o for o in scene["objects"] if o["colour"] == "red")
    wordings = ["which digit is red", "What number is RED?", "What is the red digit?"]
    inputs = processor(
        text=[chat(processor, w) for w in wordings], images=[image] * 3, padding=True, return_tensors="pt"
    )
    out = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    assert [a.strip() for a in processor.batch_decode(out, skip_special_tokens=True)] == [str(red["digit"])] * 3


def test_a_fifth_of_the_tokens_is_enough_when_hawk_chooses_and_not_when_chance_does(shipped):
    model, processor = shipped
    asked = evaluate.ask_held_out(processor, (8, 8), pictures=24, seed=79)

    def accuracy(score):
        with torch.no_grad():
            said = evaluate.answers_with_hidden_tokens(model, processor, asked, 0.2, score)
        return np.mean([a == s for a, s in zip(asked.answers, said, strict=True)])

    assert accuracy(lambda inputs: evaluate.literal_hawk_scores(model, inputs)) >= 0.9
    assert accuracy(evaluate.random_scores(model, 0)) < 0.6


def test_the_processor_refuses_videos_it_cannot_read(shipped):
    _, processor = shipped
    if "video_processor" in processor.get_attributes():
        pytest.skip("torchvision is installed, so the processor is the full one")
    with pytest.raises(ValueError, match="pip install torchvision"):
        processor(text=["<|video_pad|>"], videos=[np.zeros((4, 28, 28, 3))])
