"""Say which kernels a stream of prompts needs that `warm_up` has not compiled, as JSON; run without TRITON_INTERPRET.

    python -m tests.warm_up_streams hawk:qwen2_5_vl:bfloat16:shared fastv:llava:float32:shared [--prompts 20]

Two streams are drawn. The prompts of one are pruned by a tiny model on the CPU, and each operator that runs is followed
on meta tensors that lie as its tensors do: strides and alignment are those of real calls. The other goes up to 262144
tokens and 64 rows on meta tensors alone. Kernels are named as Triton names them in its cache of compiled kernels.
"""

import argparse
import json
import random

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

from hawk_kernels import prune
from hawk_kernels.backends.kernels.caught import distinct
from hawk_kernels.compile_ahead import following, place_of_backend
from hawk_kernels.hf.warm_up import Shape, WeightlessModel, launches_of_config, launches_of_prune
from hawk_kernels.hf.weightless import layout_of
from hawk_kernels.methods import METHODS
from hawk_kernels.ops.library import implementations
from tests import tiny_families
from tests.tiny_models import Picture, question

MOST_TOKENS, MOST_BATCH = 262144, 64
SMALL = (64, 2)
# Host arrays of larger batches would take longer than they show.
MOST_OF_A_BATCH = 2**19


class AlsoOnMeta(TorchDispatchMode):
    """Let operators run on the CPU, and follow each on meta tensors as on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "hawk_kernels" and not args[0].is_meta:
            others = [layout_of(x) if isinstance(x, torch.Tensor) else x for x in args]
            place = place_of_backend(func)
            assert others[place] == "torch"
            others[place] = "triton"
            implementations[func._opname](*others)
        return func(*args, **(kwargs or {}))


def needed_by_real_prompts(model, pruning, family, target, draw, num_prompts):
    """Return the kernels that prompts of a tiny model need; each has rows of several pictures and of any text."""
    with following(f"sm_{target.arch}") as launches, AlsoOnMeta(), pruning:
        for _ in range(num_prompts):
            rows = []
            for _ in range(draw.choice([1, 1, 2, 3])):
                pictures = [tiny_families.BY_NAME[family].picture] * draw.choice([1, 1, 2])
                if family.startswith("qwen"):
                    pictures = [Picture(draw.randint(1, 9), draw.randint(1, 9)) for _ in pictures]
                rows.append(question(pictures, after=draw.randint(1, 40)))
            inputs = tiny_families.batch(family, *rows)
            model(**{name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()})
    return set(distinct(launches, target))


def needed_by_long_prompts(model, target, draw, num_prompts):
    """Return the kernels that prompts of up to 262144 tokens and 64 rows need."""
    with following(f"sm_{target.arch}") as launches:
        for _ in range(num_prompts):
            batch = draw.choice([1, 1, draw.randint(1, MOST_BATCH)])
            most = min(MOST_TOKENS, MOST_OF_A_BATCH // batch) - 500
            num_visual = draw.choice([draw.randint(1, most), round(2 ** draw.uniform(0, most.bit_length() - 1))])
            model.prefill(Shape(batch, num_visual, draw.randint(1, 500), is_uneven=draw.random() < 0.5))
    return set(distinct(launches, target))


def check(case: str, num_prompts: int) -> dict[str, object]:
    """Draw both streams for a case and return what they need, what is missing, and what the config alone tells."""
    method, family, dtype, budget, *reach = case.split(":")
    reach = tuple(map(int, reach)) or (MOST_TOKENS, MOST_BATCH)
    target = GPUTarget("cuda", 90, 32)
    model = tiny_families.tiny_model(family).to(getattr(torch, dtype))
    method, *switches = method.split("+")
    options = dict.fromkeys(switches, True)
    weights = {"head_weights": "uniform"} if METHODS[method].uses_head_weights else {}
    pruning = prune(model, 0.3, method=method, budget=budget, **weights, **options)
    parts = pruning._anatomy, pruning._choosers
    launches, notes = launches_of_prune(*parts, "sm_90", reach=reach)
    warmed = set(distinct(launches, target))
    arguments = {"keep_ratio": 0.3, "method": method, "budget": budget, **options}
    by_model, _ = launches_of_prune(*parts, "sm_90", reach=SMALL)
    by_config, _ = launches_of_config(model.config, model.dtype, "sm_90", arguments, reach=SMALL)
    draw = random.Random(0)
    layer, chooser = next(iter(pruning._choosers.items()))
    weightless = WeightlessModel(pruning._anatomy, chooser, layer)
    real = needed_by_real_prompts(model, pruning, family, target, draw, num_prompts)
    long = needed_by_long_prompts(weightless, target, draw, num_prompts)
    kernels = [name for name, _ in warmed]
    return {
        "warmed": {name: kernels.count(name) for name in sorted(set(kernels))},
        "needed by real prompts": len(real),
        "needed by long prompts": len(long),
        "missing": sorted((real | long) - warmed),
        "differs by the config": sorted(set(distinct(by_model, target)) ^ set(distinct(by_config, target))),
        "notes": [*notes, *weightless.notes],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("case", nargs="+", help="method:family:dtype:budget, +option for each that is True")
    parser.add_argument("--prompts", type=int, default=20)
    arguments = parser.parse_args()
    print(json.dumps({case: check(case, arguments.prompts) for case in arguments.case}))


if __name__ == "__main__":
    main()
