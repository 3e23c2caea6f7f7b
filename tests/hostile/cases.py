"""Cases: what is read, by which model, in which mode, and how it is pruned. Each fits on one line of JSON."""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch

from hawk_kernels.hf.families import ENCODERS
from hawk_kernels.methods import METHODS, Method, resolve_method
from tests.family_checks import SUPPORTED
from tests.tiny_families import BY_NAME, batch
from tests.tiny_models import BEGIN, END_OF_TURN, IMAGE, VIDEO, VISION_END, VISION_START, Picture, words

PADDINGS = ("left", "right", "none")
HIDDEN = ("", "text", "visual")
MASKS = ("int64", "bool", "float32")
QUERIES = ("", "mask", "callable")
MODES = (
    "forward",
    "forward without a cache",
    "gradient",
    "labels",
    "autocast",
    "greedy",
    "beams",
    "sampling",
    "return sequences",
    "static cache",
    "use_cache=False",
    "prompt lookup",
    "assisted",
    "second turn",
    "chat",
    "threads",
)
GENERATING = MODES[MODES.index("greedy") :]
ONE_ROW = ("prompt lookup", "assisted")
"""Modes in which upstream generates for one row at a time."""
NEEDS_HIDING = ("gradient", "second turn", "chat", "threads")
"""Modes whose oracle hides tokens by a mask."""

OPTIONS: dict[str, tuple[Any, ...]] = {
    "normalize": ("auto", None, "l2", "softmax", "minmax"),
    "reduce": ("mean", "max"),
    "rounding": ("floor", "ceil"),
    "keep": ("longest", "shortest"),
    "pivots": (1, 4, 50),
    "text_pivots": (0, 4),
    "seed": (0, 7),
    "negate": (False, True),
    "theta": (None, 0.0, 0.5),
    "scale_over": ("budget", "prompt"),
    "alpha": (0.1, 0.5),
    "object_layer": (None, 1),
    "cls_layer": (None, 1),
    "crops": (1, 4, 16),
    "scale": ("crop", "image"),
    "neighbours": (1, 32),
    "plus": (False, True),
    "merging": ("paper", "release"),
    "contextual": (0.0, 5 / 32, 0.5),
    "important": (0.0, 0.5),
    "step": (1, 8),
    "layer": (1, 2),
    "second": (0.5, 1.0),
    "local": (0.0, 0.5, 0.9),
    "window": (None, 1, 2),
    "allocation": ("paper", "release"),
    "local_layer": (None, 1),
}
"""Values of the options of methods, by name; a method gets those that it has."""


@dataclass(frozen=True)
class Case:
    """One call, or a few that belong together, with pruning and without.

    Attributes:
        family: whose tiny model reads.
        rows: prompts, each as words: "b" begins, "w5" is five words of text, "i3x4" an image, "v2x3x6" a video of six
            frames, "e" the end of a turn.
        mode: one of `MODES`.
        method: name of a method.
        keep: what stays of the visual tokens.
        stages: `[layer, method, keep]` of stages inside the stack, in place of `method` and `keep`.
        options: of the method.
        budget: "shared" or "per_image".
        padding: the side of the padding; "none" leaves the mask out where no row has padding.
        separators: whether something stands between two images that follow each other.
        hidden: what the caller's mask hides besides padding: nothing, a few "text" tokens or a few "visual" ones.
        mask: dtype of the caller's mask.
        query: how the caller marks the text that ranks: not at all, by a "mask" or by a "callable".
        attention: implementation of attention; "" is the usual one.
        seed: of pixels, weights of the assistant, and sampling.
    """

    family: str
    rows: tuple[str, ...] = ("b w3 i3x3 w5 e w2",)
    mode: str = "forward"
    method: str = "downsample"
    keep: float | int = 0.3
    stages: tuple[tuple[int, str, float | int], ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    budget: str = "shared"
    padding: str = "left"
    separators: bool = True
    hidden: str = ""
    mask: str = "int64"
    query: str = ""
    attention: str = ""
    seed: int = 0

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods that choose."""
        return tuple(method for _, method, _ in self.stages) or (self.method,)

    def to_line(self) -> str:
        """What `--replay` takes: the values that are not the usual ones."""
        usual = Case(self.family)
        changed = {key: value for key, value in asdict(self).items() if value != getattr(usual, key)}
        return json.dumps({"family": self.family, **changed}, separators=(",", ":"))


def from_line(line: str) -> Case:
    """Read what `Case.to_line` wrote.

    Raises:
        ValueError: not JSON, or not the values of a case.
    """
    values = json.loads(line)
    names = {each.name for each in fields(Case)}
    if not isinstance(values, dict) or "family" not in values or not values.keys() <= names:
        raise ValueError(f"--replay: expected an object with the keys {', '.join(sorted(names))}, got {line!r}")
    for name in ("rows", "stages"):
        values[name] = tuple(tuple(v) if isinstance(v, list) else v for v in values.get(name, getattr(Case, name)))
    return Case(**values)


def pictures_of(case: Case) -> list[list[Picture]]:
    """The pictures of each row, in the sizes that the family takes."""
    return [[item for item in row if isinstance(item, Picture)] for row in _items(case)]


def inputs_of(case: Case) -> dict[str, torch.Tensor]:
    """The arguments of the model for the prompts of a case, without what the caller's mask hides."""
    inputs = batch(case.family, *_items(case), seed=case.seed)
    if case.separators and case.padding != "right":
        return inputs
    stays = inputs["attention_mask"].bool()
    if not case.separators:
        stays &= ~torch.isin(inputs["input_ids"], torch.tensor([VISION_START, VISION_END]))
    inputs = _padded_on_the_right(inputs, [row.nonzero().flatten().tolist() for row in stays])
    return inputs if case.padding == "right" else _padded_on_the_left(inputs)


def hidden_tokens(case: Case, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tokens that the caller's mask hides besides padding, bool `[B, T]`: the second and third of their kind."""
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    visual = (ids == IMAGE) | (ids == VIDEO)
    if not case.hidden:
        return torch.zeros_like(valid)
    of_kind = visual if case.hidden == "visual" else valid & ~visual & (ids >= 10)
    number = of_kind.cumsum(1)
    enough = of_kind.sum(1, keepdim=True) > 4
    return of_kind & (number > 1) & (number <= 3) & enough


def random_cases(seed: int, families: list[str], methods: list[str], modes: list[str], burst: int) -> Iterator[Case]:
    """Cases without end, `burst` of them for the model of a family before that of another.

    Raises:
        ValueError: none of the families has an oracle for any of the modes.
    """
    able = [family for family in families if modes_of(family, modes)]
    if not able:
        raise ValueError(
            f"modes: expected one that the oracle of {', '.join(families)} can judge, got {', '.join(modes)}; name "
            "other modes or families"
        )
    families, number = able, 0
    while True:
        rng = random.Random(f"{seed} {number}")
        family = rng.choice(families)
        attention = "eager" if rng.random() < 0.25 else ""
        for _ in range(burst):
            yield _random_case(rng, family, attention, methods, modes)
        number += 1


def simpler(case: Case) -> Iterator[Case]:
    """Cases with one thing less."""
    usual = Case(case.family)
    if case.method != usual.method:
        yield replace(case, method=usual.method, options={})
    for each in fields(Case):
        if each.name not in ("family", "rows", "method", "options") and getattr(case, each.name) != getattr(
            usual, each.name
        ):
            yield replace(case, **{each.name: getattr(usual, each.name)})
    for name in case.options:
        yield replace(case, options={key: value for key, value in case.options.items() if key != name})
    for number in range(len(case.stages) if len(case.stages) > 1 else 0):
        yield replace(case, stages=case.stages[:number] + case.stages[number + 1 :])
    for number, row in enumerate(case.rows):
        if len(case.rows) > 1:
            yield replace(case, rows=case.rows[:number] + case.rows[number + 1 :])
        items = row.split()
        for place in range(len(items)):
            shorter = " ".join(items[:place] + items[place + 1 :])
            if shorter:
                yield replace(case, rows=(*case.rows[:number], shorter, *case.rows[number + 1 :]))


def _items(case: Case) -> list[list[int | Picture]]:
    family, rows = BY_NAME[case.family], []
    for number, row in enumerate(case.rows):
        items: list[int | Picture] = []
        for place, item in enumerate(row.split()):
            kind, size = item[0], [int(n) for n in item[1:].split("x") if n]
            if kind == "w":
                items += words(size[0], 100 * number + place)
            elif kind == "i":
                items.append(family.picture or Picture(*size))
            elif kind == "v":
                items.append(Picture(*size))
            else:
                items.append({"b": BEGIN, "e": END_OF_TURN}[kind])
        rows.append(items)
    return rows


def _padded_on_the_right(inputs: dict[str, torch.Tensor], places: list[list[int]]) -> dict[str, torch.Tensor]:
    """Every row shortened to these places, with the padding on the right."""
    shape, width = inputs["input_ids"].shape, max(map(len, places))
    found = dict(inputs)
    for name in ("input_ids", "attention_mask", *inputs):
        value = inputs[name]
        if value.shape == shape:
            found[name] = value.new_zeros(len(places), width)
            for row, of_row in enumerate(places):
                found[name][row, : len(of_row)] = value[row, of_row]
    return found


def _padded_on_the_left(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows with padding on the right, moved so that it stands on the left."""
    counts, shape = inputs["attention_mask"].sum(1).tolist(), inputs["input_ids"].shape
    return {
        name: torch.stack([value.roll(shape[1] - count) for value, count in zip(tensor, counts, strict=True)])
        if tensor.shape == shape
        else tensor
        for name, tensor in inputs.items()
    }


def modes_of(family: str, modes: list[str]) -> list[str]:
    """List those modes that the family has and that its oracle can judge."""
    lacks = {"beams": ("beams",), "return sequences": ("beams",), "sampling": ()}
    able = [mode for mode in modes if not {mode, *lacks.get(mode, ())} & set(SUPPORTED[family].without)]
    return able if BY_NAME[family].hides else [mode for mode in able if mode not in NEEDS_HIDING]


def _random_case(rng: random.Random, family: str, attention: str, methods: list[str], modes: list[str]) -> Case:
    hides = BY_NAME[family].hides
    mode = rng.choice(modes_of(family, modes))
    batch_size = (
        1 if mode in ONE_ROW or not (hides or mode in ("forward", "labels", "greedy")) else rng.choice((1, 1, 2, 3))
    )
    method, options, keep, stages = _random_pruning(rng, family, methods)
    padding = rng.choice(PADDINGS if mode not in GENERATING else ("left", "left", "none"))
    return Case(
        family=family,
        rows=_random_rows(rng, family, batch_size),
        mode=mode,
        method=method,
        keep=keep,
        stages=stages,
        options=options,
        budget=rng.choice(("shared", "per_image")),
        padding=padding if not stages or hides else "left",
        # where token types count images, those side by side are one
        separators=rng.random() < (0.97 if BY_NAME[family].token_types else 0.8),
        hidden=rng.choice(HIDDEN) if hides and padding != "none" and rng.random() < 0.4 else "",
        mask=rng.choice(MASKS) if mode not in GENERATING and rng.random() < 0.3 else "int64",
        query=rng.choice(QUERIES) if rng.random() < 0.3 else "",
        attention=attention,
        seed=rng.randrange(100),
    )


def _random_rows(rng: random.Random, family: str, batch_size: int) -> tuple[str, ...]:
    takes_videos = SUPPORTED[family].video and rng.random() < 0.35
    # where frames are marked as images, a batch has the one or the other
    alone = BY_NAME[family].video_token == IMAGE
    frames = rng.choice((2, 4, 6))
    rows = []
    for number in range(batch_size):
        turns = []
        for _ in range(rng.choice((1, 1, 2))):
            # the first row has a picture
            least = 1 if number == 0 and not turns else 0
            turn = [f"w{rng.randint(1, 6)}"] if rng.random() < 0.8 else []
            for _ in range(rng.choice((1, 1, 2, 3)) if least else rng.choice((0, 1, 2))):
                size = f"{rng.randint(1, 5)}x{rng.randint(1, 5)}"
                is_video = takes_videos and (alone or rng.random() < 0.5)
                turn.append(f"v2x{rng.randint(2, 3)}x{frames}" if is_video else f"i{size}")
                if rng.random() < 0.4:
                    turn.append(f"w{rng.randint(1, 3)}")
            turns.append(" ".join([*turn, f"w{rng.randint(1, 9)}", "e", f"w{rng.randint(1, 3)}"]))
        rows.append("b " + " ".join(turns))
    return tuple(rows)


def _random_pruning(rng: random.Random, family: str, methods: list[str]) -> tuple[Any, ...]:
    able = [name for name in methods if family in ENCODERS or not _reads_encoder(name)] or methods
    method = rng.choice(able)
    keep: float | int = rng.choice((0.01, 0.1, 0.3, 0.3, 0.5, 0.9, 1.0, 2, 5, 1000))
    parameters = inspect.signature(METHODS[method]).parameters
    options = {
        name: rng.choice(values) for name, values in OPTIONS.items() if name in parameters and rng.random() < 0.3
    }
    stages: tuple[tuple[int, str, float | int], ...] = ()
    if rng.random() < 0.25:
        inner = [name for name in methods if not _reads_images(resolve_method(name, {}).at_layer(1))]
        depth = rng.choice((1, 2))
        first = (depth, rng.choice(inner or able), rng.choice((0.6, 0.4)))
        more = ((0, rng.choice(able), 0.8),) if rng.random() < 0.3 else ()
        after = ((depth + 1, rng.choice(inner or able), 0.2),) if rng.random() < 0.3 else ()
        stages, options = (*more, first, *after), {}
    return method, options, keep, stages


def _reads_encoder(name: str) -> bool:
    method = METHODS[name]
    return method.uses_encoder_attention or method.uses_cls_attention or method.uses_encoder_features


def _reads_images(method: Method) -> bool:
    return method.reads_encoder() or method.uses_grids
