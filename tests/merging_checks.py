"""What the tests of merging methods share: maps as matrices, and models that are given the sums of the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hawk_kernels import prune
from hawk_kernels.hf.anatomy import dissect
from hawk_kernels.hf.families import ENCODERS
from hawk_kernels.selection import kept_count
from tests.encoder_oracles import eager_columns
from tests.family_checks import watched
from tests.method_checks import TOLERANCE, visual_tokens
from tests.test_hiprune_families import encode
from tests.tiny_families import BY_NAME, batch, tiny_model
from tests.tiny_models import BEGIN, END_OF_TURN, Picture, question, words


def matrix_of(merge, num_tokens):
    """Weights `[B, M, M]` by target and source of a merge map; targets without an entry have a row of zeros."""
    found = torch.zeros(len(merge.target), num_tokens, num_tokens)
    for row, entries in enumerate(zip(*(part.tolist() for part in merge), strict=True)):
        for target, source, weight in zip(*entries, strict=True):
            if target >= 0:
                found[row, target, source] += weight
    return found


def matrix_of_reference(maps, num_tokens):
    """The same of a reference's dicts from a target to the weights of its sources."""
    found = torch.zeros(len(maps), num_tokens, num_tokens)
    for row, merged in enumerate(maps):
        for target, weights in merged.items():
            for source, weight in weights.items():
                found[row, target, source] = weight
    return found


class Encoded:
    """What the encoder and the projector of a tiny model do to a batch of images, computed without the package's hooks.

    Attributes:
        attention: `[S]`, of CLS to each visual token, or received by it where there is no CLS.
        keys: `[S, H, D]`.
        rows: `[S, C]`, what enters the projector.
    """

    def __init__(self, model: Any, name: str, inputs: dict[str, torch.Tensor], layer: int | None = None) -> None:
        encoder = ENCODERS[name](model.base_model)
        self.encoder = encoder
        attention = encoder.attentions[(layer or encoder.deep_layer) - 1]
        seen: dict[str, torch.Tensor] = {}
        keys = attention.k_proj if hasattr(attention, "k_proj") else attention.qkv
        handles = [
            keys.register_forward_hook(lambda module, args, output: seen.update(keys=output)),
            encoder.projector.register_forward_pre_hook(lambda module, args: seen.update(rows=args[0])),
        ]
        with torch.no_grad(), eager_columns(encoder.tower, of_first=encoder.has_cls) as received:
            encode(model.base_model, "image", inputs)
        for handle in handles:
            handle.remove()
        heads = attention.num_heads
        if encoder.has_cls:
            self.attention = torch.cat(received[attention])[:, 1:].flatten()
            self.keys = seen["keys"][:, 1:].flatten(0, 1).unflatten(-1, (heads, -1))
            self.rows = seen["rows"].flatten(0, 1)
            return
        # four patches become one token, in the order of windows
        side = encoder.tower.spatial_merge_size**2
        keys = seen["keys"].unflatten(-1, (3, heads, -1))[:, 1]
        received_by_patch = torch.cat([part.flatten() for part in received[attention]]).unsqueeze(-1)
        of_patches = torch.cat([received_by_patch, keys.flatten(1)], dim=1)
        of_tokens = of_patches.unflatten(0, (-1, side)).mean(dim=1)
        order = _order_of_windows(encoder, inputs)
        of_tokens, rows = (x[order] for x in (of_tokens, seen["rows"].reshape(len(of_tokens), -1)))
        self.attention, self.keys, self.rows = of_tokens[:, 0], of_tokens[:, 1:].unflatten(-1, (heads, -1)), rows

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        """The embeddings of rows `[K, C]`, by the model's own projector."""
        if not self.encoder.has_cls:
            rows = rows.view(len(rows) * self.encoder.tower.spatial_merge_size**2, -1)
        return self.encoder.projector(rows)


def _order_of_windows(encoder: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """For each visual token its place in the order of the encoder, found from the tower's own function."""
    if not hasattr(encoder.tower, "get_window_index"):
        from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

        index = modeling.get_vision_window_index(
            inputs["image_grid_thw"],
            encoder.tower.spatial_merge_size,
            encoder.tower.window_size,
            encoder.tower.patch_size,
        )[0]
    else:
        index = encoder.tower.get_window_index(inputs["image_grid_thw"])[0]
    return torch.as_tensor(index).argsort()


PICTURES = {
    "llava": [Picture(3, 4), Picture(3, 4), Picture(3, 4)],
    "qwen2_5_vl": [Picture(3, 4), Picture(2, 3), Picture(4, 4)],
}


@torch.no_grad()
def check_end_to_end(name: str, method: str, budget: str, options: dict[str, Any], reference: Callable) -> None:
    """`prune` gives the logits of the unpruned model that is handed the reference's sums, projected by itself.

    Args:
        name: of the family.
        method: of the package.
        budget: "shared" or "per_image".
        options: of the method.
        reference: called as `reference(attention, keys, count)` with `[1, M]`, `[1, M, H, D]`; returns a selection and
            the map of each row.
    """
    model = tiny_model(name)
    one, two, three = [BY_NAME[name].picture or picture for picture in PICTURES[name]]
    rows = [question([one, two]), question(three, seed=3, after=2), [BEGIN, *words(7), END_OF_TURN]]
    inputs = batch(name, *rows)
    with prune(model, 0.4, method=method, budget=budget, **options) as pruning:
        logits = model(**inputs).logits
    _, embeds, positions = watched(model, lambda: model(**inputs))

    encoded = Encoded(model, name, inputs, options.get("cls_layer"))
    visual, keep = visual_tokens(inputs), inputs["attention_mask"].bool()
    expected, start = embeds.clone(), 0
    lengths = [[run.shape[0] for run in _runs(row)] for row in visual]
    for row, images in enumerate(lengths):
        places = visual[row].nonzero().flatten()
        units = images if budget == "per_image" else [sum(images)] if images else []
        for length in units:
            here, there = slice(start, start + length), places[:length]
            places, start = places[length:], start + length
            attention, keys, features = encoded.attention[here], encoded.keys[here], encoded.rows[here]
            selection, maps = reference(attention[None], keys[None], kept_count(0.4, length))
            keep[row, there] = selection.mask[0]
            assert torch.allclose(pruning.scores[row, there], attention, atol=1e-5)
            for target, weights in maps[0].items():
                total = sum(weight * features[source] for source, weight in weights.items())
                expected[row, there[target]] = encoded.project(total[None])[0]
    assert torch.equal(pruning.keep_mask, keep)
    assert (expected - embeds)[keep].abs().max() > 100 * TOLERANCE

    def give(module, args, kwargs):
        return args, {**kwargs, "inputs_embeds": expected}

    handle = dissect(model).text.register_forward_pre_hook(give, with_kwargs=True)
    hidden = model(**{**inputs, "attention_mask": keep.long(), "position_ids": positions}).logits
    handle.remove()
    assert (logits - hidden)[keep].abs().max() < TOLERANCE


def _runs(marked: torch.Tensor) -> list[torch.Tensor]:
    places = marked.nonzero().flatten()
    return list(places.tensor_split((places.diff() > 1).nonzero().flatten() + 1)) if len(places) else []
