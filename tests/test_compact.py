"""The pruned prompt, both backends against the literal reference: not a bit may differ."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import csrc_ref
from hawk_kernels import compact, prune
from hawk_kernels.backends.eager import compact as torch_compaction
from hawk_kernels.ops import compact as operator
from tests.compact_cases import DTYPES, assert_same, prompt
from tests.host_reads import HostReads
from tests.tiny_families import batch, tiny_model
from tests.tiny_models import Picture, question

triton_compaction = import_module("hawk_kernels.backends.kernels.compact")
BACKENDS = ("torch", "triton")
KERNELS = {"torch": torch_compaction.compact, "triton": triton_compaction.compact}
POSITIONS = {
    "none": None,
    "shared": lambda batch, length: torch.arange(length)[None] + 7,
    "each row's": lambda batch, length: torch.randint(1, 10**6, (batch, length)),
    "axes shared": lambda batch, length: torch.randint(1, 99, (3, 1, length)),
    "axes": lambda batch, length: torch.randint(1, 10**9, (4, batch, length), dtype=torch.int32),
}


def assert_matches(embeds, keep_mask, backend, device, **options):
    moved = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    got = compact(embeds.to(device), keep_mask.to(device), backend=backend, **moved)
    assert_same(got, csrc_ref.compact(embeds, keep_mask, **options))
    return got


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_positions(dtype, positions, backend, device):
    embeds, keep_mask = prompt(dtype=dtype)
    position_ids = None if positions == "none" else POSITIONS[positions](*keep_mask.shape)
    assert_matches(embeds, keep_mask, backend, device, position_ids=position_ids)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hidden_size", [1, 3, 16, 100, 512, 1030])
def test_hidden_sizes(hidden_size, backend, device):
    embeds, keep_mask = prompt(2, 50, hidden_size, dtype=torch.float16)
    assert_matches(embeds, keep_mask, backend, device)


# Around the tokens that are counted and numbered at once, 4096 and 1024, and the 16 slots that are copied at once.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("num_tokens", "kept"),
    [
        *((length, 1.0) for length in (1, 15, 16, 17, 33, 1025)),
        *((n, 0.01) for n in (1023, 1024, 4095, 4096, 4097, 9000)),
    ],
)
def test_row_lengths(num_tokens, kept, backend, device):
    embeds, keep_mask = prompt(1, num_tokens, 2, kept)
    keep_mask[:, -1] = True
    assert_matches(embeds, keep_mask, backend, device)


@given(
    rows=st.integers(1, 40).flatmap(
        lambda length: st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=4)
    ),
    extra=st.integers(0, 20),
)
@settings(max_examples=30)
def test_any_selection_with_any_padding(device, rows, extra):
    """Rows with nothing kept and with everything kept are among them; more columns only add padding."""
    keep_mask = torch.tensor(rows, device=device)
    embeds = torch.rand(*keep_mask.shape, 5, device=device) + 1
    expected = csrc_ref.compact(embeds, keep_mask)
    padded = csrc_ref.compact(embeds, keep_mask, length=expected.source.shape[1] + extra)
    for backend in BACKENDS:
        assert_same(compact(embeds, keep_mask, backend=backend), expected)
        wider = compact(embeds, keep_mask, length=expected.source.shape[1] + extra, backend=backend)
        assert_same(wider, padded)
        assert_same([part[:, extra:] for part in wider], expected)
        assert all((part[:, :extra] == 0).all() for part in wider)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_nothing_and_everything_kept(kept, backend, device):
    got = assert_matches(*prompt(3, 20, 8, kept), backend, device)
    assert got.inputs_embeds.shape == (3, 20 * int(kept), 8)
    got = assert_matches(*prompt(3, 20, 8, kept), backend, device, length=33)
    assert got.attention_mask.sum(dim=1).tolist() == [20 * int(kept)] * 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [None, 0, 3])
@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (0, 0, 0)])
def test_zero_size(shape, length, backend, device):
    keep_mask = torch.zeros(shape[:2]) > 0
    positions = torch.zeros(3, *shape[:2], dtype=torch.long)
    assert_matches(torch.rand(shape), keep_mask, backend, device, length=length, position_ids=positions)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_hidden_size(backend, device):
    embeds, keep_mask = prompt(2, 20, 0)
    assert assert_matches(embeds, keep_mask, backend, device).source.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("positions", [None, torch.arange(20) * 3, torch.arange(60).view(3, 20)])
def test_unbatched_in_unbatched_out(positions, backend, device):
    embeds, keep_mask = prompt(1, 20)
    got = assert_matches(embeds[0], keep_mask[0], backend, device, position_ids=positions)
    assert got.inputs_embeds.dim() == 2
    assert got.position_ids.shape[:-1] == (() if positions is None else positions.shape[:-1])


LAYOUTS = {
    "transposed": lambda embeds: embeds.transpose(1, 2).contiguous().transpose(1, 2),
    "every other column": lambda embeds: embeds.repeat_interleave(2, dim=2)[:, :, ::2],
    "every other token": lambda embeds: embeds.repeat_interleave(2, dim=1)[:, ::2],
    "one row for all": lambda embeds: embeds[:1].expand_as(embeds),
    "one token for all": lambda embeds: embeds[:, :1].expand_as(embeds),
    "not aligned": lambda embeds: torch.nn.functional.pad(embeds, (1, 0))[:, :, 1:],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, backend, device):
    embeds, keep_mask = prompt(3, 40, 32)
    positions = torch.randint(1, 99, (3, 3, 40))
    expected = csrc_ref.compact(LAYOUTS[layout](embeds), keep_mask, position_ids=positions)
    got = compact(
        LAYOUTS[layout](embeds.to(device)),
        LAYOUTS["every other column"](keep_mask[None].to(device))[0],
        position_ids=LAYOUTS["transposed"](positions.to(device)),
        backend=backend,
    )
    assert_same(got, expected)
    assert all(part.is_contiguous() for part in got)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_mask_for_all_rows(backend, device):
    embeds, keep_mask = prompt(3, 40)
    shared = keep_mask[:1].expand(3, -1)
    assert_same(
        compact(embeds.to(device), keep_mask[:1].to(device).expand(3, -1), backend=backend),
        csrc_ref.compact(embeds, shared),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_that_are_no_numbers_are_copied_and_those_of_dropped_tokens_stay_away(backend, device):
    embeds, keep_mask = prompt(2, 40)
    embeds[~keep_mask] = torch.nan
    embeds[0, keep_mask[0].nonzero()[0]] = torch.inf
    got = assert_matches(embeds, keep_mask, backend, device, length=40)
    assert not got.inputs_embeds.isnan().any()
    assert got.inputs_embeds.isinf().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_longest_rows(backend, device):
    num_tokens = 262144
    keep_mask = torch.zeros(2, num_tokens, dtype=torch.bool)
    keep_mask[0, torch.randint(num_tokens, (300,))] = True
    keep_mask[1, [0, 5000, num_tokens - 1]] = True
    embeds = torch.arange(1.0, num_tokens + 1).view(1, -1, 1).expand(2, -1, 4)
    got = compact(embeds.to(device), keep_mask.to(device), backend=backend)
    for row, kept in enumerate(keep_mask):
        tokens = kept.nonzero().flatten()
        assert torch.equal(got.source[row].cpu()[-len(tokens) :], tokens)
        assert torch.equal(got.inputs_embeds[row].cpu()[-len(tokens) :, 3], tokens + 1.0)
        assert got.attention_mask[row].sum() == len(tokens)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_beyond_2_to_the_31_elements(backend, device):
    """Memory is only reserved, not read."""
    num_tokens, hidden_size = 70_000, 32_768
    try:
        embeds = torch.empty(1, num_tokens, hidden_size, dtype=torch.float16, device=device)
    except RuntimeError:
        pytest.skip("no 4.6 GB of addresses to be had")
    assert embeds.numel() > 2**31
    keep_mask = torch.zeros(1, num_tokens, dtype=torch.bool, device=device)
    kept = torch.tensor([65_530, 65_537, num_tokens - 1], device=device)
    keep_mask[0, kept] = True
    embeds[0, kept] = torch.rand(len(kept), hidden_size, dtype=torch.float16, device=device)
    got = compact(embeds, keep_mask, backend=backend)
    assert torch.equal(got.inputs_embeds[0], embeds[0, kept])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_keeps_more_than_its_length(backend, device):
    """On a CPU an error; the kernels themselves, whom a GPU does not tell, keep the last tokens of such a row."""
    embeds, keep_mask = prompt(2, 30)
    keep_mask[1, 20:] = False
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"length: expected at least 1\d, as many as the fullest row .*, got 6"):
            compact(embeds, keep_mask, length=6, backend=backend)
    last = keep_mask & (keep_mask.flip(1).cumsum(1).flip(1) <= 6)
    got = KERNELS[backend](embeds.to(device), keep_mask.to(device), None, 6)
    expected = csrc_ref.compact(embeds, last, length=6)
    assert_same((got[0], got[1][0], *got[2:]), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend, device):
    """Once and twice: those of dropped tokens are zero."""
    embeds, keep_mask = prompt(2, 4, 2, 0.6, dtype=torch.float64)
    keep_mask[1] = False
    embeds, keep_mask = embeds.to(device).requires_grad_(), keep_mask.to(device)

    def packed(embeds):
        return compact(embeds, keep_mask, length=5, backend=backend).inputs_embeds

    assert torch.autograd.gradcheck(packed, embeds)
    assert torch.autograd.gradgradcheck(lambda embeds: packed(embeds).square(), embeds)
    packed(embeds).sum().backward()
    assert torch.equal(embeds.grad, keep_mask[..., None].double().expand_as(embeds))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_odd_cases(backend, device):
    for shape, length in (((2, 0, 3), 4), ((0, 5, 3), 4), ((2, 5, 3), 0), ((2, 5, 0), 2)):
        embeds = torch.rand(shape, device=device, requires_grad=True)
        keep_mask = torch.zeros(shape[:2], device=device) > 0
        compact(embeds, keep_mask, length=length, backend=backend).inputs_embeds.sum().backward()
        assert embeds.grad.shape == shape
        assert not embeds.grad.any()


def test_only_embeddings_carry_gradients():
    embeds, keep_mask = prompt()
    assert not any(part.requires_grad for part in compact(embeds, keep_mask))
    got = compact(embeds.requires_grad_(), keep_mask)
    assert [part.requires_grad for part in got] == [True, False, False, False]
    with torch.no_grad():
        assert not compact(embeds, keep_mask).inputs_embeds.requires_grad
    with torch.inference_mode():
        assert_same(compact(embeds, keep_mask), csrc_ref.compact(embeds.detach(), keep_mask))


def test_what_else_has_one_entry_a_token_follows_by_the_source():
    embeds, keep_mask = prompt()
    kinds = torch.randint(0, 9, keep_mask.shape)
    got = compact(embeds, keep_mask)
    for row in range(2):
        packed = torch.take_along_dim(kinds, got.source, dim=1)[row][got.attention_mask[row] == 1]
        assert torch.equal(packed, kinds[row][keep_mask[row]])


BAD_CALLS = {
    "no tensor": (dict(inputs_embeds=[1.0]), TypeError, "inputs_embeds: expected a torch.Tensor, got list"),
    "ids": (dict(inputs_embeds=torch.ones(2, 5).long()), TypeError, "inputs_embeds: .*, got torch.int64; token ids ar"),
    "half of a byte": (
        dict(inputs_embeds=torch.ones(2, 5, 4).to(torch.float8_e4m3fn)),
        TypeError,
        "expected dtype float32, float16, bfloat16 or float64, got torch.float8_e4m3fn",
    ),
    "dimensions": (
        dict(inputs_embeds=torch.ones(2, 5, 4, 1)),
        ValueError,
        r"inputs_embeds: expected \[B, T, C\] or \[T, C\], got shape \[2, 5, 4, 1\]",
    ),
    "no mask": (dict(keep_mask=None), TypeError, "keep_mask: expected a torch.Tensor, got NoneType"),
    "mask dtype": (dict(keep_mask=torch.ones(2, 5)), TypeError, r"keep_mask: expected dtype torch.bool.*\.bool\(\)"),
    "mask shape": (
        dict(keep_mask=torch.ones(5) > 0),
        ValueError,
        r"keep_mask: expected shape \[2, 5\] \(one entry a t",
    ),
    "mask device": (dict(keep_mask=torch.ones(2, 5, device="meta") > 0), ValueError, "keep_mask: expected device cpu"),
    "positions type": (dict(position_ids=[0, 1]), TypeError, "position_ids: expected a torch.Tensor, got list"),
    "positions dtype": (
        dict(position_ids=torch.ones(2, 5)),
        TypeError,
        r"position_ids: expected dtype int32 or int64, got torch.float32; use position_ids.long\(\)",
    ),
    "positions shape": (
        dict(position_ids=torch.ones(2, 4).long()),
        ValueError,
        r"position_ids: expected shape \[2, 5\], or \[A, 2, 5\] .*, got \[2, 4\]; one position a token",
    ),
    "positions batch": (
        dict(position_ids=torch.ones(3, 5).long()),
        ValueError,
        r"expected shape \[2, 5\].*got \[3, 5\]",
    ),
    "no axes": (dict(position_ids=torch.ones(0, 2, 5).long()), ValueError, r"got \[0, 2, 5\]"),
    "positions dimensions": (dict(position_ids=torch.ones(5).long()), ValueError, r"position_ids: .* got \[5\]"),
    "positions device": (
        dict(position_ids=torch.ones(2, 5, device="meta").long()),
        ValueError,
        r"position_ids: expected device cpu, got meta; use position_ids.to\('cpu'\)",
    ),
    "length type": (dict(length=2.0), TypeError, "length: expected an int >= 0.*, got float; None counts"),
    "length bool": (dict(length=True), TypeError, "length: expected an int .*, got bool"),
    "length tensor": (dict(length=torch.tensor(5)), TypeError, "got Tensor; read it first, or pass None"),
    "length negative": (dict(length=-1), ValueError, "length: expected an int >= 0.*, got -1"),
    "length too small": (dict(length=4), ValueError, "length: expected at least 5, .*, got 4; None counts"),
    "backend": (dict(backend="cuda"), ValueError, "backend: expected None, 'triton' or 'torch', got 'cuda'"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_say_what_to_do(name):
    changes, error, message = BAD_CALLS[name]
    arguments = {"inputs_embeds": torch.ones(2, 5, 4), "keep_mask": torch.ones(2, 5) > 0} | changes
    with pytest.raises(error, match=message):
        compact(**arguments)


def test_unbatched_positions_have_no_batch():
    with pytest.raises(ValueError, match=r"position_ids: expected shape \[5\], or \[A, 5\] .*got \[1, 1, 5\]"):
        compact(torch.ones(5, 4), torch.ones(5) > 0, position_ids=torch.ones(1, 1, 5).long())


@pytest.mark.parametrize("positions", [None, POSITIONS["axes"](2, 37)])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(positions, grad, device):
    embeds, keep_mask = (tensor.to(device) for tensor in prompt())
    positions = None if positions is None else positions.to(device)
    for backend in BACKENDS:
        torch.library.opcheck(
            torch.ops.hawk_kernels.compact.default, (embeds.requires_grad_(grad), keep_mask, positions, 30, backend)
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic):
    def step(embeds, keep_mask, position_ids, length):
        got = compact(embeds * 2, keep_mask, position_ids=position_ids, length=length)
        return got.inputs_embeds + 1, got.position_ids, got.attention_mask * 3, got.source

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for num_tokens, length in ((37, 30), (50, 41), (64, 64)):
        embeds, keep_mask = prompt(2, num_tokens)
        positions = torch.randint(0, 99, (3, 1, num_tokens))
        for got, expected in zip(
            compiled(embeds, keep_mask, positions, length), step(embeds, keep_mask, positions, length), strict=True
        ):
            assert torch.equal(got, expected)


def test_compiles_with_gradients():
    embeds, keep_mask = prompt()
    step = torch.compile(
        lambda embeds: compact(embeds, keep_mask, length=30).inputs_embeds.square().sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    step(embeds.requires_grad_()).backward()
    assert torch.equal(embeds.grad, 2 * embeds.detach() * keep_mask[..., None])


def test_compiles_without_a_length_where_numbers_may_be_read():
    embeds, keep_mask = prompt()
    compiled = torch.compile(lambda e, k: compact(e, k).inputs_embeds * 2, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        assert torch.equal(compiled(embeds, keep_mask), compact(embeds, keep_mask).inputs_embeds * 2)


def test_fake_tensors_know_the_shapes():
    with torch._subclasses.FakeTensorMode():
        got = compact(
            torch.rand(2, 9, 4).half(), torch.rand(2, 9) < 1, position_ids=torch.zeros(3, 1, 9).int(), length=5
        )
    assert [tuple(part.shape) for part in got] == [(2, 5, 4), (3, 2, 5), (2, 5), (2, 5)]
    assert [part.dtype for part in got] == [torch.float16, torch.int32, torch.int64, torch.int64]


def test_export():
    class Packer(torch.nn.Module):
        def forward(self, embeds, keep_mask):
            return tuple(compact(embeds, keep_mask, length=30))

    inputs = prompt()
    exported = torch.export.export(Packer(), inputs)
    assert_same(exported.module()(*inputs), Packer()(*inputs))


def run_kernel(device, batch=3, num_tokens=61, hidden_size=40, length=70):
    embeds, keep_mask = prompt(batch, num_tokens, hidden_size)
    positions = torch.randint(1, 99, (3, batch, num_tokens))
    return triton_compaction.compact(*(tensor.to(device) for tensor in (embeds, keep_mask, positions)), length)


def test_one_launch(monkeypatch, device):
    grids = []
    kernel = triton_compaction._compact_kernel

    class Counting:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(triton_compaction, "_compact_kernel", Counting())
    for num_tokens in (1, 5000):
        embeds, keep_mask = prompt(2, num_tokens, 600, 0.02)
        compact(embeds.to(device), keep_mask.to(device), length=200, backend="triton")
    assert len(grids) == 2


@pytest.mark.parametrize("sizes", [(3, 61, 40, 70), (2, 4200, 600, 50)])
def test_nothing_is_written_outside_the_outputs_and_nothing_read_that_was_not_written(monkeypatch, sizes, device):
    """Outputs in the middle of larger buffers, all of it poisoned."""
    torch.manual_seed(1)
    clean = run_kernel(device, *sizes)
    guards, empty = [], torch.empty

    def guarded(size, *, dtype, device):
        count = int(torch.Size(size).numel())
        buffer = empty(count + 128, dtype=dtype, device=device).fill_(-7)
        guards.append((buffer[:64], buffer[64 + count :]))
        return buffer[64 : 64 + count].view(size)

    monkeypatch.setattr(torch, "empty", guarded)
    torch.manual_seed(1)
    for got, expected in zip(run_kernel(device, *sizes), clean, strict=True):
        assert torch.equal(got, expected)
    assert len(guards) == 4
    assert all((zone == -7).all() for pair in guards for zone in pair)


def test_launches_on_the_device_of_the_tensors(monkeypatch, device):
    entered = []

    @contextmanager
    def on_device(device):
        entered.append(device)
        yield

    monkeypatch.setattr(triton_compaction, "on_device", on_device)
    assert run_kernel(device)[0].device == entered[0]


@pytest.mark.parametrize("element_size", [2, 4, 8])
@pytest.mark.parametrize("hidden_size", [1, 896, 3584, 8192])
@pytest.mark.parametrize(
    ("batch", "num_tokens", "length"), [(1, 20, 20), (1, 5120, 1100), (64, 1296, 300), (1, 2**18, 2**18)]
)
def test_every_grid_covers_its_outputs(batch, num_tokens, length, hidden_size, element_size):
    config = triton_compaction.launch_config(batch, num_tokens, length, hidden_size, element_size)
    tiles, splits = config["grid"]
    assert tiles == batch * -(-length // config["slots_per_program"])
    assert (splits - 1) * config["columns_per_program"] < hidden_size <= splits * config["columns_per_program"]
    assert config["slots_per_program"] % config["blocks"]["BLOCK_SLOTS"] == 0
    # whole vectors of 16 bytes in every program
    assert config["columns_per_program"] * element_size % 16 == 0


@pytest.fixture
def as_on_a_gpu(monkeypatch, device):
    """On a CPU the code paths of a GPU, whose kernels Triton's interpreter runs, and no reading that is free there."""
    if device.type == "cpu":
        monkeypatch.setattr(operator, "_check_fits", lambda keep_mask, length: None)
        for name, module in list(sys.modules.items()):
            if name.startswith("hawk_kernels.") and hasattr(module, "choose_backend"):
                monkeypatch.setattr(module, "choose_backend", lambda *_: "triton")


def test_a_read_inside_an_operator_is_counted():
    with HostReads() as reads:
        compact(*prompt(), length=37, backend="torch")
    assert "compact.py: item" in reads.places


def test_one_host_read_without_a_length_and_none_with_it(as_on_a_gpu, device):
    embeds, keep_mask = (tensor.to(device) for tensor in prompt())
    with HostReads() as reads:
        compact(embeds, keep_mask)
    assert reads.places == ["compact.py: _local_scalar_dense"]
    with HostReads() as reads:
        compact(embeds, keep_mask, length=30)
    assert reads.places == []


# M-RoPE, features for deeper layers, masks over pairs
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_a_pruned_prefill_reads_its_ids_and_nothing_else(family, as_on_a_gpu, device):
    """The new length follows from the ids, which say how many tokens each row keeps. Later steps read nothing."""
    model = tiny_model(family).to(device)
    inputs = batch(family, question(Picture(4, 4)), question([Picture(4, 4)] * 2, seed=3, after=2))
    inputs = {name: value.to(device) for name, value in inputs.items()}
    with HostReads() as reads, prune(model, 0.3, head_weights="uniform") as pruning, torch.no_grad():
        model(**inputs)
    assert all(sample.visual_tokens_after < sample.visual_tokens_before for sample in pruning.stats.samples)
    assert reads.places == ["prompt.py: cpu"]
    with HostReads() as reads, prune(model, 0.3, head_weights="uniform"):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert reads.places == ["prompt.py: cpu"]


CODE = """
import json, re
from bench.compile_only import _ptxas_report, build, variants
found = {}
for variant in variants():
    if variant.name in ("compact bf16", "compact fp64"):
        compiled = build(variant, "sm_90")
        ptx, ttgir = compiled.asm["ptx"], compiled.asm["ttgir"]
        written, read = ttgir.index("tt.store"), ttgir.index("cacheModifier = cg")
        found[variant.name] = {
            "loads": len(re.findall(r"ld.global.(v4.b32|v2.b64)", ptx[ptx.index("ld.global.cg"):])),
            "stores": len(re.findall(r"st.global.(v4.b32|v2.b64)", ptx)),
            "barrier": "ttg.barrier" in ttgir[written:read] or "gpu.barrier" in ttgir[written:read],
            "emitted": "bar.sync" in ptx[ptx.index("st.global"):ptx.index("ld.global.cg")],
            "spills": _ptxas_report(ptx, 90)[1],
        }
print(json.dumps(found))
"""


def test_the_copy_goes_by_16_bytes_and_after_a_barrier(repository):
    """What some threads of a program have written to `source`, others read: between the two stands a barrier."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", CODE], cwd=repository, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    expected = {"loads": 4, "stores": 4, "barrier": True, "emitted": True, "spills": 0}
    assert json.loads(result.stdout) == {"compact bf16": expected, "compact fp64": expected}
