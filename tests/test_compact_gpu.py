"""Compaction on a device: what an interpreter cannot show."""

import pytest
import torch

import csrc_ref
from hawk_kernels import compact
from hawk_kernels.selection import Merge
from tests.compact_cases import DTYPES, assert_merged, assert_same, merge_map, prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "num_tokens"), [(1, 1400), (3, 5203), (1, 131072)])
def test_matches_the_torch_backend(batch, num_tokens, dtype, device):
    embeds, keep_mask = (tensor.to(device) for tensor in prompt(batch, num_tokens, 896, 0.2, dtype))
    positions = torch.randint(1, 10**6, (3, batch, num_tokens), device=device)
    expected = compact(embeds, keep_mask, position_ids=positions, backend="torch")
    for _ in range(20):
        assert_same(compact(embeds, keep_mask, position_ids=positions, backend="triton"), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "num_tokens"), [(1, 1400), (3, 5203)])
def test_merging_matches_the_reference_and_gives_the_same_bits_each_time(batch, num_tokens, dtype, device):
    embeds, keep_mask = prompt(batch, num_tokens, 896, 0.05, dtype)
    merge = merge_map(keep_mask, num_tokens)
    there = Merge(*(part.to(device) for part in merge))
    for backend in ("triton", "torch"):
        got = compact(embeds.to(device), keep_mask.to(device), merge=there, backend=backend)
        assert_merged(type(got)(*(part.cpu() for part in got)), embeds, keep_mask, merge)
        for _ in range(10):
            assert_same(compact(embeds.to(device), keep_mask.to(device), merge=there, backend=backend), got)


def test_outputs_beyond_2_to_the_31_elements(device):
    embeds = torch.rand(1, 1, 8192, device=device, dtype=torch.float16).add(1).expand(40, 8192, -1)
    keep_mask = torch.ones(40, 8192, dtype=torch.bool, device=device)
    keep_mask[:, 0] = False
    got = compact(embeds, keep_mask, length=8192)
    assert got.inputs_embeds.numel() > 2**31
    assert not got.inputs_embeds[:, 0].any()
    assert all(torch.equal(row[1:], embeds[0, 1:]) for row in got.inputs_embeds)


def test_graph_capture_and_replay(device):
    embeds, keep_mask = (tensor.to(device) for tensor in prompt(2, 1296, 3584, 0.2, torch.bfloat16))
    compact(embeds, keep_mask, length=400)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compact(embeds, keep_mask, length=400)
    for _ in range(3):
        keep_mask.copy_(torch.rand(keep_mask.shape, device=device) < 0.2)
        graph.replay()
        assert_same(captured, compact(embeds, keep_mask, length=400, backend="torch"))


def test_a_known_length_needs_no_sync(device):
    embeds, keep_mask = (tensor.to(device) for tensor in prompt(2, 1296, 3584, 0.2, torch.bfloat16))
    compact(embeds, keep_mask, length=400)
    torch.cuda.set_sync_debug_mode("error")
    try:
        compact(embeds, keep_mask, length=400)
        with pytest.raises(RuntimeError, match="synchroniz"):
            compact(embeds, keep_mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_merging_is_captured_and_needs_no_sync(device):
    embeds, keep_mask = prompt(2, 1296, 3584, 0.2, torch.bfloat16)
    merge = Merge(*(part.to(device) for part in merge_map(keep_mask, 1296)))
    embeds, keep_mask = embeds.to(device), keep_mask.to(device)
    expected = compact(embeds, keep_mask, length=400, merge=merge)
    torch.cuda.set_sync_debug_mode("error")
    try:
        compact(embeds, keep_mask, length=400, merge=merge.ordered())
        compact(embeds, keep_mask, length=400, merge=merge, backend="torch")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compact(embeds, keep_mask, length=400, merge=merge)
    graph.replay()
    assert_same(captured, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one():
    embeds, keep_mask = (tensor.to("cuda:1") for tensor in prompt())
    assert_same(compact(embeds, keep_mask, backend="triton"), csrc_ref.compact(embeds.cpu(), keep_mask.cpu()))
