"""Time every public operator once, after parity: `python -m pytest bench/test_operators.py --benchmark-enable`.

Cases, inputs and parity checks are those of the benchmarks of each operator; comparisons with other implementations
are theirs too.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import csrc_ref
import hawk_kernels
from bench import attention_column_mean, compact, greedy, score_peaks
from bench.cases import KEEP_RATIO, QWEN_7B, Case, Decoder
from bench.cli import default_device
from bench.contenders import OURS, contenders
from bench.inputs import HiddenStates, QueriesAndKeys, make_inputs
from bench.parity import ParityError
from bench.timing import synchronize

Call = Callable[[], object]

_SMALL = Decoder("small", 16, 2, 128, 512)
_GRID = (1, 24, 24)


def _case(kind: str, device: torch.device) -> Case:
    """Return Qwen2.5-VL-7B's queries and keys, or hidden states of a narrower model, as large as a square picture."""
    decoder = _SMALL if kind == "hidden" else QWEN_7B
    return Case(kind, decoder, 20, 1296, "bf16" if device.type == "cuda" else "fp32")


def selecting(kind: str, device: torch.device) -> Call:
    """Return the call of our contender, `score_and_select` and its like, that makes the kept tokens."""
    case = _case(kind, device)
    inputs = make_inputs(case, device)
    ours = next(one for one in contenders(case, inputs) if one.name == OURS)
    ours.check(inputs.expected(case))
    return ours.run


def scoring(kind: str, device: torch.device) -> Call:
    """Return the call of `score_tokens` or `score_hidden`."""
    case = _case(kind, device)
    inputs = make_inputs(case, device)

    def run() -> torch.Tensor:
        if isinstance(inputs, QueriesAndKeys):
            return hawk_kernels.score_tokens(inputs.q, inputs.k, inputs.w, normalize=case.normalize)
        assert isinstance(inputs, HiddenStates)
        return hawk_kernels.score_hidden(**inputs.arguments, normalize=case.normalize)

    found, expected = run().double(), inputs.expected(case)
    largest = expected[expected.isfinite()].abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * largest)
    return run


def averaging(device: torch.device) -> Call:
    """Return the call of `attention_column_mean` on one image of CLIP."""
    shape = attention_column_mean.SQUARES[0]
    attention_column_mean.check_parity(shape, device)
    return attention_column_mean.contestants(shape, device)[attention_column_mean.OURS]


def peaking(device: torch.device) -> Call:
    """Return the call of `score_peaks` on one picture."""
    inputs = score_peaks.SHAPES[1].inputs(device)
    score_peaks.check_parity(inputs)
    return score_peaks.contestants(inputs)[score_peaks.OURS]


def compacting(device: torch.device) -> Call:
    """Return the call of `compact` on one prompt."""
    prompt = compact.Prompt(compact.SHAPES[0], device)
    run = compact.contenders(prompt)[compact.OURS]
    prompt.check(run())
    return run


def picking(method: str, device: torch.device) -> Call:
    """Return the call of `greedy_max_min` or `greedy_dpp` on one picture of LLaVA-1.5."""
    shape = greedy.SHAPES[0]
    inputs = greedy.Inputs.make(shape, device)
    greedy.check_parity(method, inputs, shape.kept)
    return greedy.contestants(method, "whole", inputs, shape.kept)["ours"]


def pruning_by_encoder(device: torch.device) -> Call:
    """Return the call of `hiprune_select` on one picture of LLaVA-1.5."""
    generator = torch.Generator().manual_seed(0)
    of_object, of_deep = (torch.rand(1, _GRID[1] * _GRID[2], generator=generator) for _ in range(2))
    expected = csrc_ref.hiprune_select(of_object[0], of_deep[0], KEEP_RATIO, grid=_GRID)
    on_device = of_object.to(device), of_deep.to(device)

    def run() -> hawk_kernels.Selection:
        return hawk_kernels.hiprune_select(*on_device, KEEP_RATIO, grid=_GRID)

    if not torch.equal(run().mask[0].cpu(), expected.mask):
        raise ParityError("hiprune_select: kept other tokens than the reference")
    return run


OPERATORS: dict[str, Callable[[torch.device], Call]] = {
    "attention_column_mean": averaging,
    "compact": compacting,
    "greedy_dpp": lambda device: picking("dpp", device),
    "greedy_max_min": lambda device: picking("max_min", device),
    "hiprune_select": pruning_by_encoder,
    "score_and_select": lambda device: selecting("queries", device),
    "score_hidden": lambda device: scoring("hidden", device),
    "score_hidden_and_select": lambda device: selecting("hidden", device),
    "score_peaks": peaking,
    "score_tokens": lambda device: scoring("queries", device),
    "select_topk": lambda device: selecting("scores", device),
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_operator(benchmark: BenchmarkFixture, operator: str) -> None:
    device = default_device()
    call = OPERATORS[operator](device)

    def run() -> None:
        call()
        synchronize(device)

    benchmark(run)


def test_every_public_operator_is_timed() -> None:
    public = {name for name in hawk_kernels.__all__ if name.islower()}
    assert set(OPERATORS) == public - {
        "calibrate",
        "free_workspaces",
        "load_processor",
        "prune",
        "warm_up",
        "warm_up_score_and_select",
    }
