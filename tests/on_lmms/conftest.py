"""The local task, and the counts of equal answers that the summary prints."""

import os

# Everything is local; without this, each look at the model asks the Hub first.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from tests.on_lmms.local_task import write_task

QUESTIONS_A_KIND = 24

_counts: list[str] = []


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="session")
def documents(folder):
    return write_task(folder, QUESTIONS_A_KIND)


@pytest.fixture(scope="session")
def assert_equal_answers():
    """Compares two lists of answers and keeps the count for the summary."""

    def compare(name, one, other):
        assert len(one) == len(other) > 0
        equal = sum(left == right for left, right in zip(one, other, strict=True))
        _counts.append(f"equal answers: {equal} of {len(one)}, {name}")
        assert equal == len(one)

    return compare


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("lmms-eval and lm-eval beside transformers and prune")
    for line in _counts:
        terminalreporter.write_line(line)
