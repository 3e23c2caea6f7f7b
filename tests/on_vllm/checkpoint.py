"""The shipped TinyVQA model with wider heads: vLLM's CPU attention takes heads of 32 and more, and TinyVQA's have 16.

The padding is zeros, so that the padded model computes what the shipped one does. Three things would change and are
compensated: attention divides by the root of the head dimension, an RMSNorm by the root of the mean over more channels,
and rotary frequencies depend on the head dimension.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hawk_kernels.checkpoint import TINY_MODEL

OLD, NEW = 16, 32
FACTOR = NEW // OLD


def write_padded(folder: Path) -> Path:
    """Write the padded checkpoint, tokenizer and processor."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in TINY_MODEL.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja"):
            shutil.copy(path, folder / path.name)
    config = json.loads((TINY_MODEL / "config.json").read_text())
    text = config["text_config"]
    heads, key_heads = text["num_attention_heads"], text["num_key_value_heads"]
    hidden = text["hidden_size"]
    text["hidden_size"] = config["vision_config"]["out_hidden_size"] = hidden * FACTOR
    # the mean of squares is over twice as many channels
    text["rms_norm_eps"] /= FACTOR
    rope = text["rope_parameters"]
    # frequency i of NEW / 2 then is what frequency i of OLD / 2 was
    rope["rope_theta"] **= FACTOR
    rope["mrope_section"][-1] += (NEW - OLD) // 2
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = load_file(TINY_MODEL / "model.safetensors")
    padded = {name: _padded(name, weight, hidden, heads, key_heads) for name, weight in weights.items()}
    save_file(padded, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_qwen2_vl(folder: Path) -> Path:
    """Write a Qwen2-VL of random weights that reads TinyVQA's prompts; its answers mean nothing."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text, ids = _tinyvqa(folder)
    vision = {"depth": 2, "embed_dim": 64, "num_heads": 4, "hidden_size": text["hidden_size"], "mlp_ratio": 2}
    text = {**text, "model_type": "qwen2_vl_text"}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    return _write_random(folder, Qwen2VLForConditionalGeneration, config)


def write_qwen3_vl(folder: Path) -> Path:
    """Write a Qwen3-VL of random weights that reads TinyVQA's prompts; two layers of its encoder go to DeepStack."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text, vision, ids = _qwen3_vl(folder)
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    return _write_random(folder, Qwen3VLForConditionalGeneration, config)


def write_qwen3_vl_moe(folder: Path) -> Path:
    """Write a Qwen3-VL of random weights with four experts in each layer."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    text, vision, ids = _qwen3_vl(folder)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    # transformers always divides by the sum of the chosen probabilities, and vLLM asks for it
    text = {**text, **experts, "num_experts": 4, "norm_topk_prob": True, "model_type": "qwen3_vl_moe_text"}
    vision = {**vision, "model_type": "qwen3_vl_moe_vision"}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    _write_random(folder, Qwen3VLMoeForConditionalGeneration, config)
    weights = load_file(folder / "model.safetensors")
    # published checkpoints have the experts transposed, which transformers undoes on loading and not on saving
    published = {
        name: weight.transpose(1, 2).contiguous() if "experts" in name else weight for name, weight in weights.items()
    }
    save_file(published, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _tinyvqa(folder: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Write TinyVQA's tokenizer and processor, and return its text config and the ids of its special tokens."""
    write_padded(folder)
    config = json.loads((folder / "config.json").read_text())
    return config["text_config"], {name: value for name, value in config.items() if name.endswith("token_id")}


def _qwen3_vl(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
    """Write the processor of a small Qwen3-VL, and return its text and vision configs and its special tokens."""
    text, ids = _tinyvqa(folder)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    patches = {"patch_size": 16, "size": {"shortest_edge": 1024, "longest_edge": 1 << 20}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**processor, **patches}))
    # vLLM takes the mean and deviation of pixels from the image processor for videos too
    pixels = {name: processor[name] for name in ("image_mean", "image_std")}
    video = {"video_processor_type": "Qwen3VLVideoProcessor", "cap_pixels_per_frame": False, **patches, **pixels}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text = {**text, "model_type": "qwen3_vl_text", "head_dim": NEW, "rope_parameters": rope}
    vision = {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": text["hidden_size"],
        "num_position_embeddings": 144,
        "deepstack_visual_indexes": [0, 1],
    }
    return text, vision, ids


def _write_random(folder: Path, model_class: Any, config: Any) -> Path:
    """Write a model of random weights."""
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                # small initial weights would leave all answers alike
                weight.mul_(4)
    model.save_pretrained(folder)
    (folder / "processor_config.json").unlink(missing_ok=True)
    return folder


def _padded(name: str, weight: torch.Tensor, hidden: int, heads: int, key_heads: int) -> torch.Tensor:
    """Pad one tensor of the checkpoint."""
    if "visual" in name:
        # only the merger's last projection writes into the language model
        return _wider(weight, 0, hidden) if "merger.mlp.2" in name else weight
    if "norm" in name:
        return _wider(weight, 0, hidden) / FACTOR**0.5
    if "embed_tokens" in name or "lm_head" in name:
        return _wider(weight, 1, hidden)
    if "q_proj" in name or "k_proj" in name or "v_proj" in name:
        count = heads if "q_proj" in name else key_heads
        weight = _wider_heads(weight, count, rotated="v_proj" not in name)
        if "q_proj" in name:
            weight = weight * FACTOR**0.5
        return _wider(weight, 1, hidden) if weight.dim() == 2 else weight
    if "o_proj" in name:
        return _wider(_wider_heads(weight.T, heads, rotated=False).T, 0, hidden)
    return _wider(weight, 0 if "down_proj" in name else 1, hidden)


def _wider(weight: torch.Tensor, dim: int, hidden: int) -> torch.Tensor:
    assert weight.shape[dim] == hidden, (weight.shape, dim)
    return torch.cat([weight, weight.new_zeros(weight.shape).repeat_interleave(FACTOR - 1, dim)], dim).contiguous()


def _wider_heads(weight: torch.Tensor, count: int, rotated: bool) -> torch.Tensor:
    """Pad each head of the rows of `weight`; rotation pairs a channel with the one half a head further on."""
    parts = weight.reshape(count, 2, OLD // 2, -1) if rotated else weight.reshape(count, 1, OLD, -1)
    wide = parts.new_zeros(*parts.shape[:2], parts.shape[2] * FACTOR, parts.shape[3])
    wide[:, :, : parts.shape[2]] = parts
    return wide.reshape(count * NEW, *weight.shape[1:]).contiguous()
