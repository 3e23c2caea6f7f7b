"""Answer the questions with vLLM in a process of its own: `python -m tests.on_vllm.engine JOB.json OUT.json`.

A job has `model`, `engine` (arguments of `vllm.LLM`), `of_each_kind`, `videos` (whether the questions are those about
videos) and `rounds`: lists of indices of questions that are sent together, round after round, so that later rounds meet
filled caches. A list of jobs is done one by one, which takes less time than a process for each, and gives a list of
answers.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.on_vllm.questions import Asked, questions, video_questions

NEW_TOKENS = 3
CPU_WORKER = "hawk_kernels.vllm.cpu_worker.CPUWorker"
# Prompts of TinyVQA are shorter than the 128 tokens of vLLM's usual block on a CPU.
SMALL_BLOCKS = {"block_size": 32, "enable_prefix_caching": True}
CHUNKS = {"max_num_batched_tokens": 16, "enable_chunked_prefill": True}


def settings() -> dict[str, str]:
    """Return environment variables for a small engine on a machine that others use too."""
    return {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def prompt_of(processor: Any, asked: Asked) -> dict[str, Any]:
    """Return a question as vLLM takes it."""
    text = processor.apply_chat_template(asked.messages(), add_generation_prompt=True, tokenize=False)
    given = {
        "image": asked.pictures,
        "video": [(video.frames, {**video.metadata(), "do_sample_frames": False}) for video in asked.videos],
    }
    return {"prompt": text, "multi_modal_data": {kind: items for kind, items in given.items() if items}}


def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Answer greedily; the last round that asks a question has its say."""
    from vllm import LLM, SamplingParams

    from hawk_kernels.checkpoint import load_processor

    if job["hash_pictures_alone"]:
        from hawk_kernels.vllm.processing import PrunedPlaceholders

        del PrunedPlaceholders._get_mm_hashes
    # three layers are compiled in more time than they run
    usual = {
        "dtype": "float32",
        "max_model_len": 512,
        "limit_mm_per_prompt": {"image": 4, "video": 2 if job["videos"] else 0},
        "enforce_eager": True,
    }
    llm = LLM(model=job["model"], max_num_seqs=8, seed=0, **{**usual, **job["engine"]})
    processor = load_processor(job["model"])
    asked = (video_questions if job["videos"] else questions)(job["of_each_kind"])
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=1)
    found: dict[int, dict[str, Any]] = {}
    for indices in job["rounds"]:
        outputs = llm.generate([prompt_of(processor, asked[i]) for i in indices], sampling, use_tqdm=False)
        for index, output in zip(indices, outputs, strict=True):
            completion = output.outputs[0]
            ids = list(completion.token_ids)
            logprobs = [step[token].logprob for step, token in zip(completion.logprobs, ids, strict=True)]
            found[index] = {
                "ids": ids,
                "logprobs": logprobs,
                "prompt": len(output.prompt_token_ids),
                "cached": output.num_cached_tokens,
            }
    return [found[index] for index in sorted(found)]


if __name__ == "__main__":
    job_file, out_file = map(Path, sys.argv[1:])
    os.environ.update({name: value for name, value in settings().items() if name not in os.environ})
    given = json.loads(job_file.read_text())
    out_file.write_text(json.dumps([run(job) for job in given] if isinstance(given, list) else run(given)))
