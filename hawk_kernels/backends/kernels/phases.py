"""Several phases in one launch: how the programs of one grid wait for each other.

A grid has the programs of its first phase, then those of its second, and so on. A program does not go by its
`program_id`, because nobody promises the order in which programs start, but by a ticket that it draws when it starts.
It only waits for programs with smaller tickets. Those have started before it and wait for still smaller ones, so the
program with the smallest unfinished ticket always runs, however few programs fit on the device: no cooperative launch
is needed. It also means that Triton's interpreter, which runs one program after the other, never waits.

Counters are zero before a launch and after it: the program with the last ticket returns the roll to zero, and the last
program to leave a row returns that row's counters. A program that arrived after the last one had left would spoil the
next launch, so the programs of each phase of a row wait for all of the phase before, even where they have no use for
its results.

*Memory order.* What a program stores reaches the programs that wait for it by a release in `arrive` and an acquire in
`wait_for`, both at the scope of the GPU. Loads of what other programs have stored are marked `.cg`, which keeps them
out of L1. Correctness does not rest on that mark, and must not: where Triton's pipeliner turns such a load into
`cp.async.ca`, the load goes through L1. It then reads fresh data only because the acquire has invalidated L1, so an
acquire must never be weakened to a relaxed load or moved after the loads it protects.
"""

import triton
import triton.language as tl

# How many phases of a row can count their arrivals. counters[0] is the roll of tickets; the rows' counters follow.
COUNTERS_PER_ROW = tl.constexpr(16)


def num_counters(num_rows: int) -> int:
    """Return how many int32 zeros a launch over so many rows needs."""
    return 1 + num_rows * int(COUNTERS_PER_ROW.value)


@triton.jit
def draw_ticket(counters_ptr):
    """Return this program's place in the order in which programs have started."""
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed", scope="gpu")
    if ticket == tl.num_programs(0) - 1:
        tl.store(counters_ptr, 0)
    return ticket


@triton.jit
def counters_of_row(counters_ptr, row):
    """Return the arrival counters of one row; `launch.check_limits` keeps the offset within int32."""
    return counters_ptr + 1 + row * COUNTERS_PER_ROW


@triton.jit
def arrive(counter_ptr):
    """Say that this program's stores are done; returns how many programs had said so before."""
    # All threads make the stores and one makes the atomic; Triton puts no barrier between the two.
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")


@triton.jit
def wait_for(counter_ptr, num_arrivals):
    """Wait until so many programs of an earlier phase have arrived; afterwards all they stored can be read."""
    # The acquire is what makes the stores visible; see "Memory order" above before changing it.
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < num_arrivals:
        pass
    tl.debug_barrier()


@triton.jit
def leave_row(counters_ptr, last_counter_ptr, num_programs):
    """Arrive in a row's last phase; the last program to do so returns the row's counters to zero."""
    if arrive(last_counter_ptr) == num_programs - 1:
        tl.store(counters_ptr + tl.arange(0, COUNTERS_PER_ROW), tl.zeros([COUNTERS_PER_ROW], tl.int32))
