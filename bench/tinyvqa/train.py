"""Train a miniature: `python -m bench.tinyvqa.train --out FOLDER [--make qwen|llava] [--seed N]`.

Three things make it learn in minutes on one core. First the vision tower learns to name what it sees, as a pre-trained
encoder would; how is a matter of the make (`Lessons`). Then come questions, from small pages to large ones, a stage
ending once its slowest kind is good; some makes train the tower on with the last. All questions about a prompt share
one pass over its pictures, and kinds that lag are asked more.

A step depends on the seed, its number and what was learned before, on nothing else. The state is saved every minute
beside the checkpoint, so a run that was killed goes on where it was and ends with the same bytes as one that was not.
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from bench import cli
from bench.tinyvqa.batches import Batch, draw_batch
from bench.tinyvqa.digits import load_digits
from bench.tinyvqa.encoder import shared_prefix_pass
from bench.tinyvqa.evaluate import evaluate
from bench.tinyvqa.makes import MAKES
from bench.tinyvqa.questions import KINDS, kinds_of
from bench.tinyvqa.recipe import Recipe, Stage
from bench.tinyvqa.scenes import Layout

QUESTIONS = 10
SAVE_SECONDS = 60.0
STATE_FILE = "training-state.pt"


@dataclass
class Progress:
    """Where a run stands; everything a resumed one needs beside the parameters and the optimiser."""

    seed: int
    make: str = "qwen"
    step: int = 0
    stage: int = 0
    stage_step: int = 0
    seconds: float = 0.0
    stage_steps: list[int] = field(default_factory=list)
    accuracy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    weight: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))

    @property
    def recipe(self) -> Recipe:
        """The recipe of the make."""
        return MAKES[self.make].recipe

    def see(self, accuracy: dict[str, float]) -> None:
        """Take the accuracies of a step into the running ones."""
        for kind, value in accuracy.items():
            self.accuracy[kind] = 0.95 * self.accuracy[kind] + 0.05 * value
            self.weight[kind] = 0.95 * self.weight[kind] + 0.05

    def running(self) -> dict[str, float]:
        """Return the mean accuracy of each kind over the last steps of this stage."""
        return {kind: self.accuracy[kind] / w if (w := self.weight[kind]) else 0.0 for kind in KINDS}

    @property
    def is_done(self) -> bool:
        """Whether the last stage has ended."""
        return self.stage == len(self.recipe.curriculum)

    @property
    def most_steps(self) -> int:
        """How many steps the run takes in all, if no further stage ends early."""
        align = max(0, self.recipe.align_steps - self.step)
        ahead = sum(stage.most_steps for stage in self.recipe.curriculum[self.stage :])
        return self.step + align + ahead - self.stage_step

    def next_stage(self) -> None:
        """Begin the next stage of the curriculum."""
        self.stage_steps.append(self.stage_step)
        self.stage, self.stage_step = self.stage + 1, 0
        self.accuracy, self.weight = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0)


def learning_rate(progress: Progress) -> float:
    """Warm up, again when the language model joins, and fall to 1 % by a cosine in the last stage.

    Before the language model joins, the rate falls once more where the recipe lets the vision tower settle.
    """
    step, recipe = progress.step, progress.recipe
    warm = min(1.0, (step + 1) / 50, (step + 1 - recipe.align_steps) / 150 if step >= recipe.align_steps else 1.0)
    if recipe.settle and step < recipe.align_steps:
        warm *= min(1.0, max(0.05, (recipe.align_steps - step) / (recipe.settle * recipe.align_steps)))
    is_last = progress.stage == len(recipe.curriculum) - 1
    late = progress.stage_step / recipe.curriculum[-1].most_steps if is_last else 0.0
    return recipe.peak_rate * warm * max(0.01, 0.5 * (1 + math.cos(math.pi * late)))


def draw_layout(rng: np.random.Generator, stage: Stage) -> Layout:
    """Draw a layout of this stage; in a mixed stage one of ten has many cells, and one of four has several pages."""
    height, width = (int(s) for s in rng.integers(stage.sides[0], stage.sides[1] + 1, 2))
    chance = rng.random()
    if not stage.mixed or chance < 0.65:
        return Layout(height, width)
    if chance < 0.75:
        height, width = (int(s) for s in rng.integers(9, 17, 2))
        return Layout(height, width)
    height, width = (int(s) for s in rng.integers(4, 7, 2))
    return Layout(height, width, int(rng.integers(2, 4)), "images" if chance < 0.88 else "video")


def question_counts(
    rng: np.random.Generator, running: dict[str, float], kinds: Sequence[str], total: int
) -> dict[str, int]:
    """Draw how often each kind is asked, in proportion to how often its answers are wrong."""
    wrong = np.array([max(0.06, 1 - running[kind]) for kind in kinds])
    drawn = rng.multinomial(total, wrong / wrong.sum())
    return {kind: int(count) for kind, count in zip(kinds, drawn, strict=True)}


def accuracy_by_kind(logits: Tensor, labels: Tensor, batch: Batch, end_of_turn: int) -> dict[str, float]:
    """Return the share of questions of each kind whose answer word is right."""
    right = (logits.argmax(-1) == labels)[labels != end_of_turn].float()
    kinds = np.array([q.kind for row in batch.questions for q in row])
    return {kind: right[torch.from_numpy(kinds == kind)].mean().item() for kind in dict.fromkeys(kinds.tolist())}


class Training:
    """A run: the model, its optimiser and how far it got."""

    def __init__(self, seed: int, make: str = "qwen") -> None:
        self.make = MAKES[make]
        self.tokenizer = self.make.build_tokenizer()
        self.model = self.make.build_model(self.make.build_config(self.tokenizer), seed)
        self.encoder = self.make.encoder(self.model, self.tokenizer)
        self.lessons = self.make.lessons(self.encoder, self.make.recipe.align_cells)
        learned = [p for p in (*self.model.parameters(), *self.lessons.parameters()) if p.requires_grad]
        decayed = [p for p in learned if p.dim() > 1]
        plain = [p for p in learned if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.03}, {"params": plain, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=self.make.recipe.peak_rate, betas=(0.9, 0.98))
        self.progress = Progress(seed, make)

    def step(self) -> dict[str, float]:
        """Take one optimiser step, and return what the progress bar shows."""
        now = self.progress
        rng = np.random.default_rng([now.seed, now.step])
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(now)
        is_first = now.step < self.make.recipe.align_steps
        loss, shown = self.lessons.first(rng, load_digits("train")) if is_first else self._answer(rng)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in self.optimiser.param_groups for p in group["params"]], 1.0)
        self.optimiser.step()
        now.step += 1
        return shown

    def _answer(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        now, stage = self.progress, self.make.recipe.curriculum[self.progress.stage]
        layout = draw_layout(rng, stage)
        prompts = max(2, round(stage.cells / layout.cells))
        kinds = [kind for kind in kinds_of(layout.pages) if kind in stage.kinds]
        asked = question_counts(rng, now.running(), kinds, QUESTIONS)
        batch = draw_batch(rng, "train", prompts, layout, asked)
        logits, labels, visual = shared_prefix_pass(
            self.model, self.encoder, batch, random.Random(now.seed * 1_000_003 + now.step), stage.train_vision
        )
        loss = functional.cross_entropy(logits, labels) + self.lessons.beside(batch.scenes, visual)
        now.see(accuracy_by_kind(logits, labels, batch, self.tokenizer.eos_token_id))
        now.stage_step += 1
        running = now.running()
        if now.stage_step >= stage.most_steps or (
            now.stage_step >= 40 and min(running[kind] for kind in stage.kinds) >= stage.good
        ):
            now.next_stage()
        return loss, {"loss": loss.item(), **running}

    def save(self, path: Path) -> None:
        """Write the state; a kill in the middle leaves the previous one."""
        state = {
            "recipe": str(self.make.recipe),
            "model": self.model.state_dict(),
            "lessons": self.lessons.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "progress": asdict(self.progress),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: it is of a run with another seed, make or recipe.
        """
        state = torch.load(path, weights_only=True)
        found, recipe = Progress(**state["progress"]), str(self.make.recipe)
        if (found.seed, found.make, state["recipe"]) != (self.progress.seed, self.make.name, recipe):
            raise ValueError(
                f"{path} is of a run with seed {found.seed} ({found.make}, {state['recipe']}), not "
                f"{self.progress.seed} ({self.make.name}, {recipe}); delete it or choose another --out."
            )
        self.model.load_state_dict(state["model"])
        self.lessons.load_state_dict(state["lessons"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.progress = found


def train(seed: int, state: Path | None = None, show_progress: bool = True, make: str = "qwen") -> Training:
    """Train to the end, from nothing or from the file `state`, which is kept up to date."""
    run = Training(seed, make)
    if state is not None and state.is_file():
        run.load(state)
    run.model.train()
    before = run.progress.seconds
    started = saved = time.perf_counter()
    with (
        run.encoder.batched_vision(),
        tqdm(total=run.progress.most_steps, initial=run.progress.step, disable=not show_progress, mininterval=5) as bar,
    ):
        while not run.progress.is_done:
            shown = run.step()
            run.progress.seconds = before + time.perf_counter() - started
            bar.total = run.progress.most_steps
            bar.update()
            if run.progress.step % 20 == 0:
                is_first = run.progress.step <= run.make.recipe.align_steps
                where = "align" if is_first else f"stage {run.progress.stage + 1}"
                bar.set_description(where, refresh=False)
                bar.set_postfix({name: f"{value:.2f}" for name, value in shown.items()}, refresh=False)
            if state is not None and time.perf_counter() - saved > SAVE_SECONDS:
                run.save(state)
                saved = time.perf_counter()
    run.model.eval()
    return run


def versions() -> dict[str, str]:
    """Return the versions that a rerun needs for the same bytes."""
    import sklearn
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "scikit-learn": sklearn.__version__,
        "numpy": np.__version__,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Train, save, evaluate on held-out digits, and write `training.json` next to the weights."""
    parser = cli.parser("bench.tinyvqa.train", __doc__, seed=(0, "weights and batches"), threads=1)
    parser.add_argument("--out", type=cli.output_folder, required=True, help="folder of the checkpoint")
    parser.add_argument("--make", choices=tuple(MAKES), default="qwen", help="which miniature (default: qwen)")
    parser.add_argument("--half", action="store_true", help="store the parameters in float16, in half the space")
    parser.add_argument("--no-progress", action="store_true")
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    state = args.out / STATE_FILE
    run = train(args.seed, state, not args.no_progress, args.make)
    run.make.save(run.model, run.tokenizer, args.out, torch.float16 if args.half else torch.float32)
    facts: dict[str, Any] = {
        "make": run.make.name,
        "seed": args.seed,
        "steps": run.progress.step,
        "stage_steps": run.progress.stage_steps,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "wall_seconds": round(run.progress.seconds, 1),
        "threads": args.threads,
        "held_out": evaluate(args.out, show_progress=not args.no_progress),
        "versions": versions(),
    }
    (args.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    state.unlink(missing_ok=True)
    print(json.dumps(facts, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
