"""The model `hawk` of lmms-eval: builds one of its other models and answers every request inside a `prune` block.

    lmms_eval --model hawk --model_args base=qwen2_5_vl,pretrained=...,keep_ratio=0.2,method=hawk --tasks ...

What it builds is the base itself with its request methods wrapped, so that everything else (devices, batches, caches,
the kind of prompt) is what lmms-eval expects of that model.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import simple_parse_args_string

from hawk_kernels.hf.prune import Pruning, prune
from hawk_kernels.lmms_eval_plugin import MODEL_NAME
from hawk_kernels.methods import METHODS
from hawk_kernels.recipes import RECIPES

REQUESTS = ("generate_until", "generate_until_multi_round", "generate_visual_cot", "loglikelihood")
"""The methods by which lmms-eval asks a model."""

_DEFAULT_METHOD = "hawk"
_PRUNE_ARGUMENTS = ("keep_ratio", "method", "recipe", "head_weights", "budget", "mode", "positions")


class _Pruned(lmms):
    """Builds a pruned model; no instance is ever made, since the base takes its place."""

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> Any:
        """Build the base with its requests pruned.

        Args:
            arg_string: `base=NAME,keep_ratio=R`, then arguments of `prune` (method, recipe, head_weights, budget, mode,
                positions and the method's own options), and those of the base. Stages are written as JSON:
                `keep_ratio={"2": 0.5}`.
            additional_config: what the command line says of batches and devices.

        Raises:
            TypeError: no base, no keep_ratio, or a base that holds no transformers model.
            ValueError: as for `prune`.
        """
        arguments = simple_parse_args_string(arg_string)
        base_class = _base_class(arguments.pop("base", None), cls.is_simple)
        prune_arguments = _take_prune_arguments(arguments)
        further = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return _with_pruned_requests(_built(base_class, {**arguments, **further}), prune_arguments)


class PrunedChat(_Pruned):
    """What lmms-eval asks for unless it is told `--force_simple`."""

    is_simple = False


class PrunedSimple(_Pruned):
    """What `--force_simple` asks for."""

    is_simple = True


def _base_class(name: Any, is_simple: bool) -> Any:
    if not name or name == MODEL_NAME:
        raise TypeError(
            f"base: expected the name of a model of lmms-eval, got {name!r}; write --model_args base=qwen2_5_vl,..., "
            "`lmms_eval models` lists them"
        )
    base_class = get_model(name, is_simple)
    _let_prompts_follow(name)
    return base_class


def _let_prompts_follow(base: str) -> None:
    """Let tasks whose prompts are keyed by the name of the model find those of the base.

    lmms-eval gives the name on its command line to the manager that builds the tasks, which does so after the model
    is built, and offers nothing for a model to say otherwise.
    """

    def read(manager: TaskManager) -> Any:
        name = vars(manager)["model_name"]
        return base if name == MODEL_NAME else name

    def write(manager: TaskManager, name: Any) -> None:
        vars(manager)["model_name"] = name

    TaskManager.model_name = property(read, write)


def _take_prune_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Take the arguments of `prune` out of those for the base."""
    if "keep_ratio" not in arguments:
        raise TypeError("keep_ratio: expected a float in (0, 1] or a number of tokens, got nothing; add keep_ratio=0.2")
    recipe = RECIPES.get(arguments.get("recipe", ""))
    method = METHODS.get(arguments.get("method", _DEFAULT_METHOD) if recipe is None else recipe.method)
    options = () if method is None else inspect.signature(method).parameters
    taken = {name: arguments.pop(name) for name in (*_PRUNE_ARGUMENTS, *options) if name in arguments}
    if isinstance(taken["keep_ratio"], str) and taken["keep_ratio"].startswith("{"):
        stages = json.loads(taken["keep_ratio"])
        taken["keep_ratio"] = {
            int(layer): tuple(keep) if isinstance(keep, list) else keep for layer, keep in stages.items()
        }
    return taken


def _built(base_class: Any, arguments: dict[str, Any]) -> Any:
    """Build the base; also as one of several processes on CPUs, where its classes would take a GPU for each."""
    accelerator = Accelerator()
    if accelerator.num_processes == 1 or torch.cuda.is_available():
        return base_class(**arguments)
    with _as_only_process(base_class):
        built = base_class(**arguments)
    built.accelerator = accelerator
    built._rank, built._world_size = accelerator.process_index, accelerator.num_processes
    return built


@contextmanager
def _as_only_process(base_class: type) -> Iterator[None]:
    """Tell the constructors of a model's classes that their process is the only one."""
    alone = SimpleNamespace(
        num_processes=1,
        process_index=0,
        local_process_index=0,
        is_main_process=True,
        is_local_main_process=True,
        device=torch.device("cpu"),
    )
    modules = {ancestor.__module__ for ancestor in base_class.__mro__}
    with ExitStack() as stack:
        for module in (sys.modules[name] for name in modules):
            if getattr(module, "Accelerator", None) is Accelerator:
                stack.enter_context(patch.object(module, "Accelerator", lambda *_, **__: alone))
        yield


def _with_pruned_requests(built: Any, prune_arguments: Mapping[str, Any]) -> Any:
    # an error in the arguments is raised before anything is asked
    _pruning(built, prune_arguments)
    for name in REQUESTS:
        method = getattr(built, name, None)
        if method is not None:
            setattr(built, name, _inside_prune(built, method, prune_arguments))
    return built


def _inside_prune(built: Any, method: Callable[..., Any], prune_arguments: Mapping[str, Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def ask(requests: Any) -> Any:
        # the block is made anew, because lmms-eval frees the model after the last request
        with _pruning(built, prune_arguments):
            return method(requests)

    return ask


def _pruning(built: Any, prune_arguments: Mapping[str, Any]) -> Pruning:
    model = getattr(built, "model", None)
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"base: expected a model of lmms-eval that holds a transformers model, got {type(built).__name__}, whose "
            f"`model` is {type(model).__name__}; models behind a server or another engine cannot be pruned here"
        )
    return prune(model, **prune_arguments)
