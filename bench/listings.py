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
Flags = frozenset[tuple[str, int]]
State = tuple[int, Flags]
_NOTHING_KNOWN: Flags = frozenset()
_AMD_WAIT = r"^s_waitcnt\b.*\bvmcnt\(0\)"


class Listing:
    """The instructions of a kernel, and which may follow which."""

    def __init__(self, code: str, rules: Rules) -> None:
        self.rules = rules
        self.texts: list[str] = []
        self.labels: dict[str, int] = {}
        for raw in code.splitlines():
            line = raw.split(rules.comment)[0].strip()
            label = re.match(rules.label, line)
            if label:
                self.labels[label[1]] = len(self.texts)
            elif line and not line.startswith((".", "{ ", "}")) and not line.endswith(":"):
                self.texts.append(line.removeprefix("{").strip())
        self.following = [self._following(index, text) for index, text in enumerate(self.texts)]

    def _following(self, index: int, text: str) -> list[int]:
        following = [index + 1] if index + 1 < len(self.texts) else []
        jump = re.match(self.rules.jump, text)
        if re.match(self.rules.end, text):
            return []
        # A lane that polls, stores or arrives does not skip what an execution mask guards.
        if not jump or text.startswith("s_cbranch_execz"):
            return following
        return ([] if jump["always"] else following) + [self.labels[jump["target"]]]

    def find(self, pattern: str) -> set[int]:
        return {index for index, text in enumerate(self.texts) if re.search(pattern, text)}

    def reach(self, begin: set[int], stop: set[int]) -> set[int]:
        """Return what can come after `begin` without passing one of `stop`, these included."""
        # From the entry on, because a flag may have been set before `begin`.
        starts = {state for state in self._walk({(0, _NOTHING_KNOWN)}, set()) if state[0] in begin}
        following = {after for state in starts for after in self._step(*state)}
        return {index for index, _ in self._walk(following, stop)}

    def _walk(self, begin: set[State], stop: set[int]) -> set[State]:
        seen: set[State] = set()
        waiting = list(begin)
        while waiting:
            state = waiting.pop()
            if state not in seen:
                seen.add(state)
                waiting += [] if state[0] in stop else self._step(*state)
        return seen

    def _step(self, index: int, known: Flags) -> list[State]:
        """Return what may come next, as far as the flags that are known tell which branch is taken."""
        flags, following = dict(known), self.following[index]
        text = self.texts[index]
        jump = re.match(self.rules.jump, text) if text.startswith("s_cbranch_") else None
        if jump:
            register = "exec" if "exec" in text.split()[0] else "vcc"
            value = flags.get(register)
            if value is not None and "scc" not in text.split()[0]:
                is_taken = (value == 0) == text.split()[0].endswith("z") and not text.split()[0].endswith("nz")
                is_taken |= value != 0 and text.split()[0].endswith("nz")
                target = following[-1] if len(following) > 1 else self.labels[jump["target"]]
                following = [target] if is_taken else [index + 1]
        else:
            _note_flags(flags, text)
        after = frozenset(flags.items())
        return [(index, after) for index in following]


def _note_flags(flags: dict[str, int], text: str) -> None:
    """Keep what an AMD instruction says of the flags: pairs of scalar registers that are 0, or -1 in every lane."""
    words = re.match(r"^(?P<name>[sv]_\w+)\s+(?P<target>s\[\d+:\d+\]|s\d+|vcc|exec)(?:,\s*(?P<rest>.*))?$", text)
    if not words:
        return
    name, target, rest = words["name"], words["target"], [word.strip() for word in (words["rest"] or "").split(",")]
    value: int | None = None
    if name == "s_mov_b64" and rest[0] in ("0", "-1"):
        value = int(rest[0])
    elif name == "s_and_b64" and rest[0] == "exec" and rest[1] in flags:
        value = flags[rest[1]]
    elif name == "s_andn2_b64" and rest[0] == "exec" and rest[1] in flags:
        value = -1 - flags[rest[1]]
    is_guard = name == "s_and_saveexec_b64" and flags.get(rest[0]) == 0
    for register in [one for one in flags if _overlap(one, target)]:
        del flags[register]
    if "saveexec" in name:
        flags.pop("exec", None)
    if is_guard:
        flags["exec"] = 0
    if value is not None and target != "exec":
        flags[target] = value


def _overlap(one: str, other: str) -> bool:
    if "[" not in one or not other.startswith("s"):
        return one == other
    first, last = map(int, re.findall(r"\d+", one))
    ends = [int(number) for number in re.findall(r"\d+", other)]
    return first <= ends[-1] and ends[0] <= last


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
