"""lm-eval needs no plugin: its model is asked inside a `prune` block, as docs/engines.md shows."""

import lm_eval
import pytest
import torch
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.tasks import TaskManager

from hawk_kernels import prune
from hawk_kernels.checkpoint import TINY_MODEL
from tests.on_lmms.runs import answers_of_transformers


@pytest.fixture(scope="module")
def lm():
    return HFMultimodalLM(pretrained=str(TINY_MODEL), device="cpu", dtype="float32", batch_size=1)


def task(folder):
    return {
        "task": "tinyvqa_of_lm_eval",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(folder / "test.parquet")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_image": lambda document: [picture.convert("RGB") for picture in document["images"]],
        "doc_to_text": lambda document: "<image>" * len(document["images"]) + document["question"],
        "doc_to_target": "answer",
        "generation_kwargs": {"until": [], "max_gen_toks": 2, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }


def evaluate(lm, folder):
    manager = TaskManager(include_defaults=False)
    results = lm_eval.simple_evaluate(
        lm, tasks=[task(folder)], task_manager=manager, apply_chat_template=True, bootstrap_iters=0
    )
    (rows,) = results["samples"].values()
    (scores,) = results["results"].values()
    rows = sorted(rows, key=lambda row: row["doc_id"])
    return [row["filtered_resps"][0] for row in rows], scores["exact_match,none"]


def test_a_block_around_simple_evaluate_prunes(lm, folder, documents, assert_equal_answers, monkeypatch):
    # it collects garbage after each answer and lists all packages in the end, which takes longer than the answers
    monkeypatch.setattr("gc.collect", lambda *_: 0)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    unpruned, full_score = evaluate(lm, folder)
    with prune(lm.model, 0.2):
        pruned, score = evaluate(lm, folder)
    assert_equal_answers("lm-eval, unpruned", unpruned, answers_of_transformers(documents, torch.float32))
    assert_equal_answers("lm-eval, pruned", pruned, answers_of_transformers(documents, torch.float32, keep_ratio=0.2))
    right = [answer == document["answer"] for answer, document in zip(pruned, documents, strict=True)]
    assert score == pytest.approx(sum(right) / len(right))
    assert score < full_score
