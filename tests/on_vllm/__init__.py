"""Tests of the vLLM plugin against transformers and `prune`: `make vllm`. `make test` does not collect them."""
