"""What an installed package holds: an editable install, as `make` makes it, hides what a wheel would lack."""

import subprocess
import sys
import zipfile


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
