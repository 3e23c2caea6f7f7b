"""Holds a prompt as `prune` left it, for drawing."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hawk_kernels.hf.anatomy import Anatomy
from hawk_kernels.hf.prompt import Prompt
from hawk_kernels.hf.sources import Encoded
from hawk_kernels.hf.stats import PruningStats
from hawk_kernels.methods import Method
from hawk_kernels.pictures.given import pictures_of
from hawk_kernels.pictures.overlay import RowValues, draw_row
from hawk_kernels.pictures.regions import Regions, regions_of_row

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class PrunedPrompt:
    """What is known of a batch of prompts after its prefill. Tensors stay where they are until something is drawn.

    Attributes:
        anatomy: the model's parts.
        prompt: the batch on the host.
        encoded: what the vision encoder was told and returned, by kind.
        keep_mask: bool `[B, T]`, the tokens that stayed.
        scores: float32 `[B, T]`, not finite where nothing was scored.
        stats: the numbers, row by row.
        method: what chose.
    """

    anatomy: Anatomy
    prompt: Prompt
    encoded: dict[str, Encoded]
    keep_mask: torch.Tensor
    scores: torch.Tensor
    stats: PruningStats
    method: Method

    def checked_row(self, row: int) -> int:
        """Return a row of the batch, or raise if there is none.

        Raises:
            TypeError, ValueError: there is no such row.
        """
        batch = len(self.prompt.ids)
        if isinstance(row, bool) or not isinstance(row, numbers.Integral):
            raise TypeError(f"row: expected an int, got {type(row).__name__}; the first row of a batch is 0")
        if not 0 <= row < batch:
            raise ValueError(
                f"row: expected 0 to {batch - 1}, the rows that the model saw, got {row}; generate repeats a sample "
                "for its beams and return sequences"
            )
        return int(row)

    def values(self, row: int) -> RowValues:
        """Return what happened to the tokens of a row, on the host."""
        length = self.prompt.ids.shape[1]
        kept = self.keep_mask[row].cpu().numpy()
        scores = self.scores[row].float().cpu().numpy()
        missing = length - len(kept)
        if missing:
            # guesses of assisted decoding follow the prompt
            kept, scores = np.pad(kept, (0, missing)), np.pad(scores, (0, missing), constant_values=-np.inf)
        return RowValues(kept, scores)

    def regions(self, image: Any, row: int, processor: Any) -> list[Regions]:
        """Find where a row's visual tokens stand on the caller's pictures, or on none where `image` is None."""
        given = None if image is None else pictures_of(image)
        return regions_of_row(self.anatomy, self.prompt, self.encoded, row, given, processor)


def overlay(
    pruned: PrunedPrompt | None, image: Any, *, row: int = 0, processor: Any = None, title: str | None = None
) -> Image.Image:
    """Draw the pictures of a row: as they are, with the scores as heat, and with the dropped tokens dimmed.

    Args:
        pruned: the last prefill.
        image: what the processor got for the row: a PIL image; a list of them in the order of the prompt; a video as a
            list of frames or an array `[frames, height, width, 3]`; a list with videos in it.
        row: of the batch, as the model saw it.
        processor: the one that made the inputs; tells how it cuts pictures where that is a setting of its own.
        title: a line above, say the question.

    Raises:
        ValueError: nothing was pruned yet, another number of pictures, or a picture that cannot be the encoded one.
        TypeError: `image` is no picture.
    """
    known = read(pruned)
    row = known.checked_row(row)
    return draw_row(known.regions(image, row, processor), known.values(row), title=title)


def read(pruned: PrunedPrompt | None) -> PrunedPrompt:
    """Return the last prefill.

    Raises:
        ValueError: there was none, or none with visual tokens.
        ImportError: Pillow is missing.
    """
    try:
        import_module("PIL")
    except ImportError as error:
        raise ImportError("drawing a prompt needs pillow, which is not installed: pip install pillow") from error
    if pruned is None:
        raise ValueError(
            "cannot draw a prompt before one with images was pruned; call model.generate(**inputs) or model(**inputs) "
            "inside the block first, with the pixels"
        )
    return pruned
