"""Batches become tensors: many questions about one prompt in a single pass, which sees its pictures once."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.tinyvqa.batches import Batch
from bench.tinyvqa.scenes import COLOUR_NAMES, NUM_DIGITS, SHAPE_NAMES, Layout

IGNORED = -100


class Encoder(ABC):
    """Pixels, prompts and questions of a `Batch` as tensors.

    Attributes:
        model: the model that they are for.
        tokenizer: of the model.
        mean: of each colour channel of 0..255, float32 `[1, 3, 1, 1]`.
        std: the standard deviation, likewise.
        before: what a prompt says before its pictures.
        after: what it says after the question.
        figure_words: ids of the words that name figures, in the order of `Scene.figures`.
        colour_words: ids of the colours, in the order of `Scene.colours`.
    """

    picture: ClassVar[str]
    """How the chat template writes one picture."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.mean = torch.tensor(image_processor.image_mean).view(1, 3, 1, 1) * 255
        self.std = torch.tensor(image_processor.image_std).view(1, 3, 1, 1) * 255
        message = [{"role": "user", "content": [{"type": "image"}]}]
        chat = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        self.before, self.after = chat.split(self.picture)
        self.figure_words = self._ids([*map(str, range(NUM_DIGITS)), *SHAPE_NAMES])
        self.colour_words = self._ids(COLOUR_NAMES)

    def _ids(self, words: Any) -> Tensor:
        return torch.tensor(self.tokenizer.convert_tokens_to_ids(list(words)))

    @abstractmethod
    def picture_arguments(self, pages: Tensor, layout: Layout) -> dict[str, Tensor]:
        """Return the model's arguments that bring pictures.

        Args:
            pages: uint8 `[B * pages, 3, H, W]`.
            layout: of each prompt.
        """

    @abstractmethod
    def id_arguments(self, ids: Tensor) -> dict[str, Tensor]:
        """Return the model's arguments that follow from the ids `[B, T]`, besides these and their mask."""

    @abstractmethod
    def prefix(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Return the ids `[P]` up to where the question begins, and their position ids `[axes, P]`, of one prompt."""

    @abstractmethod
    def is_visual(self, ids: Tensor) -> Tensor:
        """Tell which ids are placeholders of visual tokens, bool of the same shape."""

    @abstractmethod
    def see(self, pages: Tensor, layout: Layout, train_vision: bool = True) -> Tensor:
        """Return the visual tokens `[B, cells, hidden]`; gradients reach the vision tower with `train_vision`."""

    @abstractmethod
    def decode(self, embeds: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Return the last hidden states of the language model, `[B, T, hidden]`.

        Args:
            embeds: `[B, T, hidden]`.
            mask: bool `[B, 1, T, T]`, who attends to whom.
            positions: int64 `[axes, B, T]`.
        """

    @abstractmethod
    def batched_vision(self) -> AbstractContextManager[None]:
        """Inside the block, the vision tower is quick with many small pictures."""

    @abstractmethod
    def pictures_read_once(self, batch: Batch) -> AbstractContextManager[None]:
        """Inside the block, the vision tower returns what it computed once for the pages of the batch."""

    def segments(self, batch: Batch, noise: random.Random | None = None) -> tuple[Tensor, Tensor]:
        """Questions with answers: ids `[B, Q, L]`, and labels of the same shape, -100 where nothing is to be learned.

        With `noise` the question mark is sometimes missing, so that the model later forgives that.
        """
        questions = [q for row in batch.questions for q in row]
        mark, end = self.tokenizer.convert_tokens_to_ids("?"), self.tokenizer.eos_token
        asked = self.tokenizer([q.text for q in questions], add_special_tokens=False).input_ids
        turn = self.tokenizer(self.after, add_special_tokens=False).input_ids
        answers = self.tokenizer([q.answer + end for q in questions], add_special_tokens=False).input_ids
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
    visual = encoder.see(batch.pages, batch.layout, train_vision)
    prefix_ids, prefix_positions = encoder.prefix(batch.layout)
    segment_ids, segment_labels = encoder.segments(batch, noise)
    prompts, count, length = segment_ids.shape
    prefix = len(prefix_ids)

    ids = torch.cat([prefix_ids.expand(prompts, -1), segment_ids.flatten(1)], dim=1)
    embeds = model.get_input_embeddings()(ids).masked_scatter(encoder.is_visual(ids)[..., None], visual)
    after = prefix_positions[:, -1].max() + 1 + torch.arange(length)
    positions = torch.cat([prefix_positions, after.repeat(count).expand(len(prefix_positions), -1)], dim=1)

    owner = torch.cat([torch.zeros(prefix, dtype=torch.long), torch.arange(1, count + 1).repeat_interleave(length)])
    causal = torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    mask = causal & ((owner[None, :] == 0) | (owner[None, :] == owner[:, None]))
    hidden = encoder.decode(embeds, mask.expand(prompts, 1, -1, -1), positions[:, None].expand(-1, prompts, -1))
    hidden = hidden[:, prefix:].reshape(prompts, count, length, -1)[:, :, :-1]
    labels = segment_labels[:, :, 1:]
    learned = labels != IGNORED
    return model.lm_head(hidden[learned]), labels[learned], visual


@contextmanager
def replaced_forward(module: Any, forward: Any) -> Iterator[None]:
    """Inside the block, the module runs `forward` instead of its own."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
