"""Measure how near visual tokens are to the words for what they show: `python -m bench.tinyvqa.alignment`.

A method that compares visual tokens with word embeddings finds the named ones by itself where the two are aligned. For
every cell of held-out pages this takes the cosine between its visual token and the input embeddings of the words that
name its figure and its colour, and of those that name other figures and colours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from bench import cli
from bench.tinyvqa.batches import draw_batch
from bench.tinyvqa.makes import MAKES, make_of
from bench.tinyvqa.scenes import Layout
from hawk_kernels.checkpoint import load_processor

LAYOUT = Layout(8, 8)
PAGES = 50
SEED = 11
_PERCENTILES = (5, 50, 95)


@torch.no_grad()
def measure(path: Path, pages: int = PAGES, seed: int = SEED) -> dict[str, Any]:
    """Return the cosines of a checkpoint, for figures and for colours.

    Each has the 5th, 50th and 95th percentile of the cosine with the word that names the cell (`named`) and with the
    others of its kind (`others`), and the share of cells whose nearest word is the right one (`nearest_is_right`)
    beside that of a guess (`chance`).
    """
    make = make_of(path)
    model = make.load_model(path)
    encoder = make.encoder(model, load_processor(str(path)).tokenizer)
    batch = draw_batch(np.random.default_rng(seed), "held_out", pages, LAYOUT, 0)
    visual = functional.normalize(encoder.see(batch.pages, LAYOUT).flatten(0, 1), dim=-1)
    table = functional.normalize(model.get_input_embeddings().weight, dim=-1)
    found: dict[str, Any] = {"make": make.name, "cells": len(visual)}
    for name, words in (("figures", encoder.figure_words), ("colours", encoder.colour_words)):
        names = torch.from_numpy(np.concatenate([getattr(scene, name) for scene in batch.scenes]))
        cosines = visual @ table[words].T
        is_named = functional.one_hot(names, len(words)).bool()
        found[name] = {
            "named": _percentiles(cosines[is_named]),
            "others": _percentiles(cosines[~is_named]),
            "nearest_is_right": round((cosines.argmax(-1) == names).float().mean().item(), 4),
            "chance": round(1 / len(words), 4),
        }
    return found


def _percentiles(cosines: torch.Tensor) -> list[float]:
    return [round(float(value), 3) for value in np.percentile(cosines.numpy(), _PERCENTILES)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = cli.parser("bench.tinyvqa.alignment", __doc__, seed=(SEED, "the pages"), threads=1)
    parser.add_argument(
        "--models",
        type=cli.checkpoint_folder,
        nargs="+",
        default=[make.shipped for make in MAKES.values()],
        help="folders of checkpoints (default: the shipped ones)",
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(json.dumps([measure(path, seed=args.seed) for path in args.models], indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
