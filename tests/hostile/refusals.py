"""What `prune` may refuse, and by which words: any other error is a failure."""

from __future__ import annotations

import re

REFUSALS: dict[str, tuple[type[Exception], str]] = {
    "the encoder of the family cannot be read": (
        TypeError,
        r"method: expected one that leaves the vision encoder( of \w+)? alone, got",
    ),
    "the encoder's tiles cannot be read": (
        ValueError,
        r"pixel_values: expected visual tokens that stand for squares of",
    ),
    "no such layer in the encoder": (ValueError, r"\w+_layer: expected 1 to \d+, the layers of the vision encoder"),
    "no merging before this projector": (TypeError, r"method: expected one that does not merge before the projector"),
    "the family rotates otherwise": (TypeError, r"method: expected one that needs no rotary position embeddings of"),
    "hidden visual tokens before a method that reads the encoder": (
        ValueError,
        r"attention_mask: expected one that shows every visual token, since neighbours on the grid count",
    ),
    "grids that do not fit": (ValueError, r"input_ids: expected \w+ placeholders of row \d+ to match the grids"),
    "keys of one length": (TypeError, r"method: expected one that does not rank by the lengths of keys, since"),
    "no text to rank by": (ValueError, r"query: expected text in row \d+ to rank its visual tokens by, got none"),
    "a stage after the last layer": (ValueError, r"layer: expected 1 to \d+, since tokens leave before the layer"),
    "a stage before a layer without attention": (ValueError, r"layer: expected one of [\d, ]+, since layer \d+ of"),
    "a stage before the layer that counts the cache": (ValueError, r"layer: expected \d+ or more to drop tokens after"),
    "hiding where layers have no masks": (TypeError, r"mode: expected 'drop', got 'hide'; a \w+ has layers without"),
    "dropping where layers share keys": (TypeError, r"mode: expected 'hide', got 'drop'; the last \d+ layers of"),
    "a method for whole images inside the stack": (
        TypeError,
        r"method: expected one that ranks by what enters a layer, got",
    ),
    "a method that merges inside the stack": (ValueError, r"method '\w+': expected a Selection without a merge map"),
    "a method that ranks inside the stack alone": (
        TypeError,
        r"method: expected one that can choose before the first layer for stage 0, got",
    ),
    "a text model of one layer": (ValueError, r"(method: expected one|second: expected 1) for a text model of 1 layer"),
    "more stays after a later stage": (ValueError, r"keep_ratio\[\d+\]: expected at most"),
    "head weights of a layer inside the stack": (ValueError, r"head_weights: expected those of layer \d+"),
    "attention that depends on slots": (ValueError, r"input_ids: expected rows of at most \d+ tokens, padding and"),
    "masks of other dimensions": (ValueError, r"attention_mask: expected masks of 4 dimensions from the model"),
}
"""Kinds of errors that are answers: their type, and how their message begins."""


def refusal_of(error: BaseException) -> str | None:
    """Name the refusal that an error is; None where it is none of `REFUSALS`, or does not say what to do."""
    message = str(error)
    for name, (kind, pattern) in REFUSALS.items():
        if type(error) is kind and re.match(pattern, message) and re.search("[;,] ", message):
            return name
    return None
