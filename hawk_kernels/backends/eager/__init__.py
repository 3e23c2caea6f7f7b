"""The operators in PyTorch, one file for each: they run on any device and are the default on a CPU."""
