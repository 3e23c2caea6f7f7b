"""pytest-benchmark's view of the same contestants: `python -m pytest bench --benchmark-enable`."""

import pytest
import torch

from bench.micro import SHAPES, check_parity
from bench.released import released_steps
from hawk_kernels import score_and_select

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=SHAPES, ids=lambda shape: f"N={shape[0]},M={shape[1]},{str(shape[2])[6:]}")
def inputs(request: pytest.FixtureRequest):
    num_queries, num_keys, dtype, _ = request.param
    q = torch.randn(1, 28, num_queries, 128, device=DEVICE).to(dtype)
    k = torch.randn(1, 4, num_keys, 128, device=DEVICE).to(dtype)
    w = torch.rand(28, device=DEVICE)
    check_parity(q, k, w)
    return q, k, w


def timed(benchmark, run):
    def synchronized():
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(synchronized)


def test_released_steps(benchmark, inputs):
    timed(benchmark, lambda: released_steps(*inputs, 0.2))


def test_score_and_select(benchmark, inputs):
    timed(benchmark, lambda: score_and_select(*inputs, 0.2, normalize="l2"))
