"""Ways to break the kernels, which the checker must notice: what it does not notice, it does not prove."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from tests.concurrent.explore import ExpectedOutputs, Explorer
from tests.concurrent.launches import PACKAGE, Kernels, make_launches

MOST_SCHEDULES = 40


class Mutant(NamedTuple):
    """A change of the kernels.

    Attributes:
        name: of the mutant.
        file: that is changed.
        old: what it has, once at least.
        new: what takes its place everywhere.
        launches: part of the names of the launches that are to show it.
        is_harmless: whether the kernels stay right, so that the checker must find nothing.
    """

    name: str
    file: str
    old: str
    new: str
    launches: str
    is_harmless: bool = False


def _in_l1(name: str, file: str, load: str, launches: str) -> Mutant:
    """A load of what the launch has written that may come from L1."""
    modifier = re.search(r',\s*cache_modifier="\.cg"', load)
    assert modifier
    return Mutant(f"{name} from L1", file, load, load.replace(modifier[0], ""), launches)


_SHORT, _LONG, _SPLIT = "score_and_select l2 short", "score_and_select minmax split long", "score_and_select l2 split"
_HIDDEN, _SELECT = "score_hidden l2 long", "select masked=True is_long=True"
_PEAKS = "score_peaks softmax"
_ARRIVE = 'return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")'
_ACQUIRE = 'tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < num_arrivals'
_POLL = 'tl.atomic_add(counter_ptr, 0, sem="relaxed", scope="gpu") < num_arrivals'
_LEAVE = "if arrive(last_counter_ptr) == num_programs - 1:"
_LAST_TICKET = "if ticket == tl.num_programs(0) - 1:"
_COUNT = (
    "tl.atomic_add(histograms_ptr + DIGIT * RADIX_BINS + bins, histogram, mask=histogram > 0, "
    'sem="relaxed", scope="gpu")'
)
_COUNT_PLAINLY = (
    "place = histograms_ptr + DIGIT * RADIX_BINS + bins\n"
    '    tl.store(place, tl.load(place, cache_modifier=".cg") + histogram)'
)
_WAIT_TO_SELECT = "tl.where(phase == 0, num_arrivals, blocks)"
_GROUP_LEFT = "rows_of_group * num_fold_parts * num_chunks)"
_MEANS_LOAD = 'other=0.0,\n        cache_modifier=".cg",\n    )\n    for start'
_QUERIES_LOAD = (
    "mask=head_inside[:, None] & dim_inside[None, :],\n            other=0.0,\n            "
    'cache_modifier=".cg",\n        )\n        folded'
)
_CLEAR = "clear_histograms(histograms_of_row("

# Few, of different kinds, that are found soon: CI tries them.
QUICK = [
    Mutant("arrive: no barrier", "phases.py", "    tl.debug_barrier()\n    return", "    return", _SELECT),
    Mutant("arrive: relaxed", "phases.py", _ARRIVE, _ARRIVE.replace("acq_rel", "relaxed"), _SELECT),
    Mutant("arrive: acquires only", "phases.py", _ARRIVE, _ARRIVE.replace("acq_rel", "acquire"), _SELECT),
    Mutant("wait: relaxed", "phases.py", _ACQUIRE, _ACQUIRE.replace("acquire", "relaxed"), _SELECT),
    Mutant("wait: for one too few", "phases.py", _ACQUIRE, _ACQUIRE + " - 1", _SHORT),
    Mutant("wait: for one too many", "phases.py", _ACQUIRE, _ACQUIRE + " + 1", _SHORT),
    Mutant("ticket: the roll is not returned", "phases.py", _LAST_TICKET, "if ticket < 0:", _SELECT),
    Mutant("ticket: program_id", "phases.py", "    return ticket", "    return tl.program_id(0)", _SELECT),
    Mutant(
        "leave: the first returns the counters", "phases.py", _LEAVE, _LEAVE.replace("num_programs - 1", "0"), _SELECT
    ),
    Mutant("rows share a line", "phases.py", "LINE + row * LINE", "LINE + row * 2", _SELECT),
    _in_l1("means", "score_and_select.py", _MEANS_LOAD, _SHORT),
    Mutant("select_topk: no wait", "select_topk.py", "wait_for(counters + _CLEARED, 1)", "pass", _SELECT),
    Mutant("digits counted without atomics", "radix.py", _COUNT, _COUNT_PLAINLY, _SELECT),
    Mutant("compact: no barrier", "compact.py", "    tl.debug_barrier()\n", "", "compact"),
    Mutant("greedy dpp: no barrier", "greedy.py", "        tl.debug_barrier()\n", "", "greedy dpp"),
    Mutant(
        "column mean: stores outside", "attention_column_mean.py", "out, total, mask=inside", "out, total", "column"
    ),
    Mutant(
        "wait: polls with acquire", "phases.py", _POLL, _POLL.replace("relaxed", "acquire"), _SELECT, is_harmless=True
    ),
]
SLOW = [
    Mutant("arrive: releases only", "phases.py", _ARRIVE, _ARRIVE.replace("acq_rel", "release"), _LONG),
    Mutant("arrive: scope of a block", "phases.py", _ARRIVE, _ARRIVE.replace('"gpu"', '"cta"'), _LONG),
    Mutant("wait: scope of a block", "phases.py", _ACQUIRE, _ACQUIRE.replace('"gpu"', '"cta"'), _LONG),
    Mutant("wait: polls for one too many", "phases.py", _POLL, _POLL + " + 1", _LONG),
    Mutant("wait: polls for one too few", "phases.py", _POLL, _POLL + " - 1", _LONG, is_harmless=True),
    Mutant("ticket: returned too early", "phases.py", "tl.num_programs(0) - 1:", "tl.num_programs(0) - 3:", _SHORT),
    Mutant("leave: counters are not returned", "phases.py", _LEAVE, _LEAVE.replace("1:", "0:"), _SHORT),
    Mutant("leave: the last but one returns them", "phases.py", _LEAVE, _LEAVE.replace("- 1:", "- 2:"), _LONG),
    Mutant("leave: without arriving", "phases.py", _LEAVE, "if num_programs > 0:", _LONG),
    Mutant("the roll is row 0's counter", "phases.py", "counters_ptr + LINE + row", "counters_ptr + row", _SHORT),
    Mutant(
        "phases in another order",
        "score_and_select.py",
        "ticket = draw_ticket(memory.counters)",
        "ticket = tl.num_programs(0) - 1 - draw_ticket(memory.counters)",
        _SHORT,
    ),
    Mutant("means: no wait", "score_and_select.py", "    wait_for(means_counter_ptr, num_heads)\n", "", _SHORT),
    Mutant(
        "means: another counter",
        "score_and_select.py",
        "counters + _MEANS, part, tile",
        "counters + _LOGITS, part, tile",
        _SHORT,
    ),
    Mutant("own mean: no barrier", "score_and_select.py", "            tl.debug_barrier()\n", "", _SHORT),
    Mutant(
        "mean of parts: no wait", "score_and_select.py", "wait_for(counters + _PARTIAL_MEANS", "tl.maximum(0", _LONG
    ),
    Mutant("histograms: not cleared", "score_and_select.py", _CLEAR, "(histograms_of_row(", _LONG),
    Mutant(
        "histograms: cleared by all heads",
        "score_and_select.py",
        "if (head == 0) & (part == 0):",
        "if part >= 0:",
        _LONG,
        is_harmless=True,
    ),
    Mutant(
        "histograms: cleared while counting",
        "finish.py",
        "                count_first_digit(",
        "                tl.store(histograms_ptr + tl.arange(0, 256), tl.zeros([256], tl.int32))\n"
        "                count_first_digit(",
        _LONG,
    ),
    Mutant(
        "scores only: arrives, does not leave",
        "finish.py",
        "leave_row(counters, counters + LOGITS + 1, sum_blocks)",
        "arrive(counters + LOGITS + 1)",
        "score_and_select scores only",
    ),
    _in_l1("logits", "finish.py", 'other=0.0,\n            cache_modifier=".cg"', _SHORT),
    _in_l1("statistics", "finish.py", 'other=neutral_second, cache_modifier=".cg"', _SHORT),
    _in_l1("scores", "finish.py", 'other=float("-inf"), cache_modifier=".cg"', _LONG),
    Mutant("sum: no wait", "finish.py", "        wait_for(counters + LOGITS, logits.num_programs)\n", "", _SHORT),
    Mutant("select: one block too few", "finish.py", _WAIT_TO_SELECT, _WAIT_TO_SELECT.replace("ks)", "ks - 1)"), _LONG),
    Mutant("select: too few scores", "finish.py", _WAIT_TO_SELECT, _WAIT_TO_SELECT.replace("als,", "als - 1,"), _LONG),
    Mutant(
        "select: arrives before it counts",
        "finish.py",
        "            for DIGIT in tl",
        "            arrive(scored_ptr + phase + 1)\n            for DIGIT in tl",
        _LONG,
    ),
    Mutant("select: left by too few", "finish.py", "+ NUM_DIGITS, blocks)", "+ NUM_DIGITS, blocks - 1)", _LONG),
    _in_l1("histogram", "radix.py", 'DIGIT * RADIX_BINS + bins, cache_modifier=".cg"', _LONG),
    _in_l1("suffixes", "radix.py", 'suffixes_ptr, mask=blocks < block, other=0, cache_modifier=".cg"', _LONG),
    Mutant("suffixes: all in one place", "radix.py", "suffixes_ptr += block * SUFFIXES", "suffixes_ptr += 0", _LONG),
    Mutant(
        "select_topk: nothing is cleared", "select_topk.py", "        " + _CLEAR, "        (histograms_of_row(", _SELECT
    ),
    Mutant("rows share words", "finish.py", "words_ptr + row.to(tl.int64) * num_words", "words_ptr", _SELECT),
    _in_l1("terms", "exact_dot.py", 'tl.load(terms_ptr, mask=inside, other=0.0, cache_modifier=".cg"', _HIDDEN),
    _in_l1("queries", "folded_queries.py", _QUERIES_LOAD, _HIDDEN),
    Mutant(
        "hidden: nothing scored, no wait",
        "score_hidden.py",
        "        wait_for(folded_counter_ptr, num_arrivals)\n\n\n",
        "        pass\n\n\n",
        "score_hidden",
    ),
    Mutant(
        "hidden: waits for the first row",
        "folded_queries.py",
        "counters_of_row(counters_ptr, row) + MEAN",
        "counters_of_row(counters_ptr, chunk * BLOCK_B) + MEAN",
        _HIDDEN,
    ),
    Mutant("queries: no wait", "folded_queries.py", "    wait_for(chunk_counter_ptr, num_arrivals)\n", "", _HIDDEN),
    Mutant("queries: wait for nobody", "score_hidden.py", "_QUERIES, projecting_tiles", "_QUERIES, 0", _HIDDEN),
    Mutant("group: left by too few", "score_hidden.py", _GROUP_LEFT, "num_fold_parts * num_chunks)", _HIDDEN),
    Mutant(
        "biases: stored by all chunks",
        "folded_queries.py",
        "    if chunk == 0:\n        tl.store(bias_ptr",
        "    if chunk >= 0:\n        tl.store(bias_ptr",
        _HIDDEN,
        is_harmless=True,
    ),
    Mutant("groups use the counters of rows", "score_hidden.py", "batch + group)", "group)", _HIDDEN),
    Mutant("hidden: histograms not cleared", "score_hidden.py", _CLEAR, "(histograms_of_row(", _HIDDEN),
    Mutant(
        "pairs of peaks: no wait",
        "score_peaks.py",
        "            wait_for(counters + _PAIRS, pairs_of_row)\n",
        "            pass\n",
        _PEAKS,
    ),
    Mutant(
        "pairs of peaks: one too few", "score_peaks.py", "_PAIRS, pairs_of_row)", "_PAIRS, pairs_of_row - 1)", _PEAKS
    ),
    Mutant(
        "pairs of peaks: heads share them",
        "score_peaks.py",
        "num_heads + head) * num_splits",
        "num_heads) * num_splits",
        _PEAKS,
    ),
    Mutant(
        "peaks: parts share a row", "score_peaks.py", "num_parts + part) * num_keys", "num_parts) * num_keys", _PEAKS
    ),
    _in_l1("pairs of peaks", "score_peaks.py", 'other=neutral_second, cache_modifier=".cg"', _PEAKS),
    Mutant(
        "compact: columns disagree",
        "compact.py",
        "slots, tokens.to(",
        "slots, (tokens + tl.program_id(1)).to(",
        "compact",
    ),
    Mutant(
        "merge: sums one slot too early", "compact.py", "chosen, slots, 0", "chosen, slots - 1, 0", "compact merging"
    ),
    Mutant(
        "column mean: splits overlap", "attention_column_mean.py", "row_splits + split) *", "row_splits) *", "column"
    ),
]


@contextmanager
def kernels_from(folder: Path) -> Iterator[Kernels]:
    """Import the modules of the kernels anew, from another folder."""
    package = import_module(PACKAGE)
    saved_path, prefix = package.__path__, f"{PACKAGE}."
    saved = {name: module for name, module in sys.modules.items() if name.startswith(prefix)}
    package.__path__ = [str(folder)]
    try:
        for name in saved:
            del sys.modules[name]
            vars(package).pop(name.removeprefix(prefix), None)
        yield Kernels()
    finally:
        package.__path__ = saved_path
        for name in [name for name in sys.modules if name.startswith(prefix)]:
            del sys.modules[name]
        sys.modules.update(saved)
        vars(package).update({name.removeprefix(prefix): module for name, module in saved.items()})


def try_mutant(mutant: Mutant, folder: Path, expected: ExpectedOutputs, seed: int = 0) -> Explorer:
    """Run the mutant, of which a copy is made in the folder, until something is found."""
    copy = folder / re.sub(r"\W+", "_", mutant.name)
    shutil.copytree(Path(import_module(PACKAGE).__path__[0]), copy, ignore=shutil.ignore_patterns("__pycache__"))
    changed = copy / mutant.file
    text = changed.read_text()
    assert mutant.old in text, f"{mutant.name}: {mutant.file} no longer has {mutant.old!r}"
    changed.write_text(text.replace(mutant.old, mutant.new))
    with kernels_from(copy) as kernels:
        launches = [launch for launch in make_launches(kernels) if mutant.launches in launch.name]
        explorer = Explorer(kernels, launches, expected, seed)
        explorer.run(5 * len(launches) if mutant.is_harmless else MOST_SCHEDULES, stops_at_first=True)
    return explorer
