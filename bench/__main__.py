"""Run the suite for this machine: score_and_select, host cost, a whole prefill, model figures, report and pictures.

    python -m bench [--output FOLDER] [--only score_and_select prefill]

Each part is a process of its own and writes as it goes; without a GPU everything runs on the CPU in a few minutes.
"""

from __future__ import annotations

import subprocess
import sys
import time

from bench import cli, plots, report
from bench.environment import REPOSITORY

# Module and options; the file that each writes has its name.
PARTS = {
    "score_and_select": ("bench.score_and_select", "--seconds=240"),
    "host_cost": ("bench.host_cost",),
    "prefill": ("bench.prefill",),
    "model": ("bench.model",),
}


def main() -> int:
    """Run the parts, then write the report; fails where a part failed."""
    parser = cli.parser("bench", __doc__, device=cli.default_device(), output="bench/results/<device>")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="only these parts")
    arguments = parser.parse_args()
    output = cli.results_directory(arguments).absolute()
    output.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in arguments.only:
        device = [] if name == "model" else ["--device", str(arguments.device)]
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        command = [sys.executable, "-m", *PARTS[name], *device, "--json", str(output / f"{name}.json")]
        if subprocess.run(command, cwd=REPOSITORY).returncode:
            failed.append(name)
        print(f"== {name}: {time.perf_counter() - start:.0f} s", flush=True)
    if plots.available():
        plots.draw(output)
    else:
        print("matplotlib is not installed: no pictures; python -m bench.plots draws them later from the JSON files")
    print(f"written: {report.write(output)}")
    if failed:
        print(f"bench: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
