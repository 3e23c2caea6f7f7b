"""The benchmark of pruning inside the stack gives each method the same average cost, and compares before it times."""

import json

import pytest

from bench import in_stack
from hawk_kernels.methods import resolve_method


def test_every_method_costs_the_same_on_average(tmp_path, capsys):
    path = tmp_path / "in_stack.json"
    methods = ["--methods", "hawk", "fastv", "visionzip", "pyramiddrop", "sparsevlm", "vscan"]
    sizes = [
        *methods,
        "--device=cpu",
        "--hidden=64",
        "--layers=8",
        "--side=12",
        "--rounds=1",
        "--mean=0.5",
        "--new-tokens=4",
    ]
    assert in_stack.main([*sizes, "--json", str(path)]) == 0
    rows = {row["way"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["unpruned", *methods[1:], "fastv hide"]
    compared = {way for way, row in rows.items() if "largest_difference_from_hiding" in row}
    assert compared == {"fastv", "pyramiddrop", "sparsevlm", "vscan"}
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
    for way, row in rows.items():
        if way != "unpruned":
            assert row["mean_visual_tokens"] == pytest.approx(0.5 * 144, abs=2)
            assert (row["kv_bytes"] < rows["unpruned"]["kv_bytes"]) == (way != "fastv hide")
    assert rows["fastv"]["kv_bytes"] == pytest.approx(rows["hawk"]["kv_bytes"], rel=0.03)


def test_a_mean_that_comes_too_late_is_refused():
    assert in_stack.mean_share({2: 0.3}, 16) == pytest.approx((2 + 14 * 0.3) / 16)
    assert in_stack.keep_for(resolve_method("fastv", {}), 0.35, 16) == pytest.approx((16 * 0.35 - 2) / 14)
    with pytest.raises(ValueError, match=r"mean: expected more than 0\.25. for pyramiddrop, got 0.2; pass --mean"):
        in_stack.keep_for(resolve_method("pyramiddrop", {}), 0.2, 16)


def test_methods_that_differ_from_hiding_are_not_timed(monkeypatch):
    model = in_stack.small_model(64, 4, in_stack.torch.device("cpu"))
    prompt = in_stack.make_prompt(4, (8,), in_stack.torch.device("cpu"))
    assert in_stack.check_parity(model, prompt, "fastv", 0.3) < in_stack.TOLERANCE
    monkeypatch.setattr(in_stack, "TOLERANCE", -1.0)
    with pytest.raises(AssertionError, match="fastv: dropping and hiding give logits that differ by"):
        in_stack.check_parity(model, prompt, "fastv", 0.3)
