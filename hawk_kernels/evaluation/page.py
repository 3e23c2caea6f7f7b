"""Renders an evaluation as one HTML page that loads no other file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from hawk_kernels.evaluation.result import Evaluation
from hawk_kernels.evaluation.text import NOTE, main_rows, refused_rows, setting, task_rows, title

MARK = "<!doctype html>\n<!-- hawk_kernels evaluation -->\n"
"""How every such page begins."""

_STYLE = """\
:root { color-scheme: light dark; --page: #ffffff; --ink: #262a33; --faint: #5c6370; --line: #d9dce2; }
@media (prefers-color-scheme: dark) { :root { --page: #15171c; --ink: #e8eaee; --faint: #a5acb9; --line: #363b46; } }
body { margin: 0 auto; max-width: 80rem; padding: 1rem clamp(0.75rem, 3vw, 2rem) 3rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 1.75rem; }
p { color: var(--faint); max-width: 60rem; }
img { width: 100%; height: auto; background: #ffffff; border-radius: 0.3rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--faint); font-weight: 600; }
td.why { white-space: normal; }
"""


def page(evaluation: Evaluation, picture: bytes | None) -> str:
    """Return the page.

    Args:
        evaluation: what was found.
        picture: a PNG of it, or None.
    """
    heading = html.escape(title(evaluation))
    parts = [f"<h1>{heading}</h1>"]
    if picture is not None:
        encoded = base64.b64encode(picture).decode()
        words = "Relative score against how much sooner the first token comes, and against the tokens per layer"
        parts.append(f'<img src="data:image/png;base64,{encoded}" alt="{words}">')
    parts += [_table(main_rows(evaluation)), f"<p>{html.escape(NOTE)}</p>"]
    parts += ["<h2>Scores by task</h2>", _table(task_rows(evaluation))]
    if evaluation.refused:
        parts += ["<h2>Methods that cannot serve this model</h2>", _table(refused_rows(evaluation))]
    if evaluation.doubts():
        items = "".join(f"<li>{html.escape(doubt)}</li>" for doubt in evaluation.doubts())
        parts += ["<h2>Doubts</h2>", f"<ul>{items}</ul>"]
    parts.append(f"<p>{html.escape(setting(evaluation))}</p>")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<link rel="icon" href="data:,">\n<title>{heading}</title>\n<style>\n{_STYLE}</style>'
    )
    body = "\n".join(parts)
    return f'{MARK}<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{_cell(cell)}</th>" for cell in head) + "</tr>"]
    for row in body:
        cells = (f"<td{' class=why' if len(cell) > 80 else ''}>{_cell(cell)}</td>" for cell in row)
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _cell(text: str) -> str:
    escaped = html.escape(text)
    if escaped.startswith("**") and escaped.endswith("**"):
        return f"<b>{escaped[2:-2]}</b>"
    return escaped
