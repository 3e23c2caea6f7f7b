"""Kept tokens that become sums of tokens: both backends against the literal reference in float64."""

import copy
import pickle
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import csrc_ref
from hawk_kernels import compact
from hawk_kernels.backends.eager import compact as eager
from hawk_kernels.selection import Merge, Selection
from tests.compact_cases import DTYPES, assert_merged, assert_same, merge_map, prompt
from tests.host_reads import HostReads

kernels = import_module("hawk_kernels.backends.kernels.compact")
BACKENDS = ("torch", "triton")


def moved(merge, device):
    return Merge(*(part.to(device) for part in merge))


def check(embeds, keep_mask, merge, backend, device, **options):
    there = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    got = compact(embeds.to(device), keep_mask.to(device), merge=moved(merge, device), backend=backend, **there)
    assert_merged(got, embeds, keep_mask, merge, **options)
    return got


def one_row(*entries):
    """A map for one row, of (target, source, weight)."""
    target, source, weight = zip(*entries, strict=True)
    return Merge(torch.tensor([target]), torch.tensor([source]), torch.tensor([weight], dtype=torch.float32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_is_the_sum_of_its_entries_alone_and_others_are_copied(backend, device):
    embeds = torch.arange(1.0, 7.0).view(1, 6, 1)
    keep_mask = torch.tensor([[True, False, True, False, True, False]])
    merge = one_row((0, 1, 0.5), (0, 3, 2.0), (4, 4, 0.25), (4, 5, 1.0), (4, 5, 1.0), (-1, 0, 9.0))
    got = check(embeds, keep_mask, merge, backend, device, length=4)
    # 2 / 2 + 4 * 2; 3 is copied; 5 / 4 + 6 + 6
    assert got.inputs_embeds.flatten().tolist() == [0.0, 9.0, 3.0, 13.25]
    assert got.position_ids.tolist() == [[0, 0, 2, 4]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axes", [None, 3])
def test_dtypes_and_positions(dtype, axes, backend, device):
    embeds, keep_mask = prompt(3, dtype=dtype)
    embeds = embeds - 1.5
    positions = None if axes is None else torch.randint(1, 99, (axes, *keep_mask.shape))
    check(embeds, keep_mask, merge_map(keep_mask), backend, device, position_ids=positions, length=40)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hidden_size", [1, 3, 100, 520])
def test_hidden_sizes(hidden_size, backend, device):
    embeds, keep_mask = prompt(2, 50, hidden_size, dtype=torch.float16)
    check(embeds, keep_mask, merge_map(keep_mask, 70), backend, device)


# around the 16 entries that are summed at once, and powers of two, where a bisection takes a step more
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [0, 1, 2, 15, 16, 17, 32, 33, 64, 65])
def test_numbers_of_entries_of_one_target(count, backend, device):
    embeds, keep_mask = prompt(1, 20, 5)
    keep_mask[0, [3, 9]] = True
    target = torch.tensor([[3, *[9] * count, -1]])
    merge = Merge(target, torch.randint(20, target.shape), torch.randn(target.shape))
    check(embeds, keep_mask, merge, backend, device)


@given(
    rows=st.lists(st.lists(st.booleans(), min_size=23, max_size=23), min_size=1, max_size=3),
    num_entries=st.integers(0, 70),
    extra=st.integers(0, 20),
    seed=st.integers(0, 9999),
)
@settings(max_examples=20)
def test_any_map(device, rows, num_entries, extra, seed):
    """Rows without a kept token, without an entry, with duplicates and with every token kept are among them."""
    keep_mask = torch.tensor(rows)
    embeds = torch.rand(*keep_mask.shape, 5) + 1
    merge = merge_map(keep_mask, num_entries, seed)
    length = int(keep_mask.sum(dim=1).max()) + extra
    for backend in BACKENDS:
        check(embeds, keep_mask, merge, backend, device, length=length)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (2, 5, 0), (0, 0, 0)])
@pytest.mark.parametrize("num_entries", [0, 3])
def test_zero_size(shape, num_entries, backend, device):
    keep_mask = torch.zeros(shape[:2]) > 0
    entries = torch.full((shape[0], num_entries), -1)
    check(torch.rand(shape), keep_mask, Merge(entries, entries, entries.float()), backend, device, length=3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unbatched_in_unbatched_out(backend, device):
    embeds, keep_mask = prompt(1, 20)
    merge = Merge(*(part[0] for part in merge_map(keep_mask)))
    assert check(embeds[0], keep_mask[0], merge, backend, device).inputs_embeds.dim() == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend, device):
    embeds, keep_mask = prompt(3, 40, 32)
    merge = merge_map(keep_mask)
    doubled = Merge(*(part.to(device).repeat_interleave(2, dim=1)[:, ::2] for part in merge))
    transposed = embeds.to(device).transpose(1, 2).contiguous().transpose(1, 2)
    got = compact(transposed, keep_mask.to(device), merge=doubled, backend=backend)
    assert_merged(got, embeds, keep_mask, merge)
    assert_same(got, compact(embeds.to(device), keep_mask.to(device), merge=moved(merge, device), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_of_tokens_that_no_entry_names_stay_away(backend, device):
    embeds, keep_mask = prompt(1, 40, 20)
    keep_mask[0, 7] = True
    merge = one_row((7, 3, 1.0), (7, 4, -1.0))
    embeds[:, [token for token in range(40) if token not in (3, 4)]] = torch.nan
    got = compact(embeds.to(device), keep_mask.to(device), merge=moved(merge, device), backend=backend)
    row = got.source[0].tolist().index(7)
    assert torch.equal(got.inputs_embeds[0, row].cpu(), embeds[0, 3] - embeds[0, 4])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 2, 4])
def test_what_a_gpu_cannot_refuse_adds_nothing(length, backend, device):
    """The backends themselves check no values: dropped targets, places outside the row, more tokens than slots."""
    embeds, keep_mask = torch.rand(1, 6, 5), torch.tensor([[False, True, False, True, False, False]])
    good = [(1, 0, 0.5), (1, 2, 2.0), (3, 3, 1.0), (3, 0, 1.0)]
    outside = [(9, 4, 1.0), (2**62, 4, 1.0), (1, 6, 1.0), (1, -1, 1.0), (3, 2**40, 1.0)]
    bad = [(0, 4, 1.0), (2, 4, 1.0), (4, 4, 1.0), *outside]
    run = {"torch": eager.compact, "triton": kernels.compact}[backend]
    expected, got = (
        run(embeds.to(device), keep_mask.to(device), None, length, moved(one_row(*sorted(entries)), device))
        for entries in (good, good + bad)
    )
    assert torch.allclose(got[0], expected[0])
    assert expected[0][0, -1].tolist() == pytest.approx((embeds[0, 3] + embeds[0, 0]).tolist())


def test_the_order_of_summation_is_that_of_the_map(device):
    """The same map gives the same bits, whatever else is in the batch."""
    embeds, keep_mask = prompt(3, 40, 20)
    merge = merge_map(keep_mask, 200)
    for backend in BACKENDS:
        there = moved(merge, device)
        whole = compact(embeds.to(device), keep_mask.to(device), merge=there, length=40, backend=backend)
        for row in range(3):
            alone = Merge(*(part[row : row + 1] for part in there))
            got = compact(
                embeds[row : row + 1].to(device), keep_mask[row : row + 1].to(device),
                merge=alone, length=40, backend=backend,
            )  # fmt: skip
            assert torch.equal(got.inputs_embeds[0], whole.inputs_embeds[row])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend, device):
    """Once and twice, to embeddings and weights; targets, sources, duplicates, padding and an empty row."""
    embeds, keep_mask = prompt(2, 5, 2, 0.6, dtype=torch.float64)
    keep_mask[0, [1, 3]], keep_mask[1] = True, False
    target = torch.tensor([[1, 1, 1, 3, -1], [-1, -1, -1, -1, -1]], device=device)
    source = torch.tensor([[1, 2, 2, 4, 0], [0, 0, 0, 0, 0]], device=device)
    weight = torch.tensor([[0.5, -1.0, 2.0, 0.25, 7.0], [1.0] * 5], device=device)
    embeds, keep_mask = embeds.to(device).requires_grad_(), keep_mask.to(device)

    def packed(embeds):
        return compact(embeds, keep_mask, length=6, merge=Merge(target, source, weight), backend=backend).inputs_embeds

    assert torch.autograd.gradcheck(packed, embeds)
    if backend == "torch":
        # the backward pass is the same for both
        assert torch.autograd.gradgradcheck(lambda embeds: packed(embeds).square(), embeds)
    learned = weight.clone().requires_grad_()
    merge = Merge(target, source, learned)
    got = compact(embeds, keep_mask, length=6, merge=merge, backend=backend).inputs_embeds.sum()
    of_weight, of_embeds = torch.autograd.grad(got, (learned, embeds))
    expected = torch.where(target >= 0, embeds.sum(dim=2).gather(1, source), 0)
    assert torch.allclose(of_weight, expected.float())
    assert of_embeds[0, 2].tolist() == [1.0 + float(keep_mask[0, 2])] * 2
    assert of_embeds[0, 4].tolist() == [0.25 + float(keep_mask[0, 4])] * 2
    assert of_embeds[0, 3].tolist() == [0.0, 0.0]


def test_gradients_of_odd_cases(device):
    for shape, length in (((2, 0, 3), 4), ((0, 5, 3), 4), ((2, 5, 3), 0)):
        embeds = torch.rand(shape, device=device, requires_grad=True)
        keep_mask = torch.zeros(shape[:2], device=device) > 0
        entries = torch.full((shape[0], 2), -1, device=device)
        weight = torch.ones(shape[0], 2, device=device, requires_grad=True)
        merge = Merge(entries, entries, weight)
        got = compact(embeds, keep_mask, length=length, merge=merge, backend="torch")
        got.inputs_embeds.sum().backward()
        assert not embeds.grad.any()
        assert weight.grad.shape == weight.shape
        assert not weight.grad.any()


def test_opcheck(device):
    embeds, keep_mask = prompt(1, 5, 3)
    merge = moved(merge_map(keep_mask, 4), device)
    for backend in BACKENDS:
        arguments = (embeds.to(device).requires_grad_(), keep_mask.to(device), None, 5, backend, *merge)
        torch.library.opcheck(torch.ops.hawk_kernels.compact.default, arguments)


def test_compiles_to_one_graph_with_gradients():
    embeds, keep_mask = prompt(2, 12, 8)
    merge = merge_map(keep_mask, 9)

    def step(embeds, merge):
        return compact(embeds * 2, keep_mask, length=12, merge=merge.ordered()).inputs_embeds.square().sum()

    torch._dynamo.reset()
    gradients = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = embeds.clone().requires_grad_()
        run(leaf, merge).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_one_launch_and_no_host_read(monkeypatch, device):
    grids = []
    kernel = kernels._merge_kernel

    class Counting:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(kernels, "_merge_kernel", Counting())
    embeds, keep_mask = prompt(2, 300, 40)
    merge = merge_map(keep_mask, 100)
    with HostReads() as reads:
        kernels.compact(embeds.to(device), keep_mask.to(device), None, 300, moved(merge, device))
        merge.ordered()
    assert len(grids) == 1
    assert reads.places == []


@pytest.mark.parametrize("sizes", [(3, 61, 40, 70), (1, 4200, 20, 70)])
def test_nothing_is_written_outside_the_outputs_and_nothing_read_that_was_not_written(monkeypatch, sizes, device):
    """Outputs in the middle of larger buffers, all of it poisoned."""
    batch, num_tokens, hidden_size, length = sizes
    embeds, keep_mask = prompt(batch, num_tokens, hidden_size, 0.3 if num_tokens < 100 else 0.01)
    arguments = (embeds.to(device), keep_mask.to(device), None, length, moved(merge_map(keep_mask), device))
    clean = kernels.compact(*arguments)
    guards, empty = [], torch.empty

    def guarded(size, *, dtype, device):
        count = int(torch.Size(size).numel())
        buffer = empty(count + 128, dtype=dtype, device=device).fill_(-7)
        guards.append((buffer[:64], buffer[64 + count :]))
        return buffer[64 : 64 + count].view(size)

    monkeypatch.setattr(torch, "empty", guarded)
    for got, expected in zip(kernels.compact(*arguments), clean, strict=True):
        assert torch.equal(got, expected)
    assert len(guards) == 4
    assert all((zone == -7).all() for pair in guards for zone in pair)


def test_ordered_sorts_by_target_and_keeps_the_order_of_entries():
    merge = Merge(
        torch.tensor([[5, -1, 2, 5, -1, 2]]), torch.arange(6)[None], torch.tensor([[0.0, 1, 2, 3, 4, 5]])
    ).ordered()
    assert merge.target.tolist() == [[2, 2, 5, 5, -1, -1]]
    assert merge.source.tolist() == [[2, 5, 0, 3, 1, 4]]
    assert merge.weight.tolist() == [[2, 5, 0, 3, 1, 4]]


def test_a_selection_carries_a_map_and_unpacks_into_three():
    merge = one_row((0, 1, 1.0))
    plain = Selection(torch.ones(1, 2) > 0, torch.arange(2)[None], torch.ones(1, 2))
    selection = plain.merging(merge)
    mask, indices, scores = selection
    assert plain.merge is None
    assert selection.merge is merge
    assert (mask, indices, scores) == tuple(plain)
    for again in (copy.copy(selection), copy.deepcopy(selection), pickle.loads(pickle.dumps(selection))):
        assert isinstance(again, Selection)
        assert all(torch.equal(*pair) for pair in zip(again.merge, merge, strict=True))


ENTRIES = torch.zeros(2, 3, dtype=torch.int64)
BAD_MAPS = {
    "type": (lambda good: tuple(good), TypeError, "merge: expected a Merge or None, got tuple"),
    "no tensor": (lambda good: good._replace(source=[0]), TypeError, "merge.source: expected a torch.Tensor, got list"),
    "target dtype": (
        lambda good: good._replace(target=ENTRIES.int()),
        TypeError,
        r"merge.target: expected dtype torch.int64, got torch.int32; use merge.target.to\(torch.int64\)",
    ),
    "weight dtype": (lambda good: good._replace(weight=ENTRIES.double()), TypeError, "merge.weight: .*torch.float64"),
    "dimensions": (
        lambda good: good._replace(target=ENTRIES[0]),
        ValueError,
        r"merge.target: expected shape \[2, E\], got \[3\]; pad rows",
    ),
    "rows": (lambda good: Merge(*(part[:1] for part in good)), ValueError, r"expected shape \[2, E\], got \[1, 3\]"),
    "entries": (
        lambda good: good._replace(source=ENTRIES[:, :2]),
        ValueError,
        r"merge.source: expected the shape of merge.target, \[2, 3\], got \[2, 2\]; one entry has one of each",
    ),
    "device": (
        lambda good: good._replace(weight=torch.ones(2, 3, device="meta")),
        ValueError,
        r"merge.weight: expected device cpu, got meta; use merge.weight.to\('cpu'\)",
    ),
    "target outside": (
        lambda good: good._replace(target=ENTRIES + 5),
        ValueError,
        "merge.target: expected places of the 5 tokens of a row, from 0 to 4, got 5; a target of -1 is padding",
    ),
    "target below": (lambda good: good._replace(target=ENTRIES - 2), ValueError, "merge.target: .* got -2"),
    "source outside": (lambda good: good._replace(source=ENTRIES - 1), ValueError, "merge.source: .*to 4, got -1"),
    "dropped": (
        lambda good: good._replace(target=ENTRIES + 4),
        ValueError,
        "merge.target: expected kept tokens, got 4 in row 0, which is dropped",
    ),
    "order": (
        lambda good: good._replace(target=torch.tensor([[0, 1, 2], [0, 2, 1]])),
        ValueError,
        r"merge.target: expected targets in ascending order .*; use merge.ordered\(\)",
    ),
    "padding first": (lambda good: good._replace(target=torch.tensor([[-1, 0, 1]] * 2)), ValueError, "in ascending or"),
}


@pytest.mark.parametrize("name", BAD_MAPS)
def test_bad_maps_say_what_to_do(name):
    change, error, message = BAD_MAPS[name]
    good = Merge(ENTRIES, ENTRIES, ENTRIES.float())
    keep_mask = torch.arange(5).expand(2, -1) < 4
    compact(torch.ones(2, 5, 4), keep_mask, merge=good)
    with pytest.raises(error, match=message):
        compact(torch.ones(2, 5, 4), keep_mask, merge=change(good))


def test_the_reference_merges_in_the_order_of_the_map():
    embeds = torch.tensor([[1e8, 1.0, -1e8]]).view(1, 3, 1)
    keep_mask = torch.ones(1, 3) > 0
    found = [
        csrc_ref.compact(embeds, keep_mask, merge=one_row(*((0, source, 1.0) for source in order)))[0][0, 0].item()
        for order in ((0, 2, 1), (0, 1, 2))
    ]
    assert found == [1.0, 0.0]
