"""Output files: whole or not at all, and over nothing but their own kind."""

import errno
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hawk_kernels import output_files
from hawk_kernels.output_files import WEIGHTS_FILE, OutputFileError, check_output, picture_kind, write_whole

PNG = b"\x89PNG\r\n\x1a\n and more"


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_file_is_written_and_replaced_and_nothing_else_is_left(tmp_path):
    for content in (b"first", b"second"):
        write_whole(tmp_path / "file", lambda file, content=content: file.write(content))
        assert content_of(tmp_path) == {"file": content}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, code):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def half(file):
        file.write(b"half")
        raise OSError(code, os.strerror(code))

    with pytest.raises(OutputFileError, match=rf"cannot write {path}: {os.strerror(code)}; choose another place"):
        write_whole(path, half)
    assert content_of(tmp_path) == {"file": b"before"}


def test_a_writer_that_is_interrupted_leaves_what_was_there(tmp_path):
    def half(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", half)
    assert content_of(tmp_path) == {}
    assert output_files._partial_files == []


def test_a_read_only_file_system_is_told_by_its_folder(tmp_path, monkeypatch):
    def refused(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(OutputFileError, match=rf"to, got {tmp_path}: Read-only file system; choose another one"):
        check_output(tmp_path / "a.png", picture_kind("a.png"))


def test_a_link_is_followed_and_stays_one(tmp_path):
    (tmp_path / "link.png").symlink_to("target.png")
    for _ in range(2):
        check_output(tmp_path / "link.png", picture_kind("link.png"))
        write_whole(tmp_path / "link.png", lambda file: file.write(PNG))
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "target.png").read_bytes() == PNG


@given(content=st.binary(max_size=40))
def test_a_picture_replaces_a_picture_of_its_kind_alone(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("kinds") / "a.png"
    path.write_bytes(content)
    with pytest.raises(OutputFileError, match="exists and is not a PNG picture, so it is not replaced"):
        check_output(path, picture_kind(path))
    path.write_bytes(PNG + content)
    check_output(path, picture_kind(path))
    with pytest.raises(OutputFileError, match="is not a file of head weights"):
        check_output(path, WEIGHTS_FILE)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(value=json_values)
def test_weights_replace_weights_alone(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "w.json"
    path.write_text(json.dumps(value))
    is_weights = isinstance(value, dict) and isinstance(value.get("weights"), list)
    assert WEIGHTS_FILE.is_one(path) == is_weights
    path.write_text(json.dumps({"weights": [1.0], "more": value}))
    check_output(path, WEIGHTS_FILE)


@pytest.mark.parametrize("name", ["", ".", "folder", "gone/file.png", "file\0.png", "x" * 300])
def test_places_that_are_none_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputFileError, match="out: "):
        check_output(name, picture_kind("a.png"))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_an_input_of_the_run_is_not_replaced_under_any_of_its_names(tmp_path):
    source = tmp_path / "a.png"
    source.write_bytes(PNG)
    os.link(source, tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to(source)
    for name in ("a.png", "b.png", "c.png"):
        with pytest.raises(OutputFileError, match="is an input of this run"):
            check_output(tmp_path / name, picture_kind(name), inputs=[tmp_path / "gone", source])


@pytest.mark.parametrize("name", ["a.jpg", "a.pdf", "a.svg", "a.unknown"])
def test_a_picture_of_another_format_is_not_replaced(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(PNG)
    with pytest.raises(OutputFileError, match="so it is not replaced"):
        check_output(path, picture_kind(path))
