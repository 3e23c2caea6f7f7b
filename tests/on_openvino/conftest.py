"""OpenVINO GenAI answers in processes of its own environment; the counts of equal answers are printed at the end."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from hawk_kernels import load_processor, prune
from hawk_kernels.checkpoint import TINY_MODEL
from tests.on_openvino.engine import NEW_TOKENS
from tests.on_vllm.questions import questions

torch.set_num_threads(1)

ROOT = Path(__file__).parents[2]
_COUNTS: list[str] = []


def run_engine(*words, **environment):
    """Run the engine's module by the Python of its environment."""
    paths = [str(ROOT), str(ROOT / "tests/on_lmms/cpu_torchvision")]
    settings = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    command = [os.environ["OPENVINO_PYTHON"], "-m", "tests.on_openvino.engine", *map(str, words)]
    done = subprocess.run(
        command, env={**os.environ, **settings}, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900
    )
    if done.returncode:
        pytest.fail((done.stdout + done.stderr)[-4000:])


@pytest.fixture(scope="session")
def asked():
    """The questions that vLLM is asked too."""
    if "OPENVINO_PYTHON" not in os.environ:
        pytest.exit("OPENVINO_PYTHON: expected the Python of an environment with OpenVINO GenAI; run make openvino")
    return questions()


@pytest.fixture(scope="session")
def openvino(asked, tmp_path_factory):
    """Return a function that asks OpenVINO GenAI; its arguments are settings of the pruning."""
    folder = tmp_path_factory.mktemp("openvino")
    run_engine("convert", TINY_MODEL, folder / "model")
    job = []
    for number, question in enumerate(asked):
        paths = [folder / f"{number}-{picture}.png" for picture in range(len(question.pictures))]
        for path, picture in zip(paths, question.pictures, strict=True):
            picture.convert("RGB").save(path)
        job.append({"text": question.text, "pictures": list(map(str, paths))})

    def ask(split=None, **settings):
        (folder / "job.json").write_text(json.dumps({"questions": job, "settings": settings}))
        environment = {} if split is None else {"CDPRUNER_SPLIT_THRESHOLD": str(split)}
        run_engine("answer", folder / "model", folder / "job.json", folder / "out.json", **environment)
        return json.loads((folder / "out.json").read_text())

    return ask


@pytest.fixture(scope="session")
def transformers(asked):
    """Return a function that asks transformers, in a `prune` block if it gets arguments."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(TINY_MODEL, dtype=torch.float32).eval()
    processor = load_processor(TINY_MODEL)

    @torch.no_grad()
    def ask(**arguments):
        pruning = prune(model, **arguments) if arguments else None
        found = []
        with pruning or nullcontext():
            for one in asked:
                text = processor.apply_chat_template(one.messages(), add_generation_prompt=True, tokenize=False)
                inputs = processor(text=[text], images=one.pictures, return_tensors="pt")
                out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
                length = inputs["input_ids"].shape[1]
                (answer,) = processor.batch_decode(out[:, length:], skip_special_tokens=True)
                prompt = length if pruning is None else pruning.stats.samples[0].prompt_tokens_after
                found.append({"answer": answer, "prompt": prompt})
        return found

    return ask


@pytest.fixture(scope="session")
def count(asked):
    """Return a function that counts equal answers and the right ones of both sides, and notes them for the summary."""

    def compare(what, theirs, ours):
        equal = sum(one["answer"].strip() == other["answer"].strip() for one, other in zip(theirs, ours, strict=True))
        right = [
            sum(one["answer"].strip() == question.answer for one, question in zip(answers, asked, strict=True))
            for answers in (theirs, ours)
        ]
        _COUNTS.append(f"equal answers: {equal} of {len(asked)}, {what}; right: {right[0]}, those of prune {right[1]}")
        return equal, *right

    return compare


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("OpenVINO GenAI beside transformers and prune")
    for line in _COUNTS:
        terminalreporter.write_line(line)
