"""Draw pictures from the JSON files of a results folder; needs matplotlib.

python -m bench.plots bench/results/<device>
"""

from __future__ import annotations

import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench import cli
from bench.contenders import OURS, RELEASED, STRONG
from bench.report import load
from bench.score_and_select import EMPTY

_STYLES = {
    OURS: ("#0b6e4f", "o", 2.2),
    RELEASED: ("#b23a48", "s", 1.4),
    STRONG: ("#3d5a98", "^", 1.4),
}


def available() -> bool:
    """Whether pictures can be drawn here."""
    return find_spec("matplotlib") is not None


def growth_rows(results: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """Select the rows of Qwen2.5-VL-7B that differ in M alone, in the dtype that has most of them."""
    shapes = Counter(
        (row["case"]["num_queries"], row["case"]["dtype"]) for row in results["rows"] if _is_growth(row, kind)
    )
    if not shapes:
        return []
    shape = shapes.most_common(1)[0][0]
    rows = [
        row
        for row in results["rows"]
        if _is_growth(row, kind) and (row["case"]["num_queries"], row["case"]["dtype"]) == shape
    ]
    return sorted(rows, key=lambda row: row["case"]["num_keys"])


def _is_growth(row: dict[str, Any], kind: str) -> bool:
    case = row["case"]
    shape = (case["kind"], case["decoder"]["name"], case["batch"], case["normalize"])
    return "failed" not in row and shape == (kind, "Qwen2.5-VL-7B", 1, "l2")


def series(rows: list[dict[str, Any]]) -> tuple[str, dict[str, list[tuple[int, float, float, float]]]]:
    """Say how it was timed, and list `(M, median, p20, p80)` of each contender."""
    on_gpu = any("graph" in entry for row in rows for entry in row["contenders"])
    how, cache = ("graph", "cold") if on_gpu else ("eager", "warm")
    lines: dict[str, list[tuple[int, float, float, float]]] = {}
    for row in rows:
        for entry in row["contenders"]:
            if cache in entry.get(how, {}):
                spread = entry[how][cache]
                point = (row["case"]["num_keys"], *(max(1e-3, spread[name]) for name in ("median", "p20", "p80")))
                lines.setdefault(entry["name"], []).append(point)
    title = "replayed CUDA graph, cold L2" if on_gpu else "eager on a CPU"
    return title, lines


def draw_growth(results: dict[str, Any], kind: str, path: Path) -> bool:
    """Time against M on log axes with the floor; False where there are no two points."""
    rows = growth_rows(results, kind)
    if len(rows) < 2:
        return False
    from matplotlib.figure import Figure

    title, lines = series(rows)
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    sizes = [row["case"]["num_keys"] for row in rows]
    floor = [row["floor"]["microseconds"] for row in rows]
    axes.fill_between(sizes, floor, min(floor) / 3, color="#dddddd", label="floor: read the input once", zorder=0)
    for name, points in lines.items():
        color, marker, width = _STYLES.get(name, (None, ".", 1.0))
        m, median, low, high = zip(*points, strict=True)
        style = "--" if name == EMPTY or "compiled" in name else "-"
        drawn = axes.plot(m, median, style, marker=marker, color=color, linewidth=width, markersize=5, label=name)
        axes.fill_between(m, low, high, color=drawn[0].get_color(), alpha=0.15, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel="visual tokens M", ylabel="microseconds", xticks=sizes)
    axes.set_xticks([], minor=True)
    axes.set_xticklabels([str(size) for size in sizes], rotation=45, ha="right", fontsize=8)
    axes.set_ylim(bottom=min(floor) / 2)
    case = rows[0]["case"]
    shape = f"{case['decoder']['name']}, N={case['num_queries']}, {case['dtype']}"
    begin = {"queries": "queries and keys", "hidden": "hidden states", "scores": "scores"}[kind]
    axes.set_title(f"From {begin} to kept tokens: {shape}\n{results['environment']['device']}, {title}", fontsize=10)
    axes.grid(alpha=0.3, which="major")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    return True


def draw_prefill(results: dict[str, Any], path: Path) -> bool:
    """Time to first token by fraction pruned, with the limit that operations set."""
    if not results["rows"]:
        return False
    from matplotlib.figure import Figure

    counts = sorted({row["visual_tokens"] for row in results["rows"]})
    figure = Figure(figsize=(4 * len(counts), 4), layout="constrained")
    for axes, count in zip(figure.subplots(1, len(counts), squeeze=False)[0], counts, strict=True):
        rows = [row for row in results["rows"] if row["visual_tokens"] == count]
        unpruned = next(row for row in rows if row["way"] == "unpruned")
        for way, color, marker in (("ours", "#0b6e4f", "o"), ("released", "#b23a48", "s")):
            points = [unpruned, *(row for row in rows if row["way"] == way)]
            times = [row["first_token_microseconds"]["median"] / 1e3 for row in points]
            axes.plot([100 * row["pruned"] for row in points], times, marker=marker, color=color, label=way)
        limit = [unpruned, *(row for row in rows if row["way"] == "ours")]
        whole = unpruned["first_token_microseconds"]["median"] / 1e3
        axes.plot(
            [100 * row["pruned"] for row in limit], [whole / row["flop_limit"] for row in limit], ":k", label="limit"
        )
        axes.set(title=f"{count} visual tokens", xlabel="% pruned", ylabel="ms to first token")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(f"{results['model']}, {results['environment']['device']}", fontsize=10)
    figure.savefig(path, dpi=130)
    return True


def draw(folder: Path) -> list[Path]:
    """Draw every picture for which the folder has numbers."""
    drawn = []
    micro, prefill = load(folder, "score_and_select.json"), load(folder, "prefill.json")
    for kind in ("queries", "hidden", "scores"):
        path = folder / f"growth-{kind}.png"
        if micro is not None and draw_growth(micro, kind, path):
            drawn.append(path)
    if prefill is not None and draw_prefill(prefill, folder / "prefill.png"):
        drawn.append(folder / "prefill.png")
    return drawn


def main() -> None:
    """Draw what a folder holds."""
    parser = cli.parser("bench.plots", __doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="a results folder, such as bench/results/cpu-amd-epyc")
    arguments = parser.parse_args()
    if not available():
        sys.exit("bench.plots: needs matplotlib: pip install matplotlib. The JSON files hold all numbers")
    if arguments.folder is None or not arguments.folder.is_dir():
        got = "none" if arguments.folder is None else f"{arguments.folder}, which is none"
        sys.exit(
            f"bench.plots: expected a results folder, got {got}; make plots ARGS=bench/results/cpu-amd-epyc draws one"
        )
    drawn = draw(arguments.folder)
    if not drawn:
        sys.exit(f"bench.plots: {arguments.folder} holds no score_and_select.json or prefill.json with rows to draw")
    for path in drawn:
        print(f"written: {path}")


if __name__ == "__main__":
    main()
