"""The operators: for each a file with the public function, its checks, and what `torch.library` needs to know of it."""
