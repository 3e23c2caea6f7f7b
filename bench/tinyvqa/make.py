"""What tells the miniatures apart: a `Make` is a family of models, its parts, and how it is trained and asked."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.tinyvqa.digits import DigitPool
from bench.tinyvqa.encoder import Encoder
from bench.tinyvqa.recipe import Recipe
from bench.tinyvqa.scenes import Layout, Scene

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Lessons(nn.Module, ABC):
    """What the vision tower learns before there are questions; parameters of its own are thrown away afterwards.

    Args:
        encoder: of the model.
        cells: about how many cells a step has.
    """

    def __init__(self, encoder: Encoder, cells: int) -> None:
        super().__init__()
        self.encoder, self.cells = encoder, cells

    @abstractmethod
    def first(self, rng: np.random.Generator, pool: DigitPool) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of a step that trains the tower alone, and what the progress bar shows."""

    @abstractmethod
    def beside(self, scenes: list[Scene], visual: Tensor) -> Tensor:
        """Return what is added to the loss of the questions, given the visual tokens `[B, cells, hidden]`."""


@dataclass
class Make:
    """A family that a miniature is built of.

    Attributes:
        name: on command lines and in reports.
        model_type: `config.model_type` of its checkpoints.
        shipped: folder of the model that is shipped.
        recipe: how it is trained.
        kinds: the kinds of question that the shipped model answers, which evaluations, calibration and table ask.
        layouts: what is asked about in an evaluation, and the share of prompts of each layout.
        calibration_layouts: what head weights are calibrated on.
        timed_layouts: what the table times.
        build_tokenizer: makes the tokenizer.
        build_config: makes the configuration.
        build_model: makes a fresh model from the configuration and a seed.
        build_processor: makes what turns pictures, and perhaps text, into inputs; it is saved beside the model.
        encoder: turns batches into tensors for a model and a tokenizer.
        lessons: what the tower learns first.
        tensor_name: names a stored tensor as published checkpoints of the family do, from the name that transformers
            gives it; None where these are the same.
    """

    name: str
    model_type: str
    shipped: Path
    recipe: Recipe
    kinds: tuple[str, ...]
    layouts: dict[Layout, float]
    calibration_layouts: tuple[Layout, ...]
    timed_layouts: tuple[Layout, ...]
    build_tokenizer: Callable[[], PreTrainedTokenizerFast]
    build_config: Callable[[PreTrainedTokenizerFast], Any]
    build_model: Callable[[Any, int], Any]
    build_processor: Callable[[PreTrainedTokenizerFast], Any]
    encoder: Callable[[Any, PreTrainedTokenizerFast], Encoder]
    lessons: Callable[[Any, int], Lessons]
    tensor_name: Callable[[str], str] | None = None

    @staticmethod
    def load_model(path: str | Path) -> Any:
        """Load the model of a checkpoint, in float32 whatever it is stored in."""
        from transformers import AutoModelForImageTextToText

        auto: Any = AutoModelForImageTextToText
        return auto.from_pretrained(path, dtype=torch.float32).eval()

    def save(
        self, model: Any, tokenizer: PreTrainedTokenizerFast, out: Path, dtype: torch.dtype = torch.float32
    ) -> None:
        """Write everything `from_pretrained` wants into `out`, the parameters rounded to `dtype`."""
        out.mkdir(parents=True, exist_ok=True)
        copy.deepcopy(model).to(dtype).save_pretrained(out)
        if self.tensor_name is not None:
            path = out / "model.safetensors"
            weights = load_file(path)
            save_file({self.tensor_name(name): tensor for name, tensor in weights.items()}, path, {"format": "pt"})
        tokenizer.save_pretrained(out)
        self.build_processor(tokenizer).save_pretrained(out)
