"""Memory that the kernels keep between calls, as far as a caller has a say in it."""

import sys


def free_workspaces() -> int:
    """Free the memory that the Triton kernels keep between calls, and return how many bytes that was.

    An eager call keeps its workspace and counters for the next call on the same stream, up to 32 MiB for each stream
    (and for each thread, on a stream that PyTorch did not create). The memory goes back to PyTorch's allocator, which
    hands it out again; `torch.cuda.empty_cache()` afterwards returns it to the device. Calls that are still running are
    not disturbed, and the next call allocates anew. Do not call this while any thread captures a CUDA graph. What
    captured graphs use is not freed: their workspace belongs to the graph, and a mebibyte of counters stays on each
    device.
    """
    # Where the kernels have not been imported they keep nothing, and Triton need not be installed.
    launch = sys.modules.get(f"{__package__}.backends.kernels.launch")
    return 0 if launch is None else int(launch.free_kept_memory())
