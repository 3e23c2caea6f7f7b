"""Write the sample pictures beside the shipped model, and the README's overlay: `python -m bench.tinyvqa.samples`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from bench.tinyvqa.data import COLOUR_NAMES, Scene, draw_scene, load_digits, objects_for, render, to_image
from hawk_kernels import demo

SIZES = ((8, 8), (4, 4), (6, 9))
README_WIDTH = 1408


def draw_samples(folder: Path, seed: int) -> None:
    """One PNG a grid size, of held-out digits with a red one among them, and `samples.json` with what they show."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pool = load_digits("held_out")
    contents = {}
    for size in SIZES:
        scene = draw_scene(rng, pool, *size, objects_for(*size))
        while "red" not in _colours(scene):
            scene = draw_scene(rng, pool, *size, objects_for(*size))
        name = f"digits_{size[0]}x{size[1]}.png"
        to_image(render([scene], pool, rng, augment=False)[0]).save(folder / name, optimize=True)
        contents[name] = {
            "grid": list(size),
            "objects": [
                {"digit": digit, "colour": colour, "row": cell // size[1], "column": cell % size[1]}
                for digit, colour, cell in zip(scene.digits, _colours(scene), scene.cells, strict=True)
            ],
        }
    (folder / "samples.json").write_text(json.dumps(contents, indent=2) + "\n")


def draw_readme_overlay(path: Path, method: str) -> None:
    """What the demo draws of its sample, made small enough for a README: 1408 pixels wide, 256 colours."""
    status = demo.main(["--output", str(path), "--device", "cpu", "--method", method])
    if status != 0:
        raise SystemExit(status)
    with Image.open(path) as picture:
        height = round(picture.height * README_WIDTH / picture.width)
        small = picture.convert("RGB").resize((README_WIDTH, height), Image.Resampling.LANCZOS)
    # The octree keeps the bright digits pure; the other methods spend their colours on the noise between them.
    small.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, optimize=True)


def _colours(scene: Scene) -> list[str]:
    return [COLOUR_NAMES[c] for c in scene.colours]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.tinyvqa.samples", description=__doc__)
    parser.add_argument("--out", type=Path, default=demo.TINY_MODEL, help="folder of the shipped model")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args(argv)
    draw_samples(args.out / "samples", args.seed)
    draw_readme_overlay(args.out / "overlay.png", "hawk")
    draw_readme_overlay(args.out / "overlay_hiprune.png", "hiprune")
    print(f"wrote {args.out / 'samples'}, overlay.png and overlay_hiprune.png beside it")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
