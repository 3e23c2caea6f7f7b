"""Runs several phases in one launch, by letting the programs of one grid wait for each other.

A grid has the programs of its first phase, then those of its second, and so on. A program does not go by its
`program_id`, because the order in which programs start is not guaranteed, but by a ticket that it draws when it starts.
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

*Polling.* On NVIDIA an acquire empties the L1 cache of its multiprocessor, which the programs beside it use too. A
program that has to wait therefore polls without an acquire, and acquires once the count is there.
"""

import triton
import triton.language as tl
from triton.language.target_info import current_target

# How many phases of a row can count their arrivals.
COUNTERS_PER_ROW = tl.constexpr(16)
# The int32 words of a cache line. The roll of tickets has the first line to itself and each row has one of its own, so
# that programs that wait for one row do not delay those that draw tickets or arrive in another.
LINE = tl.constexpr(32)


def num_counters(num_rows: int) -> int:
    """Return how many int32 zeros a launch over this many rows needs."""
    return (1 + num_rows) * int(LINE.value)


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
    return counters_ptr + LINE + row * LINE


@triton.constexpr_function
def _barrier_leaves_stores_in_flight():
    """Say whether the code is for AMD's gfx9 (CDNA), whose barrier does not wait for stores; `vmcnt` counts them."""
    target = None if triton.knobs.runtime.interpret else current_target()
    return target is not None and target.backend == "hip" and target.arch.startswith("gfx9")


@triton.jit
def _complete_stores():
    """Let every wave wait until its own stores have reached L2, where the barrier that follows does not see to that.

    On gfx9 the release after the barrier is made by one wave and waits for the stores of that wave alone. On NVIDIA the
    barrier orders the stores of all threads before the release.
    """
    if _barrier_leaves_stores_in_flight():
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\n\tv_mov_b32 $0, $1", "=v,v,~{memory}", [tl.program_id(0)], tl.int32, False, 1
        )


@triton.jit
def arrive(counter_ptr):
    """Announce that this program's stores are done, and return how many programs had announced it before."""
    _complete_stores()
    # All threads make the stores and one makes the atomic; Triton puts no barrier between the two.
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")


@triton.jit
def wait_for(counter_ptr, num_arrivals):
    """Wait until this many programs of an earlier phase have arrived; then all that they stored can be read."""
    # The acquire is what makes the stores visible; see "Memory order" above before changing it. Its result must be
    # used, or the compiler deletes it. A program that finds the count complete at once makes one round trip, no more.
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < num_arrivals:
        while tl.atomic_add(counter_ptr, 0, sem="relaxed", scope="gpu") < num_arrivals:
            pass
    tl.debug_barrier()


@triton.jit
def leave_row(counters_ptr, last_counter_ptr, num_programs):
    """Arrive in a row's last phase; the last program to do so returns the row's counters to zero."""
    if arrive(last_counter_ptr) == num_programs - 1:
        tl.store(counters_ptr + tl.arange(0, COUNTERS_PER_ROW), tl.zeros([COUNTERS_PER_ROW], tl.int32))
