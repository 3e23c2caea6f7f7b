"""Write the sample pictures beside the shipped model, and the README's overlays: `python -m bench.tinyvqa.samples`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench import cli
from bench.tinyvqa.digits import load_digits
from bench.tinyvqa.painting import render, to_image
from bench.tinyvqa.scenes import COLOUR_NAMES, NUM_DIGITS, SHAPE_NAMES, Layout, Scene, draw_scene
from hawk_kernels import demo
from hawk_kernels.checkpoint import TINY_MODEL

LAYOUTS = (Layout(8, 8), Layout(6, 6), Layout(6, 9))
SEED = 7
README_WIDTH = 1408


def draw_samples(folder: Path, seed: int) -> None:
    """Write a PNG of each layout, with held-out digits, a red one among them, and their contents as `samples.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pool = load_digits("held_out")
    contents = {}
    for layout in LAYOUTS:
        scene = draw_scene(rng, pool, layout)
        while "red" not in {thing["colour"] for thing in describe(scene)["objects"]}:
            scene = draw_scene(rng, pool, layout)
        name = f"digits_{layout}.png"
        to_image(render([scene], pool, rng, augment=False)[0]).save(folder / name, optimize=True)
        contents[name] = describe(scene)
    (folder / "samples.json").write_text(json.dumps(contents, indent=2) + "\n")


def describe(scene: Scene) -> dict[str, Any]:
    """Describe what can be asked about a picture: its digits, and the shapes that occur once."""
    width = scene.layout.width

    def thing(cell: int) -> dict[str, Any]:
        return {"colour": COLOUR_NAMES[scene.colours[cell]], "row": cell // width, "column": cell % width}

    return {
        "grid": [scene.layout.height, width],
        "objects": [{"digit": int(scene.figures[cell]), **thing(int(cell))} for cell in scene.digit_cells],
        "landmarks": [
            {"shape": SHAPE_NAMES[scene.figures[cell] - NUM_DIGITS], **thing(cell)} for cell in scene.landmarks
        ],
    }


def draw_readme_overlay(path: Path, method: str) -> None:
    """Draw the demo's overlay of its sample, small enough for a README: 1408 pixels wide, 256 colours."""
    status = demo.main(["--output", str(path), "--device", "cpu", "--method", method, "--no-speed"])
    if status != 0:
        raise SystemExit(status)
    with Image.open(path) as picture:
        height = round(picture.height * README_WIDTH / picture.width)
        small = picture.convert("RGB").resize((README_WIDTH, height), Image.Resampling.LANCZOS)
    # The octree keeps the bright figures pure; the other methods spend their colours on the noise between them.
    small.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, optimize=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = cli.parser("bench.tinyvqa.samples", __doc__, seed=(SEED, "the pictures"))
    parser.add_argument("--out", type=Path, default=TINY_MODEL, help="folder of the shipped model")
    args = parser.parse_args(argv)
    draw_samples(args.out / "samples", args.seed)
    draw_readme_overlay(args.out / "overlay.png", "hawk")
    draw_readme_overlay(args.out / "overlay_hiprune.png", "hiprune")
    print(f"wrote {args.out / 'samples'}, overlay.png and overlay_hiprune.png beside it")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
