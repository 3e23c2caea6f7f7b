"""HiPrune's choice against a literal reference that goes token by token, over random and degenerate input."""

import itertools
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import csrc_ref
from hawk_kernels import hiprune_select
from hawk_kernels.ops.hiprune_select import ANCHOR, BUFFER, REGISTER, choose, grid_neighbours


def picture(*rows):
    """Attention of a grid, written as one."""
    return torch.tensor([float(value) for row in rows for value in row])


def kept(selection):
    return selection.mask.nonzero().flatten().tolist()


def test_anchor_buffers_and_registers_worked_by_hand():
    """One anchor in the middle of 3 x 4, its four neighbours, and the two best of the rest by the deep layer."""
    objects = picture([1, 1, 1, 1], [1, 9, 1, 1], [1, 1, 1, 1])
    deep = picture([3, 9, 0, 8], [9, 9, 9, 0], [0, 9, 0, 7])
    selection = hiprune_select(objects, deep, 7, grid=(3, 4), alpha=5 / 7)
    assert kept(selection) == [1, 3, 4, 5, 6, 9, 11]
    assert selection.indices.tolist() == kept(selection)
    assert torch.equal(selection.scores, deep)


def test_neighbours_do_not_wrap_across_row_ends():
    """The anchor ends its row: what follows it in memory begins the next row, and is no neighbour."""
    objects = picture([0, 0, 9], [0, 0, 0], [0, 0, 0])
    deep = picture([0, 0, 0], [0, 0, 0], [0, 5, 0])
    assert kept(hiprune_select(objects, deep, 4, grid=(3, 3), alpha=1.25)) == [1, 2, 5, 7]


def test_neighbours_stay_in_their_image_and_frame():
    """Two frames of 1 x 2, then an image of 1 x 2: an anchor has one neighbour, however close the next frame lies."""
    objects, deep = torch.tensor([0.0, 0, 0, 9, 0, 0]), torch.tensor([9.0, 0, 0, 0, 0, 0])
    assert kept(hiprune_select(objects, deep, 3, grid=[(2, 1, 2), (1, 2)], alpha=5 / 3)) == [0, 2, 3]


def test_the_budget_holds_where_anchors_and_buffers_exceed_it():
    """Anchors first, then the buffers that the object layer sees most, equal ones by lower index."""
    objects = picture([0, 2, 0], [1, 9, 3], [0, 2, 0])
    deep = picture([9, 9, 9], [9, 9, 9], [9, 9, 9])
    assert kept(hiprune_select(objects, deep, 3, grid=(3, 3), alpha=5 / 3)) == [1, 4, 5]
    assert kept(hiprune_select(objects, deep, 1, grid=(3, 3), alpha=5)) == [4]


def test_without_anchors_it_is_the_deep_layer_alone():
    deep = torch.randperm(36).float()
    selection = hiprune_select(torch.rand(36), deep, 0.25, grid=(6, 6), alpha=0)
    assert kept(selection) == deep.topk(9).indices.sort().values.tolist()


# Few distinct values make ties likely; the specials are where an order-preserving key goes wrong.
VALUES = st.sampled_from([0.0, -0.0, 1.0, 0.5, -1.0, torch.nan, torch.inf, -torch.inf, 1e-45, 3e38])
SIDES = st.integers(1, 5)
GRIDS = st.tuples(SIDES, SIDES) | st.tuples(st.integers(1, 3), SIDES, SIDES)


@settings(max_examples=300)
@given(data=st.data())
def test_matches_the_literal_reference(data):
    """Constant maps (registers, anchors and buffers all tie), NaN, several images, videos, every budget."""
    grids = data.draw(GRIDS | st.lists(GRIDS, min_size=1, max_size=4))
    images = [grids] if isinstance(grids, tuple) else grids
    num_tokens = sum(torch.Size(image).numel() for image in images)
    batch = data.draw(st.integers(1, 3))
    few = st.lists(VALUES, min_size=num_tokens, max_size=num_tokens)
    constant = VALUES.map(lambda value: [value] * num_tokens)
    rows = st.lists(few | constant, min_size=batch, max_size=batch).map(torch.tensor)
    objects, deep = data.draw(rows), data.draw(rows)
    r = data.draw(st.integers(1, num_tokens) | st.floats(0.0, 1.0, exclude_min=True))
    options = {
        "grid": grids,
        "alpha": data.draw(st.sampled_from([0, 0.1, 0.5, 1, 2.5, 5]) | st.floats(0, 5)),
        "rounding": data.draw(st.sampled_from(["floor", "ceil", "nearest"])),
    }
    selection = hiprune_select(objects, deep, r, **options)
    expected = csrc_ref.hiprune_select(objects, deep, r, **options)
    assert torch.equal(selection.mask, expected.mask)
    assert torch.equal(selection.indices, expected.indices)
    assert torch.equal(selection.scores.view(torch.int32), expected.scores.view(torch.int32))


@pytest.mark.parametrize("grid", [(24, 24), (36, 36), [(4, 20, 28), (30, 40)]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_real_sizes(grid, dtype):
    num_tokens = sum(torch.Size(image).numel() for image in ([grid] if isinstance(grid, tuple) else grid))
    objects, deep = torch.rand(2, 2, num_tokens).to(dtype)
    for r, alpha in itertools.product((0.111, 0.333, 64), (0.1, 1.0)):
        selection = hiprune_select(objects, deep, r, grid=grid, alpha=alpha)
        assert torch.equal(selection.mask, csrc_ref.hiprune_select(objects, deep, r, grid=grid, alpha=alpha).mask)
        assert selection.scores.dtype == torch.float32


def test_roles_tell_why_a_token_stays():
    objects = picture([0, 0, 0, 0], [0, 9, 0, 0], [0, 0, 0, 0])
    deep = picture([0, 0, 0, 8], [0, 0, 0, 0], [0, 0, 0, 7])
    around = grid_neighbours([(1, 3, 4)], torch.device("cpu"))
    roles = choose(objects[None], deep[None], None, around, 7, 1, 7).roles[0].view(3, 4).tolist()
    assert roles == [[0, BUFFER, 0, REGISTER], [BUFFER, ANCHOR, BUFFER, 0], [0, BUFFER, 0, REGISTER]]


def test_rows_of_different_budgets_and_candidates():
    """What a batch of prompts needs: a row with less than the others is as if alone."""
    torch.manual_seed(1)
    objects, deep = torch.rand(2, 12), torch.rand(2, 12)
    candidates = torch.arange(12) < torch.tensor([[12], [6]])
    device = torch.device("cpu")
    around = torch.full((2, 12, 4), 12)
    around[0], small = grid_neighbours([(1, 3, 4)], device)[0], grid_neighbours([(1, 2, 3)], device)[0]
    around[1, :6] = torch.where(small == 6, 12, small)
    budget, anchors = torch.tensor([[7], [3]]), torch.tensor([[2], [1]])
    selection, roles = choose(objects, deep, candidates, around, budget, anchors, 7)
    first = hiprune_select(objects[0], deep[0], 7, grid=(3, 4), alpha=10 / 7)
    second = hiprune_select(objects[1, :6], deep[1, :6], 3, grid=(2, 3), alpha=5 / 3)
    assert torch.equal(selection.mask[0], first.mask)
    assert torch.equal(selection.mask[1, :6], second.mask)
    assert selection.indices[1].tolist() == [*second.indices.tolist(), -1, -1, -1, -1]
    assert (selection.scores[1, 6:] == -torch.inf).all()
    assert (roles[1, 6:] == 0).all()


def test_compiles_to_one_graph_and_knows_its_shapes():
    objects, deep = torch.rand(2, 12), torch.rand(2, 12)

    def step(objects, deep):
        return tuple(hiprune_select(objects, deep, 0.5, grid=(3, 4), alpha=1.0))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(objects, deep), step(objects, deep), strict=True):
        assert torch.equal(got, expected)
    with torch._subclasses.FakeTensorMode():
        assert hiprune_select(torch.rand(2, 12), torch.rand(2, 12), 0.5, grid=(3, 4)).indices.shape == (2, 6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_its_compiled_code_builds():
    objects, deep = torch.rand(3, 33), torch.rand(3, 33)
    compiled = torch.compile(lambda *of: tuple(hiprune_select(*of, 0.4, grid=(3, 11), alpha=1.0)), fullgraph=True)
    expected = hiprune_select(objects, deep, 0.4, grid=(3, 11), alpha=1.0)
    assert all(torch.equal(one, other) for one, other in zip(compiled(objects, deep), expected, strict=True))


def test_gradients_and_inputs_are_left_alone():
    objects, deep = torch.rand(12, requires_grad=True), torch.rand(12, requires_grad=True)
    selection = hiprune_select(objects, deep, 5, grid=(3, 4))
    assert not selection.scores.requires_grad
    assert selection.scores.data_ptr() != deep.data_ptr()


A = torch.rand(2, 12)
BAD_CALLS = {
    "no tensor": (dict(object_attention=[1.0]), TypeError, "object_attention: expected a torch.Tensor, got list"),
    "integers": (dict(deep_attention=A.long()), TypeError, r"deep_attention: .* floating point .*\.float\(\)"),
    "heads left": (dict(object_attention=A[None]), ValueError, r"object_attention: expected \[B, M\] or \[M\].*heads"),
    "two shapes": (dict(deep_attention=A[:1]), ValueError, r"deep_attention: expected shape \[2, 12\] as object_att"),
    "two devices": (dict(deep_attention=A.to("meta")), ValueError, "deep_attention: expected device cpu"),
    "grid too small": (dict(grid=(2, 3)), ValueError, r"grid: expected 12 cells, one a token, got 6 in \(1, 2, 3\)"),
    "many grids": (dict(grid=[(1, 1)] * 5), ValueError, r"got 5 in .*\.\.\. \(5 images\)"),
    "grid tensor": (dict(grid=torch.tensor([3, 4])), TypeError, r"got a Tensor; read it first: grid.tolist\(\)"),
    "grid number": (dict(grid=12), TypeError, r"grid: expected \(h, w\), \(t, h, w\), .*, got int; use a tuple"),
    "grid of floats": (dict(grid=(3.0, 4.0)), TypeError, "grid: expected .*, got 3.0 in it; use a tuple of ints"),
    "grid empty": (dict(grid=[]), ValueError, "grid: expected .*, got an empty list"),
    "grid flat": (dict(grid=(3, 0)), ValueError, r"got \(3, 0\); every side is at least 1"),
    "grid of one": (dict(grid=(12,)), ValueError, r"got \(12,\); every side"),
    "alpha type": (
        dict(alpha="a"),
        TypeError,
        r"alpha: expected a number in \[0, 5\], .*, got str; the paper uses 0.1",
    ),
    "alpha range": (dict(alpha=-0.1), ValueError, r"alpha: expected a number in \[0, 5\], .*, got -0.1"),
    "alpha nan": (dict(alpha=float("nan")), ValueError, "got nan"),
    "budget": (dict(r=13), ValueError, "r: expected a budget of at most 12 keys, got 13"),
    "ratio": (dict(r=1.5), ValueError, "for a budget pass the int 2"),
    "rounding": (dict(rounding="round"), ValueError, "rounding: expected 'floor'"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_say_what_to_do(name):
    changes, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        hiprune_select(**{"object_attention": A, "deep_attention": A, "r": 0.5, "grid": (3, 4)} | changes)
