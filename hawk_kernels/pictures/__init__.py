"""Draws and reports pruned prompts: which part of the caller's image each visual token stands for."""
