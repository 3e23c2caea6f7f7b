"""Run all that needs a GPU in one command and within ten minutes: correctness first, then every benchmark.

    make gpu PYTHON=python3 [ARGS="--budget 540 --archive results.tar.gz"]     (or: python -m bench.gpu)

Installs nothing. Every stage is a process of its own with a time limit, so that a failure or a hang costs that stage
alone; results are written as they come, and the report after each stage. Exits with an error where a stage that checks
correctness did not pass, where any stage failed, and where there is no GPU. `--dry-run` proves the script itself on a
CPU: every stage at tiny sizes, kernels in Triton's interpreter, nothing measured that means anything.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_MISSING = [name for name in ("torch", "triton", "transformers", "pytest") if find_spec(name) is None]
if _MISSING:
    sys.exit(
        f"bench.gpu: {sys.executable} has no {' and no '.join(_MISSING)}: pip install {' '.join(_MISSING)}, or name an "
        "interpreter that has them with make gpu PYTHON=..."
    )

# after the check, which says what to install
import torch  # noqa: E402

from bench import cli, plots, report  # noqa: E402
from bench.environment import REPOSITORY, environment, results_folder, write_json  # noqa: E402

# Folder of the results for what is of no interest once all went well.
LOGS = "logs"
# A stage that is given less than this cannot do anything.
_LEAST_SECONDS = 8.0
_GIB_PER_PARITY_PROCESS = 12
_LOG_TAIL = 12
# For processes that run at once, each of which would take every core.
_SHARED = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
# So that a stage can be ended with all that it started. Not a session of its own, which would outlive ours.
_OWN_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}


@dataclass(frozen=True)
class Stage:
    """One part of the whole.

    Attributes:
        name: of the stage and its logs.
        commands: what runs, all of them at once.
        seconds: limit of all of them together.
        correctness: whether the kernels are wrong, or not known to be right, where it does not pass.
        environment: variables beside those of this process; None removes one.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    seconds: float
    correctness: bool = False
    environment: Mapping[str, str | None] = field(default_factory=dict)


def sanitizer() -> str | None:
    """compute-sanitizer, where one is installed."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda", "/opt/cuda"]
    places = [Path(root, folder) for root in roots if root for folder in ("bin", "compute-sanitizer")]
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)])
    return shutil.which("compute-sanitizer", path=path)


def parity_processes() -> int:
    """Return how many processes share the compiling; each holds float64 references."""
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return int(max(1, min(4, (os.cpu_count() or 2) // 4, memory // _GIB_PER_PARITY_PROCESS // 2)))


def tests_for_a_gpu() -> list[str]:
    """List the test files that need a GPU, so that pytest need not collect the others."""
    files = sorted((REPOSITORY / "tests").glob("test_*.py"))
    return [str(path.relative_to(REPOSITORY)) for path in files if "pytest.mark.gpu" in path.read_text("utf-8")]


@dataclass(frozen=True)
class Other:
    """A benchmark of another part of the project.

    Attributes:
        module: what is run.
        seconds: limit.
        writes: the option that takes its results, a file (`--json`) or a folder (`--output`).
        rehearsal: options for a CPU; without tiny sizes it can only show that it starts.
    """

    module: str
    seconds: float
    writes: str
    rehearsal: tuple[str, ...] = ("--help",)

    def stage(self, output: Path, *options: str) -> Stage:
        """Return the benchmark as a stage."""
        name = self.module.removeprefix("bench.")
        target = output / f"{name}.json" if self.writes == "--json" else output
        return Stage(name, (_python(self.module, f"{self.writes}={target}", *options),), self.seconds)


OTHERS = (
    Other("bench.compact", 45, "--output", ("--device=cpu", "--rounds=1", "--seconds=0.1")),
    Other(
        "bench.decode_overhead", 60, "--json", ("--device=cpu", "--hidden=64", "--layers=2", "--side=4", "--rounds=2")
    ),
    Other("bench.attention_column_mean", 45, "--json"),
    Other("bench.score_peaks", 45, "--json"),
    Other("bench.greedy", 45, "--json"),
    Other("bench.encoder_cost", 60, "--output"),
)


def _python(module: str, *options: str) -> tuple[str, ...]:
    """Return a command that runs a module with this interpreter."""
    return (sys.executable, "-m", module, *options)


def stages(output: Path, tune: bool) -> list[list[Stage]]:
    """List all stages, the most important first; stages of a group run at once, since none of them is timed."""
    logs, shards = output / LOGS, parity_processes()
    parity = (
        _python("bench.verify", "parity", f"--shard={i}/{shards}", f"--json={logs}/parity-{i}.json")
        for i in range(shards)
    )
    verify = _python("bench.verify", "repeatability", "graphs", "streams", "threads", f"--json={output}/verify.json")
    # leaves every kernel that is timed below in the compilers' caches
    contenders = (_python("bench.score_and_select", "--check", f"--shard={i}/{shards}") for i in range(shards))
    correctness = [
        Stage("parity", tuple(parity), 150, True, _SHARED),
        Stage("verify", (verify,), 150, True, _SHARED),
        Stage("contenders", tuple(contenders), 150, True, _SHARED),
        Stage("tests", (_python("pytest", "-m", "gpu", *tests_for_a_gpu()),), 150, True, _SHARED),
    ]
    checker = sanitizer()
    if checker is None:
        print("compute-sanitizer is not installed: that stage is left out", flush=True)
    else:
        for tool in ("memcheck", "racecheck"):
            checked = _python("bench.verify", "parity", "--slice=smoke", f"--json={logs}/{tool}.json")
            command = (checker, f"--tool={tool}", "--error-exitcode=9", "--print-limit=20", *checked)
            # the allocator's pools would hide what is out of bounds
            variables = {**_SHARED, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            correctness.append(Stage(tool, (command,), 150, True, variables))
    benchmark = _python(
        *("pytest", "bench/test_operators.py", "--benchmark-enable", "--benchmark-max-time=0.3"),
        f"--benchmark-json={output}/pytest-benchmark.json",
    )
    measured = [
        Stage(
            "score_and_select",
            (_python("bench.score_and_select", "--seconds=110", f"--json={output}/score_and_select.json"),),
            170,
        ),
        Stage("prefill", (_python("bench.prefill", f"--json={output}/prefill.json"),), 120),
        Stage("host_cost", (_python("bench.host_cost", f"--json={output}/host_cost.json"),), 40),
        *(other.stage(output, "--device=cuda") for other in OTHERS if find_spec(other.module) is not None),
        Stage("benchmark", (benchmark,), 60),
        Stage("model", (_python("bench.model", f"--json={output}/model.json"),), 20),
    ]
    if tune:
        measured.append(Stage("tune", (_python("hawk_kernels.tune"),), 300))
    return [correctness, *([stage] for stage in measured)]


def rehearsal(output: Path) -> list[list[Stage]]:
    """List the same stages at tiny sizes on a CPU."""
    logs, cpu, tiny = output / LOGS, "--device=cpu", "--slice=tiny"
    parity = (
        _python("bench.verify", "parity", cpu, tiny, f"--shard={i}/2", f"--json={logs}/parity-{i}.json")
        for i in range(2)
    )
    verify = _python(
        *("bench.verify", "repeatability", "graphs", "streams", "threads"),
        *(cpu, tiny, f"--json={output}/verify.json"),
    )
    prefill = ("--shape=tiny", "--tokens", "36", "--new-tokens=4", "--rounds=1", f"--json={output}/prefill.json")
    host_cost = _python("bench.host_cost", cpu, "--rounds=5", f"--json={output}/host_cost.json")
    correctness = [
        Stage("parity", tuple(parity), 180, True),
        Stage("verify", (verify,), 180, True),
        Stage("contenders", (_python("bench.score_and_select", "--check", cpu, tiny),), 180, True),
    ]
    measured = [
        Stage(
            "score_and_select",
            (_python("bench.score_and_select", cpu, tiny, "--rounds=5", f"--json={output}/score_and_select.json"),),
            180,
        ),
        Stage("prefill", (_python("bench.prefill", cpu, *prefill),), 180),
        Stage("host_cost", (host_cost,), 180, environment={"TRITON_INTERPRET": None}),
    ]
    others = [
        *(
            replace(other.stage(output, *other.rehearsal), seconds=180)
            for other in OTHERS
            if find_spec(other.module) is not None
        ),
        Stage("model", (_python("bench.model", f"--json={output}/model.json"),), 180),
        Stage("tests", (_python("pytest", "-m", "gpu", *tests_for_a_gpu()),), 180, True),
        Stage("benchmark", (_python("pytest", "bench/test_operators.py", "--benchmark-disable"),), 180),
    ]
    groups = [correctness, *([stage] for stage in measured), others]
    # at tiny sizes a second thread only waits
    alone = {"OMP_NUM_THREADS": "1"}
    return [[replace(stage, environment={**alone, **stage.environment}) for stage in group] for group in groups]


class Running:
    """A stage that has been started: its processes, each with a log."""

    def __init__(self, stage: Stage, output: Path, seconds: float) -> None:
        self.stage = stage
        self._seconds = seconds
        self._begin = time.perf_counter()
        self._took: float | None = None
        self._in_time = True
        variables = {name: value for name, value in os.environ.items() if stage.environment.get(name, "") is not None}
        variables |= {name: value for name, value in stage.environment.items() if value is not None}
        variables["PYTHONUNBUFFERED"] = "1"
        numbers = [f"-{i}" for i in range(len(stage.commands))] if len(stage.commands) > 1 else [""]
        self._logs = [output / LOGS / f"{stage.name}{number}.log" for number in numbers]
        self._processes = []
        for command, log in zip(stage.commands, self._logs, strict=True):
            with log.open("w") as file:
                options: dict[str, Any] = {"stdout": file, "stderr": subprocess.STDOUT, **_OWN_GROUP}
                self._processes.append(subprocess.Popen(command, cwd=REPOSITORY, env=variables, **options))

    def is_over(self) -> bool:
        """Whether all processes have ended; those that are out of time are ended now."""
        if self._took is None:
            running = any(process.poll() is None for process in self._processes)
            if running and time.perf_counter() - self._begin > self._seconds:
                self._in_time = running = False
                self.kill()
            if not running:
                self._took = time.perf_counter() - self._begin
        return self._took is not None

    def result(self) -> dict[str, Any]:
        """Return the outcome, after printing the end of the logs of failed processes."""
        failed = [log for log, process in zip(self._logs, self._processes, strict=True) if process.returncode]
        for log in failed[:2]:
            print(f"--- the end of {log}")
            print("\n".join(log.read_text(errors="replace").splitlines()[-_LOG_TAIL:]))
            print("---", flush=True)
        return {
            "name": self.stage.name,
            "status": "out of time" if not self._in_time else "failed" if failed else "passed",
            "correctness": self.stage.correctness,
            "seconds": round(self._took or 0.0, 1),
            "limit": round(self._seconds, 1),
        }

    def kill(self) -> None:
        """End what still runs, with all that it started."""
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def run_group(group: list[Stage], output: Path, left: float) -> list[dict[str, Any]]:
    """Run the stages of a group at once; those for which no time is left are left out."""
    running: list[Running] = []
    entries: list[dict[str, Any]] = []
    try:
        for stage in group:
            seconds = min(stage.seconds, left)
            if seconds < min(_LEAST_SECONDS, stage.seconds):
                left_out = {"name": stage.name, "status": "left out", "correctness": stage.correctness, "seconds": 0.0}
                entries.append(left_out)
                continue
            print(f"{stage.name}: {' '.join(stage.commands[0])}", flush=True)
            running.append(Running(stage, output, seconds))
        while sum(not stage.is_over() for stage in running):
            time.sleep(0.05)
        entries += [stage.result() for stage in running]
    finally:
        for started in running:
            started.kill()
    return entries


def merge_checks(output: Path) -> None:
    """Put the parts of the parity checks before the other checks."""
    parts = [report.load(path.parent, path.name) for path in sorted((output / LOGS).glob("parity-*.json"))]
    found = [part for part in parts if part]
    checks = [check for part in found for check in part["checks"]]
    if not checks:
        return
    others = report.load(output, "verify.json") or {"environment": found[0]["environment"], "checks": []}
    names = {check["name"] for check in checks}
    checks += [check for check in others["checks"] if check["name"] not in names]
    write_json(output / "verify.json", {**others, "checks": checks})


def publish(output: Path, archive: Path | None, summary: dict[str, Any]) -> None:
    """Bring the folder up to date: status, report, pictures, archive."""
    write_json(output / "gpu.json", summary)
    merge_checks(output)
    if plots.available():
        plots.draw(output)
    report.write(output)
    if archive is not None:
        archive.parent.mkdir(parents=True, exist_ok=True)
        unfinished = archive.with_name(archive.name + ".tmp")
        with tarfile.open(unfinished, "w:gz") as tar:
            tar.add(output, arcname=output.name)
        unfinished.replace(archive)


def run(todo: list[list[Stage]], output: Path, budget: float, archive: Path | None, about: dict[str, Any]) -> int:
    """Run the groups until the budget is spent; returns the exit code."""
    (output / LOGS).mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    summary: dict[str, Any] = {"environment": about, "budget": budget, "stages": []}
    for group in todo:
        entries = run_group(group, output, budget - (time.perf_counter() - begin))
        summary["stages"] += entries
        summary["seconds"] = round(time.perf_counter() - begin, 1)
        for entry in entries:
            text = f"{entry['name']}: {entry['status']} in {entry['seconds']} s"
            print(f"{text}, {summary['seconds']} s in all", flush=True)
        try:
            publish(output, archive, summary)
        # the results are there all the same, and are listed below
        except Exception as error:
            print(f"the report could not be written: {type(error).__name__}: {error}", flush=True)
    print()
    for entry in summary["stages"]:
        print(f"{entry['status']:<12} {entry['seconds']:>6.1f} s  {entry['name']}")
    print(f"results: {output}", flush=True)
    unknown = [entry["name"] for entry in summary["stages"] if entry["correctness"] and entry["status"] != "passed"]
    failed = [entry["name"] for entry in summary["stages"] if entry["status"] == "failed"]
    if unknown:
        print(f"bench.gpu: correctness is not established: {', '.join(unknown)} did not pass", file=sys.stderr)
    if failed:
        print(f"bench.gpu: failed: {', '.join(failed)}; see {output / LOGS}", file=sys.stderr)
    return 1 if unknown or failed else 0


def main(arguments: list[str] | None = None) -> int:
    """Run all stages, or those asked for, and say which passed."""
    parser = cli.parser("bench.gpu", __doc__, output="bench/results/<device name>; a dry run: a new folder")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for everything (default: 570)")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="only these stages")
    parser.add_argument("--archive", type=Path, help="also pack the results into this .tar.gz after each stage")
    parser.add_argument("--tune", action="store_true", help="also make a new tuning table")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on a CPU")
    options = parser.parse_args(arguments)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
        device = torch.device("cpu")
        output = options.output or Path(tempfile.mkdtemp(prefix="bench-gpu-dry-run-"))
    else:
        if not torch.cuda.is_available():
            print(
                "bench.gpu: no CUDA device; run this on a machine that has one. Nothing was measured.", file=sys.stderr
            )
            return 2
        os.environ.pop("TRITON_INTERPRET", None)
        device = torch.device("cuda")
        output = options.output or results_folder(device)
    output = output.absolute()
    todo = rehearsal(output) if options.dry_run else stages(output, options.tune)
    if options.only:
        names = [stage.name for group in todo for stage in group]
        if unknown := set(options.only) - set(names):
            parser.error(f"--only: expected some of {', '.join(names)}; got {', '.join(sorted(unknown))}")
        todo = [[stage for stage in group if stage.name in options.only] for group in todo]
    if any(stage.name == "parity" for group in todo for stage in group):
        # those of an earlier run may be more
        for part in (output / LOGS).glob("parity-*.json"):
            part.unlink()
    # a kill must reach the finally that ends the stages
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    about = environment(device)
    print(report.about(about), flush=True)
    return run(todo, output, options.budget, options.archive, about)


if __name__ == "__main__":
    sys.exit(main())
