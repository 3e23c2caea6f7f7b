"""What holds for every operator: where it is found, and what calling it imports."""

import json
import subprocess
import sys

import pytest
import torch

import hawk_kernels

# every public operator, and the stem of its files
OPERATORS = {
    "attention_column_mean": "attention_column_mean",
    "compact": "compact",
    "greedy_dpp": "greedy",
    "greedy_max_min": "greedy",
    "hiprune_select": "hiprune_select",
    "score_and_select": "score_and_select",
    "score_hidden": "score_hidden",
    "score_hidden_and_select": "score_hidden",
    "score_peaks": "score_peaks",
    "score_tokens": "score_and_select",
    "select_topk": "select_topk",
}
PLACES = (
    "hawk_kernels/ops/{}.py",
    "hawk_kernels/backends/eager/{}.py",
    "hawk_kernels/backends/kernels/{}.py",
    "csrc_ref/{}.py",
    "bench/{}.py",
    "tests/test_{}.py",
)
# files that an operator has no need of, and where the work is done instead
EXCEPTIONS = {
    "hawk_kernels/backends/eager/hiprune_select.py": "ops/hiprune_select.py sorts with PyTorch on every device",
    "hawk_kernels/backends/kernels/hiprune_select.py": "ops/hiprune_select.py sorts with PyTorch on every device",
    "bench/hiprune_select.py": "bench/encoder_cost.py measures the method; its choice is a few sorts of short rows",
    "bench/score_hidden.py": "bench/score_and_select.py measures it as the cases of kind hidden",
    "bench/select_topk.py": "bench/score_and_select.py measures it as the cases of kind scores",
}
STEMS = sorted(set(OPERATORS.values()))
# what a module on the left is built on, in PyTorch and in Triton
EAGER_BUILT_ON = {"score_and_select": {"select_topk"}, "score_hidden": {"score_and_select", "select_topk"}}


def test_every_public_operator_is_listed():
    for name in OPERATORS:
        getattr(hawk_kernels, name)  # operators are registered at their first use
    not_operators = {"Compacted", "Layer", "Pruning", "Selection"}
    not_operators |= {"calibrate", "free_workspaces", "load_processor", "prune", "warm_up"}
    not_operators.add("warm_up_score_and_select")
    assert set(OPERATORS) == set(hawk_kernels.__all__) - not_operators
    registered = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "hawk_kernels::" in name}
    assert registered == set(OPERATORS) - {"hiprune_select"}


@pytest.mark.parametrize("stem", STEMS)
def test_one_stem_names_all_files_of_an_operator(stem, repository):
    for place in PLACES:
        path = place.format(stem)
        assert (repository / path).exists() != (path in EXCEPTIONS), path


@pytest.mark.parametrize("name", OPERATORS)
def test_its_functions_are_where_their_stem_says(name, repository):
    stem = OPERATORS[name]
    assert getattr(hawk_kernels, name).__module__ == f"hawk_kernels.ops.{stem}"
    for place in PLACES[1:4]:
        path = place.format(stem)
        if path not in EXCEPTIONS:
            assert f"\ndef {name}(" in (repository / path).read_text()


CALLS = {
    "attention_column_mean": "h.attention_column_mean(torch.ones(2, 3, 4), torch.ones(2, 5, 4), backend='torch')",
    "compact": "h.compact(torch.ones(5, 4), torch.ones(5) > 0, backend='torch')",
    "greedy": "h.greedy_max_min(torch.eye(4), 2, backend='torch')",
    "hiprune_select": "h.hiprune_select(torch.ones(4), torch.ones(4), 2, grid=(2, 2))",
    "score_and_select": "h.score_and_select(*map(torch.ones, ((2, 3, 4), (2, 5, 4), (2,))), 2, backend='torch')",
    "score_hidden": "h.score_hidden_and_select(torch.ones(5, 4), h.Layer(None, 1e-6, torch.eye(4), None, torch.eye(4), "
    "None), torch.ones(2), 2, q_mask=torch.arange(5) > 2, k_mask=torch.arange(5) < 3, backend='torch')",
    "score_peaks": "h.score_peaks(*map(torch.ones, ((2, 3, 4), (2, 5, 4), (2,))), backend='torch')",
    "select_topk": "h.select_topk(torch.ones(4), 2)",
}


EAGER, KERNELS = "hawk_kernels.backends.eager.", "hawk_kernels.backends.kernels."
# every statement runs in a process of its own, which begins with nothing but torch and the package, or Triton as well
SCRIPT = """
import json, os, sys
import torch, hawk_kernels as h
def run(statement):
    if os.fork():
        assert os.wait()[1] == 0, statement
        return
    exec(statement)
    modules = [name for name in sys.modules if name.startswith(("hawk_kernels", "triton"))]
    print(json.dumps([statement, modules]), flush=True)
    os._exit(0)
calls, imports = json.loads(sys.argv[1])
for statement in calls: run(statement)
import triton
for statement in imports: run(statement)
"""


@pytest.fixture(scope="module")
def imported():
    """The modules of the package and of Triton that are there after a statement, by the statement."""
    imports = [f"import {KERNELS}{stem}" for stem in STEMS if stem != "hiprune_select"]
    arguments = json.dumps([list(CALLS.values()), imports])
    result = subprocess.run([sys.executable, "-c", SCRIPT, arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return {statement: set(modules) for statement, modules in map(json.loads, result.stdout.splitlines())}


def below(prefix, modules):
    return {module.removeprefix(prefix) for module in modules if module.startswith(prefix)}


@pytest.mark.parametrize("stem", STEMS)
def test_a_call_in_pytorch_imports_what_it_needs(stem, imported):
    modules = imported[CALLS[stem]]
    own = set() if stem == "hiprune_select" else {stem}
    assert below(EAGER, modules) == own | EAGER_BUILT_ON.get(stem, set())
    assert not below(KERNELS, modules)
    assert "triton" not in modules


@pytest.mark.parametrize("stem", [stem for stem in STEMS if stem != "hiprune_select"])
def test_importing_one_kernel_does_not_load_all(stem, imported):
    modules = imported[f"import {KERNELS}{stem}"]
    assert below(KERNELS, modules) & set(STEMS) == {stem}
