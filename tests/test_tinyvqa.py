"""The tiny VQA task, how its model is trained, and what ships of it."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from PIL import Image  # noqa: E402
from torch.nn import functional  # noqa: E402

from bench.tinyvqa import batches, evaluate, intervals, table, tasks, train  # noqa: E402
from bench.tinyvqa.batches import draw_batch  # noqa: E402
from bench.tinyvqa.contenders import CONTENDERS, HAWK, Contender, check_contenders  # noqa: E402
from bench.tinyvqa.digits import load_digits  # noqa: E402
from bench.tinyvqa.encoder import shared_prefix_pass  # noqa: E402
from bench.tinyvqa.painting import CELL, render, to_image  # noqa: E402
from bench.tinyvqa.questions import KINDS, NUMBER_NAMES, kinds_of  # noqa: E402
from bench.tinyvqa.qwen import (  # noqa: E402
    CONTENT_HEADS,
    QWEN,
    RECIPE,
    QwenEncoder,
    batched_vision_attention,
    build_config,
    build_image_processor,
    build_model,
    build_tokenizer,
)
from bench.tinyvqa.recipe import Recipe, Stage  # noqa: E402
from bench.tinyvqa.scenes import COLOUR_NAMES, COLOURS, NUM_DIGITS, SHAPE_NAMES, Layout, draw_scene  # noqa: E402
from hawk_kernels.checkpoint import TINY_MODEL, load_processor  # noqa: E402
from hawk_kernels.head_weights import read_weights_file, resolve_head_weights, shipped_weights  # noqa: E402

LAYOUTS = [
    Layout(3, 3),
    Layout(4, 5),
    Layout(6, 6),
    Layout(16, 16),
    Layout(4, 4, 3, "images"),
    Layout(3, 5, 2, "video"),
]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def shipped():
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY_MODEL).eval(), load_processor(str(TINY_MODEL))


@pytest.fixture(scope="module")
def encoder(shipped):
    return QwenEncoder(shipped[0], shipped[1].tokenizer)


@pytest.fixture
def short_stages(monkeypatch):
    stages = (Stage((3, 3), 18, 2, 2.0, ("exists",)), Stage((4, 5), 40, 2, 2.0, mixed=True))
    monkeypatch.setattr(QWEN, "recipe", Recipe(RECIPE.peak_rate, 2, 32, stages))


def chat(processor, question: str, images: int = 1) -> str:
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": question}]
    message = [{"role": "user", "content": content}]
    return processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)


def test_held_out_digits_are_every_fifth_and_never_trained_on():
    trained, held_out = load_digits("train"), load_digits("held_out")
    assert not set(trained.source_index) & set(held_out.source_index)
    assert len(trained.source_index) + len(held_out.source_index) == 1797
    assert (held_out.source_index % 5 == 4).all()
    assert set(held_out.labels) == set(range(10))
    with pytest.raises(ValueError, match="'train' or 'held_out', got 'test'"):
        load_digits("test")


def test_no_held_out_glyph_is_painted_in_training(monkeypatch, short_stages):
    asked_for = []

    def load(split):
        asked_for.append(split)
        return load_digits(split)

    monkeypatch.setattr(batches, "load_digits", load)
    monkeypatch.setattr(train, "load_digits", load)
    train.train(seed=0, show_progress=False)
    assert set(asked_for) == {"train"}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(LAYOUTS), st.integers(0, 10**6))
def test_a_scene_leaves_no_cell_blank_and_gives_every_question_one_answer(layout, seed):
    pool = load_digits("train")
    scene = draw_scene(rng(seed), pool, layout)
    assert scene.figures.shape == scene.colours.shape == (layout.cells,)
    assert ((scene.figures >= 0) & (scene.figures < NUM_DIGITS + len(SHAPE_NAMES))).all()
    cells = scene.digit_cells
    assert len(cells) == 2 * layout.landmarks
    assert len(set(scene.figures[cells])) == len(set(scene.colours[cells])) == len(cells)
    assert (pool.labels[scene.instances[cells]] == scene.figures[cells]).all()
    assert len(scene.landmarks) == layout.landmarks
    for cell in scene.landmarks:
        assert scene.figures[cell] >= NUM_DIGITS
        assert (scene.figures == scene.figures[cell]).sum() == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((2, 3), "at least 3 x 3"),
        ((4, 4, 2), "expected 1 of an 'image'"),
        ((4, 4, 0, "video"), "at least 1"),
        ((4, 4, 1, "film"), "expected one of"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        Layout(*arguments)


def test_digits_and_shapes_are_painted_in_their_colours_on_darker_textures():
    layout, pool = Layout(5, 6), load_digits("train")
    scenes = [draw_scene(rng(seed), pool, layout) for seed in range(4)]
    pages = render(scenes, pool, rng())
    assert pages.shape == (4, 3, 5 * CELL, 6 * CELL)
    palette = torch.tensor(list(COLOURS.values())).float()
    for page, scene in zip(pages.float(), scenes, strict=True):
        cells = page.view(3, 5, CELL, 6, CELL).permute(1, 3, 0, 2, 4).flatten(0, 1).flatten(2)
        for cell, colour in zip(cells, scene.colours, strict=True):
            brightest = cell[:, cell.amax(0).topk(12).indices].mean(1)
            assert (brightest - palette[colour]).abs().sum() == (brightest - palette).abs().sum(1).min()
            assert cell.std() > 10, "no cell is blank"


def test_pages_of_one_batch_share_one_layout():
    pool = load_digits("train")
    with pytest.raises(ValueError, match="one layout"):
        render([draw_scene(rng(), pool, Layout(3, 3)), draw_scene(rng(), pool, Layout(3, 4))], pool, rng())


def answer_by_reading(question: str, scene) -> str:
    """The right answer, from the words of the question and the cells alone."""
    words = [w for w in re.split(r"[ ?,]+", question.lower()) if w]
    width = scene.layout.width
    digits = {c: int(scene.figures[c]) for c in range(scene.layout.cells) if scene.figures[c] < NUM_DIGITS}
    colours = {c: COLOUR_NAMES[scene.colours[c]] for c in range(scene.layout.cells)}
    shapes = {SHAPE_NAMES[f - NUM_DIGITS]: c for c, f in enumerate(scene.figures) if f >= NUM_DIGITS}
    named_digits = [int(w) if w.isdigit() else NUMBER_NAMES.index(w) for w in words if w.isdigit() or w in NUMBER_NAMES]
    named_colours = [w for w in words if w in COLOUR_NAMES]
    named_shapes = [w for w in words if w in SHAPE_NAMES]

    def digit_in(colour):
        (digit,) = (d for c, d in digits.items() if colours[c] == colour)
        return digit

    if "larger" in words:
        return str(max(digit_in(colour) for colour in named_colours))
    edges = {
        "top": lambda c: c // width,
        "bottom": lambda c: -(c // width),
        "left": lambda c: c % width,
        "right": lambda c: -(c % width),
    }
    if "nearest" in words or "nearer" in words:
        distance = edges[next(w for w in words if w in edges)]
        asked = [c for c in digits if "nearest" in words or colours[c] in named_colours]
        first, second = sorted(asked, key=distance)[:2]
        assert distance(first) < distance(second)
        return str(digits[first])
    if named_digits and named_colours:
        return "yes" if digit_in(named_colours[0]) == named_digits[0] else "no"
    if named_colours:
        return str(digit_in(named_colours[0]))
    if named_digits:
        (cell,) = (c for c, d in digits.items() if d == named_digits[0])
        return colours[cell]
    return colours[shapes[named_shapes[0]]]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(LAYOUTS), st.integers(0, 10**6))
def test_every_answer_is_the_one_the_scene_gives(layout, seed):
    scene = draw_scene(rng(seed), load_digits("held_out"), layout)
    for kind in kinds_of(layout.pages):
        question = KINDS[kind](rng(seed), scene)
        assert question.kind == kind
        assert question.answer == answer_by_reading(question.text, scene), question
        assert all(0 <= cell < layout.cells for cell in question.cells)


def test_no_answer_of_a_kind_is_a_safe_guess():
    batch = draw_batch(rng(), "train", 150, Layout(6, 6), 2)
    answers = {kind: [q.answer for row in batch.questions for q in row if q.kind == kind] for kind in KINDS}
    for kind, given_answers in answers.items():
        commonest = max(given_answers.count(a) for a in set(given_answers)) / len(given_answers)
        assert commonest < {"exists": 0.6, "comparison": 0.45}.get(kind, 0.3), kind


def test_several_pages_have_no_edge_to_be_nearest_to():
    assert set(kinds_of(1)) - set(kinds_of(2)) == {"position->digit", "relation->digit"}
    batch = draw_batch(rng(), "train", 2, Layout(4, 4, 2, "images"), 1)
    assert {q.kind for row in batch.questions for q in row} == set(kinds_of(2))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_seed_gives_one_batch(layout):
    first, again, other = (draw_batch(rng(seed), "held_out", 3, layout) for seed in (7, 7, 8))
    assert torch.equal(first.pages, again.pages)
    assert first.questions == again.questions
    assert first.questions != other.questions
    assert not torch.equal(first.pages, other.pages)


def test_the_tokenizer_knows_every_word_of_the_task():
    tokenizer = build_tokenizer()
    for row in draw_batch(rng(), "train", 60, Layout(6, 6), 4).questions:
        for question in row:
            assert tokenizer.unk_token_id not in tokenizer(question.text + " " + question.answer).input_ids
    assert tokenizer("WHICH  digit is Red ?").input_ids == tokenizer("which digit is red?").input_ids
    assert tokenizer("blorp").input_ids == [tokenizer.unk_token_id]


def test_the_shipped_tokenizer_is_the_one_that_is_built(shipped):
    _, processor = shipped
    tokenizer = build_tokenizer()
    assert tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert tokenizer.chat_template == processor.tokenizer.chat_template
    assert tokenizer.response_template == processor.tokenizer.response_template


def test_a_server_can_tell_where_an_answer_begins(shipped):
    _, processor = shipped
    prompt = processor.tokenizer.decode(processor.tokenizer(chat(processor, "which digit is red?", 1)).input_ids)
    assert prompt.endswith(processor.tokenizer.response_template["start_anchor"])


@pytest.mark.parametrize("layout", [Layout(3, 5), Layout(4, 3, 2, "images")], ids=str)
def test_training_sees_the_pixels_that_the_image_processor_would_give(encoder, layout):
    batch = draw_batch(rng(), "train", 2, layout)
    patches, grid = encoder.pixels(batch.pages, layout)
    inputs = build_image_processor()([to_image(page) for page in batch.pages], return_tensors="pt")
    assert torch.equal(grid, inputs["image_grid_thw"])
    torch.testing.assert_close(patches, inputs["pixel_values"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", [Layout(5, 7), Layout(4, 4, 2, "images")], ids=str)
def test_questions_sharing_a_prefix_get_the_logits_they_would_get_alone(shipped, encoder, layout):
    model, processor = shipped
    batch = draw_batch(rng(2), "train", 2, layout, 1)
    with torch.no_grad(), batched_vision_attention(model.model.visual):
        logits, labels, _ = shared_prefix_pass(model, encoder, batch)
    assert "forward" not in vars(model.model.visual.blocks[0].attn)
    logits = logits[labels != model.config.eos_token_id].view(2, -1, logits.shape[-1])
    for prompt, questions in enumerate(batch.questions):
        images = [to_image(page) for page in batch.pages_of(prompt)]
        for column, question in enumerate(questions):
            text = chat(processor, question.text, len(images))
            inputs = processor(text=[text], images=[images], return_tensors="pt")
            with torch.no_grad():
                alone = model(**inputs).logits[0, -1]
            torch.testing.assert_close(logits[prompt, column], alone, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("layout", [Layout(6, 4), Layout(4, 4, 2, "images"), Layout(3, 4, 3, "video")], ids=str)
def test_reading_pictures_once_changes_nothing(shipped, encoder, layout):
    model, _ = shipped
    batch = draw_batch(rng(5), "held_out", 2, layout, 1)
    inputs = evaluate.model_inputs(encoder, batch)
    with torch.no_grad():
        whole = model(**inputs, logits_to_keep=1).logits[:, -1]
        with evaluate.pictures_read_once(model, encoder, batch):
            once = model(**inputs, logits_to_keep=1).logits[:, -1]
        shared, labels, _ = shared_prefix_pass(model, encoder, batch)
    assert "forward" not in vars(model.model.visual)
    torch.testing.assert_close(once, whole, atol=5e-4, rtol=1e-3)
    torch.testing.assert_close(shared[labels != model.config.eos_token_id], whole, atol=5e-4, rtol=1e-3)


def test_a_killed_training_goes_on_to_the_same_bytes(tmp_path, short_stages, monkeypatch):
    whole = train.train(4, show_progress=False)
    state = tmp_path / "state.pt"

    class KilledError(Exception):
        pass

    step = train.Training.step

    def dies(self):
        if self.progress.step == 5:
            raise KilledError
        return step(self)

    monkeypatch.setattr(train, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(train.Training, "step", dies)
    with pytest.raises(KilledError):
        train.train(4, state, show_progress=False)
    monkeypatch.setattr(train.Training, "step", step)
    resumed = train.train(4, state, show_progress=False)
    assert resumed.progress.stage_steps == whole.progress.stage_steps == [2, 2]
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


def test_a_state_of_another_run_is_refused(tmp_path, short_stages, monkeypatch):
    train.train(4, show_progress=False).save(tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"seed 4 .* not 5 .*; delete it"):
        train.train(5, tmp_path / "state.pt", show_progress=False)
    monkeypatch.setattr(QWEN, "recipe", dataclasses.replace(QWEN.recipe, curriculum=QWEN.recipe.curriculum[:1]))
    with pytest.raises(ValueError, match="delete it or choose another --out"):
        train.train(4, tmp_path / "state.pt", show_progress=False)


def test_kinds_that_lag_are_asked_more():
    running = dict.fromkeys(KINDS, 0.99) | {"comparison": 0.4}
    counts = train.question_counts(rng(), running, list(KINDS), 2000)
    assert sum(counts.values()) == 2000
    assert counts["comparison"] > 1000
    assert min(counts.values()) > 50


def test_the_learning_rate_warms_up_twice_and_falls_in_the_last_stage():
    def rate(step, stage=0, stage_step=0):
        return train.learning_rate(train.Progress(0, step=step, stage=stage, stage_step=stage_step)) / RECIPE.peak_rate

    last = len(RECIPE.curriculum) - 1
    assert rate(0) < 0.05
    assert rate(RECIPE.align_steps - 1) == 1.0
    assert rate(RECIPE.align_steps) < 0.05
    assert rate(9000, last - 1, 500) == rate(9000, last, 0) == 1.0
    assert rate(9000, last, RECIPE.curriculum[-1].most_steps - 1) == 0.01


def test_the_steps_that_are_left_are_known_at_most():
    most = RECIPE.align_steps + sum(stage.most_steps for stage in RECIPE.curriculum)
    assert train.Progress(0).most_steps == train.Progress(0, step=7).most_steps == most
    early = train.Progress(0, step=RECIPE.align_steps + 60, stage=1, stage_step=10)
    assert early.most_steps == most - RECIPE.curriculum[0].most_steps + 50


def test_a_fresh_model_is_small_and_has_words_at_right_angles():
    config = build_config(build_tokenizer())
    model = build_model(config, 3)
    table_of_words = model.get_input_embeddings().weight
    products = table_of_words @ table_of_words.T
    torch.testing.assert_close(products, 36 * torch.eye(len(products)), atol=1e-3, rtol=0)
    again = build_model(config, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def questions_of(prompts: int, each: int = 4) -> intervals.Questions:
    kinds = np.array(["a", "b"] * (prompts * each // 2))
    return intervals.Questions(kinds, np.repeat(np.arange(prompts), each), np.arange(prompts) % 2, ("a", "b"))


def test_only_content_heads_of_a_fresh_model_attend_to_what_is_like_them():
    model = build_model(build_config(build_tokenizer()), 0)
    words = torch.randn(2000, 128, generator=torch.Generator().manual_seed(0))
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        queries = attention.q_proj(words).view(2000, 8, 16)
        keys = attention.k_proj(words).view(2000, 2, 16).repeat_interleave(4, dim=1)
        likeness = functional.cosine_similarity(queries, keys, dim=-1).mean(0)
        assert [head for head in range(8) if likeness[head] > 0.5] == list(CONTENT_HEADS)


def test_intervals_cover_what_they_should():
    questions, chance = questions_of(80), rng(1)
    whole = np.ones((1, 320), dtype=bool)
    covered = 0
    for _ in range(60):
        right = {"x": {0.5: chance.random((1, 320)) < 0.7}, "y": {0.5: whole}}
        weights = intervals.resampling_weights(questions.strata, 400)
        found = intervals.summarise(questions, right, whole, "y", [0.5], weights)["x"]["0.5"]["mean"]
        covered += found["low"] <= 70 <= found["high"]
    assert 51 <= covered <= 60


def test_relative_accuracy_is_the_mean_over_kinds_of_what_is_left():
    questions = questions_of(4)
    whole = np.array([questions.kinds == "a"]) | (np.arange(16) % 4 == 1)
    pruned = np.array([(questions.kinds == "a") & (np.arange(16) % 4 == 0)]) | (np.arange(16) % 4 == 1)
    found = intervals.summarise(questions, {"x": {0.1: pruned}, "y": {0.1: whole}}, whole, "y", [0.1])
    assert found["x"]["0.1"]["mean"]["percent"] == 75.0
    assert found["x"]["0.1"]["by_kind"]["a"]["percent"] == 50.0
    assert found["x"]["0.1"]["reference_minus_this"]["percent"] == 25.0
    assert found["y"]["0.1"]["mean"] == {"percent": 100.0, "low": 100.0, "high": 100.0}


def test_resampled_prompts_keep_the_share_of_each_layout():
    weights = intervals.resampling_weights(np.array(["x"] * 3 + ["y"] * 7), 50)
    assert (weights[0] == 1).all()
    assert (weights[:, :3].sum(1) == 3).all()
    assert (weights[:, 3:].sum(1) == 7).all()


def test_every_contender_exists_and_unknown_ones_are_named():
    check_contenders(CONTENDERS)
    assert len({c.label for c in CONTENDERS}) == len(CONTENDERS)
    with pytest.raises(SystemExit, match="tea leaves: method: expected one of"):
        check_contenders([Contender("tea leaves", "tea_leaves")])


def test_permuted_heads_are_the_same_weights_elsewhere():
    calibrated = torch.arange(8) / 28
    for contender in CONTENDERS:
        if isinstance(contender.heads, int):
            weights = contender.head_weights({"first": calibrated})
            assert not torch.equal(weights, calibrated)
            assert torch.equal(weights.sort().values, calibrated)


@pytest.mark.parametrize(
    ("label", "depth", "stages", "mean"),
    [
        (HAWK, 3, {0: 0.4}, 0.4),
        ("FastV, K = 2", 3, {2: 0.4}, 2.4 / 3),
        ("FastV, K = 2", 6, {2: 0.4}, 3.6 / 6),
        ("DART, after layer 2", 3, {2: 0.4}, 2.4 / 3),
        ("PyramidDrop", 3, {1: 0.4 ** (2 / 3), 2: 0.4}, (1 + 0.4 ** (2 / 3) + 0.4) / 3),
        (
            "PyramidDrop",
            6,
            {1: 0.4 ** (1 / 3), 3: 0.4 ** (2 / 3), 4: 0.4},
            (1 + 2 * 0.4 ** (1 / 3) + 0.4 ** (2 / 3) + 0.8) / 6,
        ),
        ("SparseVLM", 3, {1: 0.4}, 1.8 / 3),
        ("SparseVLM", 6, {1: 0.4 ** (2 / 3), 3: 0.4}, (1 + 2 * 0.4 ** (2 / 3) + 3 * 0.4) / 6),
        ("VScan", 3, {1: 0.4}, 1.8 / 3),
    ],
)
def test_the_table_says_what_a_method_inside_the_stack_reads(label, depth, stages, mean):
    contender = next(c for c in CONTENDERS if c.label == label)
    assert contender.stages(0.4, depth) == pytest.approx(stages)
    assert contender.mean_share(0.4, depth) == pytest.approx(mean, abs=1e-4)


def test_a_stage_of_the_table_is_the_stage_that_is_pruned():
    subject = table.Subject.load(TINY_MODEL)
    batch = draw_batch(rng(), "held_out", 1, Layout(6, 6), {"colour->digit": 1})
    inputs = evaluate.model_inputs(subject.encoder, batch)
    for label in ("PyramidDrop", "SparseVLM, recycling", "DART, after layer 2", "VisionZip", "VScan"):
        contender = next(c for c in CONTENDERS if c.label == label)
        with torch.no_grad(), contender.with_heads({}).block(subject.model, 0.2) as pruning:
            subject.model(**inputs)
        sample = pruning.stats.samples[0]
        read = sample.visual_tokens_by_layer or [sample.visual_tokens_after] * 3
        assert sum(read) / 3 / 36 == pytest.approx(contender.mean_share(0.2, 3), abs=1 / 36)


def test_committed_weights_are_read_and_those_of_another_model_measured_anew(tmp_path, monkeypatch):
    committed = table.RESULTS / "qwen" / "head_weights_seed0.json"
    first, second = (table.Subject.load(path) for path in table.MODELS["qwen"][:2])
    (tmp_path / committed.name).write_bytes(committed.read_bytes())
    monkeypatch.setattr("hawk_kernels.calibrate", lambda *_, **__: pytest.fail("it was measured again"))
    assert table.calibrated_weights(first, tmp_path)["layers"] == "first"
    (tmp_path / "head_weights_seed1.json").write_bytes(committed.read_bytes())
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        table.calibrated_weights(second, tmp_path)


def test_answers_survive_a_kill_in_the_middle_of_a_line(tmp_path):
    path = tmp_path / "answers.jsonl"
    right = rng().random(11) < 0.5
    table.Answers(path).add({"x": right})
    with path.open("a") as file:
        file.write('{"y": "ff')
    again = table.Answers(path)
    assert set(again.found) == {"x"}
    again.add({"z": ~right})
    final = table.Answers(path)
    assert set(final.found) == {"x", "z"}
    assert (final.of("x", 11) == right).all()
    assert (final.of("z", 11) == ~right).all()


def test_the_table_asks_only_what_it_has_not_asked(tmp_path, monkeypatch):
    contenders = tuple(c for c in CONTENDERS if c.label in (HAWK, "random", "HiPrune"))
    monkeypatch.setattr(table, "CONTENDERS", contenders)
    monkeypatch.setattr(table, "KEEP_RATIOS", (0.2,))
    monkeypatch.setattr(table, "calibrated_weights", _shipped_weights)
    monkeypatch.setattr(QWEN, "layouts", {Layout(4, 4): 0.7, Layout(3, 4, 2, "video"): 0.3})
    first = table.build([TINY_MODEL], tmp_path, 4, 1, times=False, show_progress=False)
    assert first["methods"][HAWK]["0.2"]["mean"]["percent"] > 0

    def refuse(*_):
        raise AssertionError("it was asked again")

    monkeypatch.setattr(table, "answer", refuse)
    assert table.build([TINY_MODEL], tmp_path, 4, 1, times=False, show_progress=False) == first
    text = table.markdown(first)
    assert HAWK in text
    assert "random" in text


def _shipped_weights(subject, _):
    values = resolve_head_weights(None, subject.model.config, 8).values.tolist()
    other = {"all": {"weights": values[::-1]}}
    return {
        "layers": "first",
        "weights": values,
        "other_layers": other,
        "tasks": [{"name": "x"}],
        "deltas": [[0.0]] * 8,
    }


def test_the_command_says_how_to_train_a_missing_model(tmp_path):
    with pytest.raises(SystemExit, match=r"train it with python -m bench\.tinyvqa\.train --out"):
        table.Subject.load(tmp_path)


def test_calibration_asks_every_kind_about_training_digits(monkeypatch):
    asked_for = []
    draw = tasks.draw_batch
    monkeypatch.setattr(tasks, "draw_batch", lambda r, split, *a: (asked_for.append(split), draw(r, split, *a))[1])
    monkeypatch.setattr(tasks, "QUESTIONS_A_KIND", 7)
    found, again = tasks.calibration_tasks(), tasks.calibration_tasks()
    assert set(asked_for) == {"train"}
    assert [task.name for task in found] == list(KINDS)
    for task, same in zip(found, again, strict=True):
        assert len(task.samples) == 7
        assert len({sample.key for sample in task.samples}) == 7
        assert [(s.key, s.question, s.answers) for s in task.samples] == [
            (s.key, s.question, s.answers) for s in same.samples
        ]
        sample = task.samples[0]
        assert isinstance(sample.images[0](), Image.Image)
        assert task.prompt(sample) == sample.question
        assert task.score(sample, f" {sample.answers[0].upper()} ") == 1.0
        assert task.score(sample, "perhaps") == 0.0


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
    assert record["held_out"]["accuracy"] >= 0.92
    assert min(record["held_out"]["by_kind"].values()) >= 0.85
    assert {"seed", "steps", "wall_seconds", "versions"} <= record.keys()


def test_it_answers_about_digits_it_never_saw_as_a_user_would_ask(shipped):
    model, processor = shipped
    right = []
    for layout in (Layout(8, 8), Layout(6, 9), Layout(5, 5, 2, "images")):
        batch = draw_batch(rng(77), "held_out", 8, layout, 1)
        said = evaluate.generated_answers(model, processor, batch)
        right += [a == q.answer for a, q in zip(said, (q for row in batch.questions for q in row), strict=True)]
    assert np.mean(right) >= 0.87


def test_it_needs_the_picture(shipped, encoder):
    model, _ = shipped
    batch = draw_batch(rng(78), "held_out", 8, Layout(8, 8), 1)
    swapped = batches.Batch(batch.layout, batch.pages.flip(0), batch.scenes, batch.questions)
    with torch.no_grad():
        said = evaluate.first_words(model, evaluate.model_inputs(encoder, swapped))
    assert (said == evaluate.answer_ids(encoder, batch)).float().mean() < 0.5


def test_a_left_padded_batch_answers_as_its_rows_alone(shipped):
    model, processor = shipped
    images, texts = [], []
    for seed, (layout, question) in enumerate(
        [
            (Layout(8, 8), "Which digit is green?"),
            (Layout(3, 4), "What is the red digit?"),
            (Layout(6, 9), "What colour is the 3?"),
        ]
    ):
        images.append(to_image(draw_batch(rng(seed), "held_out", 1, layout, 1).pages[0]))
        texts.append(chat(processor, question))
    together = processor(text=texts, images=images, padding=True, return_tensors="pt")
    assert together["attention_mask"][1, 0] == 0
    assert together["attention_mask"][:, -1].all()
    with torch.no_grad():
        logits = model(**together).logits[:, -1]
        out = model.generate(**together, max_new_tokens=4)
        for row, (image, text) in enumerate(zip(images, texts, strict=True)):
            alone = processor(text=[text], images=[image], return_tensors="pt")
            torch.testing.assert_close(logits[row], model(**alone).logits[0, -1], atol=5e-4, rtol=1e-3)
            single = model.generate(**alone, max_new_tokens=4)[0, alone["input_ids"].shape[1] :]
            batched = out[row, together["input_ids"].shape[1] :]
            assert batched[: len(single)].tolist() == single.tolist()


def test_its_head_weights_are_in_the_registry(shipped):
    model, _ = shipped
    found = resolve_head_weights(None, model.config, 8)
    assert found.source.startswith("registry: ")
    assert found.values.sum() == pytest.approx(1.0)


def test_its_heads_differ_by_more_than_chance():
    found = read_weights_file(shipped_weights()["tinyvqa"])
    weights, errors = np.array(found["weights"]), np.array(found["standard_errors"])
    best, worst = weights.argmax(), weights.argmin()
    assert weights[best] - weights[worst] > 4 * np.hypot(errors[best], errors[worst])
    assert np.array(found["deltas"]).max() >= 0.05


def test_the_processor_refuses_videos_it_cannot_read(shipped):
    _, processor = shipped
    if "video_processor" in processor.get_attributes():
        pytest.skip("torchvision is installed, so the processor is the full one")
    with pytest.raises(ValueError, match="pip install torchvision"):
        processor(text=["<|video_pad|>"], videos=[np.zeros((4, 28, 28, 3))])


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        (evaluate, ["--model", "/nowhere"], "expected the folder of a checkpoint, got '/nowhere'"),
        (evaluate, ["--seed", "-1"], "expected a whole number of at least 0, got '-1'"),
        (evaluate, ["--prompts", "many"], "expected a whole number of at least 1, got 'many'"),
        (table, ["--models", "/nowhere"], "expected the folder of a checkpoint, got '/nowhere'"),
        (table, ["--out", __file__], "expected a folder, got the file"),
        (train, ["--out", "somewhere", "--threads", "0"], "expected a whole number of at least 1, got '0'"),
    ],
)
def test_mistakes_on_the_command_line_are_told_before_any_work(command, words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
