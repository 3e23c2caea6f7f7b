"""Tiny vision-language models with random weights, and batches of prompts for them.

The weights are drawn wider than usual, so that attention is sharp and a dropped token moves the logits visibly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

PAD, VISION_START, VISION_END, IMAGE, VIDEO, END_OF_TURN, BEGIN = 0, 1, 2, 3, 4, 5, 6
FIRST_WORD, VOCABULARY = 10, 120
PATCH, MERGE = 4, 2


@dataclass
class Picture:
    """An image (or, with more than one frame, a video) of `height` x `width` visual tokens."""

    height: int
    width: int
    frames: int = 1

    @property
    def tokens(self) -> int:
        return self.height * self.width * self.frames


def sharpen(model: nn.Module, seed: int, gain: float = 1.0) -> nn.Module:
    """Redraw every weight matrix at `gain / sqrt(fan_in)` and every bias and norm around its usual value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "embed_tokens" in name:
                parameter.copy_(noise)
            elif parameter.dim() > 1:
                parameter.copy_(noise * gain * parameter[0].numel() ** -0.5)
            elif "norm" in name and "weight" in name:
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.2 * noise)
        # louder queries and keys, so that attention is far from uniform
        for name, parameter in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                parameter.mul_(1.7)
    return model.eval()


def qwen_vl(
    kind: str = "qwen2_5_vl",
    *,
    heads: int = 4,
    kv_heads: int = 2,
    layers: int = 3,
    seed: int = 0,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A tiny Qwen2.5-VL or Qwen2-VL."""
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16 * heads,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "bos_token_id": BEGIN,
        "eos_token_id": END_OF_TURN,
        "pad_token_id": PAD,
    }
    vision = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2}
    ids = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
    if kind == "qwen2_5_vl":
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        vision |= {
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 16 * heads,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        }
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
        model_class = Qwen2_5_VLForConditionalGeneration
    else:
        from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

        vision |= {"embed_dim": 32, "hidden_size": 16 * heads, "mlp_ratio": 2}
        config = Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
        model_class = Qwen2VLForConditionalGeneration
    config._attn_implementation = attention
    torch.manual_seed(seed)
    model = sharpen(model_class(config), seed)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = END_OF_TURN
    return model.to(dtype)


def words(count: int, seed: int = 0) -> list[int]:
    """`count` ids of ordinary text."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_WORD, VOCABULARY, (count,), generator=generator).tolist()


def qwen_batch(
    *rows: list[int | Picture], seed: int = 0, padding: str = "left", dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Model inputs for rows of token ids and pictures, as a Qwen processor makes them.

    Args:
        rows: ids of text, and a `Picture` wherever an image or video stands.
        seed: for the pixels.
        padding: side of the padding.
        dtype: of the pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    expanded, pixels, grids = [], {1: [], 2: []}, {1: [], 2: []}
    for row in rows:
        ids: list[int] = []
        for item in row:
            if isinstance(item, Picture):
                kind, token = (1, IMAGE) if item.frames == 1 else (2, VIDEO)
                ids += [VISION_START, *[token] * item.tokens, VISION_END]
                patches = item.tokens * MERGE**2
                pixels[kind].append(torch.randn(patches, 3 * 2 * PATCH**2, generator=generator))
                grids[kind].append([item.frames, item.height * MERGE, item.width * MERGE])
            else:
                ids.append(item)
        expanded.append(ids)
    longest = max(map(len, expanded))
    input_ids = torch.full((len(rows), longest), PAD)
    attention_mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, ids in enumerate(expanded):
        where = slice(longest - len(ids), None) if padding == "left" else slice(len(ids))
        input_ids[row, where] = torch.tensor(ids)
        attention_mask[row, where] = 1
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": (input_ids == IMAGE).int() + 2 * (input_ids == VIDEO).int(),
    }
    for kind, pixel_name, grid_name in (
        (1, "pixel_values", "image_grid_thw"),
        (2, "pixel_values_videos", "video_grid_thw"),
    ):
        if pixels[kind]:
            inputs[pixel_name] = torch.cat(pixels[kind]).to(dtype)
            inputs[grid_name] = torch.tensor(grids[kind])
    return inputs


def question(picture: Picture | list[Picture], seed: int = 0, before: int = 3, after: int = 5) -> list[int | Picture]:
    """A prompt as a chat template makes it: text, the pictures, a question, the end of the turn, the reply's header."""
    pictures = picture if isinstance(picture, list) else [picture]
    return [BEGIN, *words(before, seed), *pictures, *words(after, seed + 1), END_OF_TURN, *words(2, 99)]


def hide(model: nn.Module, inputs: dict[str, torch.Tensor], keep_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs for the unpruned model that hide tokens instead of removing them: masked out, at their original positions.

    Args:
        model: a Qwen model.
        inputs: its inputs.
        keep_mask: bool `[B, T]`, or `[B * beams, T]` with equal rows for the beams of a sample.
    """
    keep_mask = keep_mask[:: keep_mask.shape[0] // inputs["input_ids"].shape[0]]
    grids = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
    attention_mask = inputs["attention_mask"]
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"], attention_mask=attention_mask, **grids
    )
    text = (attention_mask.cumsum(-1) - 1).clamp(min=0)[None]
    return {**inputs, "attention_mask": keep_mask.long(), "position_ids": torch.cat([text, positions])}
