"""Run the command line of lmms-eval on the local task, and answer the same questions by transformers and `prune`."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hawk_kernels import load_processor, prune
from hawk_kernels.checkpoint import TINY_MODEL
from tests.on_lmms.local_task import NAME

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = f"pretrained={TINY_MODEL},device_map=cpu,min_pixels=3136,max_pixels=200704"
"""Arguments of the base: the shipped model, and the limits of its own pictures."""


@dataclass
class Run:
    """What a run of lmms-eval left: its score, its answers by document, and all that it printed."""

    score: float
    answers: list[str]
    prompts: list[str]
    printed: str


class RunError(Exception):
    """A run of lmms-eval that wrote no results; the message ends with what it printed."""


def run_lmms_eval(folder: Path, out: Path, model: str, model_args: str, *flags: str, processes: int = 1) -> Run:
    """Evaluate by `python -m lmms_eval`, under torchrun for several processes; its exit status says nothing."""
    paths = [str(REPOSITORY), str(REPOSITORY / "tests/on_lmms/cpu_torchvision"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "lmms_eval", "--model", model, "--model_args", model_args]
    command += ["--tasks", NAME, "--include_path", str(folder), "--batch_size", "1", "--device", "cpu"]
    command += ["--output_path", str(out), "--log_samples", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)
    printed = done.stdout + done.stderr
    results = list(out.rglob("*_results.json"))
    if not results:
        raise RunError(f"lmms-eval wrote no results and exited with {done.returncode}:\n{printed[-4000:]}")
    found = json.loads(results[0].read_text())["results"][NAME]
    (samples,) = out.rglob(f"*samples_{NAME}.jsonl")
    rows = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    return Run(
        score=found["accuracy,none"],
        answers=[_text(row["filtered_resps"]) for row in rows],
        prompts=[str(row.get("input", row.get("arguments"))) for row in rows],
        printed=printed,
    )


def _text(value: Any) -> str:
    while isinstance(value, list):
        value = value[0]
    return str(value)


def through_jpeg(picture: Image.Image) -> Image.Image:
    """Return what is left of a picture after the JPEG of quality 85 that the simple class of qwen2_5_vl makes of it."""
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=85)
    return Image.open(file).convert("RGB")


def answers_of_transformers(
    documents: Any,
    dtype: torch.dtype = torch.bfloat16,
    shown: Callable[[Image.Image], Image.Image] = lambda picture: picture,
    **pruning: Any,
) -> list[str]:
    """Answer by `generate` in a `prune` block, or outside one where no argument of `prune` is given.

    Args:
        documents: of the local task.
        dtype: of the model; the classes of lmms-eval use bfloat16.
        shown: makes of each picture the one that the model is shown.
        **pruning: arguments of `prune`.
    """
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(TINY_MODEL, dtype=dtype).eval()
    processor = load_processor(TINY_MODEL)
    answers = []
    with prune(model, **pruning) if pruning else nullcontext():
        for document in documents:
            pictures = [shown(picture.convert("RGB")) for picture in document["images"]]
            content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
            messages = [{"role": "user", "content": [*content, {"type": "text", "text": document["question"]}]}]
            text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            inputs = processor(text=[text], images=pictures, return_tensors="pt")
            out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
            answers += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers
