"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before triton is imported."""

import os
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # a machine for `make gpu` need not have it
    settings = None


def _patch_the_language_once() -> None:
    """Nearly half of the interpreter's time goes into patching `triton.language` again for every device function."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_once(fn):
        modules = [module for module in (tl, tl.core) if any(value is module for value in fn.__globals__.values())]
        return patch(fn) if any(tl.core.is_builtin(module.load) for module in modules) else None

    interpreter._patch_lang = patch_once


if os.environ.get("TRITON_INTERPRET") == "1":
    _patch_the_language_once()

# Tiny tensors gain nothing from a second thread, and on a busy machine waiting for it is most of the time.
torch.set_num_threads(1)

if settings is not None:
    unhurried = [HealthCheck.too_slow]
    settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=unhurried)
    settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: a GPU, or the CPU by the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def three_layers() -> torch.nn.Module:
    """A tiny Qwen2.5-VL of three decoder layers, for the tests of the methods."""
    from tests.tiny_models import qwen_vl

    return qwen_vl(layers=3)


@pytest.fixture(autouse=True)
def _same_numbers_in_every_run():
    torch.manual_seed(0)
