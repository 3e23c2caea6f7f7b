"""The miniatures by name, and which of them a checkpoint is."""

from __future__ import annotations

import json
from pathlib import Path

from bench.tinyvqa.llava import LLAVA
from bench.tinyvqa.make import Make
from bench.tinyvqa.qwen import QWEN

MAKES: dict[str, Make] = {make.name: make for make in (QWEN, LLAVA)}


def make_of(path: str | Path) -> Make:
    """Tell of which make a checkpoint's folder is, by its configuration.

    Raises:
        ValueError: of none.
    """
    model_type = json.loads((Path(path) / "config.json").read_text())["model_type"]
    for make in MAKES.values():
        if make.model_type == model_type:
            return make
    known = ", ".join(make.model_type for make in MAKES.values())
    raise ValueError(f"model: expected a checkpoint of one of {known}, got {model_type} in {path}.")
