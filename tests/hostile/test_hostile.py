"""The fuzzer finds nothing in a few fixed cases, notices a broken package, and ends in order."""

import itertools
import json
import re

import pytest
import torch

from hawk_kernels.methods import METHODS
from tests.hostile import __main__ as command
from tests.hostile import explore
from tests.hostile.cases import MODES, Case, inputs_of, random_cases, simpler
from tests.hostile.explore import Explorer
from tests.hostile.mutants import MUTANTS
from tests.hostile.oracle import Verdict, verdict_of
from tests.hostile.refusals import refusal_of
from tests.tiny_models import IMAGE

FAMILIES = ["llava", "qwen2_5_vl", "gemma3", "qwen3_vl"]
METHODS_OF_MUTANTS = ["hawk", "downsample", "key_norm"]
MOST_CASES = 60


def explorer(seed=0, families=FAMILIES, methods=None, modes=MODES, judge=verdict_of):
    return Explorer(seed, list(families), methods or sorted(METHODS), list(modes), judge)


def test_a_few_cases_of_a_fixed_seed():
    found = explorer(seed=5)
    found.run(seconds=60, num_cases=20)
    assert found.report()[-1].startswith("20 cases")
    assert [explore._line(failure) for failure in found.failures] == []
    assert found.verdicts["passed"] >= 10


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_broken_package_is_noticed(mutant):
    found = explorer(families=["qwen2_5_vl"], methods=METHODS_OF_MUTANTS, modes=mutant.modes or MODES)
    with mutant.applied():
        found.run(seconds=60, num_cases=MOST_CASES, most_failures=1, simplify=False, burst=MOST_CASES)
    assert found.failures, f"{found.verdicts.total()} cases did not show it"
    assert verdict_of(found.failures[0].found_as).kind == "passed"


@pytest.mark.parametrize("line", ["", "[]", '{"rows": ["b"]}', '{"family": "llava", "colour": 1}'])
def test_a_line_that_is_no_case(line, capsys):
    with pytest.raises(SystemExit):
        command.main(["--replay", line])
    assert "--replay" in capsys.readouterr().err


@pytest.mark.parametrize("padding", ["left", "right", "none"])
def test_inputs_have_the_padding_of_the_case(padding):
    rows = ("w3 i1x2 w2", "w5 i2x2 w2 e w3")
    inputs = inputs_of(Case("qwen2_5_vl", rows, padding=padding, separators=False))
    mask, whole = inputs["attention_mask"], inputs_of(Case("qwen2_5_vl", rows))
    assert mask.sum(1).tolist() == (whole["attention_mask"].sum(1) - 2).tolist()
    assert (inputs["input_ids"] == IMAGE).sum(1).tolist() == [2, 4]
    order = mask if padding == "right" else mask.flip(1)
    assert torch.equal(order, order.sort(dim=1, descending=True).values)


def test_a_failure_is_made_simple_and_reported(capsys):
    def judge(case):
        is_wrong = case.mode == "beams" and any("i2x2" in row for row in case.rows)
        return Verdict("failed", "on purpose") if is_wrong else Verdict("passed")

    found = explorer(judge=judge)
    case = Case("llava", ("b w3 i2x2 w5 e", "b w1"), "beams", "dart", 0.5, options={"pivots": 1}, budget="per_image")
    found._note(case, judge(case), simplify=True)
    assert found.failures[0].case == Case("llava", ("i2x2",), "beams")
    assert found.report()[-2] == ('FAILED on purpose\n  --replay \'{"family":"llava","rows":["i2x2"],"mode":"beams"}\'')
    assert all(each != case for each in simpler(case))


def test_ctrl_c_ends_with_a_summary():
    def judge(case):
        if found.verdicts.total() == 2:
            raise KeyboardInterrupt
        return Verdict("refused", "on purpose")

    found = explorer(judge=judge)
    found.run(seconds=60)
    assert found.report()[0] == "refused     2  on purpose"
    assert found.report()[-1].startswith("interrupted: 2 cases of 1 families, 0 passed, 2 refused")


@pytest.mark.parametrize("kind", ["passed", "failed"])
def test_the_exit_status_and_the_file_tell_of_failures(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Explorer, "__init__", _with_judge(lambda case: Verdict(kind, "on purpose")))
    path = tmp_path / "found.json"
    status = command.main(["--cases", "3", "--only", "llava", "--mode", "forward", "--json", str(path)])
    assert status == (1 if kind == "failed" else 0)
    written = json.loads(path.read_text())
    assert (written["cases"], written["families"]) == (3, ["llava"])
    assert len(written["failures"]) == 3 * (kind == "failed")
    assert re.search(r"3 cases of 1 families", capsys.readouterr().out)


def _with_judge(judge):
    right = Explorer.__init__

    def init(self, *args):
        right(self, *args)
        self._judge = judge

    return init


@pytest.mark.parametrize(("option", "value"), [("--only", "gpt2"), ("--method", "best"), ("--mode", "backward")])
def test_unknown_names_are_refused(option, value, capsys):
    with pytest.raises(SystemExit):
        command.main([option, value])
    assert f"{option}: expected some of" in capsys.readouterr().err


def test_only_clear_errors_are_refusals():
    clear = "query: expected text in row 0 to rank its visual tokens by, got none; pass query= or add a question"
    assert refusal_of(ValueError(clear)) == "no text to rank by"
    assert refusal_of(TypeError(clear)) is None
    assert refusal_of(ValueError(clear.split(";")[0].replace(", ", " "))) is None
    assert refusal_of(RuntimeError("shape mismatch")) is None


def test_a_family_is_only_asked_in_modes_that_its_oracle_can_judge():
    """Tokens cannot be hidden from convolutions, so a chat of LFM2-VL has nothing to be compared with."""
    drawn = itertools.islice(random_cases(5, ["lfm2_vl", "llava"], ["hawk"], ["chat"], 1), 20)
    assert {case.family for case in drawn} == {"llava"}
    with pytest.raises(ValueError, match="modes: expected one that the oracle of lfm2_vl can judge, got chat"):
        next(random_cases(5, ["lfm2_vl"], ["hawk"], ["chat"], 1))
