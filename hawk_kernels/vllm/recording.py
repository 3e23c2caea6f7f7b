"""Records what a method asks of vLLM's vision encoder, for the encoders of Qwen2-VL and those built like it.

The queries and keys of a layer are seen where they enter its attention, rotated and split among the ranks of tensor
parallelism, and go through `attention_column_mean` as well. vLLM encodes several pictures in one call, perhaps on other
ranks than this one, and returns their rows alone; what was recorded therefore leaves the encoder in columns of these.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from vllm.distributed import tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce

from hawk_kernels.hf.encoders.base import usual_object_layer
from hawk_kernels.hf.encoders.recorder import layers_to_watch, what_is_read
from hawk_kernels.methods import Method
from hawk_kernels.ops.attention_column_mean import attention_column_mean
from hawk_kernels.vllm.columns import FEATURES, Columns

_KEYS = "keys"
# what the merger calls its norm of each patch, in Qwen2-VL and Qwen2.5-VL and in Qwen3-VL
_NORMS = ("ln_q", "norm")


def check_encoder(compilation: Any, method: str) -> None:
    """Refuse an encoder that is compiled, which leaves out hooks.

    Args:
        compilation: vLLM's `CompilationConfig`.
        method: name of a method that reads the encoder.

    Raises:
        ValueError: names the option to leave out.
    """
    if compilation.compile_mm_encoder:
        raise ValueError(
            f"compile_mm_encoder: expected False with method {method!r}, which reads the vision encoder while it runs, "
            "got True; leave it out of --compilation-config"
        )


class EncoderRecorder:
    """Puts hooks on an encoder, which then returns wider rows: each ends with what was recorded of it.

    The encoder's order of windows is undone, so that all is in the order of the visual tokens.

    Args:
        visual: vLLM's vision encoder, in the dtype that it runs in.
        method: one that reads the encoder.
        model_type: of the encoder's config.

    Attributes:
        columns: what is recorded, and how it is laid out.

    Raises:
        ValueError: a layer that the encoder does not have.
    """

    def __init__(self, visual: Any, method: Method, model_type: str) -> None:
        self._visual = visual
        depth = len(visual.blocks)
        usual = {"object": usual_object_layer(model_type, depth)[0], "deep": depth, "cls": depth, _KEYS: depth}
        reads = what_is_read(method)
        self._layer_of = layers_to_watch(reads, usual, depth, method.object_layer, method.cls_layer)
        attention = visual.blocks[0].attn
        # an encoder with data parallelism has all heads on each rank, and each rank has other pictures
        self._ranks: int = attention.tp_size
        heads = (attention.num_attention_heads_per_partition * self._ranks, attention.hidden_size_per_attention_head)
        special = {_KEYS: heads, FEATURES: (visual.merger.hidden_size,)}
        self.columns = Columns({name: special.get(name, ()) for name in reads}, visual.dtype)
        self._run: _Run | None = None
        self._attach()

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        """Run the merger on rows of visual tokens that were recorded as "features", `[K, C]` to `[K, hidden]`."""
        # the merger sets the patches of a visual token side by side itself, after a norm of each
        patches = rows.unflatten(1, (self._visual.spatial_merge_size**2, -1)).flatten(0, 1)
        embeddings: torch.Tensor = self._visual.merger(patches)
        return embeddings

    def _attach(self) -> None:
        visual = self._visual
        visual.register_forward_pre_hook(self._before_encoder, with_kwargs=True)
        for layer in sorted({layer for name, layer in self._layer_of.items() if name != _KEYS}):
            hook = partial(self._before_attention, layer)
            visual.blocks[layer - 1].attn.attn.register_forward_pre_hook(hook, with_kwargs=True)
        if _KEYS in self._layer_of:
            rotation = visual.blocks[self._layer_of[_KEYS] - 1].attn.apply_rotary_emb
            rotation.register_forward_pre_hook(self._before_rotation)
        if FEATURES in self.columns.shapes:
            # vLLM calls the merger itself in a way that passes over its hooks
            first = next(getattr(visual.merger, name) for name in _NORMS if hasattr(visual.merger, name))
            first.register_forward_pre_hook(self._before_merger)
        visual.register_forward_hook(self._after_encoder)
        visual.register_forward_hook(self._forget, always_call=True)
        # a rank without pictures makes rows of this width to gather those of the others
        visual.out_hidden_size += self.columns.count

    def _before_encoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        grids = given if isinstance(given, list) else given.tolist()
        has_windows = hasattr(module, "get_window_index_thw")
        self._run = _Run(grids, [self._visual.get_window_index_thw(*grid) for grid in grids] if has_windows else [])

    def _before_attention(self, layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._run is None:
            return
        queries, keys = (kwargs[name][0].transpose(0, 1) for name in ("query", "key"))
        # what the attention gets of segments is laid out for its backend and need not count patches
        within_windows = layer - 1 not in getattr(self._visual, "fullatt_block_indexes", [layer - 1])
        segments = torch.from_numpy(self._run.segments(within_windows)).to(keys.device, non_blocking=True)
        scale = self._visual.blocks[layer - 1].attn.attn.scale
        columns = attention_column_mean(queries, keys, cu_seqlens=segments, reduction="sum", scale=scale)
        self._run.received[layer] = columns

    def _before_rotation(self, module: nn.Module, args: Any) -> None:
        if self._run is None:
            return
        # queries and keys come as one batch, [2, patches, heads, D]
        keys = args[0][1].float().contiguous()
        self._run.others[_KEYS] = keys if self._ranks == 1 else tensor_model_parallel_all_gather(keys, dim=1)

    def _before_merger(self, module: nn.Module, args: Any) -> None:
        if self._run is not None:
            self._run.others[FEATURES] = args[0].flatten(0, -2)

    def _after_encoder(self, module: nn.Module, args: Any, rows: torch.Tensor) -> torch.Tensor:
        run = self._run
        assert run is not None
        recorded: dict[str, torch.Tensor] = {}
        if run.received:
            received = torch.stack(list(run.received.values()))
            if self._ranks > 1:
                received = tensor_model_parallel_all_reduce(received) / self._ranks
            of_layer = dict(zip(run.received, received, strict=True))
            recorded = {name: of_layer[layer] for name, layer in self._layer_of.items() if name != _KEYS}
        if _KEYS in run.others:
            recorded[_KEYS] = run.others[_KEYS]
        recorded = {name: of_patches.unflatten(0, (len(rows), -1)).mean(dim=1) for name, of_patches in recorded.items()}
        if FEATURES in run.others:
            recorded[FEATURES] = run.others[FEATURES].reshape(len(rows), -1)
        if run.windows:
            order = torch.from_numpy(run.token_order()).to(rows.device, non_blocking=True)
            recorded = {name: values.index_select(0, order) for name, values in recorded.items()}
        return self.columns.joined(rows, recorded)

    def _forget(self, module: nn.Module, args: Any, rows: torch.Tensor | None) -> None:
        """Let go of what a call has left, also of one that failed."""
        self._run = None


@dataclass
class _Run:
    """One call of the encoder.

    Attributes:
        grids: frames, height and width of each picture or video, in patches.
        windows: for each of these the order in which windows put its visual tokens, and where each window ends, counted
            in patches; none in an encoder without windows.
        received: what was measured in each layer, float32 `[patches]`.
        others: keys float32 `[patches, H, D]` and features `[patches, C]`, by name.
    """

    grids: list[list[int]]
    windows: list[tuple[torch.Tensor, torch.Tensor]]
    received: dict[int, torch.Tensor] = field(default_factory=dict)
    others: dict[str, torch.Tensor] = field(default_factory=dict)

    def segments(self, within_windows: bool) -> NDArray[np.int32]:
        """Find where patches that see each other begin and end, frame by frame or window by window, int32 `[S + 1]`."""
        if within_windows:
            lengths = [np.diff(ends.numpy(), prepend=0) for _, ends in self.windows]
        else:
            lengths = [np.full(frames, height * width) for frames, height, width in self.grids]
        return np.concatenate([[0], np.concatenate(lengths).cumsum()]).astype(np.int32)

    def token_order(self) -> NDArray[np.int64]:
        """Find where in the order of windows each visual token stands, int64 `[n]`."""
        orders, start = [], 0
        for index, _ in self.windows:
            orders.append(index.numpy() + start)
            start += len(index)
        return np.argsort(np.concatenate(orders))
