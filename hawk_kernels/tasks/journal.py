"""Keeps on disk what a run over tasks has measured so far, so that nothing finished is lost when it is killed.

A journal is a folder with one file for each process. A file is a line that says what is measured, then a line for each
sample, appended and forced to disk before the next one begins. A last line without its end is what a kill leaves; it is
dropped, and its sample is asked again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

Key = tuple[str, str, str]
"""Name of the task, key of the sample, and what was asked: a digest, and perhaps in which way."""


class Journal:
    """The journal of one process, a context manager while it writes.

    Args:
        folder: made where it does not exist.
        plan: what is measured, as JSON; a journal of anything else is refused.
        rank: number of this process.
        work: what is done, as messages call it: "calibration" or "evaluation".

    Raises:
        ValueError: the folder holds a journal of another run, or a broken one.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Any], rank: int, work: str = "calibration") -> None:
        self._folder = folder
        self._plan = json.loads(json.dumps(plan))
        self._path = folder / f"process-{rank:05d}.jsonl"
        self._work = work
        self._file: IO[bytes] | None = None

    def read(self) -> dict[Key, dict[str, Any]]:
        """Read all finished samples of all processes."""
        found: dict[Key, dict[str, Any]] = {}
        for path in sorted(self._folder.glob("process-*.jsonl")):
            lines = path.read_bytes().split(b"\n")[:-1]
            for number, line in enumerate(lines, 1):
                try:
                    record = json.loads(line)
                    if number == 1:
                        self._check_plan(record["plan"], path)
                    else:
                        found.setdefault((record["task"], record["key"], record["asked"]), record)
                except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{path}:{number}: expected a line of the {self._work}'s journal, got {line[:60]!r}; delete "
                        "the file to measure its samples again"
                    ) from error
        return found

    def __enter__(self) -> Journal:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+b")
        _lock(self._file, self._path, self._work)
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)
        if not whole:
            self._append({"plan": self._plan})
            _sync_folder(self._folder)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def add(self, key: Key, record: Mapping[str, Any]) -> None:
        """Keep what was measured of one sample; it is on disk when this returns."""
        task, sample, asked = key
        self._append({"task": task, "key": sample, "asked": asked, **record})

    def _append(self, record: Mapping[str, Any]) -> None:
        if self._file is None:
            raise RuntimeError("a journal writes inside its with block only")
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _check_plan(self, plan: Any, path: Path) -> None:
        if plan == self._plan:
            return
        fields = sorted(name for name in {*plan, *self._plan} if plan.get(name) != self._plan.get(name))
        raise ValueError(
            f"{path}: expected the journal of this {self._work}, got one that differs in {', '.join(fields)}; delete "
            f"{self._folder} to begin anew, or write to another file"
        )


def _lock(file: IO[bytes], path: Path, work: str) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ValueError(f"{path}: another {work} is writing to it; wait for it or write to another file") from error


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
