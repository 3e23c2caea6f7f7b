"""Tasks: what answers are worth, files of questions, other people's benchmarks, and how a sample becomes inputs."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hawk_kernels.calibration import BadSamplesError, JsonlTask, Sample, Task, load_tasks
from hawk_kernels.checkpoint import TINY_MODEL, load_processor
from hawk_kernels.tasks.encoding import encode, open_image, open_video
from hawk_kernels.tasks.samples import check_pictures, choose_samples
from hawk_kernels.tasks.scoring import anls, choice_index, exact_match, multiple_choice, relaxed_match


@pytest.mark.parametrize(
    ("answer", "answers", "worth"),
    [
        ("Red.", ["red"], 1),
        ("  a  Red car ", ["a red car"], 1),
        ("reddish", ["red"], 0),
        ("blue", ["red", "BLUE"], 1),
        ("", ["red"], 0),
        ("straße", ["STRASSE"], 1),
        ("cafe\N{COMBINING ACUTE ACCENT}", ["café"], 1),
        ("“Red!”", ["red"], 1),
        ("-5.", ["-5"], 1),
        ("-5", ["5"], 0),
        (".5", ["5"], 0),
        ("(.5)", [".5"], 1),
        ("\N{MINUS SIGN}5", ["-5"], 1),
        ("C++", ["C#"], 0),
        ("", ["?"], 0),
        ("+", ["-"], 0),
    ],
)
def test_exact_match(answer, answers, worth):
    assert exact_match(answer, answers) == worth


@pytest.mark.parametrize(
    ("answer", "answers", "worth"),
    [
        ("105", ["100"], 1),
        ("95", ["100"], 1),
        ("106", ["100"], 0),
        ("1,050", ["1000"], 1),
        ("$1.05", ["1"], 1),
        ("42%", ["42"], 1),
        ("-10.4", ["-10"], 1),
        ("10", ["-10"], 0),
        ("0", ["0"], 1),
        ("0.001", ["0"], 0),
        ("seven", ["7"], 0),
        ("Blue", ["blue"], 1),
        ("12", ["red", "12.5"], 1),
        ("nan", ["nan"], 1),
        ("inf", ["7"], 0),
        ("12.", ["12"], 1),
        ("12 %", ["12"], 1),
        ("-$5", ["-5"], 1),
        ("\N{MINUS SIGN}5", ["-5"], 1),
        ("1,234,567", ["1234567"], 1),
        ("12,34,567", ["1234567"], 1),
        ("3,14", ["314"], 0),
        ("1,2", ["12"], 0),
        (".5", ["0.5"], 1),
        ("1e3", ["1000"], 1),
        ("9e9999999", ["5"], 0),
        ("5", ["9e9999999"], 0),
    ],
)
def test_relaxed_match(answer, answers, worth):
    assert relaxed_match(answer, answers) == worth


@pytest.mark.parametrize(
    ("answer", "answers", "worth"),
    [
        ("Hello", ["hello"], 1),
        ("hallo", ["hello"], 0.8),
        ("hexxx", ["hello"], 0),
        ("abcd", ["ab"], 0),
        ("abc", ["abcd", "abcde"], 0.75),
        ("", [""], 1),
        ("", ["x"], 0),
        ("a  b", ["a b"], 1),
    ],
)
def test_anls(answer, answers, worth):
    assert anls(answer, answers) == pytest.approx(worth)


@given(st.text(max_size=12), st.text(max_size=12))
def test_anls_is_a_similarity(first, second):
    assert anls(first, [first]) == 1
    assert anls(first, [second]) == pytest.approx(anls(second, [first]))
    assert anls(first, [second]) == 0 or 0.5 < anls(first, [second]) <= 1


CHOICES = ["a red car", "blue", "green"]


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("B", 1),
        ("b", 1),
        ("(B)", 1),
        ("B.", 1),
        ("B. blue", 1),
        ("B) blue", 1),
        ("[C]", 2),
        ("The answer is C.", 2),
        ("Answer: A", 0),
        ("option (B)", 1),
        ("Blue.", 1),
        ("a red car", 0),
        ("A red car", 0),
        ("**B**", 1),
        ("'B'", 1),
        ("The answer is b.", 1),
        ("Answer: a red car", None),
        ("D", None),
        ("Cars are red", None),
        ("", None),
    ],
)
def test_which_choice_an_answer_names(answer, index):
    assert choice_index(answer, CHOICES) == index


def test_a_choice_of_numbers_is_known_by_its_sign_and_its_point():
    numbers = ["1", "-1", ".5", "5"]
    assert [choice_index(number, numbers) for number in numbers] == [0, 1, 2, 3]


def test_multiple_choice_by_letter_or_text():
    assert multiple_choice("B", ["blue"], CHOICES) == 1
    assert multiple_choice("blue", ["B"], CHOICES) == 1
    assert multiple_choice("C", ["B"], CHOICES) == 0
    assert multiple_choice("I do not know", ["B"], CHOICES) == 0


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    return tmp_path


def written(folder, *lines, name="data.jsonl"):
    path = folder / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_a_file_of_questions(folder):
    path = written(
        folder,
        {"image": "red.png", "question": "Which colour?", "answer": "red", "source": "made up"},
        "",
        {"id": "second", "images": ["red.png", "red.png"], "question": "How many?", "answers": [2, "two"]},
        {"image": "red.png", "prompt": "Say nothing else: the colour", "answer": "red"},
    )
    task = JsonlTask(path)
    assert isinstance(task, Task)
    assert (task.name, task.metric, task.problems()) == ("data", "exact", [])
    first, second, third = task.samples
    assert (first.key, first.origin, first.images) == ("1", "data.jsonl:1", (folder / "red.png",))
    assert (second.key, second.origin, second.answers, len(second.images)) == (
        "second",
        "data.jsonl:3",
        ("2", "two"),
        2,
    )
    assert task.prompt(first) == "Which colour?\nAnswer the question using a single word or phrase."
    assert task.prompt(third) == "Say nothing else: the colour"
    assert task.score(second, "Two") == 1
    assert JsonlTask(path, "relaxed").score(second, "2.05") == 1
    assert JsonlTask(path, "anls").score(first, "rad") == pytest.approx(2 / 3)


def test_a_file_of_choices(folder):
    line = {"image": "red.png", "question": "Colour?", "choices": ["blue", "red"], "answer": "B"}
    task = JsonlTask(written(folder, line, {**line, "answer": "red"}))
    assert task.metric == "choice"
    first, second = task.samples
    assert task.prompt(first) == (
        "Colour?\nA. blue\nB. red\nAnswer with the option's letter from the given choices directly."
    )
    assert task.score(first, "B") == task.score(second, "(b)") == task.score(first, "red") == 1
    assert task.score(first, "A") == 0


def test_a_file_as_editors_and_tables_leave_it(folder):
    line = {"image": "red.png", "images": None, "question": "Größe?", "answers": None, "answer": "L", "id": None}
    lines = "\r\n\r\n".join(json.dumps(line, ensure_ascii=False) for _ in range(2))
    (folder / "windows.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    task = JsonlTask(folder / "windows.jsonl")
    assert task.problems() == []
    assert [(sample.key, sample.question, sample.answers) for sample in task.samples] == [
        ("1", "Größe?", ("L",)),
        ("3", "Größe?", ("L",)),
    ]


def test_lines_that_break_what_reads_them_are_named_as_well(folder):
    good = {"image": "red.png", "question": "?", "answer": "red"}
    path = written(folder, good, "[" * 100_000, {**good, "question": "\ud800"}, {**good, "image": "x" * 5000})
    problems = JsonlTask(path).problems()
    assert [problem.split(": ")[0] for problem in problems] == ["data.jsonl:2", "data.jsonl:3", "data.jsonl:4"]
    assert "surrogates not allowed" in problems[1]


def test_every_bad_line_is_named(folder):
    good = {"image": "red.png", "question": "?", "answer": "red"}
    path = written(
        folder,
        good,
        '{"image": "red.png", "question": ',
        {**good, "image": "gone.png"},
        [1, 2],
        {"question": "?", "answer": "red"},
        {**good, "question": 7},
        {**good, "answer": None},
        {**good, "answers": []},
        {**good, "image": 5},
        {**good, "id": "1"},
        {**good, "choices": ["red"]},
        {**good, "choices": ["blue", "green"]},
    )
    problems = JsonlTask(path).problems()
    told = {problem.split(": ", 1)[0]: problem.split(": ", 1)[1] for problem in problems}
    assert set(told) == {f"data.jsonl:{number}" for number in range(2, 13)}
    assert "Expecting value" in told["data.jsonl:2"]
    assert "there is no file" in told["data.jsonl:3"]
    assert "gone.png" in told["data.jsonl:3"]
    assert told["data.jsonl:4"] == "expected a JSON object, got list"
    assert told["data.jsonl:5"] == "expected 'image', 'images', 'video' or 'videos', got only question, answer"
    assert told["data.jsonl:6"] == "expected 'question' to be text, got 7"
    assert told["data.jsonl:7"] == "expected 'answer' or 'answers' to be text or numbers, got None"
    assert told["data.jsonl:8"] == "expected 'answer' or 'answers' to be text or numbers, got []"
    assert told["data.jsonl:9"] == "expected 'image' to be a path, or 'images' a list of paths, got 5"
    assert told["data.jsonl:10"] == "expected an id of its own, got '1' as in data.jsonl:1"
    assert told["data.jsonl:11"] == "expected 'choices' to be a list of 2 to 26 texts, got ['red']"
    assert told["data.jsonl:12"] == "expected 'answer' to be a letter or the text of a choice, got 'red'"
    with pytest.raises(BadSamplesError, match="data: 11 problems"):
        choose_samples([JsonlTask(path)], None, 0)


def test_files_that_cannot_be_right(folder):
    line = {"image": "red.png", "question": "?", "answer": "red"}
    with pytest.raises(ValueError, match=r"expected a JSONL file, got '/nowhere.jsonl', which is no file"):
        JsonlTask("/nowhere.jsonl")
    with pytest.raises(ValueError, match="metric: expected one of exact, relaxed, anls, choice, got 'bleu'"):
        JsonlTask(written(folder, line), "bleu")
    assert JsonlTask(written(folder, "")).problems() == ["data.jsonl: expected one question a line, got an empty file"]
    mixed = written(folder, line, {**line, "choices": ["blue", "red"]})
    assert JsonlTask(mixed).problems()[0].startswith("data.jsonl:2: expected no choices as in data.jsonl:1")
    assert "for metric 'choice', got none" in JsonlTask(mixed, "choice").problems()[0]
    (folder / "binary.jsonl").write_bytes(b"\xff\xfe\n")
    assert "binary.jsonl:1: 'utf-8' codec can't decode" in JsonlTask(folder / "binary.jsonl").problems()[0]


def test_many_problems_are_counted_not_listed(folder):
    path = written(folder, *["not json"] * 50)
    with pytest.raises(BadSamplesError, match=r"data: 50 problems(?s:.*)and 30 more"):
        choose_samples([JsonlTask(path)], None, 0)


def test_a_picture_that_breaks_off_is_found(folder):
    whole = folder / "whole.jpg"
    Image.effect_noise((200, 200), 80).save(whole)
    (folder / "broken.jpg").write_bytes(whole.read_bytes()[:4000])
    line = {"question": "?", "answer": "red"}
    task = JsonlTask(written(folder, {**line, "image": "whole.jpg"}, {**line, "image": "broken.jpg"}))
    with pytest.raises(BadSamplesError, match=r"data: 1 problem, put right or leave out:\n  data.jsonl:2: .*truncated"):
        check_pictures(choose_samples([task], None, 0), progress=False)


def test_a_picture_that_a_decoder_refuses_is_found(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    task = JsonlTask(written(folder, {"image": "red.png", "question": "?", "answer": "red"}))
    with pytest.raises(BadSamplesError, match=r"data.jsonl:1: Image size \(64 pixels\) exceeds limit"):
        check_pictures(choose_samples([task], None, 0), progress=False)


def test_another_picture_of_the_same_name_and_size_is_another_question(folder):
    task = JsonlTask(written(folder, {"image": "picture.bmp", "question": "?", "answer": "red"}))
    digests = []
    for colour in ("red", "blue", "red"):
        Image.new("RGB", (8, 8), colour).save(folder / "picture.bmp")
        digests += [part.digest for part in choose_samples([task], None, 0)]
    assert digests[0] == digests[2] != digests[1]


def test_data_by_name(folder, monkeypatch):
    path = written(folder, {"image": "red.png", "question": "?", "answer": "red"})
    (folder / "riddles_of_mine.py").write_text(
        "from hawk_kernels.calibration import JsonlTask\n"
        f"def one(): return JsonlTask({str(path)!r}, name='one')\n"
        f"def two(): return [one(), JsonlTask({str(path)!r}, name='two')]\n"
        "def wrong(): return 7\n"
    )
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    tasks = load_tasks(["data.jsonl", "data.jsonl:anls", "riddles_of_mine:two"])
    assert [task.name for task in tasks] == ["data", "data", "one", "two"]
    assert [task.metric for task in tasks] == ["exact", "anls", "exact", "exact"]
    for name, message in {
        "riddles_of_mine:gone": "could not get riddles_of_mine:gone",
        "no_such_module:f": "could not get no_such_module:f: No module named",
        "riddles_of_mine:wrong": "expected riddles_of_mine:wrong to return a task or a list of tasks, got int",
        "gone.jsonl": "got 'gone.jsonl', which is no file",
        "data.jsonl:bleu": "metric: expected one of",
        "chartqa": "expected FILE.jsonl, FILE.jsonl:METRIC, lmms:TASK, tinyvqa or MODULE:FUNCTION, got 'chartqa'",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_tasks([name])


class LmmsDouble:
    """A task object of lmms-eval, as far as it is used."""

    OUTPUT_TYPE = "generate_until"

    def __init__(self, results, **settings):
        self.config = SimpleNamespace(generation_kwargs=settings, output_type=self.OUTPUT_TYPE)
        self.eval_docs = [{"question": f"Which {i}?", "answer": f"yes {i}"} for i in range(3)]
        self.results = results
        self.decoded = 0

    def doc_to_text(self, document):
        return document["question"]

    def doc_to_visual(self, document):
        self.decoded += 1
        return [Image.new("RGB", (4, 4))]

    def process_results(self, document, results):
        return self.results(document, results[0])


@pytest.fixture
def lmms(monkeypatch):
    """Installs a double of lmms-eval that knows the given tasks."""

    def install(**tasks):
        class TaskManager:
            all_tasks = (*tasks, "group")

            def __init__(self, include_path=None):
                if include_path is not None:
                    self.all_tasks = (*self.all_tasks, *(path.stem for path in Path(include_path).glob("*.yaml")))

            def load_task_or_group(self, names):
                if names == ["group"]:
                    return {"group": {name: (None, task) for name, task in tasks.items()}}
                return {name: tasks.get(name, LmmsDouble(right)) for name in names}

        package, module = ModuleType("lmms_eval"), ModuleType("lmms_eval.tasks")
        module.TaskManager = TaskManager
        monkeypatch.setitem(sys.modules, "lmms_eval", package)
        monkeypatch.setitem(sys.modules, "lmms_eval.tasks", module)

    return install


def right(document, answer):
    return {"details": {"said": answer}, "accuracy": float(answer == document["answer"])}


def test_tasks_of_lmms_eval(lmms):
    double = LmmsDouble(right, max_new_tokens=16, until=["\n"])
    lmms(chartqa=double, ai2d=LmmsDouble(right))
    (task,) = load_tasks(["lmms:chartqa"])
    assert isinstance(task, Task)
    assert (task.name, task.max_new_tokens, len(task.samples)) == ("chartqa", 16, 3)
    assert double.decoded == 0
    sample = task.samples[1]
    assert (sample.key, task.prompt(sample), sample.origin) == ("1", "Which 1?", "lmms:chartqa[1]")
    assert len(sample.images) == 1
    assert task.score(sample, "yes 1\nand more") == 1
    assert task.score(sample, "no") == 0
    assert [task.name for task in load_tasks(["lmms:group"])] == ["chartqa", "ai2d"]
    (chosen,) = choose_samples([task], 2, 0)
    assert (len(chosen.questions), chosen.total) == (2, 3)


def test_tasks_of_lmms_eval_in_a_folder_of_ones_own(lmms, tmp_path):
    lmms(chartqa=LmmsDouble(right))
    (tmp_path / "mine.yaml").write_text("task: mine")
    (task,) = load_tasks([f"lmms:mine@{tmp_path}"])
    assert (task.name, len(task.samples)) == ("mine", 3)
    with pytest.raises(ValueError, match=r"got 'mine'.*those of your own are named lmms:TASK@FOLDER"):
        load_tasks(["lmms:mine"])
    with pytest.raises(ValueError, match="expected lmms:TASK@FOLDER with a folder of tasks, got 'gone'; there is"):
        load_tasks(["lmms:mine@gone"])


def test_tasks_of_lmms_eval_that_cannot_be_used(lmms, monkeypatch):
    likelihood = LmmsDouble(right)
    likelihood.OUTPUT_TYPE = "loglikelihood"
    lmms(mme=LmmsDouble(lambda document, answer: {"mme_score": {"question": 1, "score": 1.0}}), old=likelihood)
    (task,) = load_tasks(["lmms:mme"])
    with pytest.raises(
        ValueError, match="expected lmms:mme to score one answer with a number from 0 to 1, got mme_score"
    ):
        task.score(task.samples[0], "yes")
    with pytest.raises(
        ValueError, match="expected a task that generates answers, got lmms:old, which does 'loglikelihood'"
    ):
        load_tasks(["lmms:old"])
    with pytest.raises(ValueError, match="expected a task of lmms-eval, got 'gone'"):
        load_tasks(["lmms:gone"])
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.setitem(sys.modules, "lmms_eval.tasks", None)
    with pytest.raises(
        ImportError, match=r"lmms:chartqa needs lmms-eval, which is not installed: pip install git\+https"
    ):
        load_tasks(["lmms:chartqa"])


def test_a_photo_is_turned_as_its_camera_noted(folder):
    photo = Image.new("RGB", (40, 20), "red")
    orientation = photo.getexif()
    orientation[0x0112] = 6
    photo.save(folder / "photo.jpg", exif=orientation)
    assert open_image(folder / "photo.jpg").size == (20, 40)


def test_pictures_come_from_files_objects_and_functions(folder):
    picture = Image.new("L", (5, 4))
    for source in (folder / "red.png", str(folder / "red.png"), picture, lambda: picture):
        assert open_image(source).mode == "RGB"
    assert open_image(picture).size == (5, 4)
    assert [frame.mode for frame in open_video([picture, picture])] == ["RGB", "RGB"]
    assert len(open_video(lambda: [picture] * 3)) == 3
    assert open_video(folder / "clip.mp4") == str(folder / "clip.mp4")


class Colours:
    name, max_new_tokens = "colours", 4
    samples = (Sample("0", "Which digit is red?", images=(Image.new("RGB", (56, 84)), Image.new("L", (56, 56)))),)

    def prompt(self, sample):
        return sample.question

    def score(self, sample, answer):
        return 0.0


def test_a_sample_becomes_what_the_chat_template_and_the_processor_make_of_it():
    import torch

    processor = load_processor(str(TINY_MODEL))
    model = SimpleNamespace(
        get_input_embeddings=lambda: SimpleNamespace(weight=torch.zeros(1)), dtype=torch.bfloat16, device="cpu"
    )
    task = Colours()
    inputs = encode(task, task.samples[0], processor, model)
    assert inputs["input_ids"].shape[0] == 1
    assert inputs["image_grid_thw"].tolist() == [[1, 6, 4], [1, 4, 4]]
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 6 + 4
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["input_ids"].dtype == torch.int64
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert text.rindex("red") > text.rindex(processor.image_token)
    plain = SimpleNamespace(chat_template=None)
    with pytest.raises(ValueError, match=r"expected one with a chat template.*give the task an encode"):
        encode(task, task.samples[0], plain, model)
