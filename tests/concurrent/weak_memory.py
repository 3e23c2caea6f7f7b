"""A weak memory for the programs of one launch, and a detector of data races over it.

*Time.* A program's clock counts its barriers. What its threads do between two barriers may happen in any order and in
any thread. So a release, which one thread makes, publishes what the program did before its last barrier, and what one
thread acquires the others know after the next barrier. A barrier is `tl.debug_barrier()`, or the use of a scalar
atomic's result, which Triton broadcasts through shared memory.

*Values.* A store waits in a buffer of its program until a release that publishes it, the end of the launch, or a
moment that the scheduler chooses. A load returns the newest value of a cell, or the one before it where no
synchronisation rules that out. A load without `.cg` may return the one before in any case, because synchronisation is
not taken to clean an L1 cache. Atomics act on memory at once.

*Races.* Two programs access a cell, one of them by a store, not both by atomics, and nothing orders the two accesses.
Equal values do not race: several programs may store the same. Also reported: such accesses by the threads of one
program without a barrier between them, unless both use the same tensor of addresses and therefore the same threads; a
load without `.cg` of what another program has stored; a load of scratch memory that nobody has written in this launch;
accesses outside every tensor; one store that gives a cell two values.
"""

from __future__ import annotations

import ctypes
import random
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

NOBODY = -1
Site = tuple[tuple[str, int], ...]


class Races:
    """The races that were found: how many of each kind between two places, and an example."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, Site, Site]] = Counter()
        self.examples: dict[tuple[str, Site, Site], str] = {}

    def add(self, kind: str, here: Site, there: Site, example: str) -> None:
        self.counts[kind, here, there] += 1
        self.examples.setdefault((kind, here, there), example)

    def describe(self, race: tuple[str, Site, Site]) -> str:
        kind, *places = race
        lines = [" < ".join(f"{name}:{line}" for name, line in place) for place in places if place]
        return "\n    ".join([f"{kind}: {self.examples[race]}", *lines])


class Accesses:
    """The last access of each program to each cell, `[cells, programs]`: its clock (0: none) and its site."""

    def __init__(self, num_cells: int, num_programs: int) -> None:
        self.clocks = np.zeros((num_cells, num_programs), np.int32)
        self.sites = np.zeros((num_cells, num_programs), np.int32)

    def note(self, cells: np.ndarray, program: int, clock: int, site: int) -> None:
        self.clocks[cells, program] = clock
        self.sites[cells, program] = site


class Region:
    """The storage of one or several tensors, as cells of the smallest element among them."""

    def __init__(self, name: str, base: int, num_bytes: int, cell: int, num_programs: int, is_scratch: bool) -> None:
        self.name, self.base, self.end, self.cell, self.is_scratch = name, base, base + num_bytes, cell, is_scratch
        count = num_bytes // cell
        self.memory = np.frombuffer((ctypes.c_char * (count * cell)).from_address(base), f"u{cell}")
        self.before, self.issued = self.memory.copy(), self.memory.copy()
        self.stored_by, self.stored_at = np.full(count, NOBODY, np.int32), np.zeros(count, np.int32)
        self.loads, self.stores, self.atomics = (Accesses(count, num_programs) for _ in range(3))
        self.load_threads, self.store_threads = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self.last_atomic = np.full(count, NOBODY, np.int32)
        self.released: dict[int, np.ndarray] = {}

    def reach_memory(self, cells: np.ndarray, values: np.ndarray, program: int, clock: int) -> None:
        self.before[cells], self.memory[cells] = self.memory[cells], values
        self.stored_by[cells], self.stored_at[cells] = program, clock


class Waiting(NamedTuple):
    """A store that has not reached memory."""

    region: Region
    cells: np.ndarray
    values: np.ndarray
    clock: int


class Access(NamedTuple):
    """One operation of a program: the cells it touches, its site, and what stands for the threads that make it."""

    program: int
    clock: int
    region: Region
    cells: np.ndarray
    site: int
    threads: int


class Memory:
    """The memory of a launch of `num_programs` programs, in which `rng` chooses what the hardware would."""

    def __init__(self, regions: list[Region], num_programs: int, rng: random.Random, races: Races) -> None:
        self.regions, self.rng, self.races = regions, rng, races
        self.chances = np.random.default_rng(rng.randrange(2**32))
        self.staleness = rng.choice((0.0, 0.5, 0.9))
        # known[p, q]: up to which clock of program q the threads of program p know what it did.
        self.known = np.eye(num_programs, dtype=np.int32)
        self.acquired = np.zeros_like(self.known)
        self.waiting: list[list[Waiting]] = [[] for _ in range(num_programs)]
        self.site_numbers: dict[Site, int] = {(): 0}
        self.sites: list[Site] = [()]
        self.num_accesses = 0

    def load(self, program: int, ptrs: np.ndarray, mask: np.ndarray, dtype: np.dtype, site: Site, in_l1: bool) -> Any:
        access = self._locate(program, ptrs, mask, dtype.itemsize, site)
        if access is None:
            return np.zeros(int(mask.sum()), dtype)
        region, cells, clock = access.region, access.cells, access.clock
        stores = region.stores.clocks[cells]
        has_own = stores[:, program] > 0
        self._report_unordered("store / load", access, region.stores, except_at=has_own)
        self._report_unordered("atomic / load", access, region.atomics)
        own_now = (stores[:, program] == clock) & (region.store_threads[cells] != access.threads)
        self._report("store / load by threads of a program", access, own_now, region.stores)
        stores[:, program] = 0
        foreign = stores.any(1) | ((region.last_atomic[cells] != NOBODY) & (region.last_atomic[cells] != program))
        if in_l1:
            self._report("load without .cg of what another program stored", access, foreign & ~has_own)
        if region.is_scratch:
            self._report("load of what nobody wrote", access, ~foreign & ~has_own & (region.last_atomic[cells] < 0))
        region.loads.note(cells, program, clock, access.site)
        region.load_threads[cells] = access.threads
        return self._visible(access, in_l1).view(dtype)

    def store(self, program: int, ptrs: np.ndarray, mask: np.ndarray, values: np.ndarray, site: Site) -> None:
        access = self._locate(program, ptrs, mask, values.itemsize, site)
        if access is None:
            return
        region, cells, clock = access.region, access.cells, access.clock
        values = np.ascontiguousarray(values).view(region.memory.dtype)
        stores = region.stores.clocks[cells]
        same = (region.issued[cells] == values) & stores.any(1)
        self._report_unordered("store / store", access, region.stores, except_at=same)
        self._report_unordered("load / store", access, region.loads, except_at=same)
        # Coherence orders the store of whoever made the last atomic of a cell after all its atomics.
        self._report_unordered("atomic / store", access, region.atomics, except_at=region.last_atomic[cells] == program)
        other_threads = (stores[:, program] == clock) & (region.store_threads[cells] != access.threads) & ~same
        self._report("store / store by threads of a program", access, other_threads, region.stores)
        other_threads = (region.loads.clocks[cells, program] == clock) & (region.load_threads[cells] != access.threads)
        self._report("load / store by threads of a program", access, other_threads, region.loads)
        by_atomic = region.atomics.clocks[cells, program] == clock
        self._report("atomic / store by threads of a program", access, by_atomic, region.atomics)

        region.issued[cells] = values
        self._report("one store of two values", access, region.issued[cells] != values)
        region.stores.clocks[cells[~same]] = 0
        region.stores.note(cells, program, clock, access.site)
        region.store_threads[cells] = access.threads
        for cell in region.released.keys() & set(cells.tolist()):
            del region.released[cell]
        self.waiting[program].append(Waiting(region, cells, values, clock))

    def atomic(
        self, program: int, ptrs: np.ndarray, mask: np.ndarray, itemsize: int, site: Site,
        acquires: bool, releases: bool, perform: Callable[[], Any],
    ) -> tuple[Any, tuple[Region, int] | None]:  # fmt: skip
        """Call `perform` on memory; also return the cell if there is one and it has kept its value."""
        access = self._locate(program, ptrs, mask, itemsize, site)
        if access is None:
            return perform(), None
        region, cells, clock = access.region, access.cells, access.clock
        self._report_unordered("store / atomic", access, region.stores)
        self._report_unordered("load / atomic", access, region.loads)
        own_now = region.stores.clocks[cells, program] == clock
        self._report("store / atomic by threads of a program", access, own_now, region.stores)
        self.drain(program, lambda store: (releases and store.clock < clock) or overlap(store, region, cells))
        before = region.memory[cells].copy()
        result = perform()
        after = region.memory[cells].copy()
        if acquires:
            for cell in region.released.keys() & set(cells.tolist()):
                np.maximum(self.acquired[program], region.released[cell], out=self.acquired[program])
        if releases:
            published = np.maximum(self.known[program], self.acquired[program])
            published[program] = clock - 1
            for cell in cells.tolist():
                region.released[cell] = np.maximum(published, region.released.get(cell, 0))
        changed = before != after
        region.memory[cells] = before
        region.reach_memory(cells[changed], after[changed], program, clock)
        region.issued[cells] = after
        # A release belongs to what it publishes.
        region.atomics.note(cells, program, clock - 1 if releases else clock, access.site)
        region.last_atomic[cells] = program
        return result, (region, int(cells[0])) if len(cells) == 1 and not changed.any() else None

    def barrier(self, program: int) -> None:
        np.maximum(self.known[program], self.acquired[program], out=self.known[program])
        self.known[program, program] += 1

    def drain(self, program: int, is_due: Callable[[Waiting], bool]) -> None:
        """Let the stores of a program that are due reach memory, and those to the same cells before them."""
        kept: list[Waiting] = []
        stores, self.waiting[program] = self.waiting[program], kept
        for index, store in enumerate(stores):
            is_before = any(
                is_due(later) and overlap(later, store.region, store.cells) for later in stores[index + 1 :]
            )
            if is_due(store) or is_before:
                store.region.reach_memory(store.cells, store.values, program, store.clock)
            else:
                kept.append(store)

    def drain_some(self) -> bool:
        """Let some store reach memory, if any waits."""
        programs = [program for program, stores in enumerate(self.waiting) if stores]
        if not programs:
            return False
        program = self.rng.choice(programs)
        chosen = self.rng.choice(self.waiting[program])
        self.drain(program, lambda store: store is chosen)
        return True

    def drain_all(self) -> None:
        for program in range(len(self.waiting)):
            self.drain(program, lambda store: True)

    def _locate(self, program: int, ptrs: np.ndarray, mask: np.ndarray, itemsize: int, site: Site) -> Access | None:
        addresses = ptrs[mask]
        if not addresses.size:
            return None
        number = self.site_numbers.setdefault(site, len(self.sites))
        if number == len(self.sites):
            self.sites.append(site)
        low, high = int(addresses.min()), int(addresses.max()) + itemsize
        region = next((region for region in self.regions if region.base <= low and high <= region.end), None)
        if region is None:
            self.races.add("access outside every tensor", site, (), f"{low:#x} to {high:#x}")
            return None
        cells = ((addresses - region.base) // region.cell).astype(np.int64)
        if itemsize > region.cell:
            cells = (cells[:, None] + np.arange(itemsize // region.cell)).ravel()
        # The same tensor of addresses has the same layout, so each element is in the same thread; all threads load
        # a scalar.
        self.num_accesses += 1
        threads = hash((addresses.tobytes(), mask.tobytes())) if ptrs.size > 1 else self.num_accesses
        return Access(program, int(self.known[program, program]), region, cells, number, threads)

    def _visible(self, access: Access, in_l1: bool) -> np.ndarray:
        program, region, cells = access.program, access.region, access.cells
        values, by = region.memory[cells], region.stored_by[cells]
        may_be_old = (by != NOBODY) & (in_l1 | (region.stored_at[cells] > self.known[program][by])) & (by != program)
        is_old = may_be_old & (self.chances.random(len(cells)) < self.staleness)
        values[is_old] = region.before[cells[is_old]]
        for store in self.waiting[program]:
            if store.region is region:
                order = np.argsort(store.cells, kind="stable")
                place = np.maximum(np.searchsorted(store.cells[order], cells, side="right") - 1, 0)
                is_own = store.cells[order][place] == cells
                values[is_own] = store.values[order][place[is_own]]
        return values

    def _report_unordered(
        self, kind: str, access: Access, others: Accesses, except_at: np.ndarray | None = None
    ) -> None:
        """Report accesses of other programs that nothing orders before this one."""
        unordered = others.clocks[access.cells] > self.known[access.program]
        unordered[:, access.program] = False
        if except_at is not None:
            unordered[except_at] = False
        if unordered.any():
            where, programs = np.nonzero(unordered)
            there = others.sites[access.cells[where], programs]
            for site in np.unique(there):
                first = int(np.flatnonzero(there == site)[0])
                example = f"programs {access.program} and {programs[first]}"
                self._add(kind, access, access.cells[where[first]], self.sites[site], example)

    def _report(self, kind: str, access: Access, bad: np.ndarray, others: Accesses | None = None) -> None:
        if bad.any():
            cell = access.cells[bad][0]
            there = () if others is None else self.sites[others.sites[cell, access.program]]
            self._add(kind, access, cell, there, f"program {access.program}")

    def _add(self, kind: str, access: Access, cell: int, there: Site, example: str) -> None:
        self.races.add(kind, self.sites[access.site], there, f"{access.region.name}[{cell}], {example}")


def overlap(store: Waiting, region: Region, cells: np.ndarray) -> bool:
    return store.region is region and bool(np.isin(store.cells, cells).any())
