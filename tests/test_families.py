"""Every mode that the support table lists for a family, on a tiny model; those it does not list fail unpruned too."""

import pytest

from bench import support_table
from hawk_kernels.hf.families import FAMILIES, MODES
from tests.family_checks import CHECKS, NEWEST, SUPPORTED, VERSION, check, lacks_unpruned, needs
from tests.tiny_families import BY_NAME

# one family of each kind of text model; the rest is a tail that may run elsewhere
CORE = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "qwen3_5", "llama4", "kimi_k25", "ernie4_5_vl_moe")
ALWAYS = ("one image", "keep everything")


def cells(of_family):
    """Families with their modes, those of one family side by side, so that its model is made once."""
    return [
        pytest.param(name, mode, id=f"{name}-{mode}", marks=() if name in CORE else pytest.mark.long_tail)
        for name in BY_NAME
        for mode in of_family(SUPPORTED[name])
    ]


@pytest.mark.parametrize(("name", "mode"), cells(lambda family: (*ALWAYS, *family.modes)))
def test_mode(name, mode):
    needs(name)
    if VERSION < NEWEST:
        reason = lacks_unpruned(name, mode)
        if reason is not None:
            pytest.skip(f"this transformers lacks it unpruned: {reason}")
    check(name, mode)


@pytest.mark.skipif(VERSION < NEWEST, reason="the table is that of the newest transformers")
@pytest.mark.parametrize(("name", "mode"), cells(lambda family: family.without))
def test_a_mode_that_is_not_listed_does_not_work_unpruned_either(name, mode):
    assert lacks_unpruned(name, mode) is not None


def test_every_family_is_tested_in_every_mode_that_is_listed():
    assert set(SUPPORTED) == set(BY_NAME)
    assert {*ALWAYS, *MODES} == set(CHECKS)
    assert all(family.video == bool(BY_NAME[family.model_type].video) for family in FAMILIES)


def test_the_support_table_in_the_docs_is_that_of_the_families():
    assert support_table.main(["--check"]) == 0
    assert all(f"| `{name}` |" in support_table.table() for name in BY_NAME)
