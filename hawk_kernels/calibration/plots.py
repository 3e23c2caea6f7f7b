"""Draws a weights file: the importance of each head, and what each head costs each benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hawk_kernels.calibration.result import Calibration, LayerResult
from hawk_kernels.output_files import check_output, picture_kind, write_whole

_BAR, _REFERENCE = "#2f6f9f", "#b0522d"
_TITLES = {"first": "masked in the first layer", "all": "masked in all layers"}


def draw_weights(calibration: Calibration, path: str | Path) -> None:
    """Draw a bar chart with standard errors and, where drops are known, a heat map of dS.

    There is one row for the first layer and one for all layers, as far as they were measured.

    Args:
        calibration: what was measured, or `Calibration.from_dict` of a file.
        path: of the picture; its end says the format.

    Raises:
        ImportError: matplotlib is not installed; the message has the command.
        OutputFileError: the picture cannot be written there.
    """
    try:
        # its own canvas opens no window and changes no setting of the caller's pyplot
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib, which is not installed: pip install matplotlib") from error
    check_output(path, picture_kind(path))
    results = calibration.results
    names = [task.name for task in calibration.tasks]
    with_drops = any(result.deltas is not None for result in results.values())
    num_heads = len(calibration.weights)
    width, columns = max(6.0, 0.28 * num_heads), 2 if with_drops else 1
    height = 3.2 + 0.16 * len(names)
    figure = Figure(figsize=(width * columns, height * len(results)), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(results), columns, squeeze=False)
    for row, (layers, result) in zip(axes, results.items(), strict=True):
        _draw_bars(row[0], result, _TITLES.get(layers, ""))
        if not with_drops:
            continue
        if result.deltas is not None:
            _draw_drops(figure, row[1], result.deltas, result.flat_tasks, names)
        else:
            row[1].set_axis_off()
    # names are text, also those with dollar signs
    figure.suptitle(f"Head importance of {_short(calibration.model or 'an unknown model')}", parse_math=False)
    suffix = Path(path).suffix.removeprefix(".").lower()
    write_whole(path, lambda file: figure.savefig(file, format=suffix))


def _draw_bars(axes: Any, result: LayerResult, title: str) -> None:
    weights = result.weights.tolist()
    errors = None if result.standard_errors is None else result.standard_errors.tolist()
    axes.bar(range(len(weights)), weights, yerr=errors, color=_BAR, capsize=2, ecolor="#444444")
    axes.axhline(1 / len(weights), color=_REFERENCE, linestyle="--", linewidth=1, label="uniform")
    label = "weight" if errors is None else "weight, with its standard error"
    axes.set(xlabel="head", ylabel=label, title=title, xlim=(-0.6, len(weights) - 0.4))
    axes.set_ylim(bottom=0)
    axes.set_xticks(range(len(weights)))
    axes.tick_params(axis="x", labelsize=7)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_drops(figure: Any, axes: Any, deltas: torch.Tensor, flat_tasks: Sequence[str], names: list[str]) -> None:
    by_task = deltas.T.tolist()
    # one scale to both sides of zero, so that colour says whether the score fell or rose
    extent = max((abs(drop) for row in by_task for drop in row), default=0.0) or 1.0
    image = axes.imshow(by_task, cmap="RdBu_r", vmin=-extent, vmax=extent, aspect="auto")
    labels = [f"{name} (flat)" if name in flat_tasks else name for name in names]
    axes.set_yticks(range(len(names)), labels, parse_math=False)
    axes.set_xticks(range(len(by_task[0])))
    axes.tick_params(axis="x", labelsize=7)
    axes.set(xlabel="head", title="dS: score lost without this head's view")
    figure.colorbar(image, ax=axes, shrink=0.9)


def _short(model: str) -> str:
    return Path(model).name if Path(model).is_absolute() else model
