"""Pictures of coloured digits on a grid, and questions about them with one right answer.

A cell is 28 x 28 pixels, which is exactly one visual token of Qwen2.5-VL (patch 14, merge 2), so what a pruning
method keeps can be checked cell by cell. Within a picture no colour and no digit occurs twice: both kinds of
question then have one answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

CELL = 28
HELD_OUT_EVERY = 5

# Bright enough to be told apart from each other, and from the dark background, by a person as well.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 45, 45),
    "green": (45, 185, 65),
    "blue": (60, 100, 250),
    "yellow": (245, 220, 50),
    "purple": (150, 60, 205),
    "orange": (250, 145, 30),
    "cyan": (60, 220, 235),
    "white": (240, 240, 240),
}
COLOUR_NAMES = tuple(COLOURS)
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class DigitPool:
    """Glyphs `[N, 8, 8]` in 0..1, their labels `[N]`, and the positions `[N]` they have in scikit-learn's set."""

    glyphs: torch.Tensor
    labels: np.ndarray
    source_index: np.ndarray

    def of_label(self, label: int) -> np.ndarray:
        """Positions in this pool of the instances of one digit."""
        return np.flatnonzero(self.labels == label)


@lru_cache(maxsize=2)
def load_digits(split: str) -> DigitPool:
    """The digits of one split: `"train"`, or `"held_out"` (every fifth instance, never trained on)."""
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    index = np.arange(len(bunch.target))
    is_held_out = index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out', got {split!r}.")
    chosen = index[is_held_out if split == "held_out" else ~is_held_out]
    glyphs = torch.from_numpy((bunch.images[chosen] / 16.0).astype(np.float32))
    return DigitPool(glyphs, bunch.target[chosen].astype(np.int64), chosen)


@dataclass(frozen=True)
class Scene:
    """What stands on one picture: `digits[i]` in `colours[i]` at the cell `(cells[i] // width, cells[i] % width)`."""

    height: int
    width: int
    cells: tuple[int, ...]
    digits: tuple[int, ...]
    colours: tuple[int, ...]
    instances: tuple[int, ...]


def draw_scene(rng: np.random.Generator, pool: DigitPool, height: int, width: int, objects: int) -> Scene:
    """A random scene of `objects` digits on `height x width` cells, all digits and all colours different."""
    limit = min(len(COLOURS), 10, height * width)
    if not 1 <= objects <= limit:
        raise ValueError(f"a {height} x {width} grid takes 1 to {limit} different digits, got {objects}.")
    digits = rng.permutation(10)[:objects]
    return Scene(
        height=height,
        width=width,
        cells=tuple(int(c) for c in rng.permutation(height * width)[:objects]),
        digits=tuple(int(d) for d in digits),
        colours=tuple(int(c) for c in rng.permutation(len(COLOURS))[:objects]),
        instances=tuple(int(rng.choice(pool.of_label(d))) for d in digits),
    )


@dataclass(frozen=True)
class Question:
    """A sentence about one object of a scene, with the single word that answers it."""

    kind: str
    text: str
    answer: str
    target: int


DIGIT_OF_COLOUR = (
    "Which digit is {colour}?",
    "What digit is {colour}?",
    "Which number is {colour}?",
    "What number is {colour}?",
    "What is the {colour} digit?",
    "What is the {colour} number?",
    "Which is the {colour} digit?",
    "Which digit is painted in {colour}?",
    "Which digit do you see in {colour}?",
)
COLOUR_OF_DIGIT = (
    "What colour is the {digit}?",
    "What color is the {digit}?",
    "Which colour is the {digit}?",
    "Which color is the {digit}?",
    "Which colour does the {digit} have?",
    "What is the colour of the {digit}?",
    "What is the color of the {digit}?",
    "In which colour is the {digit} painted?",
    "What colour is the digit {digit}?",
)


def _ask_digit(rng: np.random.Generator, scene: Scene, target: int) -> Question:
    template = DIGIT_OF_COLOUR[rng.integers(len(DIGIT_OF_COLOUR))]
    colour = COLOUR_NAMES[scene.colours[target]]
    return Question("colour->digit", template.format(colour=colour), str(scene.digits[target]), target)


def _ask_colour(rng: np.random.Generator, scene: Scene, target: int) -> Question:
    template = COLOUR_OF_DIGIT[rng.integers(len(COLOUR_OF_DIGIT))]
    digit = scene.digits[target]
    # Written-out digits are rarer in questions, but a person may well type one.
    word = DIGIT_NAMES[digit] if rng.random() < 0.2 else str(digit)
    return Question("digit->colour", template.format(digit=word), COLOUR_NAMES[scene.colours[target]], target)


KINDS: dict[str, Callable[[np.random.Generator, Scene, int], Question]] = {
    "colour->digit": _ask_digit,
    "digit->colour": _ask_colour,
}


def ask(rng: np.random.Generator, scene: Scene, kind: str) -> Question:
    """A question of one of `KINDS` about a random object of the scene."""
    return KINDS[kind](rng, scene, int(rng.integers(len(scene.digits))))


def render(scenes: Sequence[Scene], pool: DigitPool, rng: np.random.Generator, *, augment: bool = True) -> torch.Tensor:
    """Paint scenes of one common grid size: uint8 `[B, 3, height * 28, width * 28]`.

    Every digit is placed in its cell with a random size, shift and tilt and a slightly varying colour, on a dark
    noisy background whose brightness varies from picture to picture. `augment=False` paints all of them alike, which is
    tidier on a sample picture.
    """
    height, width = scenes[0].height, scenes[0].width
    if any((s.height, s.width) != (height, width) for s in scenes):
        raise ValueError("scenes rendered together must have the same grid.")
    spread = 1.0 if augment else 0.0
    owner = np.repeat(np.arange(len(scenes)), [len(s.digits) for s in scenes])
    cells = np.concatenate([s.cells for s in scenes])
    instances = np.concatenate([s.instances for s in scenes])
    palette = np.array(list(COLOURS.values()), dtype=np.float32)
    paint = palette[np.concatenate([s.colours for s in scenes])]
    paint = np.clip(paint + spread * rng.normal(0.0, 8.0, paint.shape), 0, 255).astype(np.float32)

    count = len(cells)
    size = 0.88 + spread * rng.uniform(-0.12, 0.08, count)
    tilt = spread * rng.uniform(-0.17, 0.17, count)
    shift = spread * rng.uniform(-0.10, 0.10, (count, 2))
    cos, sin = np.cos(tilt) / size, np.sin(tilt) / size
    theta = np.stack([np.stack([cos, -sin, shift[:, 0]], 1), np.stack([sin, cos, shift[:, 1]], 1)], 1)
    glyphs = pool.glyphs[torch.from_numpy(instances)][:, None]
    # Two steps, because sampling 8 x 8 pixels bilinearly at 28 x 28 leaves facets that no pen would draw.
    smooth = torch.nn.functional.interpolate(glyphs, size=(CELL, CELL), mode="bicubic", align_corners=False)
    flow = torch.nn.functional.affine_grid(
        torch.from_numpy(theta.astype(np.float32)), [count, 1, CELL, CELL], align_corners=False
    )
    alpha = torch.nn.functional.grid_sample(smooth, flow, align_corners=False).clamp_(0, 1)

    base = 22.0 + spread * rng.uniform(-12.0, 22.0, (len(scenes), 1)) + spread * rng.normal(0.0, 3.0, (len(scenes), 3))
    noise_seed = int(rng.integers(2**62))
    noise = torch.randn(
        (len(scenes), 1, height * CELL, width * CELL), generator=torch.Generator().manual_seed(noise_seed)
    )
    canvas = torch.from_numpy(base.astype(np.float32))[:, :, None, None] + (4.0 if augment else 2.0) * noise
    tiles = canvas.view(len(scenes), 3, height, CELL, width, CELL)
    where = (
        torch.from_numpy(owner),
        slice(None),
        torch.from_numpy(cells // width),
        slice(None),
        torch.from_numpy(cells % width),
    )
    # Indices divided by slices put the indexed axis first: [objects, 3, 28, 28].
    under = tiles[where]
    tiles[where] = under + alpha * (torch.from_numpy(paint)[:, :, None, None] - under)
    return canvas.round_().clamp_(0, 255).to(torch.uint8)


def to_image(picture: torch.Tensor) -> Image.Image:
    """A rendered picture, uint8 `[3, H, W]`, as a PIL image."""
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


@dataclass(frozen=True)
class Batch:
    """Pictures of one grid size (uint8 `[B, 3, H, W]`), their scenes, and the questions on each."""

    pictures: torch.Tensor
    scenes: list[Scene]
    questions: list[list[Question]]


def draw_batch(
    rng: np.random.Generator,
    split: str,
    batch: int,
    grid: tuple[int, int],
    objects: int,
    questions_per_kind: int = 4,
    kinds: Sequence[str] = tuple(KINDS),
) -> Batch:
    """`batch` pictures of `grid = (height, width)` cells with `questions_per_kind` questions of each kind on each."""
    pool = load_digits(split)
    scenes = [draw_scene(rng, pool, *grid, objects) for _ in range(batch)]
    questions = [[ask(rng, scene, kind) for kind in kinds for _ in range(questions_per_kind)] for scene in scenes]
    return Batch(render(scenes, pool, rng), scenes, questions)


def objects_for(height: int, width: int) -> int:
    """How many digits a grid of this size shows: six on 8 x 8, never more than half of a small one."""
    return max(1, min(6, height * width // 2, math.ceil(height * width / 8)))


def vocabulary() -> list[str]:
    """Every word of the questions, answers and chat frame, in a fixed order."""
    text = [t.replace("{colour}", "").replace("{digit}", "") for t in DIGIT_OF_COLOUR + COLOUR_OF_DIGIT]
    words = {w for line in text for w in line.lower().replace("?", " ").split()}
    frame = {"system", "user", "assistant", "you", "are", "a", "helpful"}
    return [".", ",", "?", "!", *map(str, range(10)), *COLOUR_NAMES, *DIGIT_NAMES, *sorted(words | frame)]
