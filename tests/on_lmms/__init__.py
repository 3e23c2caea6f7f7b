"""Tests that run lmms-eval and lm-eval themselves, in the environment of `make lmms`."""
