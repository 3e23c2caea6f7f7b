"""Other architectures than Qwen2.5-VL, with random weights."""

import pytest

from tests.on_vllm import oracle
from tests.on_vllm.checkpoint import write_qwen2_vl
from tests.on_vllm.questions import questions

OF_EACH_KIND = 4


@pytest.mark.parametrize("method", ["divprune", "cdpruner"])
def test_qwen2_vl(served, count_equal, tmp_path, method):
    folder = write_qwen2_vl(tmp_path)
    found = served(
        0.6,
        {"method": method},
        architecture="HawkQwen2VLForConditionalGeneration",
        model=folder,
        of_each_kind=OF_EACH_KIND,
    )
    wanted = oracle.answers(str(folder), questions(OF_EACH_KIND), 0.4, method)
    assert len({tuple(answer["ids"]) for answer in wanted}) > 3
    equal, worst = count_equal(f"Qwen2-VL of random weights, {method}, 40 %", found, wanted)
    assert equal == len(wanted)
    assert worst < 1e-4
