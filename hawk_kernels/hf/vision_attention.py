"""What attention the vision encoder pays to each visual token, by hooks on two of its layers.

The encoder keeps its own attention implementation: the queries and keys that a layer's projection has just computed
are rotated once more and go through `attention_column_mean`. `generate` may run the encoder long before the text model
and hand over its output; what was measured travels with that output.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from hawk_kernels.attention import attention_column_mean
from hawk_kernels.hf.arguments import named
from hawk_kernels.hf.prompt import Prompt
from hawk_kernels.hf.upload import upload

_ATTRIBUTE = "_hawk_kernels_attention"
Grid = tuple[int, int, int]


class QwenVisionEncoder:
    """The encoder of Qwen2-VL and Qwen2.5-VL: packed patches, RoPE, merges of 2 x 2, windows in the latter.

    Args:
        module: the vision transformer.

    Attributes:
        module: the same.
        depth: number of layers.
        default_object_layer: the middle one, counted from 1; 16 of 32 as in the paper.
    """

    def __init__(self, module: Any) -> None:
        self.module: nn.Module = module
        self.depth = len(module.blocks)
        self.default_object_layer = max(1, round(self.depth / 2))
        self._blocks = module.blocks
        self._merge: int = module.spatial_merge_size
        has_windows = hasattr(module, "fullatt_block_indexes")
        self._window: int | None = module.window_size // self._merge // module.patch_size if has_windows else None

    def attention(self, layer: int) -> Any:
        """The attention module of a layer, counted from 1; its `qkv` makes queries, keys and values."""
        return self._blocks[layer - 1].attn

    def received(self, layer: int, arguments: dict[str, Any], qkv: torch.Tensor) -> torch.Tensor:
        """Attention received by each patch, float32 `[T]`: the sum over query rows, mean over heads, 1 on average.

        Unlike the mean over rows, the sum is comparable between windows and images of different sizes.

        Args:
            layer: counted from 1.
            arguments: those of the attention module.
            qkv: what its projection returned, `[T, 3 H D]`.
        """
        attention = self.attention(layer)
        queries, keys, _ = qkv.unflatten(-1, (3, attention.num_heads, -1)).unbind(dim=1)
        rotated = (_rotated(x, *arguments["position_embeddings"]).transpose(0, 1) for x in (queries, keys))
        segments = arguments["cu_seqlens"].to(qkv.device, torch.int32)
        return attention_column_mean(*rotated, cu_seqlens=segments, reduction="sum", scale=attention.scaling)

    def of_tokens(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Patches `[T]` in the encoder's order to visual tokens `[T / 4]` in that of the text, the mean of each merge.

        Args:
            patches: one value a patch.
            grids: visual tokens of each image, `(t, h, w)`.
        """
        merged = patches.unflatten(0, (-1, self._merge**2)).mean(dim=1)
        if self._window is None:
            return merged
        place = np.argsort(_window_order(grids, self._window))
        return merged[upload(place, merged.device)]

    def grids(self, grid_thw: torch.Tensor) -> list[Grid]:
        """Visual tokens of each image or video, `(t, h, w)`, from the patches of each."""
        return [(t, h // self._merge, w // self._merge) for t, h, w in grid_thw.tolist()]


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of `[T, H, D]` by angles `[T, D]` in float32, halves of a head as real and imaginary parts."""
    real, imaginary = x.float().chunk(2, dim=-1)
    turned = torch.cat([-imaginary, real], dim=-1)
    return (x.float() * cos.float().unsqueeze(1) + turned * sin.float().unsqueeze(1)).to(x.dtype)


def _window_order(grids: Sequence[Grid], side: int) -> np.ndarray:
    """Visual tokens as windowed attention orders them: window by window within each frame, int64 `[M]`."""
    orders, start = [], 0
    for frames, height, width in grids:
        frame, row, column = np.indices((frames, height, width)).reshape(3, -1)
        # the last key counts most; equal windows stay in the order of the image
        orders.append(np.lexsort((column // side, row // side, frame)) + start)
        start += frames * height * width
    return np.concatenate(orders)


@dataclass(frozen=True)
class Recording:
    """One run of the encoder.

    Attributes:
        object: float32 `[M]`, attention received by each visual token in the object layer.
        deep: the same in the last layer.
        grids: visual tokens of each image or video, `(t, h, w)`.
        layers: the two layers, counted from 1.
    """

    object: torch.Tensor
    deep: torch.Tensor
    grids: list[Grid]
    layers: tuple[int, int]


class VisionRecorder:
    """Records each run of a vision encoder while its hooks are attached.

    Args:
        encoder: the encoder's anatomy.
        object_layer: counted from 1, or None for the encoder's own.

    Attributes:
        layers: object layer and deep layer, counted from 1.

    Raises:
        ValueError: a layer that the encoder does not have.
    """

    def __init__(self, encoder: QwenVisionEncoder, object_layer: int | None) -> None:
        if object_layer is not None and object_layer > encoder.depth:
            raise ValueError(
                f"object_layer: expected 1 to {encoder.depth}, the layers of the vision encoder, got {object_layer}; "
                f"None takes layer {encoder.default_object_layer}"
            )
        self.layers = (object_layer or encoder.default_object_layer, encoder.depth)
        self._encoder = encoder
        self._thread = _ThreadState()

    def attach(self) -> list[Any]:
        """Register the hooks; returns their handles."""
        module = self._encoder.module
        handles = [
            module.register_forward_pre_hook(self._before_encoder),
            module.register_forward_hook(self._after_encoder, with_kwargs=True),
        ]
        for layer in sorted(set(self.layers)):
            attention = self._encoder.attention(layer)

            def keep_arguments(module: nn.Module, args: Any, kwargs: dict[str, Any], layer: int = layer) -> None:
                self._thread.arguments[layer] = named(module, args, kwargs)

            def measure(module: nn.Module, args: Any, output: torch.Tensor, layer: int = layer) -> None:
                arguments = self._thread.arguments.pop(layer)
                with torch.no_grad():
                    self._thread.received[layer] = self._encoder.received(layer, arguments, output)

            handles.append(attention.register_forward_pre_hook(keep_arguments, with_kwargs=True))
            handles.append(attention.qkv.register_forward_hook(measure))
        return handles

    def options(self) -> dict[str, int]:
        """The layers, for statistics."""
        return {"object_layer": self.layers[0], "deep_layer": self.layers[1]}

    def start(self) -> None:
        """Forget the runs of earlier calls of the multimodal model."""
        self._thread.runs = []

    def recordings(self, arguments: dict[str, Any]) -> dict[str, Recording]:
        """What was measured of the images and of the videos of a call of the multimodal model.

        Args:
            arguments: those of the call.

        Raises:
            ValueError: encoder outputs that were not made inside this `prune` block.
        """
        found, runs = {}, iter(self._thread.runs)
        encoded = arguments.get("mm_encoder_outputs") or {}
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            # the model puts what it encodes itself into the same dict
            run = getattr(encoded.get(kind), _ATTRIBUTE, None)
            if run is None and arguments.get(pixels) is not None:
                run = next(runs, None)
            if run is None and encoded.get(kind) is not None:
                raise ValueError(
                    f"mm_encoder_outputs: expected {kind} features that the vision encoder made inside the prune "
                    "block, got others, of which no attention is known; encode inside the block, or pass the pixels"
                )
            if run is not None and run.layers != self.layers:
                raise ValueError(
                    f"mm_encoder_outputs: expected {kind} features measured in layers {self.layers} of the vision "
                    f"encoder, got {run.layers}; encode them inside this prune block"
                )
            if run is not None:
                found[kind] = run
        return found

    def _before_encoder(self, module: nn.Module, args: Any) -> None:
        self._thread.arguments, self._thread.received = {}, {}

    def _after_encoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        grids = self._encoder.grids(named(module, args, kwargs)["grid_thw"])
        middle, deep = (self._encoder.of_tokens(self._thread.received[layer], grids) for layer in self.layers)
        run = Recording(middle, deep, grids, self.layers)
        self._thread.runs.append(run)
        if not isinstance(output, tuple):
            setattr(output, _ATTRIBUTE, run)


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.arguments: dict[int, dict[str, Any]] = {}
        self.received: dict[int, torch.Tensor] = {}
        self.runs: list[Recording] = []


@dataclass(frozen=True)
class PromptAttention:
    """What was recorded, in the order of a prompt's visual tokens.

    Attributes:
        object: float32 `[S]`, the visual tokens of all rows without padding.
        deep: the same in the last layer.
        grids: for each row, for each of its images (runs of visual tokens), the grids in it.
    """

    object: torch.Tensor
    deep: torch.Tensor
    grids: list[list[list[Grid]]]


def attention_of_prompt(recordings: dict[str, Recording], prompt: Prompt, kinds: dict[int, str]) -> PromptAttention:
    """Find the recorded attention of each visual token of a prompt.

    Args:
        recordings: by kind, "image" and "video".
        prompt: the prompt on the host; for each sample several equal rows where `generate` repeats it.
        kinds: kind of each placeholder id.

    Raises:
        ValueError: the prompt has other images than those that were recorded.
    """
    encoded = sum(len(run.object) for run in recordings.values())
    copies = max(1, int(prompt.visual.sum()) // max(1, encoded))
    grids = {kind: deque(run.grids) for kind, run in recordings.items()}
    next_place, offset = {}, 0
    for kind, run in recordings.items():
        next_place[kind] = offset
        offset += len(run.object)

    places: list[np.ndarray] = []
    rows: list[list[list[Grid]]] = []
    for row in range(0, len(prompt.ids), copies):
        images, place_of_row = [], []
        for image in prompt.images(row):
            kind = kinds[int(prompt.ids[row, image[0]])]
            inside: list[Grid] = []
            while _cells(inside) < len(image) and grids.get(kind):
                inside.append(grids[kind].popleft())
            if _cells(inside) != len(image):
                raise ValueError(
                    f"input_ids: expected {kind} placeholders of row {row} to match the grids of the encoded {kind}s, "
                    f"got a run of {len(image)} for {inside or 'none'}; pass the pixels and grids that belong to them"
                )
            place_of_row.append(next_place[kind] + np.arange(len(image)))
            next_place[kind] += len(image)
            images.append(inside)
        rows += [images] * copies
        places += place_of_row * copies
    middle, deep = (torch.cat([getattr(run, name) for run in recordings.values()]) for name in ("object", "deep"))
    index = upload(np.concatenate(places), middle.device)
    return PromptAttention(middle[index], deep[index], rows)


def _cells(grids: Sequence[Grid]) -> int:
    return sum(math.prod(grid) for grid in grids)
