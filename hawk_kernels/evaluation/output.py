"""Writes the files of an evaluation, each whole or not at all: results.json, results.md, results.png, report.html."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from operator import methodcaller
from pathlib import Path

from hawk_kernels.evaluation.page import MARK as PAGE_MARK
from hawk_kernels.evaluation.page import page
from hawk_kernels.evaluation.result import SOURCE, Evaluation
from hawk_kernels.evaluation.text import MARK as TEXT_MARK
from hawk_kernels.evaluation.text import markdown
from hawk_kernels.output_files import Kind, OutputFileError, check_output, picture_kind, write_whole

RESULTS, TABLE, PICTURE, PAGE = "results.json", "results.md", "results.png", "report.html"


def _is_results_file(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(content, Mapping) and content.get("source") == SOURCE


def _begins_with(mark: str) -> Kind:
    def is_one(path: Path) -> bool:
        with path.open("rb") as file:
            return file.read(len(mark)) == mark.encode()

    return Kind("a file that an earlier evaluation wrote", is_one)


KINDS = {
    RESULTS: Kind("a file that an earlier evaluation wrote", _is_results_file),
    TABLE: _begins_with(TEXT_MARK),
    PICTURE: picture_kind(PICTURE),
    PAGE: _begins_with(PAGE_MARK),
}
"""The files, and what each may replace."""


def check_folder(folder: str | Path) -> None:
    """Make the folder where it does not exist, and check that its files may be written, before hours are spent asking.

    Raises:
        OutputFileError: it is a file, cannot be written to, or holds something of these names that must stay.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputFileError(f"out: expected a folder, got the file {str(folder)!r}; choose another name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputFileError(f"out: cannot make {folder}: {os.strerror(error.errno or 0)}; choose another") from error
    for name, kind in KINDS.items():
        check_output(folder / name, kind)


def write_results(evaluation: Evaluation, folder: str | Path) -> None:
    """Write the files of an evaluation; the picture only where matplotlib is installed."""
    folder = Path(folder)
    results = json.dumps(evaluation.to_dict(), indent=2, allow_nan=False) + "\n"
    picture = _picture(evaluation)
    texts = {RESULTS: results, TABLE: markdown(evaluation), PAGE: page(evaluation, picture)}
    contents = {name: text.encode() for name, text in texts.items()}
    if picture is not None:
        contents[PICTURE] = picture
    for name, content in contents.items():
        write_whole(folder / name, methodcaller("write", content))


def _picture(evaluation: Evaluation) -> bytes | None:
    if find_spec("matplotlib") is None:
        return None
    from hawk_kernels.evaluation.plots import draw_results

    file = io.BytesIO()
    draw_results(evaluation, file)
    return file.getvalue()
