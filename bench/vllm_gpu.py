"""Compare vLLM on a GPU with transformers and `prune`: `python -m bench.vllm_gpu --model MODEL --data questions.jsonl`.

Not run yet: it was written on a machine without a GPU. Prints how many answers are equal, and the seconds and prompt
tokens of vLLM with and without pruning. Each engine runs in a process of its own, so that none shares memory with
another. Lines of the file are those that `hawk-kernels calibrate` takes: `image` (or `images`) and `question`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import cli

ROLES = ("transformers", "vllm", "vllm-unpruned")
NEW_TOKENS = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = cli.parser("bench.vllm_gpu", __doc__)
    parser.add_argument("--model", required=True, help="a Qwen2.5-VL checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="questions, one JSON object a line")
    parser.add_argument("--architecture", default="HawkQwen2_5_VLForConditionalGeneration")
    parser.add_argument("--method", default="hawk")
    parser.add_argument("--rate", type=float, default=0.8, help="fraction of the visual tokens that is dropped")
    parser.add_argument("--dtype", default="float32", help="of both; equal answers are to be expected in float32 only")
    parser.add_argument("--limit", type=int, default=168)
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.role:
        answer = _with_transformers if args.role == "transformers" else _with_vllm
        args.out.write_text(json.dumps(answer(args, _questions(args.data, args.limit))))
        return 0
    given = list(sys.argv[1:] if argv is None else argv)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for role in ROLES:
            out = Path(folder) / role
            command = [sys.executable, "-m", "bench.vllm_gpu", *given, "--role", role, "--out", str(out)]
            subprocess.run(command, check=True)
            found[role] = json.loads(out.read_text())
            print(f"{role}: {found[role]['seconds']:.2f} s, {found[role]['prompt_tokens']} prompt tokens", flush=True)
    pairs = list(zip(found["transformers"]["ids"], found["vllm"]["ids"], strict=True))
    equal = sum(wanted == got for wanted, got in pairs)
    print(f"{equal} of {len(pairs)} answers equal")
    return 0 if equal == len(pairs) or args.dtype != "float32" else 1


def _questions(path: Path, limit: int) -> list[tuple[list[Any], str]]:
    from PIL import Image

    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()][:limit]
    names = [line.get("images") or [line["image"]] for line in lines]
    return [
        ([Image.open(path.parent / name).convert("RGB") for name in of_line], line["question"])
        for of_line, line in zip(names, lines, strict=True)
    ]


def _chat(processor: Any, pictures: list[Any], text: str) -> str:
    content = [*[{"type": "image"}] * len(pictures), {"type": "text", "text": text}]
    prompt: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return prompt


def _with_transformers(args: argparse.Namespace, asked: list[tuple[list[Any], str]]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForImageTextToText

    from hawk_kernels import prune
    from hawk_kernels.checkpoint import load_processor

    model: Any = AutoModelForImageTextToText.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    model = model.cuda().eval()
    processor = load_processor(args.model)
    ids, prompt_tokens, start = [], 0, time.perf_counter()
    with prune(model, 1 - args.rate, method=args.method, budget="per_image") as pruning:
        for pictures, text in asked:
            inputs = processor(text=[_chat(processor, pictures, text)], images=pictures, return_tensors="pt")
            length = inputs["input_ids"].shape[1]
            out = model.generate(**inputs.to("cuda"), max_new_tokens=NEW_TOKENS, do_sample=False)
            ids.append(out[0, length:].tolist())
            prompt_tokens += pruning.stats.samples[0].prompt_tokens_after
    return {"ids": ids, "prompt_tokens": prompt_tokens, "seconds": time.perf_counter() - start}


def _with_vllm(args: argparse.Namespace, asked: list[tuple[list[Any], str]]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    from hawk_kernels.checkpoint import load_processor

    pruned = {
        "video_pruning_rate": args.rate,
        "hf_overrides": {"architectures": [args.architecture], "hawk": {"method": args.method}},
    }
    most = max(len(pictures) for pictures, _ in asked)
    llm = LLM(
        model=args.model,
        dtype=args.dtype,
        limit_mm_per_prompt={"image": most},
        seed=0,
        **(pruned if args.role == "vllm" else {}),
    )
    processor = load_processor(args.model)
    prompts = [
        {"prompt": _chat(processor, pictures, text), "multi_modal_data": {"image": pictures}}
        for pictures, text in asked
    ]
    start = time.perf_counter()
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=NEW_TOKENS), use_tqdm=False)
    return {
        "ids": [list(output.outputs[0].token_ids) for output in outputs],
        "prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
        "seconds": time.perf_counter() - start,
    }


if __name__ == "__main__":
    sys.exit(main())
