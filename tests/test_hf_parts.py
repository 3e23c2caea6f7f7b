"""The parts below `prune`: finding the question, packing the survivors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hawk_kernels.hf.packing import Packing
from hawk_kernels.hf.prompt import Prompt, padded_positions
from hawk_kernels.hf.queries import AFTER_LAST_VISUAL, ALL_TEXT, NO_VISUAL, text_queries

PAD, START, END, IMAGE, TURN, OTHER_TURN = 0, 1, 2, 3, 5, 6


@pytest.mark.parametrize(
    ("ids", "expected", "source"),
    [
        # text, image, question, end of turn, header of the reply
        ([9, 9, START, IMAGE, IMAGE, END, 7, 8, TURN, 9], "......xx..", AFTER_LAST_VISUAL),
        # padding is never asked
        ([PAD, PAD, 9, START, IMAGE, END, 7, 8, TURN, 9], "......xx..", AFTER_LAST_VISUAL),
        # no end of turn: to the end
        ([9, START, IMAGE, END, 7, 8, 7], "....xxx", AFTER_LAST_VISUAL),
        # several images: after the last one
        ([START, IMAGE, END, 7, START, IMAGE, END, 8, TURN], ".......x.", AFTER_LAST_VISUAL),
        # several turns: to the final end of turn
        ([START, IMAGE, END, 7, TURN, 9, 8, OTHER_TURN, 9], "...xxxx..", AFTER_LAST_VISUAL),
        # a system turn before the image ends none of the question
        ([9, TURN, START, IMAGE, END, 7, 8], ".....xx", AFTER_LAST_VISUAL),
        # the question came first: all text after the first token
        ([9, 7, 8, START, IMAGE, IMAGE, END], ".xxx..x", ALL_TEXT),
        ([PAD, 9, 7, START, IMAGE, END, TURN, 9], "..xx.xxx", ALL_TEXT),
        # nothing to rank
        ([9, 7, 8, TURN], "....", NO_VISUAL),
    ],
)
def test_where_the_question_stands(ids, expected, source):
    ids = np.array([ids])
    valid = ids != PAD
    queries, sources = text_queries(ids, valid, ids == IMAGE, END, (TURN, OTHER_TURN))
    assert "".join("x" if asked else "." for asked in queries[0]) == expected
    assert sources == [source]


def test_without_a_vision_end_token_the_question_follows_the_last_visual_token():
    ids = np.array([[9, IMAGE, IMAGE, 2, 7, TURN]])
    queries, _ = text_queries(ids, ids > 0, ids == IMAGE, None, (TURN,))
    assert queries.tolist() == [[False, False, False, True, True, False]]


def test_images_are_runs_of_one_placeholder():
    ids = np.array([[9, 3, 3, 8, 3, 4, 4, 9]])
    visual = np.isin(ids, (3, 4))
    prompt = Prompt(ids, ids > 0, visual, ~visual, ["given"], 8)
    assert [image.tolist() for image in prompt.images(0)] == [[1, 2], [4], [5, 6]]
    assert prompt.image_lengths() == [[2, 1, 2]]
    assert prompt.ends_in_text(1)
    assert not prompt.ends_in_text(2)


def rows_of_bools(length):
    return st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=4)


masks = st.integers(1, 12).flatmap(rows_of_bools)


@given(masks)
@settings(max_examples=60, deadline=None)
def test_padded_positions_list_the_true_entries(rows):
    mask = np.array(rows)
    positions, filled = padded_positions(mask)
    assert [list(p[f]) for p, f in zip(positions, filled, strict=True)] == [list(np.flatnonzero(row)) for row in mask]
    assert not positions[~filled].any()


@given(masks)
@settings(max_examples=60, deadline=None)
def test_packing_moves_survivors_together_and_back(rows):
    kept = torch.tensor(rows)
    counts = kept.sum(1).tolist()
    packing = Packing(kept, counts)
    batch, length = kept.shape
    tokens = torch.arange(1.0, batch * length + 1).view(batch, length, 1)
    packed = packing.pack(tokens)
    positions = packing.pack_positions(torch.arange(length).expand(3, 1, length))
    assert packed.shape == (batch, packing.length, 1)
    assert positions.shape == (3, batch, packing.length)
    assert packing.mask.sum(1).tolist() == counts
    for row in range(batch):
        survivors = packing.mask[row].bool()
        assert survivors.tolist() == sorted(survivors.tolist())
        assert torch.equal(packed[row, survivors], tokens[row, kept[row]])
        assert torch.equal(positions[0, row, survivors], kept[row].nonzero().flatten())
    assert torch.equal(packing.unpack(packed), tokens * kept[..., None])
    assert packing.is_full == all(count == packing.length for count in counts)


def test_the_text_row_of_positions_has_no_gaps_and_arguments_a_token_are_packed():
    kept = torch.tensor([[True, False, True, True], [False, False, True, True]])
    packing = Packing(kept, [3, 2])
    arguments = {
        "inputs_embeds": torch.randn(2, 4, 8),
        "per_layer": torch.arange(16).view(2, 4, 1, 2),
        "other": torch.randn(2, 3),
        "position_ids": torch.arange(4).expand(4, 2, 4),
        "use_cache": True,
    }
    packed, following = packing.pack_arguments(arguments)
    assert packed["position_ids"][0].tolist() == [[0, 1, 2], [0, 0, 1]]
    assert packed["position_ids"][1].tolist() == [[0, 2, 3], [0, 2, 3]]
    assert packed["per_layer"].shape == (2, 3, 1, 2)
    assert packed["other"] is arguments["other"]
    assert packed["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert following.tolist() == [[[4], [4]]] * 4
