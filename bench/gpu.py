"""Everything that only a GPU can show, in one command: parity, sanitizer, repeatability, capture, streams, times.

    make gpu PYTHON=python3        (or: python -m bench.gpu --output bench/results/<device>)

Installs nothing. Each part's log is written as it runs, so that a kill loses nothing that had finished. Exits with
an error where there is no GPU, and where any part fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

_KERNEL_TESTS = (
    "tests/test_parity.py",
    "tests/test_triton_launch.py",
    "tests/test_column_stats.py",
    "tests/test_hiprune_select.py",
)


def parts(output: Path, python: str) -> dict[str, list[str]]:
    """Name and command of each part, most informative first."""
    sanitizer = shutil.which("compute-sanitizer")
    commands = {
        "parity": [python, "-m", "pytest", *_KERNEL_TESTS],
        "micro": [python, "-m", "bench.micro", "--device", "cuda", "--json", str(output / "micro.json")],
        "attention": [
            python,
            "-m",
            "bench.attention_stats",
            "--device",
            "cuda",
            "--json",
            str(output / "attention-stats.json"),
        ],
        "benchmark": [
            *(python, "-m", "pytest", "bench", "--benchmark-enable"),
            f"--benchmark-json={output / 'benchmark.json'}",
        ],
    }
    if sanitizer:
        selected = ["tests/test_parity.py", "-k", "triton and every_norm_and_dtype"]
        commands["sanitizer"] = [sanitizer, "--error-exitcode", "1", python, "-m", "pytest", *selected]
    return commands


def main() -> None:
    """Run all parts and say which passed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="default: bench/results/<device name>")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.gpu: no CUDA device; run this on a machine that has one. Nothing was measured.")

    device_name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    output = arguments.output or Path("bench/results", device_name)
    output.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    failed = []
    commands = parts(output, sys.executable)
    if "sanitizer" not in commands:
        print("compute-sanitizer is not installed: that part is left out", flush=True)
    for name, command in commands.items():
        print(f"{name}: {' '.join(command)}", flush=True)
        start = time.perf_counter()
        with (output / f"{name}.log").open("w") as log:
            result = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        print(f"{name}: {'passed' if result.returncode == 0 else 'FAILED'} in {time.perf_counter() - start:.0f} s")
        if result.returncode:
            failed.append(name)
    if failed:
        sys.exit(f"bench.gpu: failed: {', '.join(failed)}; see the logs in {output}")


if __name__ == "__main__":
    main()
