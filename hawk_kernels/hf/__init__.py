"""Pruning Hugging Face vision-language models; imports transformers."""
