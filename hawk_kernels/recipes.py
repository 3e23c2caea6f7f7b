"""The settings of the authors' releases where these differ from the defaults here, one row for each release.

A recipe sets what can be set. What a release does that no option can set, because it is an error or because a
checkpoint lacks what it needs, is described in `differs`, so that nobody mistakes the results for the release's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hawk_kernels.methods.base import Method


@dataclass(frozen=True)
class Recipe:
    """How one release prunes.

    Attributes:
        method: name of the method.
        source: the repository of the release.
        differs: what else the release does that this package does not, and who is right.
        arguments: arguments of `prune` other than the method: `budget`, `query`, `positions`.
        options: options of the method.
    """

    method: str
    source: str
    differs: str
    arguments: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)


RECIPES: dict[str, Recipe] = {
    "hawk-release": Recipe(
        method="hawk",
        source="github.com/peppery77/HAWK",
        differs="It scores in bfloat16; sums are in float32 here, which is more exact. It takes one prompt at a time.",
        arguments={"query": "release"},
        options={"normalize": "l2", "rounding": "ceil"},
    ),
    "divprune-release": Recipe(
        method="divprune",
        source="github.com/vbdi/divprune",
        differs="Nothing else that changes which tokens stay.",
        arguments={"positions": "packed"},
        options={"rounding": "nearest"},
    ),
    "cdpruner-release": Recipe(
        method="cdpruner",
        source="github.com/Theia-4869/CDPruner",
        differs=(
            "For LLaVA it takes relevance from CLIP's text encoder, negated; a checkpoint of the language model does "
            "not contain one, so relevance is the cosine with the embeddings of the question."
        ),
        arguments={"budget": "per_tile", "positions": "packed"},
        options={"scale_over": "prompt"},
    ),
    "fastv-release": Recipe(
        method="fastv",
        source="github.com/pkunlp-icler/FastV",
        differs=(
            "It expects the system prompt and the image at fixed places. It can mask the tokens instead of dropping "
            "them, which mode='hide' does."
        ),
        options={"layer": 2, "rounding": "nearest"},
    ),
    "hiprune-release": Recipe(
        method="hiprune",
        source="github.com/Danielement321/HiPrune",
        differs=(
            "It excludes anchors from the registers by subtracting 1 from sums of attention, which may leave some in, "
            "so that it keeps fewer than its budget; and neighbours go round the ends of a line. Both are errors."
        ),
        arguments={"budget": "per_tile", "positions": "packed"},
        options={"alpha": 0.1, "rounding": "nearest"},
    ),
    "fastervlm-release": Recipe(
        method="fastervlm",
        source="github.com/Theia-4869/FasterVLM",
        differs="Nothing else that changes which tokens stay.",
        arguments={"budget": "per_tile", "positions": "packed"},
    ),
    "vispruner-release": Recipe(
        method="vispruner",
        source="github.com/Theia-4869/VisPruner",
        differs="Nothing else that changes which tokens stay.",
        arguments={"budget": "per_tile", "positions": "packed"},
    ),
    "visionzip-release": Recipe(
        method="visionzip",
        source="github.com/dvlab-research/VisionZip",
        differs=(
            "It hands CLS to the language model as one of the dominant tokens, which transformers never does, and sets "
            "contextual tokens after the dominant ones; here each stands where it was in the picture."
        ),
        arguments={"positions": "packed"},
        options={"merging": "release"},
    ),
    "prumerge-release": Recipe(
        method="prumerge",
        source="github.com/42Shawn/LLaVA-PruMerge",
        differs=(
            "It counts outliers of the attention to find how many tokens stay, reads the last layer of the encoder "
            "(pass cls_layer=24 for CLIP-L), whose output LLaVA discards, takes one softmax over all heads together, "
            "and appends a token that sums up the dropped ones."
        ),
        arguments={"positions": "packed"},
        options={"merging": "release"},
    ),
    "sparsevlm-release": Recipe(
        method="sparsevlm",
        source="github.com/Gumpest/SparseVLMs",
        differs=(
            "It keeps fixed numbers of tokens; pass {3: 300, 7: 200, 16: 110} as keep_ratio for those of 192 on "
            "average. It wants R[n] > mean(R), which leaves a question of one word without raters."
        ),
        arguments={"query": "release"},
    ),
    "vscan-release": Recipe(
        method="vscan",
        source="github.com/Tencent/SelfEvolvingAgent",
        differs=(
            "In LLaVA it numbers the kept tokens anew, keeps fewer than asked for where the windows do not divide the "
            "budget evenly, and in stage two lets the tiles of a picture compete; in Qwen2.5-VL it ranks in stage two "
            "before RoPE. Its budgets are two numbers: pass {0: 96, 16: 32} as keep_ratio for those of 64 on average."
        ),
        arguments={"budget": "per_tile"},
        options={"allocation": "release"},
    ),
}
"""Every recipe by its name."""


def followed(
    name: str, given: Mapping[str, Any], options: Mapping[str, object]
) -> tuple[dict[str, Any], dict[str, object]]:
    """Complete the arguments of `prune` with those of a recipe.

    Args:
        name: of the recipe.
        given: arguments of `prune` by name, the method among them; None where the caller gave none.
        options: those that the caller gave for the method.

    Returns:
        The arguments, None where neither the caller nor the recipe says anything, and the options.

    Raises:
        ValueError: no such recipe, or another method than that of the recipe.
    """
    recipe = RECIPES.get(name) if isinstance(name, str) else None
    if recipe is None:
        raise ValueError(f"recipe: expected one of {', '.join(map(repr, sorted(RECIPES)))}, got {name!r}")
    method = given["method"]
    called = method.name if isinstance(method, Method) else method
    if called not in (None, recipe.method):
        raise ValueError(
            f"recipe: expected method {recipe.method!r} or none beside {name!r}, got {called!r}; leave one of the two "
            "out"
        )
    merged = {key: recipe.arguments.get(key) if value is None else value for key, value in given.items()}
    if isinstance(method, Method):
        # an object was made with options of its own
        return merged, dict(options)
    return {**merged, "method": recipe.method}, {**recipe.options, **options}
