"""The second miniature: a LLaVA whose visual tokens were never aligned with word embeddings.

It has the parts of LLaVA-1.5: a CLIP encoder with a CLS token, of which the last layer but one is taken without CLS; a
projector of two layers; and a Llama decoder whose output words are not tied to its input words. The encoder is trained
first and then frozen, as CLIP is in LLaVA; projector and decoder learn from answers alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.tinyvqa.batches import Batch
from bench.tinyvqa.digits import DigitPool
from bench.tinyvqa.encoder import Encoder, replaced_forward
from bench.tinyvqa.make import Lessons, Make
from bench.tinyvqa.painting import CELL, render
from bench.tinyvqa.questions import KINDS, ONE_PAGE_KINDS
from bench.tinyvqa.recipe import Recipe, Stage
from bench.tinyvqa.scenes import COLOURS, NUM_DIGITS, SHAPE_NAMES, Layout, Scene, draw_patchwork, draw_scene
from bench.tinyvqa.words import build_word_tokenizer

if TYPE_CHECKING:
    from transformers import LlavaConfig, PreTrainedTokenizerFast

# The ids of <unk>, <s> and </s> are those of Llama.
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>", ":")
SIDE = 8
DECODER_WIDTH = 128
ENCODER_WIDTH = 96

# Vicuna's frame, as LLaVA-1.5 writes it.
CHAT_TEMPLATE = (
    "<s>"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}ASSISTANT: {% else %}USER: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer with the special tokens and the chat template of LLaVA-1.5."""
    return build_word_tokenizer(SPECIAL_TOKENS, pad="<pad>", end="</s>", unknown="<unk>", chat_template=CHAT_TEMPLATE)


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """Configure about 1.5 M parameters: five layers of CLIP, of which four are used, and six of Llama."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    # Its annotations know the old name of `image_token_id` alone.
    made: Any = LlavaConfig
    ends: dict[str, Any] = {
        "bos_token_id": tokenizer.convert_tokens_to_ids("<s>"),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config: LlavaConfig = made(
        vision_config=CLIPVisionConfig(
            hidden_size=ENCODER_WIDTH,
            intermediate_size=2 * ENCODER_WIDTH,
            projection_dim=ENCODER_WIDTH,
            num_hidden_layers=5,
            num_attention_heads=4,
            image_size=SIDE * CELL,
            patch_size=CELL,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=DECODER_WIDTH,
            intermediate_size=2 * DECODER_WIDTH,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            # The default of 0.02 is meant for a width of thousands.
            initializer_range=DECODER_WIDTH**-0.5,
            tie_word_embeddings=False,
            **ends,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=SIDE * SIDE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    return config


def build_model(config: LlavaConfig, seed: int) -> Any:
    """A fresh model, as transformers initialises it: no head is made to look at content."""
    from transformers import GenerationConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    model: Any = LlavaForConditionalGeneration(config)
    text: Any = config.text_config
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        do_sample=False,
        max_new_tokens=4,
    )
    return model


def build_image_processor() -> Any:
    """Make the PIL image processor of CLIP, which needs no torchvision, for pictures of 8 x 8 cells."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side = SIDE * CELL
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    """Make LLaVA's processor of pictures and text."""
    from transformers import LlavaProcessor

    return LlavaProcessor(
        build_image_processor(),
        tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def published_name(name: str) -> str:
    """Name a tensor as the checkpoints of LLaVA-1.5 do, which every version of transformers reads.

    The newest versions store the encoder's tensors under a name that older ones do not know.
    """
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


class LlavaEncoder(Encoder):
    """Tensors for LLaVA: whole pictures, each of its own, and positions that count tokens.

    Pages of fewer cells than 8 x 8 are for training alone: there CLIP interpolates its positions, which the forward
    pass of LLaVA does not ask for.
    """

    picture: ClassVar[str] = "<image>\n"

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer, build_image_processor())

    def pixels(self, pages: Tensor) -> Tensor:
        """Return the pages as the image processor does, float32 of the same shape."""
        return (pages.float() - self.mean) / self.std

    def picture_arguments(self, pages: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels(pages)}

    def id_arguments(self, ids: Tensor) -> dict[str, Tensor]:
        return {}

    def prefix(self, layout: Layout) -> tuple[Tensor, Tensor]:
        if layout.medium == "video":
            raise ValueError(f"layout: expected pictures, got {layout}; LLaVA takes no videos.")
        run = "<image>" * (layout.height * layout.width) + "\n"
        text = self.before + run * layout.pages
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
        return ids, torch.arange(len(ids))[None]

    def is_visual(self, ids: Tensor) -> Tensor:
        found: Tensor = ids == self.model.config.image_token_id
        return found

    def encode(self, pages: Tensor) -> Any:
        """Return CLIP's output for the pages, with the hidden states of all layers."""
        return self.model.model.vision_tower(
            self.pixels(pages),
            interpolate_pos_encoding=pages.shape[-2:] != (SIDE * CELL, SIDE * CELL),
            output_hidden_states=True,
        )

    def see(self, pages: Tensor, layout: Layout, train_vision: bool = True) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and train_vision):
            features = self.encode(pages).hidden_states[self.model.config.vision_feature_layer][:, 1:]
        visual: Tensor = self.model.model.multi_modal_projector(features)
        return visual.reshape(-1, layout.cells, visual.shape[-1])

    def decode(self, embeds: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        hidden: Tensor = self.model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions[0], use_cache=False
        ).last_hidden_state
        return hidden

    @contextmanager
    def batched_vision(self) -> Iterator[None]:
        """CLIP is quick with many small pictures as it is."""
        yield

    def pictures_read_once(self, batch: Batch) -> AbstractContextManager[None]:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        seen, questions = self.encode(batch.pages), len(batch.questions[0])

        def repeated(states: Tensor) -> Tensor:
            by_prompt = states.unflatten(0, (-1, batch.layout.pages))
            states = by_prompt.repeat_interleave(questions, dim=0).flatten(0, 1)
            return states

        states = tuple(map(repeated, seen.hidden_states))
        # The multimodal model writes into what it gets, so each call gets an output of its own.
        return replaced_forward(
            self.model.model.vision_tower, lambda *_, **__: BaseModelOutputWithPooling(hidden_states=states)
        )


class CaptionLessons(Lessons):
    """What stands for the pre-training of CLIP: patches name their cell, and the CLS token the digits of the page.

    Both do so through linear classifiers that are thrown away, so nothing ties the features to the decoder's words.
    Patches are read where LLaVA reads them, after the last layer but one. The CLS token learns the `caption` of the
    page, which draws its attention to digits among many shapes, as captions draw that of CLIP to what they mention.
    """

    encoder: LlavaEncoder

    def __init__(self, encoder: LlavaEncoder, cells: int) -> None:
        super().__init__(encoder, cells)
        self.figure = nn.Linear(ENCODER_WIDTH, NUM_DIGITS + len(SHAPE_NAMES))
        self.colour = nn.Linear(ENCODER_WIDTH, len(COLOURS))
        self.caption = nn.Linear(ENCODER_WIDTH, NUM_DIGITS * (1 + len(COLOURS)))

    def first(self, rng: np.random.Generator, pool: DigitPool) -> tuple[Tensor, dict[str, float]]:
        side = int(rng.integers(3, SIDE + 1))
        layout, has_order = Layout(side, side), rng.random() < 0.5
        draw = draw_scene if has_order else draw_patchwork
        scenes = [draw(rng, pool, layout) for _ in range(max(2, round(self.cells / layout.cells)))]
        loss, right = self.named(scenes, render(scenes, pool, rng), captions=has_order)
        return loss, {"loss": loss.item(), **right}

    def named(self, scenes: list[Scene], pages: Tensor, captions: bool) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of naming what is on these pages, and the shares named right; with or without captions."""
        seen = self.encoder.encode(pages)
        patches = seen.hidden_states[-2][:, 1:].flatten(0, 1)
        answers = {
            "figures": (self.figure(patches), torch.from_numpy(np.concatenate([s.figures for s in scenes]))),
            "colours": (self.colour(patches), torch.from_numpy(np.concatenate([s.colours for s in scenes]))),
        }
        if captions:
            logits = self.caption(seen.pooler_output).view(-1, 1 + len(COLOURS))
            answers["captions"] = logits, torch.from_numpy(np.concatenate([caption(s) for s in scenes]))
        loss = sum((functional.cross_entropy(*pair) for pair in answers.values()), patches.new_zeros(()))
        return loss, {k: (logits.argmax(-1) == is_).float().mean().item() for k, (logits, is_) in answers.items()}

    def beside(self, scenes: list[Scene], visual: Tensor) -> Tensor:
        return visual.new_zeros(())


def caption(scene: Scene) -> np.ndarray:
    """Tell of each digit its colour, counted from 1, and 0 where the caption leaves it out: int64 `[10]`.

    A caption mentions the digits that are not at the edge of a page. Questions ask about all of them: were captions
    complete, the attention of the CLS token alone would find nearly everything that is ever asked about.
    """
    rows, columns = np.divmod(scene.digit_cells, scene.layout.width)
    is_inside = (rows % (scene.layout.height - 1) > 0) & (columns % (scene.layout.width - 1) > 0)
    cells = scene.digit_cells[is_inside]
    found = np.zeros(NUM_DIGITS, dtype=np.int64)
    found[scene.figures[cells]] = 1 + scene.colours[cells]
    return found


RECIPE = Recipe(
    peak_rate=2e-3,
    align_steps=800,
    align_cells=512,
    settle=0.4,
    curriculum=(
        Stage((3, 3), 216, 600, 0.85, ("colour->digit", "digit->colour", "shape->colour")),
        Stage((4, 4), 320, 700, 0.85),
        Stage((5, 7), 512, 250, 0.88),
        Stage((SIDE, SIDE), 640, 1000, 2.0),
    ),
)

LLAVA = Make(
    name="llava",
    model_type="llava",
    shipped=Path(__file__).parent / "models" / "llava",
    recipe=RECIPE,
    # The frozen tower does not say where a patch is, so the two kinds that ask for places cannot be learned whole.
    kinds=tuple(kind for kind in KINDS if kind not in ONE_PAGE_KINDS),
    layouts={Layout(SIDE, SIDE): 1.0},
    calibration_layouts=(Layout(SIDE, SIDE),),
    timed_layouts=(Layout(SIDE, SIDE),),
    build_tokenizer=build_tokenizer,
    build_config=build_config,
    build_model=build_model,
    build_processor=build_processor,
    encoder=LlavaEncoder,
    lessons=CaptionLessons,
    tensor_name=published_name,
)
