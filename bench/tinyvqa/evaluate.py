"""Measure how well the tiny model answers about digits it never saw: `python -m bench.tinyvqa.evaluate [--json]`.

Everything goes through the model's own forward pass; only the vision tower reads a prompt's pictures once for all
questions about it. `--generate` asks as a user would instead: pictures and chat through the processor, `generate`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bench import cli
from bench.tinyvqa.batches import Batch, draw_batch
from bench.tinyvqa.encoder import Encoder
from bench.tinyvqa.make import Make
from bench.tinyvqa.makes import make_of
from bench.tinyvqa.painting import to_image
from hawk_kernels.checkpoint import TINY_MODEL, load_processor

ROWS = 112


def draw_evaluation(make: Make, seed: int, prompts: int, split: str = "held_out", questions: int = 2) -> list[Batch]:
    """Draw about `prompts` prompts, `questions` of each kind on each, in batches of at most `ROWS`.

    Args:
        make: its layouts and kinds are asked.
        seed: of the prompts.
        prompts: how many in all.
        split: which digits to paint, "held_out" or "train".
        questions: how many of each kind.
    """
    batches = []
    most = max(1, ROWS // (questions * len(make.kinds)))
    for number, (layout, share) in enumerate(make.layouts.items()):
        rng, left = np.random.default_rng([seed, number]), max(1, round(prompts * share))
        while left > 0:
            batches.append(draw_batch(rng, split, min(left, most), layout, dict.fromkeys(make.kinds, questions)))
            left -= most
    return batches


def model_inputs(encoder: Encoder, batch: Batch) -> dict[str, Tensor]:
    """Make the model's keyword arguments: a row for each question, padded on the left, each with its pictures."""
    layout, pad = batch.layout, encoder.tokenizer.pad_token_id
    prefix, _ = encoder.prefix(layout)
    segments, labels = encoder.segments(batch)
    questions = segments.shape[1]
    # Answers come last; what is in front of them is the prompt.
    answers = (labels != -100).flatten(0, 1)
    lengths = answers.int().argmax(-1)
    ids = torch.full((len(lengths), len(prefix) + int(lengths.max())), pad)
    mask = torch.zeros_like(ids)
    for row, (segment, length) in enumerate(zip(segments.flatten(0, 1), lengths.tolist(), strict=True)):
        start = ids.shape[1] - length - len(prefix)
        ids[row, start:] = torch.cat([prefix, segment[:length]])
        mask[row, start:] = 1
    per_prompt = batch.pages.unflatten(0, (-1, layout.pages))
    pages = per_prompt.repeat_interleave(questions, dim=0).flatten(0, 1)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        **encoder.id_arguments(ids),
        **encoder.picture_arguments(pages, layout),
    }


def pictures_read_once(model: Any, encoder: Encoder, batch: Batch) -> AbstractContextManager[None]:
    """Inside the block, the vision tower returns what it computed once for the pages of the batch."""
    return encoder.pictures_read_once(batch)


def first_words(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the ids `[B]` of the words that the model answers with."""
    logits: Tensor = model(**inputs, use_cache=False, logits_to_keep=1).logits
    return logits[:, -1].argmax(-1)


def answer_ids(encoder: Encoder, batch: Batch) -> Tensor:
    """Return the ids `[B]` of the right words, in the order of the rows of `model_inputs`."""
    return torch.tensor(encoder.tokenizer.convert_tokens_to_ids([q.answer for row in batch.questions for q in row]))


def generated_answers(model: Any, processor: Any, batch: Batch) -> list[str]:
    """Answer as for a user: pictures through the processor, `generate`, `decode`. Not for videos."""
    texts, images = [], []
    for prompt, questions in enumerate(batch.questions):
        pages = [to_image(page) for page in batch.pages_of(prompt)]
        for question in questions:
            content = [*({"type": "image"} for _ in pages), {"type": "text", "text": question.text}]
            message = [{"role": "user", "content": content}]
            texts.append(processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
            images.append(pages)
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=4)
    return [a.strip() for a in processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]


@torch.no_grad()
def evaluate(
    path: str | Path = TINY_MODEL,
    prompts: int = 160,
    seed: int = 1,
    split: str = "held_out",
    generate: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Accuracy by kind of question and by layout.

    Args:
        path: the checkpoint.
        prompts: about how many, with two questions of each kind on each.
        seed: of the prompts; it has nothing to do with the training seed.
        split: which digits to paint, "held_out" or "train".
        generate: ask through the processor and `generate`, which leaves out videos.
        show_progress: a progress bar on stderr.
    """
    make, processor = make_of(path), load_processor(str(path))
    model = make.load_model(path)
    encoder = make.encoder(model, processor.tokenizer)
    right: list[tuple[str, str, bool]] = []
    for batch in tqdm(draw_evaluation(make, seed, prompts, split), desc=f"{split} digits", disable=not show_progress):
        questions = [q for row in batch.questions for q in row]
        if not generate:
            with pictures_read_once(model, encoder, batch):
                said = first_words(model, model_inputs(encoder, batch))
            results = (said == answer_ids(encoder, batch)).tolist()
        elif batch.layout.medium == "video":
            continue
        else:
            answers = generated_answers(model, processor, batch)
            results = [a == q.answer for a, q in zip(answers, questions, strict=True)]
        right += [(q.kind, str(batch.layout), ok) for q, ok in zip(questions, results, strict=True)]
    by_kind = {kind: _share([ok for k, _, ok in right if k == kind]) for kind in make.kinds}
    return {
        "questions": len(right),
        "accuracy": round(float(np.mean(list(by_kind.values()))), 4),
        "by_kind": by_kind,
        "by_layout": {
            name: _share([ok for _, n, ok in right if n == name]) for name in dict.fromkeys(n for _, n, _ in right)
        },
        "split": split,
        "seed": seed,
    }


def _share(right: Sequence[bool]) -> float:
    return round(sum(right) / len(right), 4)


def print_report(report: dict[str, Any]) -> None:
    """Print the report as text."""
    print(
        f"{report['split'].replace('_', '-')} digits, {report['questions']} questions: "
        f"mean of kinds {report['accuracy']:.1%}"
    )
    for name, value in {**report["by_kind"], **report["by_layout"]}.items():
        print(f"  {name:<24}{value:>7.1%}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = cli.parser("bench.tinyvqa.evaluate", __doc__, seed=(1, "the prompts"), threads=1)
    parser.add_argument(
        "--model",
        type=cli.checkpoint_folder,
        default=TINY_MODEL,
        help="folder of the checkpoint (default: the shipped one)",
    )
    parser.add_argument(
        "--prompts",
        type=cli.whole_number(1),
        default=160,
        help="about how many, two questions of each kind on each (default: 160)",
    )
    parser.add_argument("--split", choices=("held_out", "train"), default="held_out")
    parser.add_argument("--generate", action="store_true", help="ask through the processor and generate(); no videos")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    report = evaluate(args.model, args.prompts, args.seed, args.split, args.generate, show_progress=not args.json)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
