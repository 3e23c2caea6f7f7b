"""Compiled decoding and hooks: torch may reuse code that it compiled while there were no hooks, and skip ours."""

from __future__ import annotations

from typing import Any

# where transformers' `generate` keeps the compiled call of a model, and the settings it was made with
_ATTRIBUTES = ("_compiled_call", "_last_compile_config")


def check_not_compiled_without_hooks(model: Any) -> None:
    """Refuse a model that is compiled as a whole, or whose decoding `generate` compiled outside a `prune` block.

    Raises:
        ValueError: torch would run that code inside the block as well, without the block's hooks.
    """
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(
            "model: expected one that is not compiled as a whole, got one after model.compile(); how many tokens of a "
            "prompt stay is not known to compiled code. Set model._compiled_call_impl = None, and compile decoding "
            "alone: generate does so for cache_implementation='static'"
        )
    if "_compiled_call" not in vars(model):
        return
    import torch._dynamo

    if torch._dynamo.config.skip_nnmodule_hook_guards:
        raise ValueError(
            "model: expected one that generate has not compiled yet (it does for a static cache), got compiled code "
            "that torch would reuse here without the hooks that prune. Generate inside the block first; or set "
            "torch._dynamo.config.skip_nnmodule_hook_guards = False before the first generate; or call "
            "torch.compiler.reset() and `del model._compiled_call` now"
        )


def forget_compiled_call(model: Any) -> None:
    """Leave no compiled call behind that was made inside the block."""
    for name in _ATTRIBUTES:
        vars(model).pop(name, None)
