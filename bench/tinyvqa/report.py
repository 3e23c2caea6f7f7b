"""The table as Markdown and as a plot."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def markdown(report: dict[str, Any]) -> str:
    """Render `table.json` as Markdown."""
    ratios = list(next(iter(report["methods"].values())))
    kinds = list(report["questions_by_kind"])
    parts = [
        "# TinyVQA: relative accuracy with fewer visual tokens\n",
        f"{report['questions']} questions about {report['prompts']} prompts with unseen digits, "
        f"{_models(report)}. Relative accuracy: right answers with the "
        "kept tokens divided by right answers with all, mean of kinds and models, in %; ± half of the 95 % interval "
        f"over prompts. Made by `python -m bench.tinyvqa.table{_options(report)}`.\n",
        "## Mean of all kinds\n",
        _table(
            ["keep", *(_share(r) for r in ratios)],
            ([label, *(_with_interval(e[r]["mean"]) for r in ratios)] for label, e in report["methods"].items()),
        ),
        "## What the layers read\n",
        "The keep ratio is what is left after the last stage. Methods that drop inside the stack read all tokens up to "
        "their first stage, so compare their accuracy with that of others at this cost: the share of the visual tokens "
        "that a layer reads, in %, mean over the layers. In brackets: after which layer how much is left.\n",
        _table(
            ["keep", *(_share(r) for r in ratios)],
            (
                [label, *(_layers_read(read[r]) for r in ratios)]
                for label, read in report["layers_read"].items()
                if any(int(layer) for layer in read[ratios[0]]["stages"])
            ),
        ),
        f"## {report['reference']} minus the others\n",
        "Points, paired over prompts; bold where the 95 % interval leaves out zero. In brackets: model by model.\n",
        _table(
            ["keep", *(_share(r) for r in ratios)],
            (
                [label, *(_difference(e[r]) for r in ratios)]
                for label, e in report["methods"].items()
                if label != report["reference"]
            ),
        ),
    ]
    for ratio in ratios:
        parts += [
            f"## Kind by kind, keeping {_share(ratio)}\n",
            _table(
                ["", *kinds],
                (
                    [label, *(f"{e[ratio]['by_kind'][kind]['percent']:.1f}" for kind in kinds)]
                    for label, e in report["methods"].items()
                ),
            ),
        ]
    parts += [
        "## The models with all visual tokens\n",
        "% right.\n",
        _table(
            ["", "mean", *kinds],
            ([m["name"], *(f"{100 * m['accuracy'][kind]:.1f}" for kind in ("mean", *kinds))] for m in report["models"]),
        ),
        "## Heads\n",
        "Importance of each head of the first layer, in %, and the drop in accuracy (points, mean of kinds) when its "
        "view of the visual tokens is hidden, measured on training digits.\n",
        _table(
            ["", *(f"head {i}" for i in range(len(report["models"][0]["head_weights"])))],
            (
                row
                for m in report["models"]
                for row in (
                    [f"{m['name']}, importance", *(f"{100 * w:.1f}" for w in m["head_weights"])],
                    [
                        f"{m['name']}, importance in all layers",
                        *(f"{100 * w:.1f}" for w in m["head_weights_of_all_layers"]),
                    ],
                    [f"{m['name']}, drop", *(f"{100 * sum(d) / len(d):.1f}" for d in m["deltas"])],
                    [f"{m['name']}, largest drop of a kind", *(f"{100 * max(d):.1f}" for d in m["deltas"])],
                )
            ),
        ),
    ]
    if report["refused"]:
        parts += [
            "## Methods that cannot serve this family\n",
            _table(["method", "why"], ([label, why] for label, why in report["refused"].items())),
        ]
    if report["prefill_ms"]:
        sizes = list(report["prefill_ms"])
        parts += [
            f"## Time of one prefill, keeping {_share(str(report['prefill_keep_ratio']))}\n",
            f"Median milliseconds, batch 1, {report['machine']['threads']} threads of "
            f"{report['machine']['processor']}, vision tower included. Says nothing about real models.\n",
            _table(
                ["", *(f"{size} cells" for size in sizes)],
                (
                    [label, *(f"{report['prefill_ms'][size][label]:.1f}" for size in sizes)]
                    for label in report["prefill_ms"][sizes[0]]
                ),
            ),
        ]
    return "\n".join(parts)


def _layers_read(read: dict[str, Any]) -> str:
    stages = ", ".join(f"{layer}: {_share(share)}" for layer, share in read["stages"].items())
    return f"{100 * read['mean_share']:.0f} ({stages})"


def _models(report: dict[str, Any]) -> str:
    count = len(report["models"])
    return "one model" if count == 1 else f"{count} models that differ in their training seed"


def _options(report: dict[str, Any]) -> str:
    return "" if report["miniature"] == "qwen" else f" --miniature {report['miniature']}"


def draw_plot(report: dict[str, Any], path: Path) -> None:
    """Draw relative accuracy over the share of tokens kept: the mean with its interval, and each kind by itself."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(report["questions_by_kind"])
    methods = report["methods"]
    shown = [label for label in methods if not label.startswith("permuted")]
    ratios = list(methods[shown[0]])
    places = range(len(ratios))
    columns = math.ceil((1 + len(kinds)) / 2)
    figure, axes = pyplot.subplots(2, columns, figsize=(1 + 4 * columns, 8.2), sharey=True)
    colours = pyplot.get_cmap("turbo", len(shown))
    for axis, kind in zip(axes.flat, ["mean", *kinds], strict=False):
        for number, label in enumerate(shown):
            found = [e["mean"] if kind == "mean" else e["by_kind"][kind] for e in methods[label].values()]
            values = [entry["percent"] for entry in found]
            spread = [
                [v - entry["low"] for v, entry in zip(values, found, strict=True)],
                [entry["high"] - v for v, entry in zip(values, found, strict=True)],
            ]
            axis.errorbar(
                places,
                values,
                yerr=spread if kind == "mean" else None,
                label=label,
                color=colours(number),
                linewidth=2.6 if label == report["reference"] else 1.3,
                marker="o",
                markersize=3,
                capsize=2,
            )
        axis.set_title("mean of kinds" if kind == "mean" else kind)
        axis.set_xticks(list(places), [_share(r) for r in ratios])
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("relative accuracy, %")
    for axis in axes[1]:
        axis.set_xlabel("visual tokens kept")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="lower center", ncols=7, frameon=False)
    figure.suptitle(
        f"TinyVQA, {report['miniature']}: {report['questions']} questions about unseen digits, {_models(report)}, "
        "95 % intervals"
    )
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _share(ratio: str | float) -> str:
    return f"{100 * float(ratio):.3g} %"


def _with_interval(entry: dict[str, float]) -> str:
    return f"{entry['percent']:.1f} ± {(entry['high'] - entry['low']) / 2:.1f}"


def _difference(entry: dict[str, Any]) -> str:
    found = entry["reference_minus_this"]
    text = f"{found['percent']:+.1f}"
    if found["low"] > 0 or found["high"] < 0:
        text = f"**{text}**"
    return f"{text} ({', '.join(format(m['percent'], '+.1f') for m in entry['reference_minus_this_by_model'])})"
