"""README and docs are true: their snippets run, their commands and flags exist, their links lead somewhere.

A page's ```python blocks run in order in one namespace and an empty folder. A comment before a block changes that:

    <!-- not run: why -->    it must compile, its imports and keyword arguments must exist
    <!-- needs: package -->  as above where the package is not installed
    <!-- file: name -->      the block is written to that file of the folder instead
"""

import ast
import importlib
import importlib.util
import inspect
import io
import os
import re
import runpy
import shlex
import signal
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from hawk_kernels.hf.families import FAMILIES
from hawk_kernels.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "hawk_kernels/assets/tinyvqa/README.md",
    ROOT / "bench/tinyvqa/models/llava/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
MARKER = re.compile(r"<!-- (not run|needs|file): (.+?) -->\s*\Z")
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"")
# what a page may tell a reader to type without a test that it exists
FOREIGN = ("git", "cd", "export", "pip", "python3", "accelerate", "cp", "vllm", "lmms_eval")


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    line: int
    marker: str
    value: str


def blocks_in(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        marker = MARKER.search(text[: match.start()])
        kind, value = marker.groups() if marker else ("", "")
        code = inspect.cleandoc(match[3]) if match[1] else match[3]
        found.append(Block(match[2], code, text.count("\n", 0, match.start()) + 1, kind, value))
    return found


def is_run(block: Block) -> bool:
    if block.marker == "needs":
        return importlib.util.find_spec(block.value) is not None
    return block.marker not in ("not run", "file")


def execute(block: Block, page: Path, namespace: dict) -> None:
    # as many newlines as stand before it, so that a traceback names the page's own line
    code = compile("\n" * block.line + block.text, str(page), "exec")
    exec(code, namespace)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for block in blocks_in(page):
            if block.marker == "file":
                Path(block.value).write_text(block.text, encoding="utf-8")
            elif block.language == "python" and is_run(block):
                execute(block, page, namespace)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_what_is_not_run_would_find_its_names_and_arguments(page):
    for block in blocks_in(page):
        if block.language == "python" and not is_run(block):
            assert len(block.value) > 3, f"{page.name}:{block.line}: the marker gives no reason"
            check_calls(ast.parse(block.text), f"{page.name}:{block.line}", block.value)


def check_calls(tree: ast.Module, place: str, foreign: str) -> None:
    """Imports of a snippet resolve, and calls of what they bring take the keyword arguments that are given."""
    names: dict[str, object] = {"torch": torch}
    public = importlib.import_module("hawk_kernels")
    names |= {name: getattr(public, name) for name in public.__all__} | {"hawk_kernels": public}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] != foreign:
                    names[alias.asname or alias.name] = importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] != foreign:
            module = importlib.import_module(node.module)
            names |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (called := resolved(node.func, names)) is not None:
            check_keywords(node, called, place)


def resolved(function: ast.expr, names: dict[str, object]) -> object:
    if isinstance(function, ast.Attribute):
        owner = resolved(function.value, names)
        return None if owner is None else getattr(owner, function.attr)
    return names.get(function.id) if isinstance(function, ast.Name) else None


def check_keywords(call: ast.Call, called: object, place: str) -> None:
    try:
        parameters = inspect.signature(called).parameters
    except ValueError:  # a builtin without one
        return
    known = set(parameters)
    if called is importlib.import_module("hawk_kernels").prune:
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        method = ast.literal_eval(given["method"]) if isinstance(given.get("method"), ast.Constant) else "hawk"
        known |= set(inspect.signature(METHODS[method]).parameters)
    elif any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    unknown = {keyword.arg for keyword in call.keywords if keyword.arg} - known
    assert not unknown, f"{place}: {ast.unparse(call.func)} has no argument {', '.join(sorted(unknown))}"


def commands_of(page: Path) -> list[tuple[str, str]]:
    """Every command that a page gives, with the place where it stands: of its shell blocks, and in running text."""
    text = page.read_text(encoding="utf-8")
    found = []
    for block in blocks_in(page):
        if block.language == "sh":
            joined = block.text.replace("\\\n", " ")
            found += [(line, f"{page.name}:{block.line}") for line in joined.splitlines() if line.strip()]
    spans = SPAN.findall(FENCE.sub("", text).replace("\n", " "))
    found += [(span, page.name) for span in spans if re.match(r"(make|python -m|hawk-kernels) \w", span)]
    return found


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_and_their_flags_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    for line, place in commands_of(page):
        words = [word for word in shlex.split(line, comments=True) if not re.match(r"\w+=", word)]
        check_command(words, f"{place}: {line}", make_variables(line))


def make_variables(line: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in shlex.split(line, comments=True) if re.match(r"[A-Z_]+=", word))


def check_command(words: list[str], place: str, variables: dict[str, str]) -> None:
    while words and words[0] in FOREIGN and "-m" in words:
        # `accelerate launch ... -m module`
        words = ["python", *words[words.index("-m") :]]
    if not words or words[0] in FOREIGN:
        extras = [extra for word in words for extra in re.findall(r"\.\[([\w,]+)\]", word)]
        declared = (ROOT / "setup.py").read_text(encoding="utf-8")
        assert all(f'"{extra}"' in declared for extra in ",".join(extras).split(",") if extra), place
        return
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for target in words[1:]:
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"{place}: no target {target}"
        assert all(re.search(rf"\b{name}\b", makefile) for name in variables), f"{place}: make reads no such variable"
        module = re.search(rf"^{re.escape(words[1])}:.*\n\t\$\(\w+\) -m (\S+) \$\(ARGS\)", makefile, re.MULTILINE)
        if variables.get("ARGS") and module:
            check_flags(module[1], (), shlex.split(variables["ARGS"]), place)
    elif words[0] == "hawk-kernels":
        check_module("hawk_kernels", words[1:], place)
    else:
        assert words[:2] == ["python", "-m"], f"{place}: expected a command that the tests can check"
        check_module(words[2], words[3:], place)


def check_module(module: str, arguments: list[str], place: str) -> None:
    assert importlib.util.find_spec(module) is not None, f"{place}: no module {module}"
    if module in ("pytest", "pip"):
        missing = [word for word in arguments if word.startswith("tests/") and not (ROOT / word).is_file()]
        assert not missing, f"{place}: no file {', '.join(missing)}"
        return
    commands = []
    while arguments and re.fullmatch(r"[a-z][a-z-]*", arguments[0]):
        commands.append(arguments.pop(0))
    check_flags(module, tuple(commands), arguments, place)


def check_flags(module: str, commands: tuple[str, ...], arguments: list[str], place: str) -> None:
    flags = [word.split("=")[0] for word in arguments if word.startswith("--")]
    if not commands and not flags:
        return
    # `weights show FILE` has two words of command and then an argument that may look like one
    code, text = help_of(module, commands)
    while code != 0 and len(commands) > 1:
        commands = commands[:-1]
        code, text = help_of(module, commands)
    assert code == 0, f"{place}: {module} {' '.join(commands)} --help fails: {text}"
    missing = [flag for flag in flags if not re.search(rf"(?<![\w-]){flag}(?![\w-])", text)]
    assert not missing, f"{place}: no option {', '.join(missing)}"


@cache
def help_of(module: str, commands: tuple[str, ...]) -> tuple[int, str]:
    """Exit code and text of `python -m module commands --help`.

    It runs in this process, where torch is imported already. A command may handle Ctrl-C; that ends with it.
    """
    written, interrupted = io.StringIO(), signal.getsignal(signal.SIGINT)
    with (
        mock.patch.object(sys, "argv", [module, *commands, "--help"]),
        # bench.host_cost takes Triton's interpreter out of it
        mock.patch.dict(os.environ),
        redirect_stdout(written),
        redirect_stderr(written),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            signal.signal(signal.SIGINT, interrupted)
    return code, written.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for match in LINK.finditer(FENCE.sub("", text)):
        target = match[1] or match[2]
        if re.match(r"(https?|mailto):", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target} leads nowhere"
        if anchor:
            assert anchor in anchors_of(file), f"{page.name}: {target} names no heading"


@cache
def anchors_of(page: Path) -> frozenset[str]:
    """What a heading is called in a link, as GitHub does it."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_that_are_named_exist(page):
    """A path in running text, such as `hawk_kernels/hf/families.py`; one with a word in capitals is a pattern."""
    for span in SPAN.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        is_path = re.fullmatch(r"(hawk_kernels|bench|tests|csrc_ref|docs)/[\w./-]+", span)
        if is_path and not re.search(r"[A-Z]{3,}", span.removesuffix("RESULTS.md")):
            assert (ROOT / span).exists(), f"{page.name}: there is no {span}"


def test_the_reference_is_that_of_the_docstrings():
    generate_api = importlib.import_module("docs.generate_api")
    assert generate_api.main(["--check"]) == 0
    public = importlib.import_module("hawk_kernels").__all__
    written = generate_api.PAGE.read_text(encoding="utf-8")
    assert all(f"### `{name}`\n" in written for name in public)
    assert all(f'### `method="{name}"`\n' in written for name in METHODS)


def test_the_readme_counts_the_families():
    assert f"[{len(FAMILIES)} model families]" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_text_and_tables_of_the_readme_fit_two_screens():
    """A third of it is the table of methods, which has a line for each."""
    text = FENCE.sub("", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len([line for line in text.splitlines() if line.strip()]) <= 60 + len(METHODS)
