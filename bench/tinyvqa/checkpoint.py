"""The checkpoint's parts: model configuration, word-level tokenizer, chat template, image processor."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench.tinyvqa.painting import CELL
from bench.tinyvqa.questions import vocabulary

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


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer that lower-cases, splits punctuation off, knows Qwen's special tokens, pads left."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL_TOKENS, *vocabulary()]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unk|>"))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<|unk|>",
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<|endoftext|>", "<|im_end|>", "<|unk|>")],
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
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


def save_checkpoint(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write everything `from_pretrained` wants into `out`, the parameters rounded to `dtype`."""
    out.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to(dtype).save_pretrained(out)
    tokenizer.save_pretrained(out)
    build_image_processor().save_pretrained(out)
