"""How scores and selections are computed: `eager` in PyTorch on any device, `kernels` in Triton on a GPU."""
