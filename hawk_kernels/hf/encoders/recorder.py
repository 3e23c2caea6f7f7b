"""Records what a method asks of the vision encoder: attention that visual tokens receive, and the projector's input.

The encoder keeps its own attention implementation: the queries and keys that a layer has just computed go through
`attention_column_mean` as well. Of the projector's input a reference is kept until its rows are laid out. How tiles and
frames become visual tokens shows in `get_image_features` and `get_video_features` of the multimodal model, which are
watched too. `generate` may run the encoder long before the text model and hand over its output; what was measured
travels with that output.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from hawk_kernels.hf.anatomy import Anatomy
from hawk_kernels.hf.encoders import Grid, Piece, VisionEncoder
from hawk_kernels.hf.encoders.pieces import num_cells, num_tokens
from hawk_kernels.hf.families import ENCODERS
from hawk_kernels.hf.hooks import Handle, WatchedMethod, named, upload
from hawk_kernels.hf.prompt import Prompt
from hawk_kernels.methods import Method

_ATTRIBUTE = "_hawk_kernels_attention"
_KINDS = ("image", "video")


@dataclass(frozen=True)
class Recording:
    """What was measured in one run of the encoder.

    Attributes:
        values: what is known of each visual token that is a cell of a grid, `[cells]` or `[cells, C]`, by name: the
            attention received in the layers "object" and "deep", the attention of CLS in its layer, "cls", and in a
            shallow one, "local", the "keys" `[cells, H, D]` of the layer of "cls", and the "features" that entered the
            projector; only what the recorder was asked for.
        pieces: what the visual tokens stand for, all of them.
        layers: the layers of the attention, counted from 1, in the order of their names in `values`.
        has_cls: whether the encoder has a CLS token.
    """

    values: dict[str, torch.Tensor]
    pieces: list[Piece]
    layers: tuple[int, ...]
    has_cls: bool = False


class VisionRecorder:
    """Records each run of a vision encoder while its hooks are attached.

    Args:
        encoder: the encoder's anatomy.
        object_layer: counted from 1, or None for the encoder's own.
        cls_layer: counted from 1, or None for the last one that the visual tokens come from.
        reads: what to measure, out of the names in `Recording.values`.
        local_layer: counted from 1, or None for the encoder's own.

    Attributes:
        layers: the layers whose attention is measured, counted from 1, in the order of `reads`.
        encoder: the anatomy of the vision encoder.
        watched: the modules inside which hooks must run: the vision encoder, and the projector if its input is kept.

    Raises:
        ValueError: a layer that the encoder does not have.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        object_layer: int | None,
        cls_layer: int | None = None,
        reads: Sequence[str] = ("object", "deep"),
        local_layer: int | None = None,
    ) -> None:
        deep = encoder.deep_layer
        shallow = encoder.default_local_layer
        usual = {"object": encoder.default_object_layer, "deep": deep, "cls": deep, "local": shallow, "keys": deep}
        self._layer_of = layers_to_watch(reads, usual, encoder.depth, object_layer, cls_layer, local_layer)
        self.layers = tuple(self._layer_of.values())
        self._reads = set(reads)
        self._source = encoder.object_layer_source if object_layer is None else "the option object_layer"
        self.encoder = encoder
        self.watched: list[nn.Module] = [encoder.tower, *([encoder.projector] if "features" in self._reads else [])]
        self._thread = _ThreadState()

    def attach(self) -> list[Handle]:
        """Register the hooks; removing the handles ends the recording."""
        multimodal = self.encoder.multimodal
        handles: list[Handle] = [
            WatchedMethod(multimodal, f"get_{kind}_features", partial(self._watch, kind))
            for kind in _KINDS
            if hasattr(multimodal, f"get_{kind}_features")
        ]
        for layer in sorted(set(self.layers)):
            attention = self.encoder.attentions[layer - 1]
            for place, module in enumerate(self.encoder.projecting(layer)):
                handles.append(module.register_forward_hook(partial(self._after_projection, (layer, place))))
            handles.append(attention.register_forward_hook(partial(self._after_attention, layer), with_kwargs=True))
        if "features" in self._reads:
            handles.append(self.encoder.projector.register_forward_pre_hook(self._before_projector, with_kwargs=True))
        return handles

    def options(self) -> dict[str, int | str]:
        """Name the layers, for statistics."""
        found: dict[str, int | str] = {}
        for name, layer in self._layer_of.items():
            if name == "keys":
                continue
            found[f"{name}_layer"] = layer
            if name == "object":
                found["object_layer_source"] = self._source
            elif name == "cls":
                found["cls_queries"] = "CLS" if self.encoder.has_cls else "all tokens, as the encoder has no CLS"
        return found

    def start(self) -> None:
        """Forget the runs of earlier calls of the multimodal model."""
        self._thread.runs = {}

    def recordings(self, arguments: dict[str, Any]) -> dict[str, Recording]:
        """Find what was measured of the images and of the videos of a call of the multimodal model, by kind.

        Args:
            arguments: those of the call.

        Raises:
            ValueError: the call brings encoder outputs that were not made inside this `prune` block.
        """
        found = {}
        encoded = arguments.get("mm_encoder_outputs") or {}
        for kind in _KINDS:
            # the model puts what it encodes itself into the same dict
            run = getattr(encoded.get(kind), _ATTRIBUTE, None) or self._thread.runs.get(kind)
            if run is None and encoded.get(kind) is not None:
                raise ValueError(
                    f"mm_encoder_outputs: expected {kind} features that the vision encoder made inside the prune "
                    "block, got others, whose attention was not recorded; encode inside the block, or pass the pixels"
                )
            if run is not None and (run.layers != self.layers or set(run.values) != self._reads):
                raise ValueError(
                    f"mm_encoder_outputs: expected {kind} features measured in layers {self.layers} of the vision "
                    f"encoder, got {run.layers}; encode them inside this prune block"
                )
            if run is not None:
                found[kind] = run
        return found

    @contextmanager
    def _watch(self, kind: str, arguments: dict[str, Any]) -> Iterator[Callable[[Any], None]]:
        """Surround a call of `get_image_features` or `get_video_features`; one may call the other."""
        thread = self._thread
        if thread.is_encoding:
            yield lambda features: None
            return
        thread.is_encoding, thread.received, thread.entering = True, defaultdict(list), []
        try:
            yield partial(self._keep, kind, arguments)
        finally:
            thread.is_encoding = False
            thread.projected.clear()
            thread.received.clear()
            thread.entering.clear()

    def _after_projection(self, place: tuple[int, int], module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self._thread.projected[place] = output

    def _after_attention(self, layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        projected = self._thread.projected
        outputs = [projected.pop((layer, place)) for place in range(len(self.encoder.projections))]
        if not self._thread.is_encoding:
            return
        arguments = named(module, args, kwargs)
        names = [name for name, own in self._layer_of.items() if own == layer]
        with torch.no_grad():
            # float64 models are measured in float32
            outputs = [x.float() if x.dtype == torch.float64 else x for x in outputs]
            # in a shallow encoder the object layer is the deep one
            special = {"cls": self.encoder.from_cls, "local": self.encoder.from_cls, "keys": self.encoder.keys}
            measures = {name: special.get(name, self.encoder.received) for name in names}
            measured = {measure: measure(layer, outputs, arguments) for measure in dict.fromkeys(measures.values())}
        for name, measure in measures.items():
            self._thread.received[name].append(measured[measure])

    def _before_projector(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._thread.is_encoding:
            rows = args[0] if args else next(iter(kwargs.values()))
            self._thread.entering.append(rows.detach())

    @torch.no_grad()
    def _keep(self, kind: str, arguments: dict[str, Any], features: Any) -> None:
        received, entering = self._thread.received, self._thread.entering
        # a caller that asks for a tuple gets no record: no model accepts a tuple of features back
        if not (received or entering) or not hasattr(features, "pooler_output"):
            return
        values: dict[str, torch.Tensor] = {}
        pieces: list[Piece] = []
        statistics = [name for name in self._layer_of if name != "keys"]
        if statistics:
            measured = [torch.cat(received[name]) for name in statistics]
            together = torch.stack([one.to(measured[-1].device) for one in measured], dim=-1)
            cells, pieces = self.encoder.visual_tokens(kind, arguments, features, together)
            values = dict(zip(statistics, cells.unbind(-1), strict=True))
        if "keys" in self._reads:
            keys = torch.cat(received["keys"])
            cells, pieces = self.encoder.visual_tokens(kind, arguments, features, keys.flatten(-2))
            values["keys"] = torch.unflatten(cells, -1, keys.shape[-2:])
        if "features" in self._reads:
            values["features"], pieces = self.encoder.visual_rows(kind, arguments, features, entering)
        run = Recording(values, pieces, self.layers, self.encoder.has_cls)
        self._thread.runs[kind] = run
        setattr(features, _ATTRIBUTE, run)


def what_is_read(method: Method) -> list[str]:
    """List what a method asks of the vision encoder, out of the names in `Recording.values`."""
    return [
        *(("object", "deep") if method.uses_encoder_attention else ()),
        *(("cls",) if method.uses_cls_attention else ()),
        *(("local",) if method.uses_local_attention else ()),
        *(("keys",) if method.uses_encoder_keys else ()),
        *(("features",) if method.uses_encoder_features or method.stage == "encoder" else ()),
    ]


def layers_to_watch(
    reads: Sequence[str],
    usual: dict[str, int],
    depth: int,
    object_layer: int | None,
    cls_layer: int | None,
    local_layer: int | None = None,
) -> dict[str, int]:
    """Find the encoder layer, counted from 1, in which each thing that is read of a layer is measured.

    Args:
        reads: what to measure, out of the names in `Recording.values`.
        usual: the layer of each name that is measured in one, where the method names none.
        depth: number of layers.
        object_layer: what the method says, or None.
        cls_layer: likewise; keys are taken from the same layer.
        local_layer: likewise.

    Raises:
        ValueError: a layer that the encoder does not have.
    """
    for name, layer in (("object", object_layer), ("cls", cls_layer), ("local", local_layer)):
        if layer is not None and layer > depth:
            raise ValueError(
                f"{name}_layer: expected 1 to {depth}, the layers of the vision encoder, got {layer}; None takes layer "
                f"{usual[name]}"
            )
    chosen = {"object": object_layer, "cls": cls_layer, "local": local_layer, "keys": cls_layer}
    return {name: chosen.get(name) or usual[name] for name in reads if name in usual}


def recorder_for(anatomy: Anatomy, method: Method) -> VisionRecorder:
    """Make the recorder of a model's vision encoder for a method that reads it.

    Raises:
        TypeError: a family whose encoder cannot be read.
        ValueError: a layer that the encoder does not have.
    """
    reads = what_is_read(method)
    make = anatomy.family.encoder
    if make is None:
        what = "what enters its projector" if reads == ["features"] else "its attention"
        supported = ", ".join(sorted(ENCODERS))
        raise TypeError(
            f"method: expected one that leaves the vision encoder of {anatomy.family.model_type} alone, got "
            f"{method.name!r}, which reads {what}; that method works for {supported}"
        )
    return VisionRecorder(make(anatomy.multimodal), method.object_layer, method.cls_layer, reads, method.local_layer)


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.is_encoding = False
        self.projected: dict[tuple[int, int], torch.Tensor] = {}
        self.received: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.entering: list[torch.Tensor] = []
        self.runs: dict[str, Recording] = {}


@dataclass(frozen=True)
class PromptAttention:
    """What was recorded, in the order of a prompt's visual tokens.

    Attributes:
        values: as in `Recording`, with `S` in place of `cells`: the visual tokens of all rows that are cells of a grid,
            without padding.
        grids: for each row and each of its images (or tiles, where the prompt knows them), the grids in it.
        is_separator: bool `[B, T]`, True at visual tokens that are not cells, such as image newlines.
        has_cls: whether the encoder has a CLS token.
    """

    values: dict[str, torch.Tensor]
    grids: list[list[list[Grid]]]
    is_separator: np.ndarray
    has_cls: bool = False


def attention_of_prompt(recordings: dict[str, Recording], prompt: Prompt, kinds: dict[int, str]) -> PromptAttention:
    """Find the recorded attention of each visual token of a prompt.

    Args:
        recordings: by kind, "image" and "video".
        prompt: the prompt on the host; `generate` may repeat each sample in several equal rows.
        kinds: kind of each placeholder id.

    Raises:
        ValueError: the prompt has other images than those that were recorded, or its mask hides some of their tokens.
    """
    masked = prompt.all_placeholders() & ~prompt.visual
    if masked.any():
        raise ValueError(
            f"attention_mask: expected one that shows every visual token, since neighbours on the grid count, got "
            f"{masked.sum()} hidden ones; use a method that does not look into the vision encoder, such as 'hawk'"
        )
    copies = prompt.copies_of_rows(sum(num_tokens(run.pieces) for run in recordings.values()))
    pieces = {kind: deque(run.pieces) for kind, run in recordings.items()}
    next_place, offset = {}, 0
    for kind, run in recordings.items():
        next_place[kind] = offset
        offset += num_cells(run.pieces)

    places: list[np.ndarray] = []
    rows: list[list[list[Grid]]] = []
    is_separator = np.zeros_like(prompt.visual)
    for row in range(0, len(prompt.ids), copies):
        images, place_of_row = [], []
        for image in prompt.images(row):
            kind = kinds[int(prompt.ids[row, image[0]])]
            # some models mark the frames of a video as images
            source = kind if kind in recordings or not recordings else next(iter(recordings))
            inside: list[Piece] = []
            while num_tokens(inside) < len(image) and pieces.get(source):
                inside.append(pieces[source].popleft())
            grids = [piece.grid for piece in inside if piece.grid is not None]
            if num_tokens(inside) != len(image):
                raise ValueError(
                    f"input_ids: expected {kind} placeholders of row {row} to match the grids of the encoded {kind}s, "
                    f"got a run of {len(image)} for {grids or 'none'}; pass the pixels and grids that belong to them"
                )
            cells = num_cells(inside)
            place_of_row.append(next_place[source] + np.arange(cells))
            next_place[source] += cells
            is_separator[row : row + copies, image] = np.concatenate([piece.is_separator for piece in inside])
            images.append(grids)
        if prompt.tiles is not None:
            images = _grids_of_tiles(prompt, row, images)
        rows += [images] * copies
        places += place_of_row * copies
    runs = list(recordings.values())
    found = {name: torch.cat([run.values[name] for run in runs]) for name in runs[0].values}
    index = np.concatenate(places)
    ordered = {name: values[upload(index, values.device)] for name, values in found.items()}
    return PromptAttention(ordered, rows, is_separator, runs[0].has_cls)


def _grids_of_tiles(prompt: Prompt, row: int, images: list[list[Grid]]) -> list[list[Grid]]:
    """Divide the grids of the images of a row into those of its tiles."""
    from hawk_kernels.hf.tiles import grids_of_tiles

    assert prompt.tiles is not None
    cut = iter(grids_of_tiles(prompt, row))
    divided = []
    for positions, grids in zip(prompt.whole_images(row), images, strict=True):
        tiles = [next(cut) for _ in np.unique(prompt.tiles[row, positions])]
        # the whole picture comes first; after it either each tile has a grid, or all tiles have one
        own = grids if len(grids) == len(tiles) else [*grids[:1], *[None] * (len(tiles) - 1)]
        divided += [
            [grid] if grid is not None else [(1, *shape)] if shape is not None else []
            for grid, shape in zip(own, tiles, strict=True)
        ]
    return divided
