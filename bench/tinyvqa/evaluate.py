"""Accuracy of the tiny model on digits it never saw, whole and pruned: `python -m bench.tinyvqa.evaluate [--json]`.

Answers come from where a user's would: pictures and sentences through the processor, `generate`, `decode`. Pruned
accuracy is measured without the package's kernels, by a literal HAWK score and by hiding the dropped tokens behind the
attention mask, so that it can serve as a check on them; `--library` adds the same through `hawk_kernels.prune`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bench.tinyvqa.data import KINDS, draw_batch, objects_for, to_image
from hawk_kernels.checkpoint import TINY_MODEL, load_processor

GRIDS = ((2, 2), (4, 4), (6, 6), (8, 8), (6, 9), (10, 10))
PRUNED_GRID = (8, 8)
KEEP_RATIOS = (0.4, 0.2, 0.1, 0.05)
BATCH = 64


@dataclass(frozen=True)
class Asked:
    """Questions as a user would put them: pictures and chat texts side by side, with kind and answer of each."""

    images: list[Any]
    texts: list[str]
    kinds: list[str]
    answers: list[str]

    def chunks(self, size: int) -> Iterator[Asked]:
        for i in range(0, len(self.texts), size):
            part = slice(i, i + size)
            yield Asked(self.images[part], self.texts[part], self.kinds[part], self.answers[part])


def ask_held_out(
    processor: Any,
    grid: tuple[int, int],
    pictures: int,
    seed: int,
    questions_per_kind: int = 2,
    split: str = "held_out",
) -> Asked:
    """`pictures` new pictures of one grid size with `questions_per_kind` questions of each kind on each."""
    batch = draw_batch(np.random.default_rng(seed), split, pictures, grid, objects_for(*grid), questions_per_kind)
    images, texts, kinds, answers = [], [], [], []
    for picture, questions in zip(batch.pictures, batch.questions, strict=True):
        image = to_image(picture)
        for question in questions:
            content = [{"type": "image"}, {"type": "text", "text": question.text}]
            chat = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            images.append(image)
            texts.append(chat)
            kinds.append(question.kind)
            answers.append(question.answer)
    return Asked(images, texts, kinds, answers)


def generate_answers(model: Any, processor: Any, asked: Asked) -> list[str]:
    """What the model says to each question."""
    inputs = processor(text=asked.texts, images=asked.images, padding=True, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=4)
    return [a.strip() for a in processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]


def literal_hawk_scores(model: Any, inputs: Any, normalize: str | None = None) -> tuple[Tensor, Tensor]:
    """Uniform-head HAWK importance `[B, T]` straight from the definition, and the mask `[B, T]` of visual tokens.

    Queries are the tokens between the vision-end token and the following end of turn. `normalize="l2"` divides each
    head's vector by its norm, as the authors' release does.
    """
    config, layer = model.config, model.model.language_model.layers[0]
    ids = inputs["input_ids"]
    is_visual = ids == config.image_token_id
    embeds = model.get_input_embeddings()(ids)
    visual = torch.cat(model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output)
    hidden = layer.input_layernorm(embeds.masked_scatter(is_visual[..., None], visual))
    attention = layer.self_attn
    scores = torch.full(ids.shape, -torch.inf)
    for row in range(len(ids)):
        start = int((ids[row] == config.vision_end_token_id).nonzero().max()) + 1
        end = int((ids[row, start:] == model.generation_config.eos_token_id).nonzero().min()) + start
        query = attention.q_proj(hidden[row, start:end]).view(end - start, -1, attention.head_dim)
        key = attention.k_proj(hidden[row, is_visual[row]]).view(int(is_visual[row].sum()), -1, attention.head_dim)
        key = key.repeat_interleave(attention.num_key_value_groups, dim=1)
        per_head = torch.einsum("nhd,mhd->hnm", query, key).mul(attention.scaling).mean(1)
        if normalize == "l2":
            per_head = per_head / per_head.norm(dim=-1, keepdim=True)
        scores[row, is_visual[row]] = per_head.mean(0)
    return scores, is_visual


def answers_with_hidden_tokens(
    model: Any, processor: Any, asked: Asked, keep_ratio: float, score: Callable[[Any], tuple[Tensor, Tensor]]
) -> list[str]:
    """The first answer word when all but the best `floor(keep_ratio * M)` visual tokens are masked from attention."""
    inputs = processor(text=asked.texts, images=asked.images, padding=True, return_tensors="pt")
    scores, is_visual = score(inputs)
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    kept = torch.zeros_like(is_visual)
    for row in range(len(scores)):
        budget = max(1, int(keep_ratio * int(is_visual[row].sum()) + 1e-9))
        kept[row, scores[row].sort(descending=True, stable=True).indices[:budget]] = True
    inputs["attention_mask"] = inputs["attention_mask"] * (~is_visual | kept)
    logits = model(**inputs, position_ids=positions, use_cache=False).logits[:, -1]
    return [a.strip() for a in processor.batch_decode(logits.argmax(-1)[:, None])]


def random_scores(model: Any, seed: int) -> Callable[[Any], tuple[Tensor, Tensor]]:
    """A scorer that keeps visual tokens blindly."""
    generator = torch.Generator().manual_seed(seed)

    def score(inputs: Any) -> tuple[Tensor, Tensor]:
        is_visual = inputs["input_ids"] == model.config.image_token_id
        return torch.rand(is_visual.shape, generator=generator).masked_fill(~is_visual, -torch.inf), is_visual

    return score


def _tally(asked: Asked, said: list[str]) -> dict[str, list[bool]]:
    by_kind: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for kind, answer, got in zip(asked.kinds, asked.answers, said, strict=True):
        by_kind[kind].append(got == answer)
    return by_kind


def _share(right: Sequence[bool]) -> float:
    return round(sum(right) / len(right), 4)


@torch.no_grad()
def evaluate(
    path: str | Path = TINY_MODEL,
    pictures: int = 64,
    pruned_pictures: int = 128,
    seed: int = 1,
    library: bool = False,
    split: str = "held_out",
    show_progress: bool = True,
) -> dict[str, Any]:
    """Accuracy over all `GRIDS`, by kind and by grid, and on 8 x 8 with only some visual tokens kept.

    Args:
        path: the checkpoint.
        pictures: pictures per grid size, four questions on each.
        pruned_pictures: 8 x 8 pictures for the pruned figures; 0 leaves them out.
        seed: of the pictures, independent of the training seed.
        library: also prune through `hawk_kernels.prune`, next to hiding tokens here.
        split: which digits to draw, `"held_out"` or `"train"`.
        show_progress: a progress bar on stderr.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration

    processor = load_processor(str(path))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path).eval()
    by_kind: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    by_grid: dict[str, float] = {}
    bar = tqdm(total=len(GRIDS), desc="held-out digits", disable=not show_progress)
    for number, grid in enumerate(GRIDS):
        right: list[bool] = []
        for asked in ask_held_out(processor, grid, pictures, seed * 1000 + number, split=split).chunks(BATCH):
            for kind, values in _tally(asked, generate_answers(model, processor, asked)).items():
                by_kind[kind] += values
                right += values
        by_grid[f"{grid[0]}x{grid[1]}"] = _share(right)
        bar.update()
    bar.close()
    everything = [r for values in by_kind.values() for r in values]
    report: dict[str, Any] = {
        "questions": len(everything),
        "accuracy": _share(everything),
        "by_kind": {kind: _share(values) for kind, values in by_kind.items()},
        "by_grid": by_grid,
        "split": split,
        "seed": seed,
    }
    if pruned_pictures:
        asked = ask_held_out(processor, PRUNED_GRID, pruned_pictures, seed * 1000 + 999, split=split)
        report["pruned"] = _evaluate_pruned(model, processor, asked, seed, library, show_progress)
    return report


def _evaluate_pruned(
    model: Any, processor: Any, asked: Asked, seed: int, library: bool, show_progress: bool
) -> dict[str, Any]:
    """Accuracy on the questions `asked` with each share of the visual tokens kept, by each way of choosing them."""
    hiding = {
        "hawk, no norm": lambda inputs: literal_hawk_scores(model, inputs),
        "hawk, l2": lambda inputs: literal_hawk_scores(model, inputs, "l2"),
        "random": random_scores(model, seed),
    }
    table: dict[str, Any] = {
        "grid": f"{PRUNED_GRID[0]}x{PRUNED_GRID[1]}",
        "questions": len(asked.texts),
        "keep all": _accuracy(asked, lambda part: generate_answers(model, processor, part)),
    }
    through_library: dict[str, dict[str, Any]] = (
        {"prune(), no norm": {"normalize": None}, "prune(), as it comes": {}} if library else {}
    )
    bar = tqdm(total=(len(hiding) + len(through_library)) * len(KEEP_RATIOS), desc="pruned", disable=not show_progress)
    for ratio in KEEP_RATIOS:
        row: dict[str, Any] = {}
        for name, score in hiding.items():
            row[name] = _accuracy(
                asked, lambda part, s=score, r=ratio: answers_with_hidden_tokens(model, processor, part, r, s)
            )
            bar.update()
        for name, options in through_library.items():
            from hawk_kernels import prune

            with prune(model, keep_ratio=ratio, head_weights="uniform", **options):
                row[name] = _accuracy(asked, lambda part: generate_answers(model, processor, part))
            bar.update()
        table[f"keep {ratio}"] = row
    bar.close()
    return table


def _accuracy(asked: Asked, answer: Callable[[Asked], list[str]]) -> dict[str, float]:
    by_kind: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for part in asked.chunks(BATCH):
        for kind, values in _tally(part, answer(part)).items():
            by_kind[kind] += values
    everything = [r for values in by_kind.values() for r in values]
    return {"all": _share(everything), **{kind: _share(values) for kind, values in by_kind.items()}}


def print_report(report: dict[str, Any]) -> None:
    """The report as a person reads it."""
    print(
        f"{report['split'].replace('_', '-')} digits, {report['questions']} questions: {report['accuracy']:.1%} right"
    )
    for name, value in {**report["by_kind"], **report["by_grid"]}.items():
        print(f"  {name:<34}{value:>7.1%}")
    if "pruned" not in report:
        return
    pruned = report["pruned"]
    print(f"\n{pruned['grid']} cells, {pruned['questions']} questions, share right with fewer visual tokens")
    print(f"  {'keep all':<34}{pruned['keep all']['all']:>7.1%}")
    for key, row in pruned.items():
        if key.startswith("keep 0"):
            print(f"  {key}")
            for method, accuracy in row.items():
                kinds = ", ".join(f"{k} {v:.1%}" for k, v in accuracy.items() if k != "all")
                print(f"    {method:<32}{accuracy['all']:>7.1%}   ({kinds})")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.tinyvqa.evaluate", description=__doc__)
    parser.add_argument("--model", default=str(TINY_MODEL), help="folder of the checkpoint")
    parser.add_argument("--pictures", type=int, default=64, help="pictures per grid size, four questions on each")
    parser.add_argument(
        "--pruned-pictures", type=int, default=128, help="pictures for the pruned figures; 0 leaves them out"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--split", choices=("held_out", "train"), default="held_out")
    parser.add_argument("--library", action="store_true", help="also prune through hawk_kernels.prune")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    report = evaluate(
        args.model,
        args.pictures,
        args.pruned_pictures,
        args.seed,
        args.library,
        args.split,
        show_progress=not args.json,
    )
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
