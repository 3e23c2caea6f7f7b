"""What an answer is worth, from 0 to 1: the metrics that most visual benchmarks use."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal

_RELAXED_TOLERANCE = Decimal("0.05")
_ANLS_THRESHOLD = 0.5

# a comma separates thousands where three digits follow it: "1,050" is a number, "3,14" and "1,2,3" are not
_NUMBER = re.compile(
    r"[-+]?(?:[1-9]\d{0,2}(?:,\d{2,3})*,\d{3}(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d{1,3})?", re.IGNORECASE
)
_CURRENCY = "$€£¥"

# around an answer: quotation marks, brackets, ends of sentences (of other scripts, too, whose characters ruff takes for
# slips, RUF001); but "-5" and ".5" are not "5", nor is "C#" "C++"
_QUOTES = "\"'`“”‘’«»„"  # noqa: RUF001
_PUNCTUATION = string.punctuation + _QUOTES + "。、，！？"  # noqa: RUF001
_BEFORE = re.compile(rf"\A(?:(?![-+]?\.?\d)[\s{re.escape(_PUNCTUATION)}])+")
_AFTER = "".join(sorted({*_PUNCTUATION} - {*"+#"})) + " "


def exact_match(answer: str, answers: Sequence[str]) -> float:
    """Return 1 if the answer is one of `answers`, regardless of case, spaces and punctuation around it.

    The sign and the point of a number are no punctuation.
    """
    return float(_plain(answer) in {_plain(right) for right in answers})


def relaxed_match(answer: str, answers: Sequence[str]) -> float:
    """Score by ChartQA's relaxed accuracy: a number may be off by 5 % of the right one, text must match exactly.

    Percent and currency signs and thousands separators do not count. Where the right number is zero only zero is right.
    """
    said = _number(answer)
    for right in answers:
        expected = _number(right)
        if expected is None or said is None:
            if exact_match(answer, [right]):
                return 1.0
        elif abs(said - expected) <= _RELAXED_TOLERANCE * abs(expected):
            return 1.0
    return 0.0


def anls(answer: str, answers: Sequence[str]) -> float:
    """Compute DocVQA's normalised Levenshtein similarity: one minus edits per character, 0 from half the characters on.

    The best of `answers` counts.
    """
    best = 0.0
    said = " ".join(_composed(answer).lower().split())
    for right in answers:
        expected = " ".join(_composed(right).lower().split())
        longest = max(len(said), len(expected))
        distance = _edit_distance(said, expected) / longest if longest else 0.0
        if distance < _ANLS_THRESHOLD:
            best = max(best, 1.0 - distance)
    return best


def multiple_choice(answer: str, answers: Sequence[str], choices: Sequence[str]) -> float:
    """Return 1 if the answer names a right choice, by letter ("B", "(b)", "B. blue", "The answer is B.") or text.

    Args:
        answer: what the model said.
        answers: right choices, each a letter or the text of a choice.
        choices: their texts; the first is "A".
    """
    said = choice_index(answer, choices)
    return float(said is not None and said in {choice_index(right, choices) for right in answers})


def choice_index(answer: str, choices: Sequence[str]) -> int | None:
    """Find which of `choices` an answer names, or None."""
    letters = string.ascii_uppercase[: len(choices)]
    any_case = letters + letters.lower()
    answer = answer.strip(f"{_QUOTES}* \t\n")
    patterns = (
        rf"\s*[(\[]?([{any_case}])[)\]]?[.:,]?\s*",
        rf"\s*[(\[]?([{letters}])[)\].:](?:\s.*)?",
        rf".*\b(?i:answer|option|choice)\b(?:\s+is)?\s*:?\s*[*(\[]*([{letters}])\b.*",
        rf".*\b(?i:answer|option|choice)\b(?:\s+is)?\s*:?\s*[*(\[]*([{any_case}])[)\].*]*",
    )
    for pattern in patterns:
        found = re.fullmatch(pattern, answer, re.DOTALL)
        if found:
            return letters.index(found.group(1).upper())
    plain, texts = _plain(answer), [_plain(choice) for choice in choices]
    return texts.index(plain) if plain in texts else None


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact_match,
    "relaxed": relaxed_match,
    "anls": anls,
}
"""By name; "choice" (`multiple_choice`) takes the choices as well."""


def _composed(text: str) -> str:
    """Write a letter and its accent as one code point, however they were typed, and every minus as a keyboard does."""
    return unicodedata.normalize("NFC", text).replace("\N{MINUS SIGN}", "-")


def _plain(text: str) -> str:
    whole = " ".join(_composed(text).casefold().split())
    # an answer that is nothing but punctuation is itself
    return _BEFORE.sub("", whole.rstrip(_AFTER)) if any(map(str.isalnum, whole)) else whole


def _number(text: str) -> Decimal | None:
    """Read a number as it is written: 1.05 is 5 % off 1, and not a little more."""
    cleaned = _composed(text).strip().rstrip(".").removesuffix("%").strip(f"{_CURRENCY} ")
    if cleaned[:1] in {*"+-"}:
        cleaned = cleaned[0] + cleaned[1:].lstrip(f"{_CURRENCY} ")
    return Decimal(cleaned.replace(",", "")) if _NUMBER.fullmatch(cleaned) else None


def _edit_distance(first: str, second: str) -> int:
    """Count the insertions, deletions and substitutions that make one string of the other."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]
