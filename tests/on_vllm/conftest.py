"""Engines run in processes of their own; the counts of equal answers are printed at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.on_vllm import oracle
from tests.on_vllm.checkpoint import write_padded
from tests.on_vllm.engine import CPU_WORKER, settings
from tests.on_vllm.questions import OF_EACH_KIND, questions, video_questions

torch.set_num_threads(1)

ROOT = Path(__file__).parents[2]
_COUNTS: list[str] = []


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return str(write_padded(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="session")
def served(folder, tmp_path_factory):
    """Return a function that asks vLLM; keyword arguments are those of a job, `engine` without the usual ones.

    A list in place of the settings `hawk` gives a list of answers.
    """

    def ask(
        rate,
        hawk,
        *,
        architecture="HawkQwen2_5_VLForConditionalGeneration",
        model=folder,
        of_each_kind=OF_EACH_KIND,
        rounds=None,
        hash_pictures_alone=False,
        videos=False,
        **engine,
    ):
        here = tmp_path_factory.mktemp("job")
        rounds = rounds or [list(range(7 * of_each_kind))]
        pruned = {
            "video_pruning_rate": rate,
            "worker_cls": CPU_WORKER,
            "hf_overrides": {"architectures": [architecture], "hawk": hawk},
        }
        job = {
            "model": str(model),
            "of_each_kind": of_each_kind,
            "rounds": rounds,
            "hash_pictures_alone": hash_pictures_alone,
            "videos": videos,
            "engine": {**(pruned if rate else {}), **engine},
        }
        given = [_with_settings(job, one) for one in hawk] if isinstance(hawk, list) else job
        (here / "job.json").write_text(json.dumps(given))
        command = [sys.executable, "-m", "tests.on_vllm.engine", str(here / "job.json"), str(here / "out.json")]
        with (here / "log").open("w") as log:
            subprocess.run(
                command, cwd=ROOT, env={**os.environ, **settings()}, stdout=log, stderr=log, timeout=600, check=False
            )
        if not (here / "out.json").exists():
            pytest.fail((here / "log").read_text()[-6000:])
        return json.loads((here / "out.json").read_text())

    return ask


@pytest.fixture(scope="session")
def expected(folder):
    """Return a function that asks transformers and `prune`."""
    known = {}

    def ask(keep_ratio, method, *, of_each_kind=OF_EACH_KIND, videos=False, model=folder, **options):
        key = repr((keep_ratio, getattr(method, "name", method), of_each_kind, videos, str(model), options))
        if key not in known:
            asked = (video_questions if videos else questions)(of_each_kind)
            known[key] = oracle.answers(str(model), asked, keep_ratio, method, **options)
        return known[key]

    return ask


@pytest.fixture
def count_equal():
    """Return a function that counts equal answers, notes the count, and returns it with the largest difference."""

    def count(what, found, wanted):
        assert len(found) == len(wanted)
        same = [a["ids"] == b["ids"] for a, b in zip(found, wanted, strict=True)]
        worst = max(
            abs(x - y)
            for a, b, is_same in zip(found, wanted, same, strict=True)
            if is_same
            for x, y in zip(a["logprobs"], b["logprobs"], strict=True)
        )
        prompts = sum(answer["prompt"] for answer in found)
        _COUNTS.append(
            f"equal answers: {sum(same)} of {len(same)}, {what}, log-probabilities within {worst:.1e}, "
            f"{prompts} prompt tokens"
        )
        return sum(same), worst

    return count


def _with_settings(job, hawk):
    engine = job["engine"]
    return {**job, "engine": {**engine, "hf_overrides": {**engine["hf_overrides"], "hawk": hawk}}}


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("vLLM beside transformers and prune")
    for line in _COUNTS:
        terminalreporter.write_line(line)
