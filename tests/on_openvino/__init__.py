"""Tests that run OpenVINO GenAI beside transformers and `prune`, in the environment of `make openvino`."""
