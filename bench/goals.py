"""The project's bars and goals on an H200, and what a run reached of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.contenders import OURS, RELEASED, STRONG

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Goal:
    """One line of the table.

    Attributes:
        title: what is asked.
        bar, goal: what must and what should be reached.
        unit: printed after every number.
        smaller_is_better: direction.
        measured: from the rows of `score_and_select.json` and `prefill.json` to named values, none where nothing was
            measured.
    """

    title: str
    bar: float
    goal: float
    unit: str
    smaller_is_better: bool
    measured: Callable[[Rows, Rows], dict[str, float]]

    def verdict(self, values: dict[str, float]) -> str:
        """Judge the worst of the values; empty without one."""
        if not values:
            return ""
        worst = max(values.values()) if self.smaller_is_better else min(values.values())
        reached = [worst <= limit if self.smaller_is_better else worst >= limit for limit in (self.goal, self.bar)]
        return "goal" if reached[0] else "bar" if reached[1] else "not reached"


def _median(row: dict[str, Any], name: str, how: str, cache: str) -> float | None:
    for entry in row.get("contenders", []):
        if entry["name"] == name and cache in entry.get(how, {}):
            return float(entry[how][cache]["median"])
    return None


def _rows(rows: Rows, kind: str, num_keys: tuple[int, ...]) -> dict[int, dict[str, Any]]:
    """Select the rows of Qwen2.5-VL-7B in bfloat16, N=64, L2, by M."""
    found = {}
    for row in rows:
        case = row["case"]
        shape = (case["kind"], case["decoder"]["name"], case["num_queries"], case["dtype"], case["normalize"])
        if shape == (kind, "Qwen2.5-VL-7B", 64, "bf16", "l2") and case["batch"] == 1 and case["num_keys"] in num_keys:
            found[case["num_keys"]] = row
    return found


def _time(num_keys: int) -> Callable[[Rows, Rows], dict[str, float]]:
    def measured(micro: Rows, prefill: Rows) -> dict[str, float]:
        values = {m: _median(row, OURS, "graph", "cold") for m, row in _rows(micro, "queries", (num_keys,)).items()}
        return {f"M={m}": value for m, value in values.items() if value is not None}

    return measured


def _over_floor(micro: Rows, prefill: Rows) -> dict[str, float]:
    return {
        f"M={m}": value / row["floor"]["microseconds"]
        for m, row in _rows(micro, "queries", (131072,)).items()
        if (value := _median(row, OURS, "graph", "cold")) is not None
    }


def _ratio(kind: str, other: str, how: str, num_keys: tuple[int, ...]) -> Callable[[Rows, Rows], dict[str, float]]:
    def measured(micro: Rows, prefill: Rows) -> dict[str, float]:
        found = {}
        for m, row in _rows(micro, kind, num_keys).items():
            ours, theirs = (_median(row, name, how, "warm") for name in (OURS, other))
            # a CPU's times say nothing about a GPU's
            if ours is not None and theirs is not None and _median(row, OURS, "graph", "warm") is not None:
                found[f"M={m}"] = theirs / ours
        return found

    return measured


def _of_prefill(key: Callable[[dict[str, Any]], float]) -> Callable[[Rows, Rows], dict[str, float]]:
    def measured(micro: Rows, prefill: Rows) -> dict[str, float]:
        rows = (row for row in prefill if (row["way"], row["pruned"], row["visual_tokens"]) == ("ours", 0.8, 5120))
        return {f"M={row['visual_tokens']}": 100 * key(row) for row in rows}

    return measured


_SIZES = (1296, 16384)

GOALS = (
    Goal("M=1296, cold L2, graph replay", 10, 6, "us", True, _time(1296)),
    Goal("M=16384, cold L2, graph replay", 20, 12, "us", True, _time(16384)),
    Goal("M=131072 over the K-read floor", 2, 1.3, "x", True, _over_floor),
    Goal("against the released steps, eager", 15, 40, "x", False, _ratio("queries", RELEASED, "eager", _SIZES)),
    Goal("against strong PyTorch, eager", 3, 6, "x", False, _ratio("queries", STRONG, "eager", _SIZES)),
    Goal(
        "from hidden states, against all projections + released steps, graph replay",
        5,
        15,
        "x",
        False,
        _ratio("hidden", RELEASED, "graph", _SIZES),
    ),
    Goal(
        "pruning's share of the 7B prefill, 80 % pruned",
        1,
        0.3,
        "%",
        True,
        _of_prefill(lambda row: row["pruning_share"]["median"]),
    ),
    Goal(
        "prefill speed-up at 80 % pruned, of the FLOP limit",
        85,
        95,
        "%",
        False,
        _of_prefill(lambda row: row["speed_up_of_limit"]),
    ),
)


def table(micro: Rows, prefill: Rows) -> str:
    """Render Markdown; a cell is empty if nothing was measured."""
    lines = ["| Qwen2.5-VL-7B, bf16, N=64, L2 mode | bar | goal | measured | reached |", "|---|---:|---:|---|---|"]
    for goal in GOALS:
        values = goal.measured(micro, prefill)
        text = ", ".join(f"{value:.3g} {goal.unit} ({name})" for name, value in values.items())
        bar, best = (f"{limit:g} {goal.unit}" for limit in (goal.bar, goal.goal))
        lines.append(f"| {goal.title} | {bar} | {best} | {text} | {goal.verdict(values)} |")
    return "\n".join(lines)
