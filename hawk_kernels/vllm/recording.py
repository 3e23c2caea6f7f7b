"""Records what a method asks of vLLM's vision encoder, for the encoders of Qwen2-VL and those built like it.

The queries and keys of a layer are seen where they enter its attention, rotated and split among the ranks of tensor
parallelism, and go through `attention_column_mean` as well. vLLM encodes several pictures in one call, perhaps on other
ranks than this one, and returns their rows alone; what was recorded therefore leaves the encoder in columns of these.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce

from hawk_kernels.hf.encoders.base import usual_object_layer
from hawk_kernels.hf.encoders.recorder import layers_to_watch, what_is_read
from hawk_kernels.methods import Method
from hawk_kernels.ops.attention_column_mean import attention_column_mean
from hawk_kernels.vllm.columns import FEATURES, Columns

_KEYS = "keys"


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
        self._received: dict[int, torch.Tensor] = {}
        self._others: dict[str, torch.Tensor] = {}
        self._grids: list[list[int]] = []
        self._windows: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._attach()

    def _attach(self) -> None:
        visual = self._visual
        visual.register_forward_pre_hook(self._before_encoder, with_kwargs=True)
        for layer in sorted({layer for name, layer in self._layer_of.items() if name != _KEYS}):
            attention = visual.blocks[layer - 1].attn
            hook = partial(self._before_attention, layer)
            attention.attn.register_forward_pre_hook(hook, with_kwargs=True)
        if _KEYS in self._layer_of:
            attention = visual.blocks[self._layer_of[_KEYS] - 1].attn
            attention.apply_rotary_emb.register_forward_pre_hook(self._before_rotation)
        if FEATURES in self.columns.shapes:
            # vLLM calls the merger itself past its hooks
            visual.merger.ln_q.register_forward_pre_hook(self._before_merger)
        visual.register_forward_hook(self._after_encoder)
        # an encoder with data parallelism tells by this the width of no rows at all
        visual.out_hidden_size += self.columns.count

    def _before_encoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        grids = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        self._grids = grids if isinstance(grids, list) else grids.tolist()
        has_windows = hasattr(module, "get_window_index_thw")
        self._windows = [self._visual.get_window_index_thw(*grid) for grid in self._grids] if has_windows else []
        self._received, self._others = {}, {}

    def _before_attention(self, layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        queries, keys = (kwargs[name][0].transpose(0, 1) for name in ("query", "key"))
        segments = torch.from_numpy(self._segments(layer)).to(keys.device, non_blocking=True)
        self._received[layer] = attention_column_mean(
            queries, keys, cu_seqlens=segments, reduction="sum", scale=self._visual.blocks[layer - 1].attn.attn.scale
        )

    def _before_rotation(self, module: nn.Module, args: Any) -> None:
        # queries and keys in one batch, [2, patches, heads, D]
        keys = args[0][1].float()
        if self._ranks > 1:
            keys = tensor_model_parallel_all_gather(keys.contiguous(), dim=1)
        self._others[_KEYS] = keys

    def _before_merger(self, module: nn.Module, args: Any) -> None:
        self._others[FEATURES] = args[0].flatten(0, -2)

    def _after_encoder(self, module: nn.Module, args: Any, rows: torch.Tensor) -> torch.Tensor:
        received, others, recorded = self._received, self._others, {}
        self._received, self._others = {}, {}
        if received:
            together = torch.stack(list(received.values()))
            if self._ranks > 1:
                together = tensor_model_parallel_all_reduce(together) / self._ranks
            of_layer = dict(zip(received, together, strict=True))
            recorded = {name: of_layer[layer] for name, layer in self._layer_of.items() if name != _KEYS}
        merged = len(next(iter({**recorded, **others}.values()))) // len(rows)
        recorded = {name: patches.unflatten(0, (-1, merged)).mean(dim=1) for name, patches in recorded.items()}
        if _KEYS in others:
            recorded[_KEYS] = others[_KEYS].unflatten(0, (-1, merged)).mean(dim=1)
        if FEATURES in others:
            recorded[FEATURES] = others[FEATURES].reshape(len(rows), -1)
        if self._windows:
            order = torch.from_numpy(self._token_order()).to(rows.device, non_blocking=True)
            recorded = {name: values.index_select(0, order) for name, values in recorded.items()}
        return self.columns.joined(rows, recorded)

    def _segments(self, layer: int) -> np.ndarray:
        """Find where the sequences of patches that see each other in a layer begin and end, int32 `[S + 1]`.

        What vLLM hands to the attention itself is laid out for the backend, in which it need not count patches.
        """
        whole = getattr(self._visual, "fullatt_block_indexes", None)
        if not self._windows or whole is None or layer - 1 in whole:
            lengths = [np.full(frames, height * width) for frames, height, width in self._grids]
        else:
            lengths = [np.diff(ends.numpy(), prepend=0) for _, ends in self._windows]
        return np.concatenate([[0], np.concatenate(lengths).cumsum()]).astype(np.int32)

    def _token_order(self) -> np.ndarray:
        """Find where in the encoder's order of windows each visual token stands, int64 `[n]`."""
        orders, start = [], 0
        for index, _ in self._windows:
            orders.append(index.numpy() + start)
            start += len(index)
        return np.argsort(np.concatenate(orders))
