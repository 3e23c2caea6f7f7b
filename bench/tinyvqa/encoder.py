"""Batches become tensors: many questions about one prompt in a single pass, which sees its pictures once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bench.tinyvqa.batches import Batch
from bench.tinyvqa.checkpoint import WORD_LENGTH, build_image_processor
from bench.tinyvqa.painting import CELL
from bench.tinyvqa.scenes import COLOUR_NAMES, NUM_DIGITS, SHAPE_NAMES, Layout, Scene

IGNORED = -100


class Encoder:
    """Pixels, prompts and questions of a `Batch` as tensors.

    Attributes:
        figure_words: ids of the words that name figures, in the order of `Scene.figures`.
        colour_words: ids of the colours, in the order of `Scene.colours`.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        processor = build_image_processor()
        self.mean = torch.tensor(processor.image_mean).view(1, 3, 1, 1) * 255
        self.std = torch.tensor(processor.image_std).view(1, 3, 1, 1) * 255
        message = [{"role": "user", "content": [{"type": "image"}]}]
        chat = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        before, after = chat.split("<|vision_start|><|image_pad|><|vision_end|>")
        self.before, self.after = before, after
        self.figure_words = self._ids([*map(str, range(NUM_DIGITS)), *SHAPE_NAMES])
        self.colour_words = self._ids(COLOUR_NAMES)

    def _ids(self, words: Any) -> Tensor:
        return torch.tensor(self.tokenizer.convert_tokens_to_ids(list(words)))

    def pixels(self, pages: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Patches in the image processor's order, float32 `[n, 1176]`, and their grids int64 `[images or videos, 3]`.

        Args:
            pages: uint8 `[B * pages, 3, H, W]`.
            layout: of each prompt; a video is one grid with a temporal side.
        """
        count, _, height, width = pages.shape
        patch = CELL // 2
        x = (pages.float() - self.mean) / self.std
        x = x.view(count, 3, height // CELL, 2, patch, width // CELL, 2, patch).permute(0, 2, 5, 3, 6, 1, 4, 7)
        # Two equal frames make a temporal patch: that is how Qwen2.5-VL takes a picture.
        x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
        frames = layout.pages if layout.medium == "video" else 1
        grid = torch.tensor([[frames, height // patch, width // patch]]).expand(count // frames, -1)
        return x.reshape(count * (height // patch) * (width // patch), -1), grid

    def prefix(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Return the ids `[P]` up to the last vision-end token, and their M-RoPE positions `[3, P]`, of one prompt."""
        is_video = layout.medium == "video"
        config, pad = self.model.config, "<|video_pad|>" if is_video else "<|image_pad|>"
        runs = 1 if is_video else layout.pages
        run = "<|vision_start|>" + pad * (layout.cells // runs) + "<|vision_end|>"
        ids = self.tokenizer(self.before + run * runs, return_tensors="pt", add_special_tokens=False).input_ids
        kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        grid = torch.tensor([[layout.pages if is_video else 1, 2 * layout.height, 2 * layout.width]]).expand(runs, -1)
        name = "video_grid_thw" if is_video else "image_grid_thw"
        positions, _ = self.model.model.get_rope_index(ids, mm_token_type_ids=kinds, **{name: grid})
        return ids[0], positions[:, 0]

    def segments(self, batch: Batch, noise: random.Random | None = None) -> tuple[Tensor, Tensor]:
        """Questions with answers: ids `[B, Q, L]`, and labels of the same shape, -100 where nothing is to be learned.

        With `noise` the question mark is sometimes missing, so that the model later forgives that.
        """
        questions = [q for row in batch.questions for q in row]
        mark = self.tokenizer.convert_tokens_to_ids("?")
        asked = self.tokenizer([q.text for q in questions], add_special_tokens=False).input_ids
        turn = self.tokenizer(self.after, add_special_tokens=False).input_ids
        answers = self.tokenizer([q.answer + "<|im_end|>" for q in questions], add_special_tokens=False).input_ids
        rows = []
        for words in asked:
            if noise is not None and noise.random() < 0.15:
                words = [w for w in words if w != mark]
            rows.append(words + turn)
        length = max(len(r) + len(a) for r, a in zip(rows, answers, strict=True))
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        labels = torch.full((len(rows), length), IGNORED)
        for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            ids[i, : len(row) + len(answer)] = torch.tensor(row + answer)
            labels[i, len(row) : len(row) + len(answer)] = torch.tensor(answer)
        shape = (len(batch.questions), -1, length)
        return ids.view(shape), labels.view(shape)


def shared_prefix_pass(
    model: Any,
    encoder: Encoder,
    batch: Batch,
    noise: random.Random | None = None,
    train_vision: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits `[N, V]` and labels `[N]` at every learned position, and visual tokens `[B, cells, hidden]`."""
    layout = batch.layout
    patches, grid = encoder.pixels(batch.pages, layout)
    with torch.set_grad_enabled(torch.is_grad_enabled() and train_vision):
        visual = model.model.visual(patches, grid_thw=grid).pooler_output
    prefix_ids, prefix_positions = encoder.prefix(layout)
    segment_ids, segment_labels = encoder.segments(batch, noise)
    prompts, count, length = segment_ids.shape
    prefix = len(prefix_ids)

    ids = torch.cat([prefix_ids.expand(prompts, -1), segment_ids.flatten(1)], dim=1)
    is_visual = (ids == model.config.image_token_id) | (ids == model.config.video_token_id)
    visual = visual.view(prompts, layout.cells, -1)
    embeds = model.get_input_embeddings()(ids).masked_scatter(is_visual[..., None], visual)
    after = prefix_positions[:, -1].max() + 1 + torch.arange(length)
    positions = torch.cat([prefix_positions, after.repeat(count).expand(3, -1)], dim=1)

    owner = torch.cat([torch.zeros(prefix, dtype=torch.long), torch.arange(1, count + 1).repeat_interleave(length)])
    causal = torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    mask = causal & ((owner[None, :] == 0) | (owner[None, :] == owner[:, None]))
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask={"full_attention": mask.expand(prompts, 1, -1, -1)},
        position_ids=positions[:, None].expand(-1, prompts, -1),
        use_cache=False,
    ).last_hidden_state[:, prefix:]
    hidden = hidden.reshape(prompts, count, length, -1)[:, :, :-1]
    labels = segment_labels[:, :, 1:]
    learned = labels != IGNORED
    return model.lm_head(hidden[learned]), labels[learned], visual


def description_loss(encoder: Encoder, scenes: list[Scene], visual: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """How far each visual token is from the sum of the words for its figure and its colour, and the shares named right.

    It stands for the alignment that a pre-trained vision encoder brings along: without it a model this small spends
    most of its training finding out that a cell has anything to do with a word. The distance keeps visual tokens as
    large as words, the cross-entropy keeps similar figures apart.

    Args:
        encoder: of the model.
        scenes: one a prompt.
        visual: the visual tokens, `[B, cells, hidden]`.
    """
    table = encoder.model.get_input_embeddings().weight
    visual = visual.flatten(0, 1)
    loss, right, meant = visual.new_zeros(()), {}, torch.zeros_like(visual)
    for name, words in (("figures", encoder.figure_words), ("colours", encoder.colour_words)):
        names = torch.from_numpy(np.concatenate([getattr(scene, name) for scene in scenes]))
        logits = 8 / WORD_LENGTH**2 * visual @ table[words].T
        loss = loss + 0.25 * functional.cross_entropy(logits, names)
        right[name] = (logits.argmax(-1) == names).float().mean()
        meant += table[words[names]]
    return loss + (visual - meant).square().sum(-1).mean() / WORD_LENGTH**2, right


@contextmanager
def batched_vision_attention(visual: Any) -> Iterator[None]:
    """Inside the block, vision layers attend to windows of equal length together instead of one at a time.

    The stock layer calls attention once per window, which for a batch of small pictures is almost all overhead.
    """
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    def attend(layer: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Any, **_: Any) -> Tensor:
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
        projected: Tensor = layer.proj(torch.cat(parts)[torch.cat(order).argsort()])
        return projected

    layers = [block.attn for block in visual.blocks]
    for layer in layers:
        layer.forward = attend.__get__(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
