"""Train the tiny Qwen2.5-VL on coloured digits: `python -m bench.tinyvqa.train --out hawk_kernels/assets/tinyvqa`.

What makes it quick enough for two cores: all questions about a picture share one pass over its visual tokens (they
see the picture and themselves, not each other), grids grow from 2 x 2 to 8 x 8 as the model gets better, and the
visual tokens are drawn towards the embeddings of the words that describe them, which stands for a pre-trained encoder.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from bench.tinyvqa.checkpoint import build_config, build_image_processor, build_model, build_tokenizer, save_checkpoint
from bench.tinyvqa.data import CELL, COLOUR_NAMES, DIGIT_NAMES, KINDS, Batch, draw_batch, objects_for


@dataclass(frozen=True)
class Stage:
    """A step of the curriculum: grid sides are drawn from `sides`; it ends early once every kind reaches `good`."""

    sides: tuple[int, int]
    pictures: int
    max_steps: int
    good: float


CURRICULUM = (
    Stage(sides=(2, 2), pictures=48, max_steps=500, good=0.85),
    Stage(sides=(3, 4), pictures=32, max_steps=500, good=0.90),
    Stage(sides=(5, 6), pictures=24, max_steps=400, good=0.92),
    Stage(sides=(8, 8), pictures=16, max_steps=300, good=0.93),
)
FINAL = Stage(sides=(2, 10), pictures=16, max_steps=350, good=2.0)


@contextmanager
def batched_vision_attention(visual: torch.nn.Module) -> Iterator[None]:
    """Inside the block, vision layers attend to windows of equal length together instead of one at a time.

    The stock layer calls attention once per window, which for a batch of small pictures is almost all overhead.
    """

    def attend(layer: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Any, **_: Any) -> Tensor:
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

        total = hidden_states.shape[0]
        query, key, value = layer.qkv(hidden_states).view(total, 3, layer.num_heads, -1).unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
        parts, order = [], []
        for length in lengths.unique().tolist():
            rows = (starts[lengths == length, None] + torch.arange(length)).flatten()
            q, k, v = (
                x[rows].view(-1, length, layer.num_heads, x.shape[-1]).transpose(1, 2) for x in (query, key, value)
            )
            mixed = functional.scaled_dot_product_attention(q, k, v, scale=layer.scaling)
            parts.append(mixed.transpose(1, 2).reshape(len(rows), -1))
            order.append(rows)
        return layer.proj(torch.cat(parts)[torch.cat(order).argsort()])

    layers = [block.attn for block in visual.blocks]
    for layer in layers:
        layer.forward = attend.__get__(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class Encoder:
    """Turns a `Batch` into the tensors of one shared-prefix pass."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        processor = build_image_processor()
        self.mean = torch.tensor(processor.image_mean).view(1, 3, 1, 1) * 255
        self.std = torch.tensor(processor.image_std).view(1, 3, 1, 1) * 255
        message = [{"role": "user", "content": [{"type": "image"}]}]
        chat = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        self.before, self.after = chat.split("<|image_pad|>")
        self.after = self.after.removeprefix("<|vision_end|>")
        self.named = {tokenizer.convert_tokens_to_ids(w) for w in (*map(str, range(10)), *DIGIT_NAMES, *COLOUR_NAMES)}

    def pixels(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 `[B, 3, H, W]` -> patches `[B * n, 1176]` in the image processor's order, and `grid_thw [B, 3]`."""
        batch, _, height, width = pictures.shape
        patch = CELL // 2
        x = (pictures.float() - self.mean) / self.std
        x = x.view(batch, 3, height // CELL, 2, patch, width // CELL, 2, patch).permute(0, 2, 5, 3, 6, 1, 4, 7)
        x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
        grid = torch.tensor([[1, height // patch, width // patch]]).expand(batch, -1)
        return x.reshape(batch * grid[0, 1] * grid[0, 2], -1), grid

    def prefix(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        """Ids `[P]` from the start to the vision-end token, and their M-RoPE positions `[3, P]`, for one picture."""
        count = int(grid[0].prod()) // 4
        text = self.before + "<|image_pad|>" * count + "<|vision_end|>"
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        is_image = (ids == self.model.config.image_token_id).int()
        positions, _ = self.model.model.get_rope_index(ids, mm_token_type_ids=is_image, image_grid_thw=grid[:1])
        return ids[0], positions[:, 0]

    def segments(self, batch: Batch, noise: random.Random | None) -> tuple[Tensor, Tensor]:
        """Questions with answers: ids `[B, Q, L]`, and labels of the same shape, -100 where nothing is to be learned.

        With `noise`, a word that carries no meaning is sometimes unknown and the question mark sometimes missing, so
        that the model later forgives a wording it never saw.
        """
        questions = [q for row in batch.questions for q in row]
        unknown, mark = self.tokenizer.unk_token_id, self.tokenizer.convert_tokens_to_ids("?")
        asked = self.tokenizer([q.text for q in questions], add_special_tokens=False).input_ids
        turn = self.tokenizer(self.after, add_special_tokens=False).input_ids
        answers = self.tokenizer([q.answer + "<|im_end|>" for q in questions], add_special_tokens=False).input_ids
        rows = []
        for words in asked:
            if noise is not None and noise.random() < 0.15:
                words = [w for w in words if w != mark]
            if noise is not None and noise.random() < 0.15:
                at = noise.randrange(len(words))
                words = [unknown if i == at and w not in self.named else w for i, w in enumerate(words)]
            rows.append(words + turn)
        length = max(len(r) + len(a) for r, a in zip(rows, answers, strict=True))
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        labels = torch.full((len(rows), length), -100)
        for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            ids[i, : len(row) + len(answer)] = torch.tensor(row + answer)
            labels[i, len(row) : len(row) + len(answer)] = torch.tensor(answer)
        shape = (len(batch.questions), -1, length)
        return ids.view(shape), labels.view(shape)


def shared_prefix_pass(
    model: Any, encoder: Encoder, batch: Batch, noise: random.Random | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[N, V]` and labels `[N]` at every learned position, and the visual tokens `[B, cells, hidden]`."""
    patches, grid = encoder.pixels(batch.pictures)
    visual = model.model.visual(patches, grid_thw=grid).pooler_output
    prefix_ids, prefix_positions = encoder.prefix(grid)
    segment_ids, segment_labels = encoder.segments(batch, noise)
    pictures, count, length = segment_ids.shape
    prefix = len(prefix_ids)

    ids = torch.cat([prefix_ids.expand(pictures, -1), segment_ids.flatten(1)], dim=1)
    embeds = model.get_input_embeddings()(ids)
    visual = visual.view(pictures, -1, visual.shape[-1])
    embeds = embeds.masked_scatter((ids == model.config.image_token_id)[..., None], visual)
    after = prefix_positions.max() + 1 + torch.arange(length)
    positions = torch.cat([prefix_positions, after.repeat(count).expand(3, -1)], dim=1)

    owner = torch.cat([torch.zeros(prefix, dtype=torch.long), torch.arange(1, count + 1).repeat_interleave(length)])
    total = len(owner)
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    mask = causal & ((owner[None, :] == 0) | (owner[None, :] == owner[:, None]))
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask={"full_attention": mask.expand(pictures, 1, -1, -1)},
        position_ids=positions[:, None].expand(-1, pictures, -1),
        use_cache=False,
    ).last_hidden_state[:, prefix:]
    hidden = hidden.view(pictures, count, length, -1)[:, :, :-1]
    labels = segment_labels[:, :, 1:]
    learned = labels != -100
    return model.lm_head(hidden[learned]), labels[learned], visual


def description_loss(model: Any, encoder: Encoder, batch: Batch, visual: Tensor) -> Tensor:
    """How far each digit's visual token is from naming its own digit and colour by word embedding."""
    table = model.get_input_embeddings().weight
    ids = encoder.tokenizer.convert_tokens_to_ids
    words = table[torch.tensor(ids([str(d) for d in range(10)]) + ids(list(COLOUR_NAMES)))]
    rows = torch.tensor([i for i, s in enumerate(batch.scenes) for _ in s.cells])
    cells = torch.tensor([c for s in batch.scenes for c in s.cells])
    logits = visual[rows, cells] @ words.T
    digits = torch.tensor([d for s in batch.scenes for d in s.digits])
    colours = torch.tensor([c for s in batch.scenes for c in s.colours])
    return functional.cross_entropy(logits[:, :10], digits) + functional.cross_entropy(logits[:, 10:], colours)


def accuracy_by_kind(logits: Tensor, labels: Tensor, batch: Batch, end_of_turn: int) -> dict[str, float]:
    """Share of questions of each kind whose answer word is right."""
    right = (logits.argmax(-1) == labels)[labels != end_of_turn].float()
    kinds = [q.kind for row in batch.questions for q in row]
    return {k: right[torch.tensor([kind == k for kind in kinds])].mean().item() for k in KINDS}


def train(seed: int, final_steps: int, show_progress: bool = True) -> tuple[Any, Any, dict[str, Any]]:
    """Train from nothing: the model (in eval mode), its tokenizer, and the facts about the run."""
    tokenizer = build_tokenizer()
    model = build_model(build_config(tokenizer), seed)
    encoder = Encoder(model, tokenizer)
    rng, noise = np.random.default_rng(seed), random.Random(seed)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], lr=1e-3, betas=(0.9, 0.98)
    )
    stages = (*CURRICULUM, Stage(FINAL.sides, FINAL.pictures, final_steps, FINAL.good))
    started, cpu_started = time.perf_counter(), time.process_time()
    step, stage_log = 0, []
    model.train()
    with batched_vision_attention(model.model.visual):
        for stage in stages:
            is_final = stage is stages[-1]
            running = dict.fromkeys(KINDS, 0.0)
            bar = tqdm(range(stage.max_steps), desc=f"grid {_sides(stage.sides)}", disable=not show_progress)
            for local in bar:
                warm = min(1.0, (step + 1) / 50)
                cool = 0.5 * (1 + math.cos(math.pi * local / stage.max_steps)) if is_final else 1.0
                for group in optimiser.param_groups:
                    group["lr"] = 1e-3 * warm * max(cool, 0.01)
                height, width = (int(s) for s in rng.integers(stage.sides[0], stage.sides[1] + 1, 2))
                # About the same number of cells a step, whatever the grid.
                pictures = max(8, min(48, stage.pictures * 64 // (height * width))) if is_final else stage.pictures
                batch = draw_batch(rng, "train", pictures, (height, width), objects_for(height, width))
                logits, labels, visual = shared_prefix_pass(model, encoder, batch, noise)
                described = description_loss(model, encoder, batch, visual)
                loss = functional.cross_entropy(logits, labels) + (0.1 if is_final else 0.5) * described
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                step += 1
                seen = accuracy_by_kind(logits, labels, batch, model.config.eos_token_id)
                running = {k: 0.95 * running[k] + 0.05 * seen[k] for k in KINDS}
                corrected = {k: v / (1 - 0.95 ** (local + 1)) for k, v in running.items()}
                if local % 10 == 0:
                    shown = {k: f"{v:.2f}" for k, v in corrected.items()}
                    bar.set_postfix(loss=f"{loss.item():.2f}", named=f"{described.item():.2f}", **shown)
                if local >= 30 and min(corrected.values()) >= stage.good:
                    break
            bar.close()
            stage_log.append({**asdict(stage), "steps": local + 1, "train_accuracy": corrected})
    model.eval()
    facts = {
        "seed": seed,
        "steps": step,
        "stages": stage_log,
        "parameters": sum(p.numel() for p in model.parameters()),
        "wall_seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu_started, 1),
        "threads": torch.get_num_threads(),
    }
    return model, tokenizer, facts


def _sides(sides: tuple[int, int]) -> str:
    return f"{sides[0]}" if sides[0] == sides[1] else f"{sides[0]}-{sides[1]}"


def versions() -> dict[str, str]:
    """The versions that a rerun would need to come out the same."""
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
    """Command line: train, save, evaluate on held-out digits, and write `training.json` beside the weights."""
    parser = argparse.ArgumentParser(prog="python -m bench.tinyvqa.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="one repeats the shipped weights")
    parser.add_argument("--final-steps", type=int, default=FINAL.max_steps, help="steps on mixed grids at the end")
    parser.add_argument("--no-progress", action="store_true")
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    model, tokenizer, facts = train(args.seed, args.final_steps, not args.no_progress)
    save_checkpoint(model, tokenizer, args.out)
    from bench.tinyvqa.evaluate import evaluate

    facts["held_out"] = evaluate(args.out, show_progress=not args.no_progress)
    facts["versions"] = versions()
    (args.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
