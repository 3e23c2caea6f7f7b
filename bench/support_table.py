"""Write the support table of the README from `hawk_kernels/hf/families.py`.

python -m bench.support_table           # write it into the README
python -m bench.support_table --check   # fail where the README says something else
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench import cli
from hawk_kernels.hf.families import FAMILIES, MODES, OUT_OF_REACH

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- support table: python -m bench.support_table -->", "<!-- end of support table -->"


def everywhere() -> list[str]:
    """List the modes that every family has."""
    return [mode for mode in MODES if all(mode in family.modes for family in FAMILIES)]


def table() -> str:
    """List every family with the modes that some lack; a cell is empty if the unpruned model lacks the mode as well."""
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
    """List the families that are refused by name, with the reasons."""
    return "\n".join(f"- {', '.join(f'`{name}`' for name in names)}: {why}." for names, why in OUT_OF_REACH.items())


def section() -> str:
    """Render the text between the two markers, markers included."""
    return "\n".join(
        [
            BEGIN,
            "",
            f"Each of the {len(FAMILIES)} families is tested with {', '.join(everywhere())}. Modes that some lack:",
            "",
            f"<details><summary>{len(FAMILIES)} families and their modes</summary>",
            "",
            table(),
            "",
            "`since`: the oldest transformers of the tested ones (5.5, 5.10, 5.17, 5.23) that has it.",
            "",
            "</details>",
            "",
            "<details><summary>Refused by name, with the reason</summary>",
            "",
            refused(),
            "",
            "</details>",
            "",
            END,
        ]
    )


def updated(text: str) -> str:
    """`text` of a README with the section as it should be.

    Raises:
        ValueError: a marker is missing.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"README: expected the markers {BEGIN!r} and {END!r}, got none; put them where the table goes")
    before, rest = text.split(BEGIN, 1)
    return before + section() + rest.split(END, 1)[1]


def main(arguments: list[str] | None = None) -> int:
    """Write the section, or check it."""
    parser = cli.parser("bench.support_table", __doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where the README differs")
    options = parser.parse_args(arguments)
    text = README.read_text(encoding="utf-8")
    if options.check:
        if updated(text) == text:
            return 0
        print("README.md: the support table differs from families.py; run python -m bench.support_table")
        return 1
    README.write_text(updated(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
