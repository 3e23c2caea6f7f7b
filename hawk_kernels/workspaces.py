"""Memory that calls keep for the calls after them, as far as a caller has a say in it."""

import sys


def free_workspaces() -> int:
    """Free the memory that the backends keep between calls, and return how many bytes that was.

    With Triton an eager call keeps its workspace and counters for the next call on the same stream, up to 32 MiB for
    each stream (and for each thread, on a stream that PyTorch did not create). The memory goes back to PyTorch's
    allocator, which hands it out again; `torch.cuda.empty_cache()` afterwards returns it to the device. Calls that are
    still running are not disturbed, and the next call allocates anew. Do not call this while any thread captures a CUDA
    graph. What captured graphs use is not freed: their workspace belongs to the graph, and a mebibyte of counters stays
    on each device.

    On a CPU `score_and_select` and `score_tokens` keep the memory between their steps, up to 4 MiB for each of
    eight signatures.
    """
    # What has not been imported keeps nothing, and Triton need not be installed.
    keepers = (f"{__package__}.backends.{name}" for name in ("kernels.launch", "eager.score_and_select"))
    return sum(int(sys.modules[keeper].free_kept_memory()) for keeper in keepers if keeper in sys.modules)
