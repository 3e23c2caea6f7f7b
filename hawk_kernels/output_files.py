"""Writes the files that commands make: whole or not at all, and over nothing that the user would miss.

A file is written beside its place and renamed, so that a full disk or a kill leaves what was there before. It replaces
only a regular file of its own kind; anything else needs another name.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_HEADER_BYTES = 16
_PICTURE_HEADERS: dict[str, tuple[bytes, ...]] = {
    ".png": (b"\x89PNG\r\n\x1a\n",),
    ".jpg": (b"\xff\xd8\xff",),
    ".jpeg": (b"\xff\xd8\xff",),
    ".gif": (b"GIF87a", b"GIF89a"),
    ".bmp": (b"BM",),
    ".tif": (b"II*\0", b"MM\0*"),
    ".tiff": (b"II*\0", b"MM\0*"),
    ".webp": (b"RIFF",),
    ".pdf": (b"%PDF-",),
    ".svg": (b"<?xml", b"<svg"),
}


class OutputFileError(ValueError):
    """A file that cannot be written, or must not be replaced; the message names its path."""


@dataclass(frozen=True)
class Kind:
    """A kind of file that a command writes.

    Attributes:
        name: as a message calls one of them, with its article.
        is_one: whether an existing regular file is of this kind, so that it may be replaced.
    """

    name: str
    is_one: Callable[[Path], bool]


def picture_kind(path: str | Path) -> Kind:
    """Return the kind of picture that the end of a file's name stands for."""
    suffix = Path(path).suffix.lower()
    headers = _PICTURE_HEADERS.get(suffix, ())

    def is_one(existing: Path) -> bool:
        with existing.open("rb") as file:
            return file.read(_HEADER_BYTES).startswith(headers) if headers else False

    return Kind(f"a {suffix.removeprefix('.').upper()} picture", is_one)


def _is_weights_file(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return isinstance(content, Mapping) and isinstance(content.get("weights"), list)


WEIGHTS_FILE = Kind("a file of head weights", _is_weights_file)


def check_output(path: str | Path, kind: Kind, *, name: str = "out", inputs: Iterable[str | Path] = ()) -> None:
    """Check, before the work begins, that a file can be written and may replace what is there.

    Args:
        path: of the file; its folder must exist.
        kind: of the file.
        name: of the argument or option, for messages.
        inputs: files that the same run reads, which it must not replace.

    Raises:
        OutputFileError: the folder is missing or cannot be written to, or something stands there that must stay.
    """
    path = Path(path)
    try:
        target = path.resolve()
        if not path.name or target.is_dir():
            raise OutputFileError(f"{name}: expected a file to write, got the folder {str(path)!r}; name a file in it")
        if not target.parent.is_dir():
            raise OutputFileError(
                f"{name}: expected a file in a folder that exists, got {path}, whose folder does not exist; make the "
                "folder first"
            )
        if os.path.lexists(target):
            _check_replaceable(path, target, kind, name, inputs)
        _try_folder(target.parent, name)
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OutputFileError):
            raise
        raise OutputFileError(f"{name}: cannot write {path}: {_reason(error)}; choose another name") from error


def write_whole(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside its place and rename it; where that fails, what was there before stays.

    Args:
        path: of the file; a symbolic link is followed.
        write: gets the open file.

    Raises:
        OutputFileError: the disk is full, the folder is read-only, ...; nothing is left of the attempt.
    """
    try:
        target = Path(path).resolve()
        partial = _beside(target.parent)
        _partial_files.append(partial)
        try:
            with partial.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            with suppress(OSError):
                partial.unlink()
            _partial_files.remove(partial)
    except OSError as error:
        raise OutputFileError(f"cannot write {path}: {_reason(error)}; choose another place") from error


_partial_files: list[Path] = []


def remove_partial_files() -> None:
    """Remove what `write_whole` has not finished, for a process that ends now."""
    for partial in _partial_files:
        with suppress(OSError):
            partial.unlink()


def _check_replaceable(path: Path, target: Path, kind: Kind, name: str, inputs: Iterable[str | Path]) -> None:
    if not stat.S_ISREG(target.stat().st_mode):
        raise OutputFileError(
            f"{name}: expected a file to write, got {path}, which is no regular file; choose another name"
        )
    for source in inputs:
        if os.path.exists(source) and os.path.samefile(source, target):
            raise OutputFileError(f"{name}: {path} is an input of this run and is not replaced; choose another name")
    if not kind.is_one(target):
        raise OutputFileError(
            f"{name}: {path} exists and is not {kind.name}, so it is not replaced; choose another name"
        )


def _try_folder(folder: Path, name: str) -> None:
    # permission bits say nothing of a read-only file system, nor to root
    probe = _beside(folder)
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    except OSError as error:
        raise OutputFileError(
            f"{name}: expected a folder that can be written to, got {folder}: {_reason(error)}; choose another one"
        ) from error
    finally:
        with suppress(OSError):
            probe.unlink()


def _beside(folder: Path) -> Path:
    return folder / f".hawk-kernels-{os.getpid()}.partial"


def _reason(error: BaseException) -> Any:
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "its symbolic links go in a circle"
    return error.strerror if isinstance(error, OSError) and error.strerror else error
