"""Draws an evaluation: quality against speed, and quality against the visual tokens that a layer reads."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

from hawk_kernels.evaluation.result import Evaluation, MethodResult
from hawk_kernels.evaluation.stages import share
from hawk_kernels.evaluation.text import title


def draw_results(evaluation: Evaluation, file: IO[bytes] | Path) -> None:
    """Draw a PNG with a line for each method through its keep ratios.

    Args:
        evaluation: what was found.
        file: where the picture goes.

    Raises:
        ImportError: matplotlib is not installed; the message has the command.
    """
    try:
        # its own canvas opens no window and changes no setting of the caller's pyplot
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib, which is not installed: pip install matplotlib") from error
    figure = Figure(figsize=(13, 5.6), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    speed, tokens = figure.subplots(1, 2, sharey=True)
    whole = evaluation.unpruned
    for axes, begin in ((speed, 1.0), (tokens, 100.0)):
        axes.plot([begin], [100.0], marker="*", markersize=13, color="black", linestyle="", label="unpruned")
        axes.axhline(100, color="black", linewidth=0.6, alpha=0.5)
        axes.grid(alpha=0.3)
    for number, method in enumerate(dict.fromkeys(result.method for result in evaluation.methods)):
        results = [result for result in evaluation.methods if result.method == method and result.relative]
        colour = f"C{number % 10}"
        _draw_line(speed, results, [result.first_token_speedup for result in results], method, colour)
        shares = [100 * result.tokens_per_layer / max(1.0, whole.visual_tokens) for result in results]
        _draw_line(tokens, results, shares, method, colour)
        for result in results:
            place = (result.first_token_speedup, _percent(result, "percent"))
            speed.annotate(share(result.keep), place, fontsize=6.5, xytext=(4, 4), textcoords="offset points")
    speed.axvline(1, color="black", linewidth=0.6, alpha=0.5)
    speed.set(xlabel="first token comes so many times sooner (median)", ylabel="relative score, %")
    tokens.set(xlabel="visual tokens that a layer reads, %, mean of the layers")
    tokens.invert_xaxis()
    figure.legend(*_legend(tokens), loc="outside lower center", ncols=4, frameon=False)
    # names are plain text, even those with dollar signs
    settings = evaluation.settings
    figure.suptitle(
        f"{title(evaluation)}\n{sum(task.samples for task in evaluation.tasks)} questions, {settings['dtype']} on "
        f"{settings['device']}, 95 % intervals",
        parse_math=False,
        fontsize=11,
    )
    figure.savefig(file, format="png")


def _draw_line(axes: Any, results: list[MethodResult], places: list[float], label: str, colour: str) -> None:
    values = [_percent(result, "percent") for result in results]
    below = [max(0.0, value - _percent(result, "low")) for value, result in zip(values, results, strict=True)]
    above = [max(0.0, _percent(result, "high") - value) for value, result in zip(values, results, strict=True)]
    # a name that begins with an underscore would be left out of the legend
    shown = label if not label.startswith("_") else f" {label}"
    axes.errorbar(places, values, yerr=[below, above], label=shown, color=colour, marker="o", markersize=4, capsize=2)


def _legend(axes: Any) -> tuple[list[Any], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    return handles, [label.replace("$", r"\$") for label in labels]


def _percent(result: MethodResult, name: str) -> float:
    assert result.relative is not None
    return result.relative[name]
