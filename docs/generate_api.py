"""Write docs/api.md, the reference of the public names, from their docstrings.

python -m docs.generate_api           # write it
python -m docs.generate_api --check   # fail where the file differs from the docstrings
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hawk_kernels
from hawk_kernels import calibration, evaluation, methods

PAGE = Path(__file__).resolve().parent / "api.md"
NOT_RUN = "<!-- not run: the docstring's sketch, whose names stand for the caller's own -->"

GROUPS = {
    "Prune a model": ("prune", "Pruning", "load_processor"),
    "Score and select tokens": ("score_and_select", "score_tokens", "score_peaks", "select_topk", "Selection"),
    "Score from hidden states": ("score_hidden_and_select", "score_hidden", "Layer"),
    "Build the pruned prompt": ("compact", "Compacted"),
    "Other primitives": ("attention_column_mean", "hiprune_select", "greedy_max_min", "greedy_dpp"),
}
"""Headings of the page and the names below each; a public name that stands nowhere here comes under "Also public"."""

MADE_BY_OTHERS = ("Pruning", "Calibration", "Evaluation", "MethodResult", "TaskResult", "Unpruned", "PrefillView")
"""Classes whose objects a caller is given and never makes, so that their arguments are left out."""

FOR_AUTHORS = ("Method", "PrefillView", "Segments", "EncoderAttention", "LocalAttention", "LastQuery")
"""What `hawk_kernels.methods` offers to the author of a method."""

_INTRODUCTION = """\
# API reference

Generated from the docstrings by `python -m docs.generate_api`; edit those, not this page. A test compares the two.

Sizes: `B` rows of a batch, `H` query heads, `Hkv` key heads, `N` queries, `M` keys, `T` tokens of a prompt, `D` head
dimension, `C` hidden size.

<!-- fmt: off -->"""

_SECTIONS = ("Args", "Attributes", "Returns", "Raises")
_ITEM = re.compile(r"(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)*): (?P<text>.*)")


def page() -> str:
    """Return the whole page."""
    parts = [_INTRODUCTION]
    grouped = {name for names in GROUPS.values() for name in names} | {"calibrate"}
    rest = tuple(name for name in hawk_kernels.__all__ if name not in grouped)
    for heading, names in {**GROUPS, "Also public": rest}.items():
        present = [name for name in names if name in hawk_kernels.__all__]
        if present:
            parts.append(f"## {heading}")
            parts += [entry(name, getattr(hawk_kernels, name)) for name in present]
    parts.append("## Calibrate\n\nFrom `hawk_kernels.calibration`; `calibrate` is in `hawk_kernels` too.")
    parts += [entry(name, getattr(calibration, name)) for name in calibration.__all__]
    parts.append("## Evaluate\n\nFrom `hawk_kernels.evaluation`; tasks are those of `calibrate`.")
    parts += [entry(name, getattr(evaluation, name)) for name in evaluation.__all__]
    parts.append("## Methods and their options\n\nThe keyword arguments of each are `prune`'s `**options`.")
    for name, method in methods.METHODS.items():
        parts.append(entry(f'method="{name}"', method, called=method.__name__, members=False))
    parts.append("## For authors of methods\n\nFrom `hawk_kernels.methods`.")
    parts += [entry(name, getattr(methods, name)) for name in FOR_AUTHORS]
    return "\n\n".join(parts) + "\n"


def entry(name: str, value: Any, *, called: str | None = None, members: bool = True) -> str:
    """Return heading, signature and docstring of one public name, and of a class those of its public members."""
    if not callable(value):
        return f"### `{name}`\n\nA `{type(value).__name__}`."
    parts = [f"### `{name}`"]
    if name not in MADE_BY_OTHERS and not getattr(value, "_is_protocol", False):
        parts.append(f"```text\n{signature(called or name, value)}\n```")
    parts.append(prose(inspect.getdoc(value) or ""))
    if inspect.isclass(value) and members:
        parts += list(_members(name, value))
    return "\n\n".join(part for part in parts if part)


def _members(name: str, value: type) -> Iterator[str]:
    """Yield public properties and methods that the class itself defines and documents."""
    for member, found in vars(value).items():
        function = found.__func__ if isinstance(found, (classmethod, staticmethod)) else found
        is_documented = isinstance(function, property) or inspect.isfunction(function)
        if member.startswith("_") or not is_documented or not inspect.getdoc(function):
            continue
        shown = f"{name}.{member}" if isinstance(function, property) else signature(f"{name}.{member}", function)
        text = prose(inspect.getdoc(function) or "")
        is_long = "\n" in shown
        heading = f"#### `{name}.{member}`\n\n```text\n{shown}\n```" if is_long else f"#### `{shown}`"
        yield f"{heading}\n\n{text}"


def signature(name: str, value: Any) -> str:
    """Write the call on one line where it fits, else with one argument per line."""
    parameters = [p for p in inspect.signature(value).parameters.values() if p.name not in ("self", "cls")]
    shown: list[str] = []
    is_open = False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not is_open:
            shown.append("*")
            is_open = True
        is_open = is_open or parameter.kind is parameter.VAR_POSITIONAL
        shown.append(_parameter(parameter))
    line = f"{name}({', '.join(shown)}){_arrow(value)}"
    if len(line) <= 110:
        return line
    return "\n".join([f"{name}(", *(f"    {argument}," for argument in shown), f"){_arrow(value)}"])


def _parameter(parameter: inspect.Parameter) -> str:
    kinds = inspect.Parameter
    stars = "*" if parameter.kind is kinds.VAR_POSITIONAL else "**" if parameter.kind is kinds.VAR_KEYWORD else ""
    annotation = "" if parameter.annotation is parameter.empty else f": {_annotation(parameter.annotation)}"
    if parameter.default is parameter.empty:
        return f"{stars}{parameter.name}{annotation}"
    default = json.dumps(parameter.default) if isinstance(parameter.default, str) else repr(parameter.default)
    return f"{parameter.name}{annotation}{' = ' if annotation else '='}{default}"


def _annotation(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__forward_arg__", None)
    return str(text) if text is not None else getattr(annotation, "__name__", str(annotation))


def _arrow(value: Any) -> str:
    annotation = getattr(value, "__annotations__", {}).get("return")
    return "" if inspect.isclass(value) or annotation is None else f" -> {_annotation(annotation)}"


def prose(docstring: str) -> str:
    """Turn a docstring into Markdown: sections become lists, indented code becomes a block."""
    parts: list[str] = []
    for block in re.split(r"\n\s*?\n", docstring):
        head, _, body = block.partition("\n")
        if head.rstrip(":") in _SECTIONS and head.endswith(":"):
            parts.append(f"*{head}*\n\n{_items(textwrap.dedent(body))}")
        elif block.startswith("    "):
            parts.append(_code(textwrap.dedent(block)))
        else:
            parts.append(block)
    return "\n\n".join(parts)


def _items(body: str) -> str:
    """Return the entries of a section: a list where each names an argument, else text."""
    lines = []
    for line in body.splitlines():
        match = _ITEM.fullmatch(line)
        if match:
            names = ", ".join(f"`{name}`" for name in match["names"].split(", "))
            lines.append(f"- {names}: {match['text']}")
        else:
            lines.append(f"  {line.strip()}" if line.startswith(" ") else line)
    return "\n".join(lines)


def _code(text: str) -> str:
    """Return a fenced block that names its language."""
    try:
        json.loads(text)
        return f"```json\n{text}\n```"
    except ValueError:
        pass
    try:
        compile(text, "docstring", "exec")
    except SyntaxError:
        return f"```text\n{text}\n```"
    return f"{NOT_RUN}\n\n```python\n{text}\n```"


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where the page differs")
    options = parser.parse_args(arguments)
    if options.check:
        if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page():
            return 0
        print("docs/api.md differs from the docstrings; run python -m docs.generate_api")
        return 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
