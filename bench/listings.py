"""Reads what the compiler made of a kernel whose programs wait for each other, as PTX or AMDGCN.

Each check asks whether control can get from one instruction to another without passing a third. An arrival is the
release of `phases.arrive`; a poll is a load in `phases.wait_for`, with an acquire or without.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Rules(NamedTuple):
    """How an instruction set says things, as patterns; `always` in a jump means that it is taken always."""

    comment: str
    label: str
    jump: str
    end: str
    store: str
    load: str
    barrier: str
    arrival: str
    acquire: str
    relaxed_poll: str


PTX = Rules(
    comment="//",
    label=r"^(\$L\w+):",
    jump=r"^(?:@!?%p\d+\s+)?bra(?P<always>\.uni)?\s+(?P<target>\$L\w+);",
    end=r"^(?:ret|exit);",
    store=r"\bst\.global|\b(?:atom|red)\.global\S*\.relaxed",
    load=r"\bld\.global(?!\S*\.(?:acquire|relaxed))|cp\.async\.c[ag]\.shared",
    barrier=r"^bar\.sync\s+0",
    arrival=r"\batom\.global\S*\.acq_rel",
    acquire=r"\bld\.global\S*\.acquire|\batom\.global\S*\.acquire",
    relaxed_poll=r"\bld\.global\S*\.relaxed",
)
AMDGCN = Rules(
    comment=";",
    label=r"^(\.LBB\w+):",
    jump=r"^(?P<always>s_branch)?(?:s_cbranch_\w+)?\s+(?P<target>\.LBB\w+)",
    end=r"^s_endpgm",
    store=r"\b(?:global|buffer)_store",
    load=r"\b(?:global|buffer)_load",
    barrier=r"^s_barrier",
    arrival=r"\bbuffer_wbl2",
    acquire=r"\bbuffer_inv",
    relaxed_poll=r"(?!)",
)
_AMD_WAIT = r"^s_waitcnt\b.*\bvmcnt\(0\)"


class Listing:
    """The instructions of a kernel, and which may follow which."""

    def __init__(self, code: str, rules: Rules) -> None:
        self.rules = rules
        self.texts: list[str] = []
        labels: dict[str, int] = {}
        for raw in code.splitlines():
            line = raw.split(rules.comment)[0].strip()
            label = re.match(rules.label, line)
            if label:
                labels[label[1]] = len(self.texts)
            elif line and not line.startswith((".", "{ ", "}")) and not line.endswith(":"):
                self.texts.append(line.removeprefix("{").strip())
        self.following = [self._following(index, text, labels) for index, text in enumerate(self.texts)]

    def _following(self, index: int, text: str, labels: dict[str, int]) -> list[int]:
        following = [index + 1] if index + 1 < len(self.texts) else []
        jump = re.match(self.rules.jump, text)
        if re.match(self.rules.end, text):
            return []
        # A lane that polls, stores or arrives does not skip what an execution mask guards.
        if not jump or text.startswith("s_cbranch_execz"):
            return following
        return ([] if jump["always"] else following) + [labels[jump["target"]]]

    def find(self, pattern: str) -> set[int]:
        return {index for index, text in enumerate(self.texts) if re.search(pattern, text)}

    def reach(self, begin: set[int], stop: set[int]) -> set[int]:
        """Return what can come after `begin` without passing one of `stop`, these included."""
        seen: set[int] = set()
        waiting = [after for index in begin for after in self.following[index]]
        while waiting:
            index = waiting.pop()
            if index not in seen:
                seen.add(index)
                waiting += [] if index in stop else self.following[index]
        return seen


def violations(code: str, rules: Rules) -> list[str] | None:
    """Return what is wrong with a listing, in words; None where its programs do not wait for each other."""
    listing = Listing(code, rules)
    barriers, stores = listing.find(rules.barrier), listing.find(rules.store)
    arrivals, acquires, loads = listing.find(rules.arrival), listing.find(rules.acquire), listing.find(rules.load)
    relaxed = listing.find(rules.relaxed_poll)
    if not arrivals:
        return None
    wrong: dict[str, set[int]] = {
        "a program stores and then arrives without a barrier": listing.reach(stores, barriers) & arrivals,
        "a program polls, and goes on without an acquire": listing.reach(relaxed, acquires)
        & (stores | loads | arrivals),
    }
    if rules is PTX:
        branches = {index for index, following in enumerate(listing.following) if len(following) > 1}
        wrong |= {
            "a program acquires, and loads without a barrier": listing.reach(acquires, barriers) & loads,
            "a program branches on a poll before a barrier": listing.reach(acquires | relaxed, barriers) & branches,
            "a program polls only once": {poll for poll in acquires if poll not in listing.reach({poll}, set())},
        }
    else:
        before_arrivals = {barrier for barrier in barriers if listing.reach({barrier}, barriers) & arrivals}
        in_flight = listing.reach(stores, listing.find(_AMD_WAIT)) & before_arrivals
        wrong["other waves' stores may be in flight when a wave arrives"] = in_flight
    found = [f"{what}: {listing.texts[min(where)]}" for what, where in wrong.items() if where]
    return found if acquires else [*found, "programs arrive, but none acquires"]
