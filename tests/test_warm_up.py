"""After warm_up no prompt compiles a kernel. Only Triton's keys are made here, and two kernels for a GPU elsewhere."""

import json
import os
import subprocess
import sys

import pytest
import torch

import hawk_kernels
from hawk_kernels import prune, warm_up, warm_up_score_and_select
from hawk_kernels.__main__ import main
from tests.tiny_models import qwen_vl

COVERED = [
    "hawk:qwen2_5_vl:bfloat16:shared",
    "hawk:gemma3:float32:per_image",
    "hawk_rope:qwen2_5_vl:bfloat16:shared",
    "fastv:llava:bfloat16:shared",
    "hiprune:qwen2_5_vl:bfloat16:shared",
    "hiprune:llava:float32:per_image",
    "cdpruner:internvl:bfloat16:shared",
    "sparsevlm+recycle:llava:bfloat16:shared",
    "prumerge:llava:bfloat16:shared",
]
# Without rows of more than 2048 tokens, and without batches, whose masks are not aligned.
TOO_LITTLE = {
    "hawk:qwen2_5_vl:bfloat16:shared:2048:64": "_score_hidden_kernel",
    "divprune:llava:bfloat16:per_image:2048:64": "_max_min_kernel",
    "hawk:qwen2_5_vl:bfloat16:shared:262144:1": "_compact_kernel",
}
MOST_VARIANTS = 4


def with_the_compiler(repository, *arguments, **variables):
    """Run a module of the repository with Triton's compiler in place of its interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, *arguments], cwd=repository, env=environment | variables, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def streams(repository):
    return json.loads(
        with_the_compiler(repository, "-m", "tests.warm_up_streams", *COVERED, *TOO_LITTLE, "--prompts", "8")
    )


@pytest.mark.parametrize("case", COVERED)
def test_no_prompt_needs_a_kernel_that_was_not_warmed_up(streams, case):
    found = streams[case]
    assert found["missing"] == []
    assert found["notes"] == []
    assert found["needed by real prompts"] > 0
    assert found["needed by long prompts"] > 0


@pytest.mark.parametrize("case", COVERED)
def test_warming_up_compiles_few_variants(streams, case):
    assert {name: count for name, count in streams[case]["warmed"].items() if count > MOST_VARIANTS} == {}


@pytest.mark.parametrize("case", COVERED)
def test_the_config_of_a_model_tells_what_the_model_tells(streams, case):
    assert streams[case]["differs by the config"] == []


@pytest.mark.parametrize("case", TOO_LITTLE)
def test_a_stream_shows_what_was_left_out(streams, case):
    assert {name for name, _ in streams[case]["missing"]} == {TOO_LITTLE[case]}


def test_the_command_compiles_for_a_gpu_elsewhere_and_its_cache_is_found_again(repository, tmp_path):
    arguments = ("-m", "hawk_kernels", "warm-up", "hawk_kernels/assets/tinyvqa", "--json", "--target", "cuda:90")
    small = ("--method", "downsample", "--max-tokens", "64", "--max-batch", "1")
    first, second = (
        json.loads(with_the_compiler(repository, *arguments, *small, TRITON_CACHE_DIR=str(tmp_path)))["warm_ups"][0]
        for _ in range(2)
    )
    assert first["targets"] == ["sm_90"]
    assert first["kernels"] == second["kernels"] == {"_compact_kernel": 2}
    assert (first["compiled"], first["cached"], first["ready"]) == (2, 0, 0)
    assert (second["compiled"], second["cached"], second["ready"]) == (0, 2, 0)
    assert len(list(tmp_path.glob("*/_compact_kernel.cubin"))) == 2


_AFTERWARDS = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from hawk_kernels import prune
from hawk_kernels.compile_ahead import compile_launches_for
from hawk_kernels.hf.warm_up import launches_of_prune
from hawk_kernels.methods import Method
from tests.tiny_models import Picture, question, qwen_batch, qwen_vl

class Waits(Method):
    name = "waits"
    def score(self, view):
        keys = view.visual_keys().float()
        return (keys / keys.abs().max().item()).sum((1, 3)).masked_fill(~view.candidates, -torch.inf)

run, model = JITFunction.run, qwen_vl()
weights = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
with prune(model, 0.3, method=Waits()) as pruning:
    launches, notes = launches_of_prune(pruning._anatomy, pruning._choosers, "sm_90", reach=(64, 1))
    model(**qwen_batch(question(Picture(4, 4))))
    assert pruning.stats.samples
assert {launch.kernel.fn.__name__ for launch in launches} == {"_compact_kernel"}
(note,) = notes
assert note.startswith("method 'waits' cannot be followed on tensors without data"), note
assert JITFunction.run is run
assert weights == {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
"""


def test_a_method_that_reads_values_is_named_and_nothing_is_left_behind(repository):
    with_the_compiler(repository, "-c", _AFTERWARDS)


def test_without_a_gpu_nothing_is_compiled():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    model = qwen_vl(layers=1)
    before = prune(model, 0.2, head_weights="uniform")
    with prune(model, 0.2, head_weights="uniform") as inside:
        reports = [before.warm_up(), inside.warm_up(), warm_up_score_and_select(4, 2, 16)]
        model(torch.tensor([[10, 11]]))
    for report in (*reports, warm_up(model, 0.2, head_weights="uniform", progress=False)):
        assert not report.kernels
        assert report.compiled == report.cached == report.ready == 0
        assert "nothing is to be compiled" in str(report)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"max_tokens": 0}, ValueError, "max_tokens: expected an int >= 1, got 0; the default is 262144"),
        ({"max_tokens": 2.5}, TypeError, "max_tokens: expected an int >= 1, got float; the default is 262144"),
        ({"max_batch": True}, TypeError, "max_batch: expected an int >= 1, got bool; the default is 64"),
        ({"method": "eagle"}, ValueError, "method: expected one of"),
        ({"colour": 1}, TypeError, "method 'hawk' has no option 'colour'"),
    ],
)
def test_wrong_arguments_say_what_was_expected(arguments, kind, message):
    with pytest.raises(kind, match=message):
        warm_up(qwen_vl(layers=1), 0.2, **{"head_weights": "uniform", **arguments})


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((4, 3, 16), ValueError, "num_key_value_heads: expected a divisor of the 4 query heads, got 3"),
        ((0, 1, 16), ValueError, "num_heads: expected an int >= 1, got 0; see the model's config"),
        ((4, 2, "16"), TypeError, "head_dim: expected an int >= 1, got str; see the model's config"),
        ((4, 2, 16, torch.float64), TypeError, "dtype: expected float32, float16 or bfloat16, got torch.float64"),
    ],
)
def test_wrong_shapes_say_what_was_expected(arguments, kind, message):
    with pytest.raises(kind, match=message):
        warm_up_score_and_select(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "cuda:9"], "--target: expected cuda: and a compute capability from 80 on, got 'cuda:9'"),
        (["--target", "hip:942"], "--target: expected cuda: and a compute capability from 80 on, got 'hip:942'"),
        (["--target", "cuda:90", "--option", "l2"], "--option: expected NAME=VALUE, got 'l2'"),
        (["--target", "cuda:90", "--option", "colour=1"], "method 'hawk' has no option 'colour'"),
    ],
)
def test_the_command_says_what_it_expected(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(hawk_kernels.compile_ahead, "_is_interpreting", lambda: False)
    assert main(["warm-up", "hawk_kernels/assets/tinyvqa", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_no_call_compiles_after_warming_up(monkeypatch):
    from triton import knobs

    report = warm_up_score_and_select(4, 2, 64, torch.bfloat16, max_tokens=4096, max_batch=2, progress=False)
    assert report.kernels
    compiled = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda **facts: compiled.append(facts["src"]))
    w = torch.ones(4, device="cuda")
    for batch in (1, 2):
        for length in (1, 100, 2048, 2049, 4096):
            q = torch.randn(batch, 4, 7, 64, device="cuda", dtype=torch.bfloat16)
            k = torch.randn(batch, 2, length, 64, device="cuda", dtype=torch.bfloat16)
            hawk_kernels.score_and_select(q, k, w, 0.3)
    assert compiled == []
