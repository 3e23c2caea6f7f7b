"""Several phases in one launch: what the programs of one grid need to wait for each other.

A grid has the programs of its first phase, then those of its second, and so on. A program does not go by its
`program_id`, whose order of execution nobody promises, but by a ticket that it draws when it starts. It only waits for
programs with smaller tickets; these have started before it and wait for smaller ones in turn, so the one with
the smallest unfinished ticket always runs, however few programs fit on the device: no cooperative launch is needed. It
also means that Triton's interpreter, which runs one program after the other, never waits.

Counters are zero before a launch and after it: the holder of the last ticket returns the roll, and whoever is
the last to leave a row sets that row's counters back. So every phase of a row must be waited for by the next one, also
by programs that have no use for it: nobody may arrive behind the last to leave.
"""

import triton
import triton.language as tl

# Phases whose arrivals a row counts; counters[0] is the roll of tickets, the counters of the rows follow.
COUNTERS_PER_ROW = tl.constexpr(16)


def num_counters(num_rows: int) -> int:
    """Int32 zeros that a launch over so many rows needs."""
    return 1 + num_rows * COUNTERS_PER_ROW.value


@triton.jit
def draw_ticket(counters_ptr):
    """This program's place in the order of all that have started."""
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed", scope="gpu")
    if ticket == tl.num_programs(0) - 1:
        tl.store(counters_ptr, 0)
    return ticket


@triton.jit
def counters_of_row(counters_ptr, row):
    """The arrival counters of one row."""
    return counters_ptr + 1 + row * COUNTERS_PER_ROW


@triton.jit
def arrive(counter_ptr):
    """Say that this program's stores are done; returns how many had said so before."""
    # Triton puts no barrier between these stores, made by all threads, and the atomic, made by one.
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")


@triton.jit
def wait_for(counter_ptr, num_arrivals):
    """Wait until so many programs of an earlier phase have arrived; what they stored is visible past L1 (`.cg`)."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < num_arrivals:
        pass
    tl.debug_barrier()


@triton.jit
def leave_row(counters_ptr, last_counter_ptr, num_programs):
    """Arrive in a row's last phase; the last to do so sets the row's counters back for the next launch."""
    if arrive(last_counter_ptr) == num_programs - 1:
        tl.store(counters_ptr + tl.arange(0, COUNTERS_PER_ROW), tl.zeros([COUNTERS_PER_ROW], tl.int32))
