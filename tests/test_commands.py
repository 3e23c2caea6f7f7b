"""The commands at the shell: interruptions, closed pipes, full disks, files that must stay, and what is missing."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

import hawk_kernels  # noqa: E402
from hawk_kernels.__main__ import COMMANDS, main  # noqa: E402
from hawk_kernels.checkpoint import TINY_MODEL  # noqa: E402
from hawk_kernels.commands.guard import run_guarded  # noqa: E402

SAMPLE = TINY_MODEL / "samples" / "digits_8x8.png"
QUICK = ("--device", "cpu", "--max-new-tokens", "2", "--no-speed")


@pytest.fixture(scope="module")
def environment(repository):
    path = os.pathsep.join(part for part in (str(repository), os.environ.get("PYTHONPATH")) if part)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def shell(environment, tmp_path):
    """Runs `hawk-kernels` with some words in an empty folder."""

    def run(*words, **options):
        command = [sys.executable, "-m", "hawk_kernels", *map(str, words)]
        settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "timeout": 300}
        return subprocess.run(command, cwd=tmp_path, **{"env": environment, **settings, **options})

    return run


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "digits.jsonl"
    things = json.loads((TINY_MODEL / "samples" / "samples.json").read_text())[SAMPLE.name]["objects"][:3]
    lines = [
        {"image": str(SAMPLE), "prompt": f"Which digit is {t['colour']}?", "answer": str(t["digit"])} for t in things
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def only_line(text):
    (line,) = text.strip().splitlines()
    return line


def failed(capsys, *words):
    """The one line of a command that ends with 1 and prints nothing else."""
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert (status, captured.out) == (1, "")
    return only_line(captured.err)


def broken_package(folder, name, text):
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)
    return folder


def test_version_help_and_the_commands():
    assert set(COMMANDS) == {"info", "demo", "calibrate", "evaluate", "serve", "weights", "tune", "warm-up"}


def test_version_is_printed(shell):
    done = shell("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"hawk_kernels {hawk_kernels.__version__}\n", "")


@pytest.mark.parametrize("command", ["info", "demo", "calibrate", "evaluate", "serve", "weights", "tune", "warm-up"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_info_says_what_is_here_and_what_a_call_runs_on(capsys):
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["hawk_kernels"] == hawk_kernels.__version__
    assert report["packages"]["torch"]["version"] == __import__("torch").__version__
    cpu = report["devices"][0]
    assert (cpu["name"].split()[0], cpu["backend"], cpu["why"]) == ("cpu", "torch", "Triton needs a GPU")
    assert "sm_90" in report["tuning_tables"]["shipped"]
    assert {weights["name"] for weights in report["head_weights"]} >= {"tinyvqa", "qwen2_5_vl_7b"}
    assert "hawk" in report["methods"]
    assert "hawk-release" in report["recipes"]
    assert "qwen2_5_vl" in report["families"]
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for part in ("backend torch, Triton needs a GPU", "sm_90", "Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl, qwen2_vl"):
        assert part in text


def test_info_names_a_tuning_table_that_cannot_be_read(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HAWK_KERNELS_CONFIGS", str(tmp_path / "gone.json"))
    assert main(["info"]) == 0
    assert "gone.json, ValueError: " in capsys.readouterr().out


@pytest.mark.parametrize("failure", ["raise OSError('libcudart.so: cannot open')", "import sys; sys.exit('no')"])
def test_info_runs_with_a_broken_torch_and_a_broken_transformers(shell, environment, tmp_path, failure):
    folder = broken_package(tmp_path / "broken", "torch", failure)
    broken_package(folder, "transformers", failure)
    variables = {**environment, "PYTHONPATH": os.pathsep.join([str(folder), environment["PYTHONPATH"]])}
    done = shell("info", "--json", env=variables)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    for name in ("torch", "transformers"):
        assert report["packages"][name]["error"].startswith(("OSError", "SystemExit"))
    assert report["devices"]["error"]
    assert [weights["name"] for weights in report["head_weights"]] == ["qwen2_5_vl_7b", "tinyvqa"]
    assert "does not import" in shell("info", env=variables).stdout


def test_the_package_imports_without_torch_and_names_what_a_function_needs(environment, tmp_path):
    folder = broken_package(tmp_path / "broken", "torch", "raise ImportError('broken')")
    code = (
        "import hawk_kernels as h\n"
        "try: h.score_and_select\n"
        "except ImportError as error: print(error)\n"
        "try: h.nonsense\n"
        "except AttributeError as error: print(error)\n"
    )
    path = os.pathsep.join([str(folder), environment["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stdout == "broken\nmodule 'hawk_kernels' has no attribute 'nonsense'\n"


def test_every_public_name_is_there_after_the_import():
    for name in hawk_kernels.__all__:
        assert getattr(hawk_kernels, name) is not None
    assert hawk_kernels.load_processor(TINY_MODEL).tokenizer is not None


@pytest.fixture(autouse=True)
def ctrl_c_reaches_children():
    """A shell lets jobs in the background ignore Ctrl-C, and what they start inherits that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# Python's own start, before any line of a package runs, is not ours to guard
READY = "import os, sys, hawk_kernels.__main__ as m; os.write(2, b'ready\\n'); sys.exit(m.main())"


@pytest.mark.parametrize("wait", [0.1, 0.6, 1.5, 4.0])
def test_ctrl_c_at_any_moment_is_one_line_and_130(environment, tmp_path, wait):
    command = [sys.executable, "-c", READY, "demo", "--device", "cpu", "--speed", "--json"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr.readline() == "ready\n"
    time.sleep(wait)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (130, "", "stopped\n")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_ctrl_c_in_a_calibration_says_how_to_go_on(environment, questions, tmp_path):
    words = ["calibrate", "--model", TINY_MODEL, "--data", questions, "--device", "cpu", "--layers", "both"]
    lines = questions.read_text()
    questions.write_text("".join(lines for _ in range(200)))
    process = subprocess.Popen(
        [sys.executable, "-m", "hawk_kernels", *map(str, words)],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("weights.json.journal/*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "stopped; the same command goes on from weights.json.journal"
    assert "Traceback" not in err
    assert not (tmp_path / "weights.json").exists()


@pytest.mark.parametrize(
    "swallowed", ["except KeyboardInterrupt: raise ImportError('half')", "except BaseException: pass"]
)
def test_an_interruption_that_a_library_swallows_stops_all_the_same(environment, swallowed):
    code = (
        "import os, signal, sys, time\n"
        "from hawk_kernels.commands.guard import run_guarded\n"
        "def command():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(5)\n"
        f"    {swallowed}\n"
        "    return 0\n"
        "sys.exit(run_guarded(command, is_process=True))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


def test_an_interruption_inside_another_program_is_left_to_its_handler(capfd):
    before = signal.getsignal(signal.SIGINT)

    def command():
        raise KeyboardInterrupt

    assert run_guarded(command) == 130
    assert capfd.readouterr().err == "stopped\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_an_unexpected_error_is_one_line_and_a_traceback_on_request(capsys, monkeypatch):
    def command():
        raise KeyError("gone")

    assert run_guarded(command) == 1
    assert only_line(capsys.readouterr().err).startswith("error: KeyError: 'gone' (unexpected; ")
    monkeypatch.setenv("HAWK_KERNELS_TRACEBACK", "1")
    with pytest.raises(KeyError):
        run_guarded(command)


@pytest.mark.parametrize("words", [["weights", "list"], ["--help"], ["demo", "--help"], ["demo", *QUICK]], ids=" ".join)
def test_a_closed_pipe_is_silent(environment, tmp_path, words):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "hawk_kernels", *words]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, stdout=write, stderr=subprocess.PIPE, text=True, timeout=300
    )
    os.close(write)
    assert done.stderr == ""
    assert done.returncode in (0, 141)


@pytest.mark.parametrize("words", [["--version"], ["weights", "list"]], ids=" ".join)
def test_a_full_output_device_is_one_line(shell, words):
    with open("/dev/full", "w") as full:
        done = shell(*words, stdout=full)
    assert (done.returncode, done.stderr) == (1, "error: cannot write the output: No space left on device\n")


def test_the_answer_is_printed_even_when_the_disk_is_full(shell, tmp_path):
    before = b"\x89PNG\r\n\x1a\n earlier"
    (tmp_path / "overlay.png").write_bytes(before)

    def full_after_a_kilobyte():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    done = shell("demo", *QUICK, "--output", "overlay.png", preexec_fn=full_after_a_kilobyte)
    assert done.returncode == 1
    assert re.search(r"pruned +12 +33   8\n", done.stdout)
    assert only_line(done.stderr) == "error: cannot write overlay.png: File too large; choose another place"
    assert (tmp_path / "overlay.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["overlay.png"]


@pytest.mark.parametrize("folder", ["/proc", "/sys"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(capsys, questions, folder):
    line = failed(capsys, "demo", *QUICK, "--output", f"{folder}/overlay.png")
    assert f"expected a folder that can be written to, got {folder}: " in line
    line = failed(capsys, "calibrate", "--model", "/nowhere", "--data", questions, "--out", f"{folder}/w.json")
    assert f"expected a folder that can be written to, got {folder}: " in line
    line = failed(capsys, "weights", "show", "tinyvqa", "--out", f"{folder}/w.png")
    assert f"expected a folder that can be written to, got {folder}: " in line


def victims(folder):
    """Things that an output must not replace, by what they are."""
    (folder / "folder.png").mkdir()
    (folder / "device.png").symlink_to("/dev/null")
    os.mkfifo(folder / "fifo.png")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "text.png").write_text("mine")
    return ["folder.png", "device.png", "fifo.png", "circle.png", "text.png"]


def identity(path):
    found = os.lstat(path)
    return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns


def test_outputs_replace_nothing_but_their_own_kind(capsys, questions, tmp_path):
    model = ("--model", TINY_MODEL, "--device", "cpu")
    for name in victims(tmp_path):
        before = identity(tmp_path / name)
        for words in (
            ("demo", *QUICK, "--output", tmp_path / name),
            ("weights", "show", "tinyvqa", "--out", tmp_path / name),
            ("calibrate", *model, "--data", questions, "--out", tmp_path / name),
        ):
            line = failed(capsys, *words)
            assert str(tmp_path / name) in line
            assert "name" in line
        assert identity(tmp_path / name) == before
    calibrate = ("calibrate", *model, "--data", questions, "--out")
    assert "is not a file of head weights, so it is not replaced" in failed(capsys, *calibrate, questions)
    assert "/dev/null, which is no regular file; choose another name" in failed(capsys, *calibrate, "/dev/null")
    assert len(questions.read_text().splitlines()) == 3
    assert os.path.exists("/dev/null")


def test_the_picture_that_is_asked_about_is_not_replaced(capsys, tmp_path):
    picture = shutil.copy(SAMPLE, tmp_path / "mine.png")
    os.link(picture, tmp_path / "again.png")
    (tmp_path / "link.png").symlink_to(picture)
    for name in ("mine.png", "again.png", "link.png"):
        line = failed(capsys, "demo", *QUICK, "--image", picture, "--output", tmp_path / name)
        assert "is an input of this run and is not replaced; choose another name" in line
    assert picture.read_bytes() == SAMPLE.read_bytes()


def test_weights_of_another_model_are_not_replaced(capsys, questions, tmp_path):
    out = tmp_path / "weights.json"
    command = ["calibrate", "--model", str(TINY_MODEL), "--data", str(questions), "--device", "cpu", "--out", str(out)]
    assert main(command) == 0
    capsys.readouterr()
    mine = json.loads(out.read_text())
    shutil.rmtree(tmp_path / "weights.json.journal")
    for strange, told in (
        ({**mine, "model": "somebody/else", "fingerprint": {**mine["fingerprint"], "vocab_size": 7}}, "somebody/else"),
        ({"weights": [1.0]}, "a model that it does not name"),
        ({**mine, "settings": {**mine["settings"], "parameters": "other"}}, "other parameters"),
    ):
        out.write_text(json.dumps(strange))
        assert main(command) == 1
        assert told in capsys.readouterr().err.splitlines()[-1]
        assert json.loads(out.read_text()) == strange
    out.write_text(json.dumps(mine))
    assert main(command) == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--image", "{folder}"], "is a folder; give the path of a PNG or JPEG file in it"),
        (["--image", "https://example.org/cat.png"], "takes a file, not the address https://example.org/cat.png"),
        (["--device", "mps"], "--device mps cannot be used here"),
        (["--method", "astrology"], "--method: expected one of cdpruner, "),
        (["--head-weights", "gone.json"], "--head-weights: expected 'uniform', the name of a shipped file"),
        (["--output", "{folder}"], "does not end like a picture file"),
    ],
)
def test_a_mistake_is_one_true_line_before_a_model_is_loaded(capsys, monkeypatch, tmp_path, words, told):
    from hawk_kernels import demo

    monkeypatch.setattr(demo, "load_checkpoint", None)
    assert told in failed(capsys, "demo", *(word.format(folder=tmp_path) for word in words))


@pytest.mark.parametrize("option", ["--prompt", "--model", "--image", "--output", "--head-weights"])
@pytest.mark.parametrize("nothing", ["", "  "])
def test_an_empty_word_is_not_taken_for_the_default(capsys, option, nothing):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", option, nothing])
    assert stopped.value.code == 2
    assert f"argument {option}: expected some text, got nothing" in capsys.readouterr().err


def edited(folder, change):
    """A copy of the shipped model whose tensors were changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(TINY_MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_tensors_that_a_checkpoint_lacks_are_reported(capsys, questions, tmp_path):
    name = next(name for name in ("model.layers.0.mlp.up_proj.weight", "lm_head.weight"))

    def drop(tensors):
        found = [key for key in tensors if key.endswith("layers.0.mlp.up_proj.weight")]
        del tensors[found[0]]

    folder = edited(tmp_path / "lacking", drop)
    assert main(["demo", *QUICK, "--model", str(folder), "--output", str(tmp_path / "o.png")]) == 0
    line = only_line(capsys.readouterr().err)
    assert line.startswith(f"warning: {folder} lacks 1 tensor of the model (")
    assert name.split("model.")[1] in line
    assert main(["calibrate", "--model", str(folder), "--data", str(questions), "--out", str(tmp_path / "w.json")]) == 1
    assert "lacks 1 tensor of the model" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "w.json").exists()


def test_logits_that_are_not_finite_are_refused(capsys, questions, tmp_path):
    def spoil(tensors):
        key = next(key for key in tensors if key.endswith("layers.0.mlp.up_proj.weight"))
        tensors[key][0, 0] = float("nan")

    folder = edited(tmp_path / "nan", spoil)
    assert "logits are NaN or infinite" in failed(
        capsys, "demo", *QUICK, "--model", folder, "--output", tmp_path / "o.png"
    )
    assert not (tmp_path / "o.png").exists()
    command = ["calibrate", "--model", str(folder), "--data", str(questions), "--out", str(tmp_path / "w.json")]
    assert main([*command, "--device", "cpu"]) == 1
    assert "expected finite logits, got NaN or infinity" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "w.json").exists()


@pytest.mark.parametrize(
    "missing", ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "config.json"]
)
def test_a_missing_file_of_a_checkpoint_is_one_line(capsys, tmp_path, missing):
    folder = shutil.copytree(TINY_MODEL, tmp_path / "copy")
    (folder / missing).unlink()
    status = main(["demo", *QUICK, "--model", str(folder), "--output", str(tmp_path / "o.png")])
    captured = capsys.readouterr()
    if status == 0:
        # this file can be done without
        assert "pruned" in captured.out
    else:
        assert f"the folder {folder} " in only_line(captured.err)
        assert missing in only_line(captured.err)


def test_the_demo_times_a_larger_model_at_a_fixed_number_of_tokens(tmp_path):
    # in a process of its own, since memory that another test has freed would hide the peak
    command = [sys.executable, "-m", "hawk_kernels", "demo", "--json", "--speed", "--device", "cpu"]
    result = subprocess.run([*command, "--output", str(tmp_path / "o.png")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    speed = json.loads(result.stdout)["speed"]
    assert 45e6 < speed["parameters"] < 60e6
    assert speed["visual_tokens"] == 1296
    before, after = speed["unpruned"], speed["pruned"]
    assert before["first_token"] > 2 * after["first_token"]
    # 8 layers, 4 key-value heads of 64, keys and values, 4 bytes; the last of the new tokens is never cached
    prompt, per_token = 1296 + 26, 8 * 4 * 64 * 2 * 4
    assert before["cache_bytes"] == (prompt + speed["new_tokens"] - 1) * per_token
    assert before["cache_bytes"] - after["cache_bytes"] == (1296 - 259) * per_token
    assert before["peak_bytes"] is None or before["peak_bytes"] > before["cache_bytes"]


def test_the_text_labels_random_weights_and_compares_no_answers_of_different_length(capsys, tmp_path, monkeypatch):
    from hawk_kernels import demo_speed

    run = demo_speed.Run(2.0, 0.1, 2_000_000, None)
    half = demo_speed.Run(0.5, 0.05, 500_000, None)
    monkeypatch.setattr(demo_speed, "random_model", lambda device: (None, None))
    monkeypatch.setattr(
        demo_speed,
        "measure",
        lambda *_, name, visual_tokens, **__: demo_speed.Speed(name, 53_000_000, visual_tokens, 16, 3, 1, run, half),
    )
    assert main(["demo", "--device", "cpu", "--output", str(tmp_path / "o.png")]) == 0
    text = capsys.readouterr().out
    assert "random weights" in text
    assert re.search(r"time to first token +2000\.0 ms +500\.0 ms +4\.00x sooner", text)
    assert re.search(r"keys and values +2\.0 MB +0\.5 MB +4\.00x smaller", text)
    assert "16 new tokens each way" in text
    assert "times as long" not in text
    assert "generation" not in text


def test_calibrate_shows_its_prompt_and_what_it_appends(capsys, tmp_path):
    line = {"image": str(SAMPLE), "question": "Which digit is red?", "answer": "8"}
    (tmp_path / "plain.jsonl").write_text(json.dumps(line))
    (tmp_path / "own.jsonl").write_text(json.dumps({**line, "prompt": "Which digit is red?"}))
    data = [str(tmp_path / "plain.jsonl"), str(tmp_path / "own.jsonl")]
    assert main(["calibrate", "--model", "/nowhere", "--dry-run", "--data", *data]) == 0
    plain, own = (text for text in capsys.readouterr().err.splitlines() if "asks with" in text)
    sentence = "Answer the question using a single word or phrase."
    assert plain.startswith(f"plain: asks with prompts such as 'Which digit is red?\\n{sentence}'; \"{sentence}\" is")
    assert own == "own: asks with prompts such as 'Which digit is red?'"


def test_the_help_of_calibrate_has_a_line_of_data_that_works(capsys, tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        main(["calibrate", "--help"])
    text = capsys.readouterr().out
    sample = json.loads(next(line for line in text.splitlines() if line.strip().startswith("{")))
    assert {"id", "image", "question", "answer"} == set(sample)
    for field in ("prompt", "choices", "id", "question"):
        assert re.search(rf"^  .*\b{field}\b", text, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / sample["image"]).parent.mkdir(parents=True)
    shutil.copy(SAMPLE, tmp_path / sample["image"])
    (tmp_path / "data.jsonl").write_text(json.dumps(sample))
    assert main(["calibrate", "--model", "/nowhere", "--dry-run", "--data", "data.jsonl"]) == 0


def test_calibrate_refuses_a_base_score_of_zero(capsys, questions, tmp_path):
    lines = [{**json.loads(line), "answer": "a cat"} for line in questions.read_text().splitlines()]
    questions.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "w.json"
    assert main(["calibrate", "--model", str(TINY_MODEL), "--data", str(questions), "--out", str(out)]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "digits: expected a score above zero with nothing masked, got 0 on all 3 samples" in line
    assert "was asked 'Which digit is " in line
    assert "instead of 'a cat'" in line
    assert not out.exists()


def test_calibrate_warns_about_few_samples_with_the_standard_error(capsys, questions, tmp_path):
    out = str(tmp_path / "w.json")
    assert main(["calibrate", "--model", str(TINY_MODEL), "--data", str(questions), "--out", out]) == 0
    err = capsys.readouterr().err
    base = json.loads((tmp_path / "w.json").read_text())["tasks"][0]
    told = f"has a standard error of {base['base_standard_error']:.3f}"
    assert f"warning: digits: 3 samples are few; the score {base['base']:.3f} {told}" in err


def test_data_that_is_a_picture_is_one_line(capsys, tmp_path):
    shutil.copy(SAMPLE, tmp_path / "data.jsonl")
    for name in ("data.jsonl", SAMPLE):
        line = failed(capsys, "calibrate", "--model", "/nowhere", "--data", tmp_path / name, "--dry-run")
        assert line.startswith("error: data: expected a JSONL file of UTF-8 text, one JSON object a line, got ")


def test_weights_check_says_what_prune_would(capsys, tmp_path):
    assert main(["weights", "check", "tinyvqa", "qwen2_5_vl_7b"]) == 0
    assert "tinyvqa: in order, 8 heads of " in capsys.readouterr().out
    assert main(["weights", "check", "tinyvqa", "--model", str(TINY_MODEL)]) == 0
    assert main(["weights", "check", "qwen2_5_vl_7b", "--model", str(TINY_MODEL), "--json"]) == 1
    report = json.loads(capsys.readouterr().out.split("\n", 1)[1])
    assert report["files"][0]["problem"] == "expected 8 weights, one for each attention head of the model, got 28"
    bad = tmp_path / "bad.json"
    for content, told in (
        ('{"weights": [0, 0]}', "at least one weight above zero"),
        ("[]", "a JSON object"),
        ("x", "JSON"),
    ):
        bad.write_text(content)
        assert main(["weights", "check", str(bad), "tinyvqa"]) == 1
        first, second = capsys.readouterr().out.splitlines()
        assert told in first
        assert second.startswith("tinyvqa: in order")


@pytest.mark.parametrize(
    ("words", "module", "package"),
    [
        (["demo", *QUICK], "PIL", "pillow"),
        (["demo", *QUICK], "transformers", "transformers"),
        (["demo", *QUICK], "torch", "torch"),
        (["calibrate", "--model", "x", "--data", "digits.jsonl"], "transformers", "transformers"),
        (["calibrate", "--model", "x", "--data", "digits.jsonl"], "PIL", "pillow"),
        (["weights", "show", "tinyvqa"], "matplotlib", "matplotlib"),
        (["weights", "check", "tinyvqa", "--model", "x"], "transformers", "transformers"),
        (["tune", "--dry-run"], "triton", "triton"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_what_is_missing_is_one_line_with_the_command_that_brings_it(
    shell, environment, questions, tmp_path, words, module, package
):
    text = f"raise ModuleNotFoundError({f'No module named {module!r}'!r}, name={module!r})"
    folder = broken_package(tmp_path / "missing", module, text)
    path = os.pathsep.join([str(folder), environment["PYTHONPATH"]])
    done = shell(*words, env={**environment, "PYTHONPATH": path})
    assert done.returncode == 1
    assert f"pip install {package}" in only_line(done.stderr)
    assert only_line(done.stderr).startswith(("error: ", "hawk_kernels.tune: "))


@pytest.mark.parametrize(
    ("module", "words", "told"),
    [
        ("bench.gpu", ["--dry-run"], "has no torch and no triton"),
        ("bench.plots", [], "bench.plots: expected a results folder, got none"),
        ("bench.plots", ["nowhere"], "bench.plots: expected a results folder, got nowhere, which is none"),
    ],
)
def test_benchmarks_without_what_they_need_are_one_line(environment, repository, module, words, told):
    command = [sys.executable, "-m", module, *words]
    options = {"cwd": repository, "env": environment, "capture_output": True, "text": True}
    if module == "bench.gpu":
        # an interpreter without torch, as `make gpu` finds it on a machine that is not set up
        command[1:1] = ["-S"]
    done = subprocess.run(command, **options)
    assert done.returncode == 1
    assert told in only_line(done.stderr)
