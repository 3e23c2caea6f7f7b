"""The table of an evaluation in words and numbers: rows of text, and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hawk_kernels.evaluation.result import Evaluation, MethodResult
from hawk_kernels.evaluation.stages import share

MARK = "<!-- written by hawk-kernels evaluate -->\n"
"""How the Markdown file begins."""

NOTE = (
    "After layer: after which layers tokens leave; 0 is before the first. Relative score: the score with the kept "
    "visual tokens divided by the score with all of them, mean of the tasks, with half of its 95 % interval (bootstrap "
    "over pictures). Points behind: how far a method's relative score is behind that of the first method at the same "
    "keep ratio, paired over questions; bold where the interval excludes zero. Visual tokens: those that are left in "
    "the end; tokens per layer: those that a layer reads, mean of the layers. These and the KV cache are means of the "
    "prompts. Times: median over questions, batch 1, each question asked in all ways in turn; the brackets say how "
    "many times as fast as unpruned that is."
)


def markdown(evaluation: Evaluation) -> str:
    """Render an evaluation as Markdown."""
    parts = [f"{MARK}# {_escaped(title(evaluation))}", NOTE, _table(main_rows(evaluation)), "## Scores by task"]
    parts.append(_table(task_rows(evaluation)))
    if evaluation.refused:
        parts += ["## Methods that cannot serve this model", _table(refused_rows(evaluation))]
    doubts = evaluation.doubts()
    if doubts:
        parts += ["## Doubts", "\n".join(f"- {_escaped(doubt)}" for doubt in doubts)]
    return "\n\n".join([*parts, setting(evaluation)]) + "\n"


def title(evaluation: Evaluation) -> str:
    """Say what was evaluated."""
    return f"Visual-token pruning of {evaluation.model}"


def setting(evaluation: Evaluation) -> str:
    """Say on what, with what and when."""
    settings, versions = evaluation.settings, evaluation.versions
    asked = ", ".join(f"{task.name} ({task.samples} of {task.total})" for task in evaluation.tasks)
    return (
        f"Questions: {asked}. Seed {settings['seed']}, {settings['dtype']} on {settings['device']}, attention "
        f"{settings['attention']}; hawk_kernels {versions['hawk_kernels']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}; {evaluation.date}."
    )


def main_rows(evaluation: Evaluation) -> list[list[str]]:
    """Return the header and a row for the unpruned model and for each method at each keep ratio."""
    whole = evaluation.unpruned
    head = ["method", "keep", "after layer", "score", "relative score", "points behind", "visual tokens"]
    head += ["tokens per layer", "KV cache", "first token", "next token"]
    rows = [head]
    rows.append(
        [
            "unpruned",
            "all",
            "",
            f"{100 * whole.score:.1f}",
            "100 %",
            "",
            f"{whole.visual_tokens:.0f}",
            f"{whole.visual_tokens:.0f}",
            size(whole.cache_bytes),
            time(whole.first_token_ms, None),
            time(whole.next_token_ms, None),
        ]
    )
    return rows + [_row(result) for result in evaluation.methods]


def task_rows(evaluation: Evaluation) -> list[list[str]]:
    """Return the header and, for each row of the main table, the score of each task with its relative score."""
    names = [task.name for task in evaluation.tasks]
    rows = [["method", "keep", *names]]
    rows.append(["unpruned", "all", *(f"{100 * task.score:.1f}" for task in evaluation.tasks)])
    for result in evaluation.methods:
        cells = [_task_cell(result, name) for name in names]
        rows.append([result.method, share(result.keep), *cells])
    return rows


def refused_rows(evaluation: Evaluation) -> list[list[str]]:
    """Return the header and a row for each method that cannot serve the model."""
    return [["method", "why"], *([label, reason] for label, reason in evaluation.refused.items())]


def size(count: float) -> str:
    """Write a number of bytes."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def time(milliseconds: float | None, speedup: float | None) -> str:
    """Write a time, with how many times faster that is than unpruned."""
    if milliseconds is None:
        return "-"
    return f"{milliseconds:.1f} ms" + ("" if speedup is None else f" ({speedup:.2f}x)")


def with_interval(entry: Mapping[str, float] | None) -> str:
    """Write a percentage with half of its interval."""
    return "-" if entry is None else f"{entry['percent']:.1f} ± {(entry['high'] - entry['low']) / 2:.1f} %"


def _row(result: MethodResult) -> list[str]:
    return [
        result.method,
        share(result.keep),
        ", ".join(map(str, result.layers)),
        f"{100 * result.score:.1f}",
        with_interval(result.relative),
        _behind(result.behind_first),
        f"{result.visual_tokens:.0f}",
        f"{result.tokens_per_layer:.0f}",
        size(result.cache_bytes),
        time(result.first_token_ms, result.first_token_speedup),
        time(result.next_token_ms, result.next_token_speedup),
    ]


def _behind(entry: Mapping[str, float] | None) -> str:
    if entry is None:
        return ""
    text = f"{entry['percent']:+.1f}"
    return f"**{text}**" if entry["low"] > 0 or entry["high"] < 0 else text


def _task_cell(result: MethodResult, name: str) -> str:
    score = f"{100 * result.scores[name]:.1f}"
    entry = result.relative_by_task.get(name)
    return score if entry is None else f"{score} ({with_interval(entry)})"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(map(_escaped, line)) + " |" for line in lines)


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
