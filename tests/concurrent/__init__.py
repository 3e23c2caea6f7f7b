"""Runs the programs of the kernels concurrently on a model of the memory of a GPU."""
