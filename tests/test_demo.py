"""The demo from the command line to the overlay, and what it says when something is wrong."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

from hawk_kernels import demo, head_weights  # noqa: E402
from hawk_kernels.viz import ROLE_EDGES  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def overlay(tmp_path):
    return tmp_path / "overlay.png"


def run_json(capsys, overlay, *options: str) -> dict:
    status = demo.main(["--json", "--device", "cpu", "--output", str(overlay), *options])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out)


def run_failing(capsys, *options: str) -> str:
    status = demo.main(["--device", "cpu", *options])
    captured = capsys.readouterr()
    assert status == 1
    assert captured.err.startswith("error: ")
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


def red_digit() -> str:
    contents = json.loads((demo.SAMPLE_IMAGE.parent / "samples.json").read_text())[demo.SAMPLE_IMAGE.name]
    return str(next(o["digit"] for o in contents["objects"] if o["colour"] == "red"))


def test_the_sample_is_answered_right_with_all_tokens_and_with_a_fifth(capsys, overlay):
    report = run_json(capsys, overlay)
    assert report["all_tokens"]["text"] == report["pruned"]["text"] == red_digit()
    assert report["same_answer"] is True
    assert report["grid"] == [8, 8]
    assert (report["all_tokens"]["visual_tokens"], report["pruned"]["visual_tokens"]) == (64, 12)
    assert report["all_tokens"]["prompt_tokens"] - report["pruned"]["prompt_tokens"] == 52
    assert report["head_weights"] == "registry"
    assert report["stats"]["head_weights"].startswith("registry: ")
    assert report["keep_ratio"] == 0.2
    assert set(report["seconds"]) == {"load", "preprocess", "generate_all", "generate_pruned", "overlay"}
    assert all(value > 0 for value in report["seconds"].values())
    assert report["overlay"] == str(overlay)
    with Image.open(overlay) as picture:
        assert max(picture.size) >= 512


def test_text_output_names_what_a_person_wants_to_know(capsys, overlay):
    assert demo.main(["--device", "cpu", "--no-speed", "--output", str(overlay)]) == 0
    text = capsys.readouterr().out
    for part in (
        "Which digit is red?",
        "head weights from the registry",
        "visual tokens",
        "preprocess",
    ):
        assert part in text
    assert str(overlay) in text
    assert "load" in text


def test_hiprune_draws_anchors_buffers_and_registers(capsys, overlay):
    report = run_json(capsys, overlay, "--method", "hiprune")
    assert report["pruned"]["visual_tokens"] == 12
    assert report["head_weights"] is None
    assert report["stats"]["method_options"]["object_layer"] == 1
    with Image.open(overlay) as picture:
        found = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    assert set(ROLE_EDGES.values()) <= found
    assert demo.main(["--device", "cpu", "--no-speed", "--method", "hiprune", "--output", str(overlay)]) == 0
    assert "hiprune, keep 0.2 of the visual tokens\n" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["random", "fastv", "key_norm"])
def test_methods_without_head_weights_get_none(capsys, overlay, method):
    report = run_json(capsys, overlay, "--method", method)
    assert report["method"] == report["stats"]["method"] == method
    assert report["head_weights"] is None
    assert report["pruned"]["visual_tokens"] == 12


def test_other_pictures_questions_and_ratios(capsys, overlay):
    folder = demo.SAMPLE_IMAGE.parent
    contents = json.loads((folder / "samples.json").read_text())["digits_6x9.png"]
    thing = contents["objects"][0]
    report = run_json(
        capsys,
        overlay,
        *("--image", str(folder / "digits_6x9.png"), "--prompt", f"What colour is the {thing['digit']}?"),
        *("--keep-ratio", "0.5", "--max-new-tokens", "3"),
    )
    assert report["grid"] == [6, 9]
    assert report["pruned"]["visual_tokens"] == 27
    assert report["all_tokens"]["text"] == thing["colour"]


def test_a_whole_number_is_a_budget_and_everything_kept_changes_nothing(capsys, overlay):
    assert run_json(capsys, overlay, "--keep-ratio", "5")["pruned"]["visual_tokens"] == 5
    report = run_json(capsys, overlay, "--keep-ratio", "1.0")
    assert report["pruned"]["visual_tokens"] == 64
    assert report["same_answer"]


def test_the_shipped_folder_by_path_counts_as_the_tiny_model(capsys, overlay):
    report = run_json(capsys, overlay, "--model", str(demo.TINY_MODEL), "--dtype", "float32")
    assert report["model"] == "tinyvqa"
    assert report["head_weights"] == "registry"


def test_as_a_command_in_another_folder(tmp_path):
    path = os.pathsep.join(p for p in (str(REPOSITORY), os.environ.get("PYTHONPATH")) if p)
    command = [sys.executable, "-m", "hawk_kernels.demo", "--json", "--device", "cpu"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert Path(json.loads(done.stdout)["overlay"]) == tmp_path / "overlay_hawk.png"


def test_a_missing_picture_is_named(capsys, tmp_path):
    assert "there is no picture at" in run_failing(capsys, "--image", str(tmp_path / "none.png"))


def test_a_file_that_is_no_picture_is_named(capsys, tmp_path):
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    assert "is not a picture that Pillow can read" in run_failing(capsys, "--image", str(text))


def test_a_photo_lies_as_its_camera_noted(capsys, overlay, tmp_path):
    photo = Image.new("RGB", (112, 56), "red")
    orientation = photo.getexif()
    orientation[0x0112] = 6
    photo.save(tmp_path / "photo.jpg", exif=orientation)
    report = run_json(capsys, overlay, "--image", str(tmp_path / "photo.jpg"), "--max-new-tokens", "1")
    assert (report["image_size"], report["grid"]) == ([56, 112], [4, 2])


def test_what_the_processor_does_not_take_is_said_plainly(capsys, tmp_path, overlay):
    strip = tmp_path / "strip.png"
    Image.new("RGB", (4000, 10)).save(strip)
    assert "does not take this picture" in run_failing(capsys, "--image", str(strip), "--output", str(overlay))
    twice = ("--prompt", "<|image_pad|> and?", "--output", str(overlay))
    assert "does not take this picture" in run_failing(capsys, *twice)


def test_a_missing_output_folder_is_named_before_any_work(capsys, tmp_path):
    assert "does not exist" in run_failing(capsys, "--output", str(tmp_path / "none" / "x.png"))


def test_an_output_that_is_no_picture_name_is_said_before_any_work(capsys, tmp_path):
    # Pillow reads .psd and does not write it
    for name in ("overlay.txt", "overlay.psd", "overlay"):
        assert "does not end like a picture file" in run_failing(capsys, "--output", str(tmp_path / name))


@pytest.mark.parametrize("ratio", ["0", "0.0", "-0.2", "1.5", "nan", "much", "-3"])
def test_a_keep_ratio_out_of_range_is_refused(capsys, ratio):
    with pytest.raises(SystemExit) as stop:
        demo.main([f"--keep-ratio={ratio}"])
    assert stop.value.code == 2
    assert "--keep-ratio" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["abacus", "cuda:63", "meta"])
def test_an_unusable_device_is_named_with_the_usable_ones(capsys, device):
    status = demo.main(["--device", device])
    error = capsys.readouterr().err
    assert status == 1
    assert f"--device {device} cannot be used here" in error
    assert "usable: cpu" in error


def test_an_unknown_method_is_said_plainly(capsys, overlay):
    assert "astrology" in run_failing(capsys, "--method", "astrology", "--output", str(overlay))


def test_head_weights_that_are_not_there_are_said_plainly(capsys, overlay, tmp_path):
    missing = str(tmp_path / "weights.json")
    assert "weights.json" in run_failing(capsys, "--head-weights", missing, "--output", str(overlay))


def test_a_checkpoint_without_known_head_weights_gets_uniform_ones_and_that_is_said(
    capsys, overlay, tmp_path, monkeypatch
):
    monkeypatch.setattr(head_weights, "_FOLDER", tmp_path / "empty")
    stranger = tmp_path / "stranger"
    shutil.copytree(demo.TINY_MODEL, stranger)
    report = run_json(capsys, overlay, "--model", str(stranger), "--prompt", "Which is red?")
    assert report["head_weights"] == "uniform"
    assert "no published HAWK head weights" in demo.describe(report)
    assert report["model"] == str(stranger)
    assert report["pruned"]["visual_tokens"] == 12


def test_without_network_a_hub_model_says_how_to_get_it(capsys, monkeypatch, tmp_path):
    from huggingface_hub import HfApi, constants

    def unreachable(*_, **__):
        raise ConnectionError("Name or service not known")

    before = constants.HF_HUB_OFFLINE
    monkeypatch.setattr(HfApi, "model_info", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    name = "Qwen/Qwen2.5-VL-7B-Instruct"
    started = time.perf_counter()
    error = run_failing(capsys, "--model", name, "--output", str(tmp_path / "o.png"))
    assert f"hf download {name} --local-dir FOLDER" in error
    assert "cannot be reached (Name or service not known)" in error
    assert time.perf_counter() - started < 30
    assert before == constants.HF_HUB_OFFLINE


def test_a_folder_that_is_no_checkpoint_is_said_plainly(capsys, tmp_path):
    assert "does not hold a vision-language checkpoint" in run_failing(capsys, "--model", str(tmp_path))
    assert "there is no folder" in run_failing(capsys, "--model", str(tmp_path / "none"))


@pytest.mark.parametrize(("module", "package"), [("transformers", "transformers"), ("PIL", "pillow")])
def test_a_missing_dependency_is_named_with_the_command_that_brings_it(capsys, monkeypatch, module, package):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == module:
            raise ImportError(f"No module named {name!r}")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    status = demo.main([])
    monkeypatch.undo()
    assert status == 1
    assert f"pip install {package}" in capsys.readouterr().err


def test_the_package_runs_its_commands_by_name(capsys, overlay):
    from hawk_kernels.__main__ import main

    assert main(["demo", "--json", "--device", "cpu", "--output", str(overlay)]) == 0
    assert json.loads(capsys.readouterr().out)["same_answer"]
    assert main(["--help"]) == 0
    assert "demo" in capsys.readouterr().out
    assert main(["dance"]) == 2
    assert "there is no command 'dance'" in capsys.readouterr().err
    assert main([]) == 2
    assert "usage:" in capsys.readouterr().err
