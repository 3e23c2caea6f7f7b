"""Head weights: found by fingerprint, refused when they cannot be right."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hawk_kernels.head_weights import (
    fingerprint,
    load_head_weights,
    read_weights_file,
    resolve_head_weights,
    shipped_weights,
)

SHIPPED = Path(__import__("hawk_kernels").__file__).parent / "head_weights" / "qwen2_5_vl_7b.json"
PUBLISHED = (
    "0.0875 0.3000 0.0480 0.0321 0.0104 0.0102 0.0336 0.0460 0.0540 0.0472 0.0234 0.0537 0.0109 0.0573 0.0276 0.0403 "
    "0.0429 0.0352 0.0162 0.0519 0.0553 0.0266 0.0222 0.0480 0.0337 0.0250 0.0000 0.0224"
)


def qwen_7b(**changes):
    from transformers import Qwen2_5_VLConfig

    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        **changes,
    }
    return Qwen2_5_VLConfig(text_config=text, name_or_path="/home/somebody/my-finetune")


def test_the_shipped_vector_is_the_published_one_and_sums_to_one():
    content = json.loads(SHIPPED.read_text())
    published = torch.tensor([float(value) for value in PUBLISHED.split()])
    weights = torch.tensor(content["weights"])
    assert torch.allclose(weights, published / published.sum(), atol=1e-7)
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert published.sum().item() == pytest.approx(content["raw_sum"], abs=1e-5)
    assert content["model"] == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert {"source", "definition", "date", "layer", "fingerprint"} <= content.keys()


def test_a_model_is_found_by_its_config_whatever_its_path():
    found = resolve_head_weights(None, qwen_7b(), 28)
    assert found.values.shape == (28,)
    assert found.values.argmax().item() == 1
    assert found.source == "registry: Qwen/Qwen2.5-VL-7B-Instruct"
    assert fingerprint(qwen_7b()) == json.loads(SHIPPED.read_text())["fingerprint"]


@pytest.mark.parametrize("change", [{"vocab_size": 151936}, {"num_hidden_layers": 36}, {"num_key_value_heads": 7}])
def test_another_checkpoint_is_not_taken_for_it(change):
    with pytest.raises(ValueError, match=r"no weights are known.*`hawk-kernels calibrate.*head_weights='uniform'"):
        resolve_head_weights(None, qwen_7b(**change), 28)


def test_uniform_given_and_file(tmp_path):
    config = SimpleNamespace(model_type="tiny")
    assert torch.equal(resolve_head_weights("uniform", config, 4).values, torch.full((4,), 0.25))
    for given in (torch.tensor([1.0, 0.0, 2.0]), [1, 0, 2], (1.0, 0.0, 2.0), np.array([1.0, 0.0, 2.0])):
        weights = resolve_head_weights(given, config, 3)
        assert weights.values.tolist() == [1.0, 0.0, 2.0]
        assert weights.values.dtype == torch.float32
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({"weights": [0.25, 0.75]}))
    for name in (path, str(path)):
        assert resolve_head_weights(name, config, 2).values.tolist() == [0.25, 0.75]
    assert resolve_head_weights(path, config, 2).source == "file weights.json"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, float("nan")], "expected finite weights >= 0, got nan for head 1"),
        ([float("inf"), 0.5], "expected finite weights >= 0, got inf for head 0"),
        ([10**400, 0.5], "expected finite weights >= 0, got inf for head 0"),
        ([0.5, -0.1], "expected finite weights >= 0, got -0.1"),
        ([0.5], "expected 2 weights, one for each attention head of the model, got 1"),
        ([0.5] * 3, "got 3"),
        ([0.0, 0.0], "expected at least one weight above zero, got 2 zeros"),
        ([0.5, "a"], "expected numbers, got 'a' for head 1"),
        ([0.5, True], "expected numbers, got True"),
    ],
)
def test_bad_weights_are_refused_from_everywhere(weights, message, tmp_path):
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({"weights": weights}))
    with pytest.raises(ValueError, match=message):
        load_head_weights(path, 2)
    with pytest.raises(ValueError, match=message):
        resolve_head_weights(weights, SimpleNamespace(model_type="tiny"), 2)


def test_bad_files_and_kinds_are_refused(tmp_path):
    config = SimpleNamespace(model_type="tiny")
    path = tmp_path / "weights.json"
    with pytest.raises(ValueError, match=r"which is no file; `hawk-kernels calibrate` writes one"):
        resolve_head_weights("Uniform", config, 2)
    path.write_text("not json")
    with pytest.raises(ValueError, match="expected a JSON file of head weights"):
        resolve_head_weights(path, config, 2)
    path.write_text("[0.5, 0.5]")
    with pytest.raises(ValueError, match="expected a JSON object with a list 'weights'"):
        resolve_head_weights(path, config, 2)
    path.write_text('{"weights": [0.5, 0.5], "fingerprint": ["qwen"]}')
    with pytest.raises(ValueError, match="expected 'fingerprint' to be an object"):
        resolve_head_weights(path, config, 2)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="expected a JSON file of head weights, got maximum recursion depth"):
        resolve_head_weights(path, config, 2)
    with pytest.raises(ValueError, match=r"expected a tensor of shape \[2\], got \[2, 2\]"):
        resolve_head_weights(torch.ones(2, 2), config, 2)
    with pytest.raises(TypeError, match="got int"):
        resolve_head_weights(3, config, 2)
    with pytest.raises(TypeError, match="expected real numbers"):
        resolve_head_weights(torch.ones(2, dtype=torch.bool), config, 2)


def test_a_file_of_another_model_warns_and_names_what_differs(tmp_path):
    path = tmp_path / "weights.json"
    content = {"weights": [1.0] * 28, "model": "somebody/else", "fingerprint": fingerprint(qwen_7b())}
    path.write_text(json.dumps(content))
    assert resolve_head_weights(path, qwen_7b(), 28).values.tolist() == [1.0] * 28
    other = qwen_7b(vocab_size=151936, num_hidden_layers=36)
    with pytest.warns(UserWarning, match="expected head weights of this model") as caught:
        assert resolve_head_weights(path, other, 28).values.tolist() == [1.0] * 28
    (warning,) = caught
    assert "got those of somebody/else" in str(warning.message)
    assert "(num_hidden_layers 28 instead of 36, vocab_size 152064 instead of 151936)" in str(warning.message)
    assert "measure this one with `hawk-kernels calibrate`" in str(warning.message)


def test_a_file_without_a_fingerprint_is_taken_as_it_is(tmp_path):
    path = tmp_path / "weights.json"
    path.write_text('{"weights": [0.5, 0.5]}')
    assert resolve_head_weights(path, SimpleNamespace(model_type="tiny"), 2).source == "file weights.json"


def test_every_shipped_file_is_one(tmp_path):
    assert shipped_weights()["qwen2_5_vl_7b"] == SHIPPED
    for path in shipped_weights().values():
        content = read_weights_file(path)
        assert len(content["weights"]) == content["fingerprint"]["num_attention_heads"]


def test_a_shipped_file_is_known_by_its_name():
    content = json.loads(shipped_weights()["tinyvqa"].read_text())
    config = SimpleNamespace(**content["fingerprint"])
    found = resolve_head_weights("tinyvqa", config, len(content["weights"]))
    assert torch.equal(found.values, torch.tensor(content["weights"], dtype=torch.float32))
    assert found.source == "file tinyvqa.json"
    with pytest.raises(ValueError, match=r"the name of a shipped file \(qwen2_5_vl_7b, tinyvqa\) or the path"):
        resolve_head_weights("tinyvqb", config, 8)


@pytest.mark.parametrize("name", ["", "/models/my model's"])
def test_the_command_of_an_unknown_model_has_every_argument_that_it_needs(name):
    from hawk_kernels.commands.calibrate import build_parser

    config = SimpleNamespace(model_type="tiny", _name_or_path=name, num_attention_heads=2)
    with pytest.raises(ValueError, match="head_weights='uniform'") as caught:
        resolve_head_weights(None, config, 2)
    program, command, *words = shlex.split(str(caught.value).split("`")[1])
    assert (program, command) == ("hawk-kernels", "calibrate")
    parsed = build_parser().parse_args(words)
    assert parsed.model == (name or "FOLDER_OF_THE_MODEL")
    assert (parsed.data, parsed.out) == (["questions.jsonl"], "weights.json")


def test_the_command_that_errors_name_is_there(capsys):
    from hawk_kernels.__main__ import main

    with pytest.raises(ValueError, match="hawk-kernels calibrate") as caught:
        resolve_head_weights(None, qwen_7b(num_hidden_layers=3), 28)
    command = str(caught.value).split("`")[1].split()[1]
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert "--model" in capsys.readouterr().out
