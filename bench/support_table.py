"""Write the support table of docs/families.md from `hawk_kernels/hf/families.py`.

python -m bench.support_table           # write it into docs/families.md
python -m bench.support_table --check   # fail where the page says something else
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench import cli
from hawk_kernels.hf.families import FAMILIES, MODES, OUT_OF_REACH

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- support table: python -m bench.support_table -->", "<!-- end of support table -->"


def everywhere() -> list[str]:
    """Return the modes that every family has."""
    return [mode for mode in MODES if all(mode in family.modes for family in FAMILIES)]


def table() -> str:
    """Return a row for each family, with the modes that some lack.

    An empty cell is a mode that the unpruned model lacks or has wrong.
    """
    columns = [mode for mode in MODES if mode not in everywhere()]
    lines = [
        f"| `model_type` | since | {' | '.join(columns)} |",
        f"|---|---|{':-:|' * len(columns)}",
    ]
    for family in sorted(FAMILIES, key=lambda family: family.model_type):
        cells = ("yes" if mode in family.modes else "" for mode in columns)
        lines.append(f"| `{family.model_type}` | {family.since} | {' | '.join(cells)} |")
    return "\n".join(lines)


def refused() -> str:
    """Return the models that are refused by name, and why."""
    return "\n".join(f"- {', '.join(f'`{name}`' for name in names)}: {why}." for names, why in OUT_OF_REACH.items())


def section() -> str:
    """Return what stands between the two markers, markers included."""
    return "\n".join(
        [
            BEGIN,
            "",
            f"Each of the {len(FAMILIES)} families is tested with {', '.join(everywhere())}. Modes that some lack:",
            "",
            table(),
            "",
            "`since`: the oldest transformers of the tested ones (5.5, 5.10, 5.17, 5.23) that has it.",
            "",
            "## Refused by name",
            "",
            "`prune` raises a `TypeError` for these models, with the reason:",
            "",
            refused(),
            "",
            END,
        ]
    )


def updated(text: str) -> str:
    """Return the page `text` with the section as it should be.

    Raises:
        ValueError: a marker is missing.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(
            f"{PAGE.name}: expected the markers {BEGIN!r} and {END!r}, got none; put them where the table goes"
        )
    before, rest = text.split(BEGIN, 1)
    return before + section() + rest.split(END, 1)[1]


def main(arguments: list[str] | None = None) -> int:
    """Write the section, or check it."""
    parser = cli.parser("bench.support_table", __doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where the page differs")
    options = parser.parse_args(arguments)
    text = PAGE.read_text(encoding="utf-8")
    if options.check:
        if updated(text) == text:
            return 0
        print("docs/families.md: the support table differs from families.py; run python -m bench.support_table")
        return 1
    PAGE.write_text(updated(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
