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


_WHOLE_TILES = "Of LLaVA-NeXT it reads whole tiles, with their padding and without image newlines."

RECIPES: dict[str, Recipe] = {
    "hawk-release": Recipe(
        method="hawk",
        source="github.com/peppery77/HAWK",
        differs=(
            "It scores in bfloat16; sums are in float32 here, which is more exact. It takes one prompt at a time. It "
            "rounds the product of binary numbers up, so that 0.07 of 100 tokens are 8. A question before the image is "
            "an error here; there, the tokens of the chat template after the image rank in its place."
        ),
        arguments={"query": "release"},
        options={"normalize": "l2", "rounding": "ceil"},
    ),
    "divprune-release": Recipe(
        method="divprune",
        source="github.com/vbdi/divprune",
        differs=(
            "It expects the image after 35 tokens, and rounds the product of binary numbers, so that 0.07 of 150 "
            "tokens are 11; here they are 10. Where fewer tokens differ than the budget has room for, it picks one "
            "twice and keeps fewer; here the budget is met."
        ),
        arguments={"positions": "packed"},
        options={"rounding": "nearest"},
    ),
    "cdpruner-release": Recipe(
        method="cdpruner",
        source="github.com/Theia-4869/CDPruner",
        differs=(
            "For LLaVA it takes relevance from CLIP's text encoder, negated; a checkpoint of the language model does "
            f"not contain one, so relevance is the cosine with the embeddings of the question. {_WHOLE_TILES}"
        ),
        arguments={"budget": "per_tile", "positions": "packed"},
        options={"scale_over": "prompt"},
    ),
    "dart-release": Recipe(
        method="dart",
        source="github.com/ZichenWen1/DART",
        differs=(
            "It ranks pivots by the keys of layer 2 after RoPE, here by those of layer 3 before RoPE, and compares "
            "states that have gone through the model's last norm. Its pivots choose in the order of a Python set, here "
            "the one with the largest key first. Four of its pivots come on top of the budget, and the rest is a "
            "multiple of eight: 128 are 132 here. It counts text after the final end of turn too."
        ),
        arguments={"query": "release"},
        options={"layer": 2},
    ),
    "fastv-release": Recipe(
        method="fastv",
        source="github.com/pkunlp-icler/FastV",
        differs=(
            "It expects the system prompt and the image at fixed places, and its demo takes layer=3. Its code that "
            "masks tokens in place of dropping them chooses anew for each generated token, and its code for a "
            "key-value cache computes the prompt with all tokens; here the tokens of the prompt are chosen once."
        ),
        options={"layer": 2, "rounding": "nearest"},
    ),
    "hiprune-release": Recipe(
        method="hiprune",
        source="github.com/Danielement321/HiPrune",
        differs=(
            "Neighbours go round the ends of a line, and those above the first line or below the last become the first "
            "or the last token of the image, which is an error; without an anchor on the border the same tokens stay. "
            f"It raises an error where anchors and neighbours exceed the budget. {_WHOLE_TILES}"
        ),
        arguments={"budget": "per_tile", "positions": "packed"},
        options={"alpha": 0.1, "rounding": "nearest"},
    ),
    "fastervlm-release": Recipe(
        method="fastervlm",
        source="github.com/Theia-4869/FasterVLM",
        differs=_WHOLE_TILES,
        arguments={"budget": "per_tile", "positions": "packed"},
    ),
    "vispruner-release": Recipe(
        method="vispruner",
        source="github.com/Theia-4869/VisPruner",
        differs=(
            "It raises an error where attention leaves an odd number of tokens, as with 66 of 576, or where a round "
            f"would take more than half of what is left. {_WHOLE_TILES}"
        ),
        arguments={"budget": "per_tile", "positions": "packed"},
    ),
    "holov-release": Recipe(
        method="holov",
        source="github.com/obananas/HoloV",
        differs=(
            "It hands the tokens of a crop over in the order of their attention, and zero vectors where a share "
            "exceeds its crop; here tokens stay in the order of the picture, and the surplus goes to other crops. Of "
            "a picture for LLaVA it keeps 64 tokens, all tiles together. In Qwen2.5-VL it does not put the attention "
            "of the encoder's windows back into the order of the picture, which is an error."
        ),
        arguments={"positions": "packed"},
    ),
    "mmtok-release": Recipe(
        method="mmtok",
        source="github.com/Ironieser/MMTok",
        differs=(
            "It drops common words from the question, encodes the rest word by word, and leaves out the padding of "
            "LLaVA-1.5's square pictures. For Qwen-VL it takes text_temperature=0.01."
        ),
        arguments={"budget": "per_tile", "positions": "packed"},
    ),
    "vidcom2-release": Recipe(
        method="vidcom2",
        source="github.com/xuyang-liu16/VidCom2",
        differs=(
            "It rounds the share of each frame by itself, so that the total may miss the budget; where it does not, "
            "the same tokens stay."
        ),
        arguments={"budget": "per_image", "positions": "packed"},
    ),
    "evs-release": Recipe(
        method="evs",
        source="github.com/vllm-project/vllm",
        differs=(
            "It never keeps less than the first frame of a video, and leaves still images alone; here every image and "
            "video keeps its budget."
        ),
        arguments={"budget": "per_image"},
    ),
    "visionzip-release": Recipe(
        method="visionzip",
        source="github.com/dvlab-research/VisionZip",
        differs=(
            "It hands CLS to the language model as one of the dominant tokens, which transformers never does, and sets "
            "contextual tokens after the dominant ones; here each stands where it was in the picture. Its 54 dominant "
            f"and 10 contextual tokens are keep_ratio=63 here. {_WHOLE_TILES}"
        ),
        arguments={"budget": "per_tile", "positions": "packed"},
        options={"contextual": 0.16, "merging": "release"},
    ),
    "prumerge-release": Recipe(
        method="prumerge",
        source="github.com/42Shawn/LLaVA-PruMerge",
        differs=(
            "It counts outliers of the attention to find how many tokens stay, reads the last layer of the encoder "
            "(pass cls_layer=24 for CLIP-L), whose output LLaVA discards, takes one softmax over all heads together, "
            "sets tokens in the order of their attention, and appends a token that sums up the dropped ones."
        ),
        arguments={"budget": "per_tile", "positions": "packed"},
        options={"merging": "release"},
    ),
    "sparsevlm-release": Recipe(
        method="sparsevlm",
        source="github.com/Gumpest/SparseVLMs",
        differs=(
            "It keeps fixed numbers of tokens; pass {3: 309, 7: 204, 16: 113} as keep_ratio for its 300, 200 and 110 "
            "and their clusters. It counts text after the final end of turn too, and wants R[n] > mean(R), which "
            "leaves a question of one word without raters. It clusters the states that leave the layer, here those "
            "that enter it, sets the means after the other visual tokens, and numbers positions anew after each stage."
        ),
        arguments={"query": "release"},
        options={"recycle": True, "merging": "release"},
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
