"""Pictures of a weights file: importance of each head, and what each head costs each benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hawk_kernels.calibration.result import results_in

_BAR, _REFERENCE = "#2f6f9f", "#b0522d"
_TITLES = {"first": "hidden in the first layer", "all": "hidden in all layers"}


def draw_weights(content: Mapping[str, Any], path: str | Path) -> None:
    """Draw a weights file: a bar chart with standard errors and, where drops are known, a heat map of dS.

    One row for each way of hiding that was measured.

    Args:
        content: of the file.
        path: of the picture; its end says the format.

    Raises:
        ImportError: matplotlib is not installed; the message has the command.
    """
    try:
        # a canvas of its own: no window, and no setting of the caller's pyplot changes
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib, which is not installed: pip install matplotlib") from error
    results = results_in(content)
    names = [task["name"] for task in content.get("tasks", [])]
    with_drops = any(result.get("deltas") for result in results.values())
    num_heads = len(content["weights"])
    width, columns = max(6.0, 0.28 * num_heads), 2 if with_drops else 1
    height = 3.2 + 0.16 * len(names)
    figure = Figure(figsize=(width * columns, height * len(results)), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(results), columns, squeeze=False)
    for row, (layers, result) in zip(axes, results.items(), strict=True):
        _draw_bars(row[0], result, _TITLES.get(layers, ""))
        if not with_drops:
            continue
        if result.get("deltas"):
            _draw_drops(figure, row[1], result, names)
        else:
            row[1].set_axis_off()
    # names are text, also those with dollar signs
    figure.suptitle(f"Head importance of {_short(content.get('model', 'an unknown model'))}", parse_math=False)
    figure.savefig(path)


def _draw_bars(axes: Any, result: Mapping[str, Any], title: str) -> None:
    weights = result["weights"]
    axes.bar(range(len(weights)), weights, yerr=result.get("standard_errors"), color=_BAR, capsize=2, ecolor="#444444")
    axes.axhline(1 / len(weights), color=_REFERENCE, linestyle="--", linewidth=1, label="uniform")
    label = "weight" if result.get("standard_errors") is None else "weight, with its standard error"
    axes.set(xlabel="head", ylabel=label, title=title, xlim=(-0.6, len(weights) - 0.4))
    axes.set_ylim(bottom=0)
    axes.set_xticks(range(len(weights)))
    axes.tick_params(axis="x", labelsize=7)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_drops(figure: Any, axes: Any, result: Mapping[str, Any], names: list[str]) -> None:
    by_task = list(zip(*result["deltas"], strict=True))
    # one scale to both sides of zero, so that colour says whether the score fell or rose
    extent = max((abs(drop) for row in by_task for drop in row), default=0.0) or 1.0
    image = axes.imshow(by_task, cmap="RdBu_r", vmin=-extent, vmax=extent, aspect="auto")
    flat = set(result.get("flat_tasks") or [])
    labels = [f"{name} (flat)" if name in flat else name for name in names]
    axes.set_yticks(range(len(names)), labels, parse_math=False)
    axes.set_xticks(range(len(by_task[0])))
    axes.tick_params(axis="x", labelsize=7)
    axes.set(xlabel="head", title="dS: score lost without this head's view")
    figure.colorbar(image, ax=axes, shrink=0.9)


def _short(model: str) -> str:
    return Path(model).name if Path(model).is_absolute() else model
