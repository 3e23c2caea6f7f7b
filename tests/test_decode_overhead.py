"""The benchmark of decoding inside a block runs, compares before it times, and says what it measured."""

import json

from bench import decode_overhead


def test_steps_inside_and_outside_are_compared_and_timed(tmp_path, capsys):
    path = tmp_path / "decode.json"
    sizes = ["--device", "cpu", "--hidden", "64", "--layers", "1", "--side", "4", "--rounds", "3"]
    assert decode_overhead.main([*sizes, "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert [row["case"] for row in results["rows"]] == ["one row", "left-padded rows", "without position ids"]
    for row in results["rows"]:
        assert row["prompt_tokens"] - row["cached_tokens"] == 16 - 3
        assert row["ratio"] > 0
    assert results["environment"]["torch"]
    assert "ratio" in capsys.readouterr().out
