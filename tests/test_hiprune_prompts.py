"""HiPrune's choice over whole batches of prompts, against a literal walk through them.

Tiles, separators, images of any size, rows of any number of images, and the copies that `generate` makes.
"""

from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import csrc_ref
from hawk_kernels.hf.choose_tokens import Chooser, Context
from hawk_kernels.hf.encoders.pieces import Piece
from hawk_kernels.hf.encoders.recorder import Recording, attention_of_prompt
from hawk_kernels.hf.prompt import Prompt
from hawk_kernels.methods import HiPrune
from tests.tiny_models import FIRST_WORD, IMAGE, VIDEO

SIDES = st.integers(1, 4)
IDS = {"image": IMAGE, "video": VIDEO}


@st.composite
def pieces(draw):
    height, width = draw(SIDES), draw(SIDES)
    if draw(st.booleans()):
        return Piece.of_cells(height, width)
    newline_after_each_row = np.tile(np.arange(width + 1) == width, height)
    return Piece((1, height, width), newline_after_each_row)


@st.composite
def images(draw):
    """Pieces of one run of placeholders, a grid among them, and which kind they are."""
    tail = [Piece.of_separators(draw(st.integers(1, 2)))] if draw(st.booleans()) else []
    return draw(st.sampled_from(["image", "video"])), [*draw(st.lists(pieces(), min_size=1, max_size=3)), *tail]


BATCHES = st.lists(st.lists(images(), max_size=3), min_size=1, max_size=3).filter(lambda rows: any(rows))
# few values make ties likely
VALUES = st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.0, torch.nan])


def prompt_of(rows, copies):
    """Ids of a left-padded batch with a word between images, each row `copies` times."""
    ids = []
    for row in rows:
        ids.append([FIRST_WORD])
        for kind, run in row:
            ids[-1] += [IDS[kind]] * sum(len(piece.is_separator) for piece in run) + [FIRST_WORD]
    longest = max(map(len, ids))
    padded = np.array([[0] * (longest - len(row)) + row for row in ids]).repeat(copies, axis=0)
    is_visual = (padded == IMAGE) | (padded == VIDEO)
    valid = padded != 0
    return Prompt(padded, valid, is_visual, np.zeros_like(valid), [""] * len(padded), longest)


def walk(rows, runs, copies, method, r, per_image):
    """Kept visual tokens of each row in their order, row after row."""
    taken = dict.fromkeys(runs, 0)
    for row in rows:
        units, kept = [], []
        for kind, run in row:
            count = sum(int((~piece.is_separator).sum()) for piece in run)
            here = slice(taken[kind], taken[kind] + count)
            taken[kind] += count
            grids = [piece.grid for piece in run if piece.grid is not None]
            separators = np.concatenate([piece.is_separator for piece in run])
            values = runs[kind].values
            units.append((values["object"][here], values["deep"][here], grids, separators))
        groups = [[unit] for unit in units] if per_image or not units else [units]
        for group in groups:
            chosen = csrc_ref.hiprune_select(
                torch.cat([unit[0] for unit in group]),
                torch.cat([unit[1] for unit in group]),
                r if isinstance(r, float) else min(r, sum(len(unit[0]) for unit in group)),
                grid=[grid for unit in group for grid in unit[2]],
                alpha=method.alpha,
                rounding=method.rounding,
            ).mask
            separators = np.concatenate([unit[3] for unit in group])
            of_group = np.ones(len(separators), dtype=bool)
            of_group[~separators] = chosen.numpy()
            kept += of_group.tolist()
        yield from [kept] * copies


@settings(max_examples=150, deadline=None)
@given(data=st.data(), rows=BATCHES, copies=st.integers(1, 2), per_image=st.booleans())
def test_the_choice_in_a_batch_of_prompts(data, rows, copies, per_image):
    runs = {}
    for kind in IDS:
        all_pieces = [piece for row in rows for other, run in row if other == kind for piece in run]
        count = sum(int((~piece.is_separator).sum()) for piece in all_pieces)
        if all_pieces:
            of_object, of_deep = (
                torch.tensor(data.draw(st.lists(VALUES, min_size=count, max_size=count))) for _ in range(2)
            )
            runs[kind] = Recording({"object": of_object, "deep": of_deep}, all_pieces, (1, 2))
    method = HiPrune(
        alpha=data.draw(st.sampled_from([0.1, 1.0, 2.5, 5.0])),
        rounding=data.draw(st.sampled_from(["floor", "ceil", "nearest"])),
    )
    r = data.draw(st.integers(1, 20) | st.floats(0.05, 1.0))
    prompt = prompt_of(rows, copies)
    attention = attention_of_prompt(runs, prompt, {token: kind for kind, token in IDS.items()})
    choice = Chooser(method, r, per_image).choose(
        torch.zeros(*prompt.ids.shape, 1),
        prompt,
        SimpleNamespace(device=lambda device: device),
        Context(attention=attention),
    )
    expected = list(walk(rows, runs, copies, method, r, per_image))
    for row, kept in enumerate(expected):
        assert choice.kept[row].numpy()[prompt.visual[row]].tolist() == kept
        assert choice.kept[row].numpy()[~prompt.visual[row]].tolist() == prompt.valid[row][~prompt.visual[row]].tolist()
        assert sum(choice.budgets[row]) == sum(kept)
        assert choice.counts[row] == choice.kept[row].sum()
    scored = choice.scores > -torch.inf
    is_cell = torch.from_numpy(prompt.visual & ~attention.is_separator)
    assert torch.equal(scored | choice.scores.isnan(), is_cell)
