"""What the benchmark of encoders reports, on small encoders and on made-up ones."""

import json
from types import SimpleNamespace

import pytest
import torch

from bench import encoder_cost
from bench.encoder_cost import HOOKS, PLAIN, WEIGHTS, Case


def test_hooks_and_written_out_weights_agree_and_every_way_is_timed(monkeypatch, tmp_path):
    cases = (Case("clip-l-336", 2, 24, 2, 336, "float32"), Case("qwen2.5-vl", 4, 32, 1, 168, "float32"))
    for published in (encoder_cost._CLIP_L, encoder_cost._QWEN2_5_VL):
        monkeypatch.setitem(published, "hidden_size", 64)
        monkeypatch.setitem(published, "intermediate_size", 64)
    monkeypatch.setitem(encoder_cost._CLIP_L, "num_attention_heads", 2)
    monkeypatch.setitem(encoder_cost._QWEN2_5_VL, "num_heads", 2)
    monkeypatch.setattr(encoder_cost, "CPU_CASES", cases)
    monkeypatch.setitem(encoder_cost._CASE_SECONDS, "cpu", 0.0)
    results = encoder_cost.run(tmp_path, torch.device("cpu"), rounds=2)
    written = json.loads((tmp_path / "encoder_cost.json").read_text())
    assert [row["title"] for row in written["rows"]] == [str(case) for case in cases]
    for row in results["rows"]:
        assert row["error"] < 1e-5
        assert row["reduced"]
        assert list(row["ways"]) == [PLAIN, HOOKS, WEIGHTS]
        assert all(way["times_plain"] > 0 for way in row["ways"].values())
        assert row["ways"][WEIGHTS]["peak_bytes"] > row["ways"][HOOKS]["peak_bytes"]
    table = (tmp_path / "encoder_cost.md").read_text()
    assert "| clip-l-336, 2 x 336^2, 2 of 24 layers, float32 | sdpa, two hooks |" in table
    assert "but do not measure the encoder" in table


class MadeUp:
    """Stands for `Encoding`, with a given error, and too large for the weights."""

    wrong = 0.0

    def __init__(self, case, device):
        self.recorder = SimpleNamespace(options=dict)

    def error(self):
        return self.wrong

    def see(self, side, dtype):
        pass

    def plain(self):
        torch.ones(100).sum()

    with_hooks = plain

    def with_weights(self):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB\nand more")


def test_a_way_that_runs_out_of_memory_says_so_and_the_others_are_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(encoder_cost, "Encoding", MadeUp)
    monkeypatch.setattr(encoder_cost, "CPU_CASES", (Case("qwen2.5-vl", 32, 32, 1, 2016, "bfloat16"),))
    (row,) = encoder_cost.run(tmp_path, torch.device("cpu"), rounds=2)["rows"]
    assert row["ways"][WEIGHTS] == {"failed": "out of memory: tried to allocate 80 GiB"}
    assert row["ways"][HOOKS]["times_plain"] > 0
    table = (tmp_path / "encoder_cost.md").read_text()
    assert "| weights of every layer | out of memory |" in table
    assert "do not measure" not in table


def test_nothing_is_timed_where_parity_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(encoder_cost, "Encoding", MadeUp)
    monkeypatch.setattr(MadeUp, "wrong", 0.5)
    with pytest.raises(SystemExit, match=r"parity failed at clip-l-336.* with an error of 5\.0e-01; no time is given"):
        encoder_cost.run(tmp_path, torch.device("cpu"))
    assert not list(tmp_path.iterdir())
