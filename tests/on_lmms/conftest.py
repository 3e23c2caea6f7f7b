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
        _counts.append(f"{name}: {equal} of {len(one)} answers equal those of transformers and prune")
        assert equal == len(one)

    return compare


def pytest_terminal_summary(terminalreporter):
    for line in _counts:
        terminalreporter.write_line(line)
