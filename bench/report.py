"""Write `RESULTS.md` from the JSON files of a results folder.

python -m bench.report bench/results/<device>
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import cli, goals, model
from bench.contenders import OURS

_WAYS = (("graph", "cold"), ("graph", "warm"), ("eager", "cold"), ("eager", "warm"))


def load(folder: Path, name: str) -> dict[str, Any] | None:
    """Load a file of the folder; None if it is not there."""
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def about(environment: dict[str, Any]) -> str:
    """Format what the numbers depend on in one line."""
    parts = [f"{name} {value}" for name, value in environment.items() if value not in (None, "", False)]
    return ", ".join(part.removesuffix(" True") for part in parts)


def spread_text(spread: dict[str, float] | None, factor: float = 1.0) -> str:
    """Format the median and the 20th to 80th percentile; empty if nothing was measured."""
    if spread is None:
        return ""
    median, low, high = (_short(spread[name] * factor) for name in ("median", "p20", "p80"))
    return f"{median} ({low}-{high})"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def verify_section(results: dict[str, Any]) -> str:
    """Render which checks passed."""
    checks = results["checks"]
    failed = [check for check in checks if not check["passed"]]
    stages: dict[str, list[bool]] = {}
    for check in checks:
        stages.setdefault(check["stage"], []).append(check["passed"])
    counts = ", ".join(f"{stage} {sum(passed)} of {len(passed)}" for stage, passed in stages.items())
    lines = ["## Correctness", "", f"Checks passed: {counts}.", ""]
    lines += [f"- **failed**: {check['name']}: {check['found']}" for check in failed]
    return "\n".join(lines)


def micro_section(results: dict[str, Any]) -> str:
    """Render a table for each case."""
    bandwidth = results["copy_bytes_per_second"] / 1e9
    lines = [
        "## To the kept tokens",
        "",
        "Microseconds, median (20th-80th percentile). The floor is the time to read the keys (visual hidden states,",
        f"scores) once at the copy bandwidth measured in the same run, {bandwidth:.0f} GB/s. Eager: the host's clock",
        "around one call, from an idle device to an idle device. Graph: mean over the calls in one replayed CUDA",
        "graph. Cold: with the last-level cache flushed. Error: against float64, relative to the largest score. Peak",
        "memory: of a repeated call, outputs included, without the workspace that ours keeps for each stream. `x`: the",
        "contender's time over ours, in the first column that both have.",
    ]
    for row in results["rows"]:
        lines += ["", f"**{row['title']}**", ""]
        if "failed" in row:
            lines.append(f"Not measured: {row['failed']}")
            continue
        lines += _case_table(row)
    if results["left_out"]:
        lines += ["", f"Left out, since the time was up: {'; '.join(results['left_out'])}."]
    return "\n".join(lines)


def _case_table(row: dict[str, Any]) -> list[str]:
    entries = row["contenders"]
    ways = [way for way in _WAYS if any(way[1] in entry.get(way[0], {}) for entry in entries)]
    head = [f"{how}, {cache}" for how, cache in ways]
    lines = [f"| contender | {' | '.join(head)} | x | error | peak MiB |", "|---|" + "---:|" * (len(ways) + 3)]
    ours: dict[str, Any] = next((entry for entry in entries if entry["name"] == OURS), {})
    for entry in entries:
        if "failed" in entry:
            lines.append(f"| {entry['name']} | {' | ' * (len(ways) - 1)} | | not timed: {entry['failed']} | |")
            continue
        cells = [spread_text(entry.get(how, {}).get(cache)) for how, cache in ways]
        ratio = ""
        for how, cache in ways:
            if cache in entry.get(how, {}) and cache in ours.get(how, {}):
                ratio = f"{entry[how][cache]['median'] / ours[how][cache]['median']:.2f}"
                break
        error = f"{entry['error']:.0e}" if "error" in entry else ""
        memory = f"{entry['peak_bytes'] / 2**20:.2f}" if "peak_bytes" in entry else ""
        lines.append(f"| {entry['name']} | {' | '.join(cells)} | {ratio} | {error} | {memory} |")
    floor = _short(row["floor"]["microseconds"])
    lines.append(f"| floor: {row['floor']['bytes'] / 1e6:.2f} MB once | {' | '.join([floor] * len(ways))} | | | |")
    return lines


def host_section(results: dict[str, Any]) -> str:
    """Render the host cost of each function beside a bare launch of its kernels, and the parts of it."""
    parts = list(next(iter(results["rows"].values()))["parts"])
    titles = ["nothing kept", "call", "bare launch", "nothing kept / bare", "call / bare", "call / direct", *parts]
    lines = [
        "## Host cost",
        "",
        f"Medians, {results['unit']} a call. The bare launch is `kernel[grid](...)` with arguments that are ready, the",
        "direct launch passes them to the compiled kernel; where nothing is kept, each call checks, prepares and looks",
        f"up everything. Triton's launcher: {results['launcher']}.",
        "",
        f"| function | {' | '.join(titles)} |",
        "|---|" + "---:|" * len(titles),
    ]
    for name, row in results["rows"].items():
        times = (row["call_with_nothing_kept"], row["call"], row["bare_launch"])
        ratios = (
            row["call_with_nothing_kept_over_launch"],
            row["call_over_launch"],
            row["call_over_direct_launch"],
        )
        cells = ["" if value is None else _short(value) for value in times]
        cells += ["" if value is None else f"{value:.2f}" for value in ratios]
        cells += ["" if value is None else _short(value) for value in row["parts"].values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def prefill_section(results: dict[str, Any]) -> str:
    """Render the whole prefill."""
    lines = [
        "## Whole prefill",
        "",
        f"{results['model']}, {results['dtype']}; the vision encoder is {results['vision_encoder']}. Median (20th-80th",
        "percentile). The limit is the ratio of operations; pruning is all that our hooks take of the prefill.",
        "",
        "| visual tokens | way | pruned | first token ms | speed-up | FLOP limit | of the limit | pruning | "
        "decode tokens/s | KV MB | peak MiB |",
        "|---:|---|" + "---:|" * 9,
    ]
    rows = results["rows"]
    for row in rows:
        share, decode, peak = (row.get(name) for name in ("pruning_share", "decode_tokens_per_second", "peak_bytes"))
        cells = [
            str(row["visual_tokens"]),
            row["way"],
            f"{row['pruned']:.0%}",
            spread_text(row["first_token_microseconds"], 1e-3),
            f"{row['speed_up']:.2f}",
            f"{row['flop_limit']:.2f}",
            f"{row['speed_up_of_limit']:.0%}" if "speed_up_of_limit" in row else "",
            "" if share is None else f"{row['pruning_microseconds']['median'] / 1e3:.2f} ms, {share['median']:.2%}",
            "" if decode is None else f"{decode:.1f}",
            f"{row['kv_bytes'] / 1e6:.1f}",
            "" if peak is None else f"{peak / 2**20:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    ours = [row for row in rows if row["way"] == "ours"]
    if ours:
        parts = list(ours[0]["pruning_parts"])
        lines += [
            "",
            "Where our hooks spend it, median microseconds (in multimodal: reading the prompt; in text: scoring,",
            "selection, compaction):",
            "",
            f"| visual tokens | pruned | {' | '.join(parts)} |",
            "|---:|---:|" + "---:|" * len(parts),
        ]
        for row in ours:
            medians = (_short(row["pruning_parts"][part]["median"]) for part in parts)
            lines.append(f"| {row['visual_tokens']} | {row['pruned']:.0%} | {' | '.join(medians)} |")
    return "\n".join(lines)


def model_section(results: dict[str, Any]) -> str:
    """Render computed bytes, operations and floors."""
    machines = [model.Machine(**machine) for machine in results["machines"]]
    return "\n".join(["## Model figures", "", model.CAPTION, "", model.markdown(results["rows"], machines)])


SECTIONS = (
    ("verify.json", verify_section),
    ("score_and_select.json", micro_section),
    ("host_cost.json", host_section),
    ("prefill.json", prefill_section),
    ("model.json", model_section),
)


def render(folder: Path) -> str:
    """Render the report of the files that are there."""
    loaded = [(results, section) for name, section in SECTIONS if (results := load(folder, name)) is not None]
    lines = ["# Results", ""]
    environments = [results["environment"] for results, _ in loaded if "environment" in results]
    if environments:
        lines += [about(environments[0]), ""]
    micro, prefill = ((load(folder, name) or {}).get("rows", []) for name in ("score_and_select.json", "prefill.json"))
    if environments and "capability" in environments[0]:
        lines += ["## Bars and goals", "", goals.table(micro, prefill), ""]
    lines += [f"![{picture.stem}]({picture.name})\n" for picture in sorted(folder.glob("*.png"))]
    for results, section in loaded:
        lines += [section(results), ""]
    known = {name for name, _ in SECTIONS}
    others = sorted(path.name for path in folder.glob("*.json") if path.name not in known)
    if others:
        lines += ["## Other measurements", "", *(f"- [{name}]({name})" for name in others), ""]
    return "\n".join(lines)


def write(folder: Path) -> Path:
    """Render into the folder."""
    path = folder / "RESULTS.md"
    path.write_text(render(folder), encoding="utf-8")
    return path


def main() -> None:
    """Write the report of a folder."""
    parser = cli.parser("bench.report", __doc__)
    parser.add_argument("folder", type=Path)
    print(f"written: {write(parser.parse_args().folder)}")


if __name__ == "__main__":
    main()
