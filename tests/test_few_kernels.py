"""However long a stream of prompts, one model needs few variants of each kernel; only Triton's keys are made here."""

import json
import os
import subprocess
import sys

import pytest

from hawk_kernels.backends.kernels import finish, greedy, score_and_select, score_hidden
from hawk_kernels.backends.kernels.attention_column_mean import launch_config as columns_config
from hawk_kernels.backends.kernels.configs import Shape, config_for

MOST_VARIANTS = 4
LENGTHS = sorted({2**power + step for power in range(19) for step in (-1, 0, 1)} & set(range(1, 2**18 + 1)))


def without_the_interpreter(repository, *arguments):
    """Run a module of the repository with Triton's compiler in place of its interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=repository, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_random_streams_need_few_variants_of_each_kernel(repository, tmp_path):
    """Ordinary photos, batches, every length, budgets, ratios and masks that are cut out of others, on every table."""
    report = tmp_path / "counts.json"
    without_the_interpreter(repository, "bench.few_kernels", "--prompts", "60", "--seed", "1", "--json", str(report))
    rows = json.loads(report.read_text())
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    counted = {(row["target"], row["model"], use): number for row in rows for use, number in row["variants"].items()}
    kernels = {use.partition(": ")[2] for *_, use in counted}
    assert kernels == {
        "_column_pass",
        "_compact_kernel",
        "_dpp_kernel",
        "_finish",
        "_max_min_kernel",
        "_merge_kernel",
        "_row_pass",
        "_score_and_select_kernel",
        "_score_hidden_kernel",
        "_score_peaks_kernel",
        "_select_kernel",
    }
    assert {stream: number for stream, number in counted.items() if number > MOST_VARIANTS} == {}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("dtype", ["half", "fp32"])
@pytest.mark.parametrize("batch", [1, 64])
def test_few_constants_cover_every_length(architecture, dtype, batch):
    """What a plan tells the compiler takes few values between one token and 262144, wherever the prompt ends."""
    scoring, hidden = set(), set()
    for length in LENGTHS:
        config = config_for(architecture, "score_and_select", Shape(dtype, 128, batch * 4, length))
        for num_queries in (1, 300, 9000):
            plan = score_and_select.make_plan(batch, 28, 4, num_queries, length, 128, "l2", True, config)
            scoring.add(str((plan.static, plan.options)))
        config = config_for(architecture, "score_hidden", Shape(dtype, 0, batch, length))
        plan = score_hidden.make_plan(batch, length, 3584, 28, 4, 128, "l2", True, config)
        hidden.add(str((plan.static, plan.options)))
    assert len(scoring) <= MOST_VARIANTS
    assert len(hidden) <= MOST_VARIANTS


@pytest.mark.parametrize("num_keys", LENGTHS)
def test_blocks_hold_what_they_must(num_keys):
    blocks = finish.blocks_of(num_keys, sum_block=256)
    assert blocks.num_blocks >= finish.num_blocks(num_keys)
    assert not blocks.in_registers or blocks.row >= num_keys
    assert greedy.launch_config(num_keys)["block"]["BLOCK"] >= num_keys
    assert columns_config(28, num_keys, 4096, 128, 2)["blocks"]["BLOCK_N"] in (16, 64)
