"""The first miniature: a Qwen2.5-VL whose visual tokens are aligned with word embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bench.tinyvqa.batches import Batch
from bench.tinyvqa.digits import DigitPool
from bench.tinyvqa.encoder import Encoder, replaced_forward
from bench.tinyvqa.make import Lessons, Make
from bench.tinyvqa.painting import CELL, render
from bench.tinyvqa.questions import KINDS
from bench.tinyvqa.recipe import Recipe, Stage
from bench.tinyvqa.scenes import Layout, Scene, draw_patchwork
from bench.tinyvqa.words import build_word_tokenizer
from hawk_kernels.checkpoint import TINY_MODEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|unk|>",
)

# Norm of a word's embedding: about that of what a layer adds to it.
WORD_LENGTH = 6.0

# Of 8 in each layer, one in either group: they start as heads that attend to what is like the query.
CONTENT_HEADS = (1, 6)

# Qwen2.5-VL's own frame: a system turn unless one is given, then each turn between its markers.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Servers look for the answer of a Qwen after the line break that follows "assistant". This tokenizer has no line break,
# so it has to say where an answer begins.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|> assistant",
    "fields": {"content": {"close": "<|im_end|>", "content": "text"}},
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer that lower-cases, splits punctuation off, knows Qwen's special tokens, pads left."""
    tokenizer = build_word_tokenizer(
        SPECIAL_TOKENS, pad="<|endoftext|>", end="<|im_end|>", unknown="<|unk|>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """Configure about 0.7 M parameters with the features of a large Qwen2.5-VL: GQA, M-RoPE, windows, 2 x 2 merge."""
    from transformers import Qwen2_5_VLConfig

    token_id: dict[str, Any] = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    ends: dict[str, Any] = {
        "bos_token_id": token_id["<|endoftext|>"],
        "eos_token_id": token_id["<|im_end|>"],
        "pad_token_id": token_id["<|endoftext|>"],
    }
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [1, 2, 5]},
            **ends,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 128,
            "patch_size": CELL // 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 4 * CELL,
            "tokens_per_second": 1,
            "fullatt_block_indexes": [1],
        },
        image_token_id=token_id["<|image_pad|>"],
        video_token_id=token_id["<|video_pad|>"],
        vision_start_token_id=token_id["<|vision_start|>"],
        vision_end_token_id=token_id["<|vision_end|>"],
        tie_word_embeddings=True,
        **ends,
    )


def build_model(config: Qwen2_5_VLConfig, seed: int) -> Any:
    """A fresh model: matrices of standard deviation `1 / sqrt(fan-in)`, queries of some heads close to keys.

    The default of 0.02 is meant for a width of thousands; at a width of 128 signals drawn with it die out on their way.
    In pre-trained transformers the product of query and key projection is near a multiple of the identity in some
    heads, so that tokens attend to what is like them; mimetic initialisation (arXiv 2305.09828) starts small ones
    there, and so do `CONTENT_HEADS` here. From independent draws alone the model learns to answer as well, but compares
    words with visual tokens only in its later layers, unlike the large models that HAWK's first-layer score was made
    for; with all heads alike, no single one matters, and there is nothing to calibrate.
    """
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    model: Any = Qwen2_5_VLForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=math.prod(parameter.shape[1:]) ** -0.5)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        key, value = attention.k_proj.weight.detach(), attention.v_proj.weight.detach()
        for head in CONTENT_HEADS:
            rows, shared = (
                slice(h * attention.head_dim, (h + 1) * attention.head_dim)
                for h in (head, head // attention.num_key_value_groups)
            )
            with torch.no_grad():
                attention.q_proj.weight[rows].mul_(0.4).add_(key[shared])
                attention.o_proj.weight[:, rows].mul_(0.4).add_(value[shared].T)
    torch.nn.init.orthogonal_(model.get_input_embeddings().weight, gain=WORD_LENGTH)
    # Words stay as they were drawn: what the vision tower learned to name keeps its meaning.
    model.get_input_embeddings().requires_grad_(False)
    torch.nn.init.constant_(model.model.language_model.norm.weight, 1.5 / WORD_LENGTH)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=False,
        max_new_tokens=4,
    )
    return model


def build_image_processor() -> Any:
    """Make the PIL image processor of Qwen2-VL, which needs no torchvision, for pictures from 2 x 2 to 256 cells."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(size={"shortest_edge": 4 * CELL * CELL, "longest_edge": 256 * CELL * CELL})


class QwenEncoder(Encoder):
    """Tensors for Qwen2.5-VL: patches in the order of their merges, and M-RoPE positions."""

    picture: ClassVar[str] = "<|vision_start|><|image_pad|><|vision_end|>"

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer, build_image_processor())

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

    def picture_arguments(self, pages: Tensor, layout: Layout) -> dict[str, Tensor]:
        patches, grid = self.pixels(pages, layout)
        if layout.medium == "video":
            return {"pixel_values_videos": patches, "video_grid_thw": grid}
        return {"pixel_values": patches, "image_grid_thw": grid}

    def id_arguments(self, ids: Tensor) -> dict[str, Tensor]:
        config = self.model.config
        return {"mm_token_type_ids": (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()}

    def prefix(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Return the ids `[P]` up to the last vision-end token, and their M-RoPE positions `[3, P]`, of one prompt."""
        is_video = layout.medium == "video"
        pad = "<|video_pad|>" if is_video else "<|image_pad|>"
        runs = 1 if is_video else layout.pages
        run = "<|vision_start|>" + pad * (layout.cells // runs) + "<|vision_end|>"
        ids = self.tokenizer(self.before + run * runs, return_tensors="pt", add_special_tokens=False).input_ids
        grid = torch.tensor([[layout.pages if is_video else 1, 2 * layout.height, 2 * layout.width]]).expand(runs, -1)
        name = "video_grid_thw" if is_video else "image_grid_thw"
        positions, _ = self.model.model.get_rope_index(ids, **self.id_arguments(ids), **{name: grid})
        return ids[0], positions[:, 0]

    def is_visual(self, ids: Tensor) -> Tensor:
        config = self.model.config
        found: Tensor = (ids == config.image_token_id) | (ids == config.video_token_id)
        return found

    def see(self, pages: Tensor, layout: Layout, train_vision: bool = True) -> Tensor:
        patches, grid = self.pixels(pages, layout)
        with torch.set_grad_enabled(torch.is_grad_enabled() and train_vision):
            visual: Tensor = self.model.model.visual(patches, grid_thw=grid).pooler_output
        return visual.view(-1, layout.cells, visual.shape[-1])

    def decode(self, embeds: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        hidden: Tensor = self.model.model.language_model(
            inputs_embeds=embeds, attention_mask={"full_attention": mask}, position_ids=positions, use_cache=False
        ).last_hidden_state
        return hidden

    def batched_vision(self) -> AbstractContextManager[None]:
        return batched_vision_attention(self.model.model.visual)

    def pictures_read_once(self, batch: Batch) -> AbstractContextManager[None]:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        with self.batched_vision():
            seen = self.see(batch.pages, batch.layout)
        seen = seen.repeat_interleave(len(batch.questions[0]), dim=0).flatten(0, 1)
        # The multimodal model writes into what it gets, so each call gets an output of its own.
        return replaced_forward(
            self.model.model.visual, lambda *_, **__: BaseModelOutputWithPooling(pooler_output=seen)
        )


class NamingLessons(Lessons):
    """The tower learns to turn a cell into the sum of the word embeddings of its figure and its colour."""

    def first(self, rng: np.random.Generator, pool: DigitPool) -> tuple[Tensor, dict[str, float]]:
        height, width = (int(side) for side in rng.integers(3, 8, 2))
        layout = Layout(height, width)
        scenes = [draw_patchwork(rng, pool, layout) for _ in range(round(self.cells / layout.cells))]
        visual = self.encoder.see(render(scenes, pool, rng), layout)
        loss, right = description_loss(self.encoder, scenes, visual)
        return loss, {"loss": loss.item(), **{name: share.item() for name, share in right.items()}}

    def beside(self, scenes: list[Scene], visual: Tensor) -> Tensor:
        return 0.3 * description_loss(self.encoder, scenes, visual)[0]


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


RECIPE = Recipe(
    peak_rate=1.5e-3,
    align_steps=400,
    align_cells=512,
    curriculum=(
        Stage((3, 3), 216, 500, 0.85, ("colour->digit", "digit->colour", "shape->colour")),
        Stage((4, 4), 320, 900, 0.85),
        Stage((5, 6), 512, 250, 0.88),
        Stage((6, 9), 640, 1400, 2.0, train_vision=True, mixed=True),
    ),
)

QWEN = Make(
    name="qwen",
    model_type="qwen2_5_vl",
    shipped=TINY_MODEL,
    recipe=RECIPE,
    kinds=tuple(KINDS),
    # Mostly single pictures of 36 to 256 cells, some prompts of several pages.
    layouts={
        Layout(6, 6): 0.2,
        Layout(8, 8): 0.3,
        Layout(6, 10): 0.15,
        Layout(12, 12): 0.1,
        Layout(16, 16): 0.05,
        Layout(6, 6, 2, "images"): 0.1,
        Layout(5, 5, 3, "video"): 0.1,
    },
    # Pictures only: transformers reads videos with torchvision, which a machine that calibrates need not have.
    calibration_layouts=(Layout(6, 6), Layout(8, 8), Layout(6, 9), Layout(5, 5, 2, "images")),
    timed_layouts=(Layout(8, 8), Layout(16, 16)),
    build_tokenizer=build_tokenizer,
    build_config=build_config,
    build_model=build_model,
    build_processor=lambda _: build_image_processor(),
    encoder=QwenEncoder,
    lessons=NamingLessons,
)
