"""Pruning Hugging Face vision-language models."""
