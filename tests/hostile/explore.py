"""Runs cases one after another, simplifies those that fail, and counts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.hostile.cases import Case, random_cases, simpler
from tests.hostile.oracle import Verdict, verdict_of

BURST = 6
"""Cases for a model before another family has its turn."""
PROGRESS_SECONDS = 30.0
MOST_SIMPLER = 60
"""Cases that are tried to simplify a failure."""


class Failure(NamedTuple):
    """A case that failed.

    Attributes:
        case: as simple as it still fails.
        found_as: what was run.
        what: is wrong with the simple one.
    """

    case: Case
    found_as: Case
    what: str


class Explorer:
    """Runs random cases.

    Args:
        seed: another gives other cases.
        families, methods, modes: what cases are made of.
        judge: says what came of a case.

    Attributes:
        verdicts: how many cases passed, were refused and so on.
        refusals: how many, by reason.
        upstream: how many cases had no oracle, by reason.
        families: those that had a case.
        failures: what was found.
    """

    def __init__(
        self,
        seed: int,
        families: list[str],
        methods: list[str],
        modes: list[str],
        judge: Callable[[Case], Verdict] = verdict_of,
    ) -> None:
        self.seed = seed
        self._given = families, methods, modes
        self._judge = judge
        self.verdicts: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.upstream: Counter[str] = Counter()
        self.families: set[str] = set()
        self.failures: list[Failure] = []
        self.was_interrupted = False

    def run(
        self,
        seconds: float,
        num_cases: int | None = None,
        *,
        most_failures: int | None = None,
        simplify: bool = True,
        burst: int = BURST,
        print_progress: bool = False,
    ) -> None:
        """Run cases until the time or the number is used up; Ctrl-C ends it as well, and what was counted stays."""
        start = said = time.monotonic()
        try:
            for case in random_cases(self.seed, *self._given, burst):
                if time.monotonic() - start > seconds or self.verdicts.total() == num_cases:
                    return
                if most_failures is not None and len(self.failures) >= most_failures:
                    return
                verdict = self._judge(case)
                self._count(case, verdict)
                if verdict.kind == "failed":
                    self._note(case, verdict, simplify)
                    if print_progress:
                        print(_line(self.failures[-1]), flush=True)
                if print_progress and time.monotonic() - said > PROGRESS_SECONDS:
                    said = time.monotonic()
                    print(f"{said - start:.0f} s: {self._counts()}", flush=True)
        except KeyboardInterrupt:
            self.was_interrupted = True

    def report(self) -> list[str]:
        """Lines that say what was done and found."""
        lines = [f"refused {count:>5}  {reason}" for reason, count in self.refusals.most_common()]
        lines += [f"no oracle {count:>3}  {reason[:140]}" for reason, count in self.upstream.most_common(8)]
        lines += [_line(failure) for failure in self.failures]
        return [*lines, ("interrupted: " if self.was_interrupted else "") + self._counts()]

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "seed": self.seed,
            "cases": self.verdicts.total(),
            "families": sorted(self.families),
            "verdicts": dict(self.verdicts),
            "refusals": dict(self.refusals.most_common()),
            "upstream": dict(self.upstream.most_common()),
            "failures": [
                {"what": failure.what, "case": failure.case.to_line(), "found_as": failure.found_as.to_line()}
                for failure in self.failures
            ],
        }

    def _count(self, case: Case, verdict: Verdict) -> None:
        self.families.add(case.family)
        self.verdicts[verdict.kind] += 1
        if verdict.kind == "refused":
            self.refusals[verdict.what] += 1
        elif verdict.kind == "upstream":
            self.upstream[f"{case.family}, {case.mode}: {verdict.what}"] += 1

    def _note(self, case: Case, verdict: Verdict, simplify: bool) -> None:
        simple, what = case, verdict.what
        tries = MOST_SIMPLER if simplify else 0
        candidates = simpler(simple)
        while tries and (candidate := next(candidates, None)) is not None:
            tries -= 1
            found = self._judge(candidate)
            # a simpler case that fails for another reason is another finding
            if found.kind == "failed" and found.what[:16] == verdict.what[:16]:
                simple, what, candidates = candidate, found.what, simpler(candidate)
        self.failures.append(Failure(simple, case, what))

    def _counts(self) -> str:
        count = self.verdicts
        return (
            f"{count.total()} cases of {len(self.families)} families, {count['passed']} passed, "
            f"{count['refused']} refused, {count['upstream']} without an oracle, "
            f"{count['failed']} failed"
        )


def _line(failure: Failure) -> str:
    return f"FAILED {failure.what}\n  --replay '{failure.case.to_line()}'"
