"""Write TinyVQA's held-out questions as a task of lmms-eval: a parquet file, and what `--include_path` finds."""

from __future__ import annotations

from pathlib import Path

import datasets

from bench.tinyvqa.tasks import draw_tasks

NAME = "tinyvqa_local"
SEED = 11
WRONG_PROMPT = "Say nothing at all."
"""Asked by default, so that an answer is right only where the prompts of the base model are used."""

_YAML = """\
task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.pictures
doc_to_text: !function functions.question
doc_to_target: answer
process_results: !function functions.score
generation_kwargs:
  max_new_tokens: 2
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
lmms_eval_specific_kwargs:
  default:
    instead: "{wrong}"
  qwen2_5_vl:
    instead: ""
metadata:
  - version: 0.0
"""

_FUNCTIONS = '''\
"""What the task calls for each document."""


def pictures(document):
    """Return the pictures in the order of the question."""
    return [picture.convert("RGB") for picture in document["images"]]


def question(document, lmms_eval_specific_kwargs=None):
    """Return the question, or what the model's name says to ask instead."""
    return (lmms_eval_specific_kwargs or {}).get("instead") or document["question"]


def score(document, results):
    """Return 1.0 for the right word."""
    return {"accuracy": float(results[0].strip().lower() == document["answer"])}
'''


def write_task(folder: Path, questions_a_kind: int) -> datasets.Dataset:
    """Write the task into a folder and return its documents."""
    samples = [sample for task in draw_tasks("held_out", SEED, questions_a_kind) for sample in task.samples]
    columns = {
        "question": [sample.question for sample in samples],
        "answer": [sample.answers[0] for sample in samples],
        "images": [[picture() for picture in sample.images] for sample in samples],
    }
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
        }
    )
    documents = datasets.Dataset.from_dict(columns, features=features)
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "test.parquet"
    documents.to_parquet(data)
    (folder / "functions.py").write_text(_FUNCTIONS)
    (folder / f"{NAME}.yaml").write_text(_YAML.format(name=NAME, data=data.resolve(), wrong=WRONG_PROMPT))
    return documents
