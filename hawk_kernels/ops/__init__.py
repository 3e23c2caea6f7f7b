"""Public operators, one file for each: the function, its checks and its definition in `torch.library`."""
