"""The second miniature: its parts, how it is trained, and what is committed of it."""

from __future__ import annotations

import json

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from safetensors import safe_open  # noqa: E402

from bench.tinyvqa import alignment, evaluate, table, tasks, train  # noqa: E402
from bench.tinyvqa.batches import draw_batch  # noqa: E402
from bench.tinyvqa.contenders import CONTENDERS, HAWK, Contender  # noqa: E402
from bench.tinyvqa.encoder import shared_prefix_pass  # noqa: E402
from bench.tinyvqa.llava import (  # noqa: E402
    LLAVA,
    RECIPE,
    build_config,
    build_image_processor,
    build_model,
    build_tokenizer,
    caption,
    published_name,
)
from bench.tinyvqa.makes import MAKES, make_of  # noqa: E402
from bench.tinyvqa.painting import to_image  # noqa: E402
from bench.tinyvqa.qwen import QWEN  # noqa: E402
from bench.tinyvqa.recipe import Recipe, Stage  # noqa: E402
from bench.tinyvqa.scenes import Layout, Scene  # noqa: E402
from hawk_kernels import prune  # noqa: E402
from hawk_kernels.checkpoint import load_checkpoint, load_processor  # noqa: E402
from hawk_kernels.evaluation import contenders  # noqa: E402

PAGE = Layout(8, 8)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def committed():
    return LLAVA.load_model(LLAVA.shipped), load_processor(str(LLAVA.shipped))


@pytest.fixture(scope="module")
def encoder(committed):
    return LLAVA.encoder(committed[0], committed[1].tokenizer)


@pytest.fixture
def short_stages(monkeypatch):
    stages = (Stage((3, 3), 18, 2, 2.0, ("exists",)), Stage((8, 8), 64, 1, 2.0))
    monkeypatch.setattr(LLAVA, "recipe", Recipe(RECIPE.peak_rate, 2, 32, stages, settle=0.5))


def user_inputs(processor, batch, prompt: int = 0):
    question = batch.questions[prompt][0]
    content = [{"type": "image"}, {"type": "text", "text": question.text}]
    message = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    images = [to_image(page) for page in batch.pages_of(prompt)]
    return processor(text=[text], images=images, return_tensors="pt")


def test_a_checkpoint_says_which_miniature_it_is(tmp_path):
    assert {name: make_of(make.shipped).name for name, make in MAKES.items()} == {"qwen": "qwen", "llava": "llava"}
    (tmp_path / "config.json").write_text('{"model_type": "paligemma"}')
    with pytest.raises(ValueError, match="one of qwen2_5_vl, llava, got paligemma"):
        make_of(tmp_path)


def test_the_config_is_that_of_llava_with_a_cls_token_that_is_dropped():
    tokenizer = build_tokenizer()
    config = build_config(tokenizer)
    model = build_model(config, 3)
    assert config.vision_feature_layer == -2
    assert config.vision_feature_select_strategy == "default"
    assert config.text_config.num_hidden_layers >= 6
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert [p.shape for name, p in model.named_parameters() if name.endswith("class_embedding")] == [(96,)]
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
    again = build_model(config, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_no_head_of_a_fresh_model_attends_to_what_is_like_the_query():
    model = build_model(build_config(build_tokenizer()), 0)
    words = torch.randn(2000, 128, generator=torch.Generator().manual_seed(0))
    for layer in model.model.language_model.layers:
        queries = layer.self_attn.q_proj(words).view(2000, 8, 16)
        keys = layer.self_attn.k_proj(words).view(2000, 4, 16).repeat_interleave(2, dim=1)
        likeness = torch.nn.functional.cosine_similarity(queries, keys, dim=-1).mean(0)
        assert likeness.abs().max() < 0.1


def test_a_caption_names_the_digits_that_are_not_at_the_edge():
    figures, colours = np.full(64, 12), np.zeros(64, dtype=int)
    for cell, digit, colour in ((0, 3, 1), (9, 5, 2), (15, 6, 3), (36, 0, 7), (63, 8, 4), (57, 9, 5)):
        figures[cell], colours[cell] = digit, colour
    scene = Scene(PAGE, figures, colours, np.zeros(64), np.zeros(64), ())
    assert caption(scene).tolist() == [8, 0, 0, 0, 0, 3, 0, 0, 0, 0]


def test_training_sees_the_pixels_that_the_image_processor_would_give(encoder):
    batch = draw_batch(rng(), "train", 2, PAGE)
    inputs = build_image_processor()([to_image(page) for page in batch.pages], return_tensors="pt")
    torch.testing.assert_close(encoder.pixels(batch.pages), inputs["pixel_values"], atol=1e-5, rtol=0)


def test_questions_sharing_a_prefix_get_the_logits_they_would_get_alone(committed, encoder):
    model, processor = committed
    batch = draw_batch(rng(2), "train", 2, PAGE, {"exists": 1})
    with torch.no_grad():
        logits, labels, _ = shared_prefix_pass(model, encoder, batch)
        logits = logits[labels != processor.tokenizer.eos_token_id]
        for prompt in range(2):
            alone = model(**user_inputs(processor, batch, prompt)).logits[0, -1]
            torch.testing.assert_close(logits[prompt], alone, atol=5e-4, rtol=1e-3)


def test_reading_pictures_once_changes_nothing(committed, encoder):
    model, _ = committed
    batch = draw_batch(rng(5), "held_out", 2, PAGE, 1)
    inputs = evaluate.model_inputs(encoder, batch)
    with torch.no_grad():
        whole = model(**inputs, logits_to_keep=1).logits[:, -1]
        with evaluate.pictures_read_once(model, encoder, batch):
            once = model(**inputs, logits_to_keep=1).logits[:, -1]
    assert "forward" not in vars(model.model.vision_tower)
    torch.testing.assert_close(once, whole, atol=5e-4, rtol=1e-3)


def test_a_video_is_refused(encoder):
    with pytest.raises(ValueError, match="LLaVA takes no videos"):
        encoder.prefix(Layout(8, 8, 2, "video"))


def test_a_killed_training_goes_on_to_the_same_bytes(tmp_path, short_stages, monkeypatch):
    whole = train.train(4, show_progress=False, make="llava")
    step = train.Training.step

    class KilledError(Exception):
        pass

    def dies(self):
        if self.progress.step == 1:
            raise KilledError
        return step(self)

    monkeypatch.setattr(train, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(train.Training, "step", dies)
    with pytest.raises(KilledError):
        train.train(4, tmp_path / "state.pt", show_progress=False, make="llava")
    monkeypatch.setattr(train.Training, "step", step)
    resumed = train.train(4, tmp_path / "state.pt", show_progress=False, make="llava")
    for ours, theirs in ((whole.model, resumed.model), (whole.lessons, resumed.lessons)):
        for name, parameter in ours.named_parameters():
            assert torch.equal(parameter, theirs.get_parameter(name)), name


def test_the_vision_tower_is_frozen_once_there_are_questions(short_stages):
    run = train.Training(0, "llava")
    while run.progress.step < 2:
        run.step()
    before = {name: parameter.clone() for name, parameter in run.model.named_parameters()}
    while not run.progress.is_done:
        run.step()
    changed = {name for name, parameter in run.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name for name in before if "vision_tower" not in name} == changed


def test_the_rate_falls_before_the_tower_is_frozen():
    def rate(step):
        return train.learning_rate(train.Progress(0, "llava", step=step)) / RECIPE.peak_rate

    assert rate(RECIPE.align_steps // 2) == 1.0
    assert rate(RECIPE.align_steps - 1) == pytest.approx(0.05)


def test_a_state_of_another_make_is_refused(tmp_path, short_stages):
    train.Training(4, "llava").save(tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"seed 4 \(llava, .* not 4 \(qwen, .*; delete it"):
        train.train(4, tmp_path / "state.pt", show_progress=False)


def test_the_committed_checkpoint_is_small_and_a_real_llava(committed):
    model, processor = committed
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"
    assert sum(file.stat().st_size for file in LLAVA.shipped.iterdir()) < 8_000_000
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    loaded, _ = load_checkpoint(str(LLAVA.shipped), "float32", torch.device("cpu"), report=pytest.fail)
    assert loaded.generation_config.eos_token_id == processor.tokenizer.eos_token_id


def test_its_tensors_have_the_names_of_published_checkpoints():
    with safe_open(LLAVA.shipped / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "vision_tower.vision_model.embeddings.class_embedding" in names
    assert {"language_model.lm_head.weight", "multi_modal_projector.linear_1.weight"} <= names
    assert {published_name(name) for name in names} == names


def test_its_training_record_states_a_model_that_passed():
    record = json.loads((LLAVA.shipped / "training.json").read_text())
    assert record["make"] == "llava"
    assert record["held_out"]["split"] == "held_out"
    assert record["held_out"]["accuracy"] >= 0.95
    assert min(record["held_out"]["by_kind"].values()) >= 0.85


def test_it_answers_about_digits_it_never_saw_as_a_user_would_ask(committed):
    model, processor = committed
    batch = draw_batch(rng(77), "held_out", 8, PAGE, dict.fromkeys(LLAVA.kinds, 1))
    said = evaluate.generated_answers(model, processor, batch)
    right = [a == q.answer for a, q in zip(said, (q for row in batch.questions for q in row), strict=True)]
    assert np.mean(right) >= 0.9


@pytest.mark.parametrize("method", ["hawk", "cdpruner", "divprune", "hiprune", "fastv"])
def test_it_can_be_pruned(committed, method):
    model, processor = committed
    batch = draw_batch(rng(3), "held_out", 1, PAGE, {"colour->digit": 1})
    inputs = user_inputs(processor, batch)
    options = {"head_weights": "uniform"} if method == "hawk" else {}
    with torch.no_grad():
        whole = model(**inputs).logits[0, -1]
        with prune(model, 0.25, method=method, **options) as pruning:
            out = model.generate(**inputs, max_new_tokens=2)
        is_visual = inputs["input_ids"] == model.config.image_token_id
        assert pruning.keep_mask[is_visual].sum() == 16
        assert pruning.keep_mask[~is_visual].all()
        assert out.shape[1] > inputs["input_ids"].shape[1]
        with prune(model, 1.0, method=method, **options):
            torch.testing.assert_close(model(**inputs).logits[0, -1], whole, atol=5e-4, rtol=1e-3)


def test_its_visual_tokens_are_not_aligned_with_words_and_those_of_the_first_are():
    first, second = (alignment.measure(make.shipped, pages=4) for make in (QWEN, LLAVA))
    for name in ("figures", "colours"):
        assert first[name]["nearest_is_right"] > 0.95
        assert first[name]["named"][1] > 0.6
        assert abs(second[name]["named"][1] - second[name]["others"][1]) < 0.2
        assert second[name]["nearest_is_right"] < 0.5


def test_calibration_asks_about_pages_of_the_size_it_knows(monkeypatch):
    monkeypatch.setattr(tasks, "QUESTIONS_A_KIND", 3)
    found = tasks.llava_tasks()
    assert [task.name for task in found] == list(LLAVA.kinds)
    for task in found:
        assert len(task.samples) == 3
        assert all(sample.images[0]().size == (224, 224) for sample in task.samples)


def uniform_weights(subject, _):
    weights = {"weights": [0.125] * 8}
    return {"layers": "first", "other_layers": {"all": weights}, "tasks": [], "deltas": [[0.0]] * 8} | weights


def test_the_table_takes_it_and_lists_methods_that_cannot_serve_it(tmp_path, monkeypatch):
    def refuse(model, *args, method, **kwargs):
        if method == "random":
            raise TypeError("method: expected one that needs no dice, got random; use method='hawk'")
        return prune(model, *args, method=method, **kwargs)

    monkeypatch.setattr(contenders, "prune", refuse)
    monkeypatch.setattr(table, "calibrated_weights", uniform_weights)
    monkeypatch.setattr(table, "KEEP_RATIOS", (0.2,))
    names = ["hiprune", "random"]
    report = table.build([LLAVA.shipped], tmp_path, 2, 1, times=False, show_progress=False, methods=names)
    labels = [c.label for c in CONTENDERS if c.method == "hiprune"]
    assert list(report["methods"]) == [HAWK, *labels]
    assert report["miniature"] == "llava"
    assert report["refused"] == {"random": "method: expected one that needs no dice, got random; use method='hawk'"}
    text = table.markdown(report)
    assert "one model" in text
    assert "`python -m bench.tinyvqa.table --miniature llava`" in text
    assert "| random | method: expected one that needs no dice" in text


def test_the_table_raises_every_other_error(committed, encoder, tmp_path):
    subject = table.Subject.load(LLAVA.shipped)
    contender = Contender("hawk of no heads", "hawk", heads=None)
    with pytest.raises(ValueError, match="head_weights"):
        table.refusals(subject, [contender], {}, draw_batch(rng(), "held_out", 1, PAGE, 1))


def test_the_table_refuses_models_of_two_makes(tmp_path):
    with pytest.raises(SystemExit, match="expected models of one make"):
        table.build([QWEN.shipped, LLAVA.shipped], tmp_path, 1, 1, times=False, show_progress=False)
