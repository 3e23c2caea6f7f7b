"""What an installed package holds: an editable install, as `make` makes it, hides what a wheel would lack."""

import re
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement


def test_the_wheel_holds_everything_that_runs(repository, tmp_path):
    command = ["wheel", ".", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(tmp_path)]
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=repository, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        if (repository / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((repository / name).read_bytes())
    subprocess.run([sys.executable, "-m", "pip", *command], cwd=source, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    expected = {name for name in tracked.splitlines() if name.startswith("hawk_kernels/")}
    assert expected <= packed, sorted(expected - packed)
    assert not [name for name in packed if name.startswith(("tests/", "bench/", "csrc_ref/"))]


def requirements(text):
    """By package, those lines of a constraints file that hold for this Python."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    found = (Requirement(line) for line in lines if line)
    return {entry.name: entry for entry in found if entry.marker is None or entry.marker.evaluate()}


def declared_ranges(repository):
    text = (repository / "setup.py").read_text()
    return requirements("\n".join(re.findall(r'"((?:torch|triton|transformers|numpy)[<>][^"]*)"', text)))


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-floor.txt", "constraints-ceiling.txt"])
def test_what_the_tests_install_lies_in_the_declared_ranges(repository, name):
    declared = declared_ranges(repository)
    assert set(declared) == {"torch", "triton", "transformers", "numpy"}
    for package, pinned in requirements((repository / name).read_text()).items():
        if package in declared:
            (version,) = (part.version for part in pinned.specifier)
            assert version in declared[package].specifier, f"{package}=={version} in {name}"


def test_the_ranges_end_where_they_were_tried(repository):
    declared = declared_ranges(repository)
    for package, first_untried in (("torch", "2.14.0"), ("triton", "3.9.0"), ("transformers", "5.24.0")):
        assert first_untried not in declared[package].specifier
    assert "3.8.0" in declared["triton"].specifier


def test_the_demo_installs_no_linter(repository):
    command = ["make", "--dry-run", "--always-make", "demo"]
    planned = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True).stdout
    assert "'.[hf]'" in planned
    assert "[dev]" not in planned
