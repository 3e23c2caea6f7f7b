"""What a call costs the host beside a bare launch: how it is measured, and a bound that holds on a busy machine."""

import json
import os
import subprocess
import sys

import pytest

from bench import host_cost
from bench.report import host_section

ROW = {"call_over_launch": 1.0}


def test_calls_are_measured_beside_launches_without_a_gpu(repository, tmp_path):
    """Keeping what follows from a signature takes less than making it anew, which holds whatever else is running."""
    report = tmp_path / "host_cost.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.host_cost", "--device", "cpu", "--rounds", "5", "--json", str(report)]
    result = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    results = json.loads(report.read_text())
    assert results["launcher"] == "does nothing"
    assert set(results["rows"]) == {
        "attention_column_mean",
        "compact",
        "score_and_select",
        "score_and_select, masked",
        "score_hidden",
        "score_hidden_and_select",
        "score_peaks",
        "score_tokens",
        "select_topk",
    }
    for name, row in results["rows"].items():
        assert row["call_over_launch"] < row["call_with_nothing_kept_over_launch"], name
        assert row["call_over_launch"] < row["call_over_direct_launch"], name
        assert row["parts"]["direct launch"] < row["bare_launch"], name
        assert None not in row["parts"].values(), name
        assert f"| {name} |" in host_section(results)


@pytest.mark.parametrize(("ratio", "fails"), [(1.49, False), (1.51, True)])
@pytest.mark.parametrize("is_checked", [False, True])
def test_a_call_that_takes_too_long_fails_where_that_is_asked_for(ratio, fails, is_checked, monkeypatch, tmp_path):
    rows = {"quick": ROW, "compact": ROW | {"call_over_launch": ratio}}
    monkeypatch.setattr(host_cost, "run", lambda *arguments: {"rows": rows})
    options = ["--json", str(tmp_path / "host_cost.json"), *(["--check"] if is_checked else [])]
    monkeypatch.setattr(sys, "argv", ["host_cost", *options])
    if fails and is_checked:
        with pytest.raises(SystemExit, match=r"more than 1\.5 bare launches: compact$"):
            host_cost.main()
    else:
        host_cost.main()
