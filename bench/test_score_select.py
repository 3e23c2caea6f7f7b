"""pytest-benchmark's view of the main contenders: `python -m pytest bench --benchmark-enable`."""

import pytest
import torch

from bench.cases import QWEN_7B, Case
from bench.contenders import OURS, RELEASED, STRONG, contenders
from bench.inputs import make_inputs
from bench.timing import synchronize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = (
    Case("queries", QWEN_7B, 20, 1296, "bf16"),
    Case("queries", QWEN_7B, 64, 1296, "fp32"),
    Case("queries", QWEN_7B, 64, 16384, "bf16"),
    Case("scores", QWEN_7B, 64, 16384, "fp32"),
)


@pytest.mark.parametrize("name", [OURS, RELEASED, STRONG, "torch.topk, sort"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_contender(benchmark, case, name):
    inputs = make_inputs(case, DEVICE)
    contender = next((one for one in contenders(case, inputs) if one.name == name), None)
    if contender is None:
        pytest.skip(f"{name} does not take part")
    contender.check(inputs.expected(case))

    def run():
        contender.run()
        synchronize(DEVICE)

    benchmark(run)
