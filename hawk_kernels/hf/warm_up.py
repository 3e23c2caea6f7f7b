"""Compile ahead every kernel that a pruned model can need, so that no prompt waits for a compiler.

The stages of a pruned call that launch kernels are `encoders`, `encoder_stage`, `choose_tokens` and `packing`. The code
of the call itself runs them here on tensors without data, for prompts of every class of lengths.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from hawk_kernels.compile_ahead import (
    MOST_BATCH,
    MOST_TOKENS,
    WarmUp,
    architecture_and_size,
    check_reach,
    compile_launches,
    following,
    lengths_up_to,
    why_nothing_compiles,
)
from hawk_kernels.hf.anatomy import Anatomy, dissect, first_attention_layer
from hawk_kernels.hf.choose_tokens import Chooser, Context
from hawk_kernels.hf.encoders import VisionEncoder
from hawk_kernels.hf.encoders.recorder import PromptAttention, recorder_for
from hawk_kernels.hf.encoders.tiles import TileEncoder
from hawk_kernels.hf.families import VISUAL_FEATURES
from hawk_kernels.hf.packing import Packing
from hawk_kernels.hf.prompt import Prompt
from hawk_kernels.hf.prune import DEFAULT_METHOD, KeepRatio, prune, stages_of
from hawk_kernels.hf.rotary import rotary_of_first_layer, rotary_of_layer
from hawk_kernels.hf.weightless import WeightlessProjections, give_layer_weights, without_weights
from hawk_kernels.methods import Method
from hawk_kernels.ops.attention_column_mean import attention_column_mean
from hawk_kernels.ops.compact import compact
from hawk_kernels.selection import Merge

if TYPE_CHECKING:
    from hawk_kernels.backends.kernels.caught import Launch

_VISUAL, _WORD = 7, 8
_TEXT_LENGTHS = (1, 40)
# Lengths at which small batches are followed: few tokens, rows aligned to 16 or not, the longest that one program
# selects from.
_EDGES = (1, 2, 16, 17, 2048, 2049)
_FEW_ROWS = 3
# Sides of the squares of patches that become one visual token. Rows of 512 channels or more are all compiled alike, so
# these differ only in encoders narrower than any that is published.
_SQUARES = (1, 2, 3, 4)
# Tokens that a vision encoder sees at once; what is compiled for it changes at 16 rows alone.
_ENCODER_LENGTHS = (4, 16, 20, 64, 576, 4096)


class Shape(NamedTuple):
    """The shape of a batch of prompts: `batch` rows of visual tokens and then text.

    If `is_uneven`, the first row has one visual and one text token fewer than the others, where it has them to spare.
    """

    batch: int
    num_visual: int
    num_text: int
    is_uneven: bool = False


def warm_up(
    model: nn.Module,
    keep_ratio: KeepRatio,
    *,
    method: str | Method = DEFAULT_METHOD,
    max_tokens: int = MOST_TOKENS,
    max_batch: int = MOST_BATCH,
    progress: bool = True,
    **options: Any,
) -> WarmUp:
    """Compile ahead every kernel that prompts of this model can need under `prune` with the same arguments.

    Afterwards no prompt of up to `max_tokens` tokens compiles a kernel, whatever its length, pictures and budget.
    Kernels are compiled in parallel, taken from Triton's cache on disk where it has them, and loaded on the model's
    GPUs; that also makes it safe to prune while another thread captures a CUDA graph. The model is not called.

    Args:
        model: as for `prune`.
        keep_ratio: as for `prune`. What is compiled is the same for every ratio and budget.
        method: name of a method, or a method object. A method of your own is followed on tensors without data.
        max_tokens: the most tokens in a row of a batch.
        max_batch: the most rows.
        progress: whether a bar shows how far it is.
        **options: the other arguments of `prune`, such as `head_weights`, `budget` and the options of the method.

    Returns:
        What was compiled. On a CPU and in Triton's interpreter that is nothing, and the notes say so.

    Raises:
        TypeError, ValueError: as in `prune`.
    """
    pruning = prune(model, keep_ratio, method=method, **options)
    return pruning.warm_up(max_tokens=max_tokens, max_batch=max_batch, progress=progress)


def warm_up_pruning(
    anatomy: Anatomy, choosers: Mapping[int, Chooser], max_tokens: int, max_batch: int, progress: bool
) -> WarmUp:
    """Do what `Pruning.warm_up` does."""
    check_reach(max_tokens, max_batch)
    devices = _devices(anatomy)
    reason = why_nothing_compiles(devices)
    if reason is not None:
        return WarmUp(notes=(reason,))
    devices = [device for device in devices if device.type == "cuda"]
    launches, notes = launches_of_prune(
        anatomy, choosers, *architecture_and_size(devices[0]), reach=(max_tokens, max_batch)
    )
    return replace(compile_launches(launches, devices, progress=progress), notes=notes)


def launches_of_prune(
    anatomy: Anatomy,
    choosers: Mapping[int, Chooser],
    architecture: str,
    multiprocessors: int | None = None,
    *,
    reach: tuple[int, int] = (MOST_TOKENS, MOST_BATCH),
) -> tuple[list[Launch], tuple[str, ...]]:
    """Return what prompts of up to `reach` tokens and rows launch, and notes of what could not be followed.

    Args:
        anatomy: the model's parts.
        choosers: what chooses after each layer, counted from 1; 0 stands for before the first.
        architecture: as tables are named.
        multiprocessors: how many the device has; None takes what the table says.
        reach: the most tokens in a row, and the most rows.
    """
    notes: list[str] = []
    with following(architecture, multiprocessors) as launches:
        for layer, chooser in choosers.items():
            model = WeightlessModel(anatomy, chooser, layer)
            for shape in shapes_up_to(*reach, model.classes_of(architecture)):
                model.prefill(shape)
            model.encode(reach[0])
            notes += model.notes
    return launches, tuple(dict.fromkeys(notes))


def shapes_up_to(
    max_tokens: int, max_batch: int, class_of: Callable[[int, int], object] | None = None
) -> Iterator[Shape]:
    """Yield shapes of prompts that together meet every case a launch is compiled for.

    Single rows have every length of `lengths_up_to`, a few rows those of `_EDGES`.

    Args:
        max_tokens: the most tokens in a row.
        max_batch: the most rows.
        class_of: returns the launch configurations for a number of rows of a length. The smallest batch that meets a
            new one is followed too.
    """
    lengths, met = lengths_up_to(max_tokens), set()
    for batch, length in sorted(product(range(1, max_batch + 1), lengths), key=lambda pair: (pair[0] * pair[1], pair)):
        is_edge = length in _EDGES or length == max_tokens
        kind = None if class_of is None else class_of(batch, length)
        if batch > 1 and kind in met and not (is_edge and batch <= _FEW_ROWS):
            continue
        met.add(kind)
        for num_text in _TEXT_LENGTHS if is_edge else _TEXT_LENGTHS[-1:]:
            # rows of this length, and rows with so many visual tokens
            for num_visual in (length - num_text, length):
                if num_visual >= 1 and num_visual + num_text <= max(max_tokens, 2):
                    yield Shape(batch, num_visual, num_text, is_uneven=batch == _FEW_ROWS)


class WeightlessModel:
    """The stages of a pruned call that launch kernels, on tensors without data.

    Args:
        anatomy: the model's parts.
        chooser: chooses the tokens that stay.
        stage: after which layer, counted from 1; 0 stands for before the first.

    Attributes:
        notes: what could not be followed.
    """

    def __init__(self, anatomy: Anatomy, chooser: Chooser, stage: int) -> None:
        weights = chooser.head_weights
        self._chooser = replace(
            chooser, head_weights=None if weights is None else torch.empty(len(weights), device="meta")
        )
        text: Any = anatomy.text
        before, _ = first_attention_layer(text)
        layer = ranking_layer(text, stage, chooser.method)
        real = anatomy.family.projections(layer) if stage and hasattr(layer, "self_attn") else anatomy.projections
        self._layer = without_weights(layer)
        self._projections = WeightlessProjections(real, anatomy.family.projections(self._layer))
        self._merges_in_encoder = chooser.method.stage == "encoder"
        self._is_inside, self._has_layers_before = stage > 0, before > 0
        self._has_more_features = any(name in inspect.signature(text.forward).parameters for name in VISUAL_FEATURES)
        self._needs_rotary = chooser.method.uses_positions
        self._anatomy = replace(anatomy, text=_with_weightless_rotary(text))
        self._encoders = anatomy
        self._hidden_size: int = text.config.hidden_size
        self._dtype = dtype_of_embeddings(anatomy)
        self.notes: list[str] = []

    def classes_of(self, architecture: str) -> Callable[[int, int], object]:
        """Return a function from a number of rows and their length to launch configurations."""
        from hawk_kernels.backends.kernels import configs

        kind = configs.dtype_class(self._dtype)
        keys = self._projections.keys(self._states(1, 1))
        num_key_value_heads, head_dim = keys.shape[-2:]

        def class_of(batch: int, length: int) -> object:
            scoring = configs.Shape(kind, head_dim, batch * num_key_value_heads, length)
            hidden = configs.Shape(kind, 0, batch, length)
            return (
                configs.config_for(architecture, "score_and_select", scoring),
                configs.config_for(architecture, "score_hidden", hidden),
            )

        return class_of

    def prefill(self, shape: Shape) -> None:
        """Choose and pack a batch of prompts."""
        prompt = prompt_of(shape)
        states = self._states(*prompt.ids.shape)
        positions = self._positions(*prompt.ids.shape)
        kept = torch.empty(prompt.ids.shape, dtype=torch.bool, device="meta")
        counts, merge = [shape.num_text + 1] * shape.batch, None
        try:
            # the budget of a later stage is a part of more visual tokens than are left
            more = [[2 * each for each in row] for row in self._chooser.lengths(prompt)]
            originals = (None, more) if self._is_inside else (None,)
            for given, original in product((positions, None) if self._needs_rotary else (None,), originals):
                context = self._context(prompt, states, given)
                choice = self._chooser.choose(states, prompt, self._projections, context, original)
                kept, counts, merge = choice.kept, choice.counts, choice.merge
        except Exception as error:  # whatever a method of the caller's raises on tensors without data
            self._note_unfollowed(f"method {self._chooser.method.name!r}", error)
        # layers of a stage inside the stack get their position ids cut by other means
        for given in (None,) if self._is_inside else (positions, None):
            packing = Packing(states, kept, counts, given, merge=merge, embeds_are_merged=self._merges_in_encoder)
            if merge is not None and self._has_more_features:
                packing.merged(states)

    def encode(self, max_tokens: int) -> None:
        """Measure attention in the vision encoder, and merge before its projector, where the method does so."""
        method = self._chooser.method
        measures = [
            *(["received"] if method.uses_encoder_attention else []),
            *(["from_cls"] if method.uses_cls_attention or method.uses_local_attention else []),
        ]
        if not measures and not self._merges_in_encoder:
            return
        make: Any = self._encoders.family.encoder
        encoder = make(self._encoders.multimodal)
        dtype = next(p.dtype for p in encoder.tower.parameters() if p.dtype.is_floating_point)
        # float64 models are measured in float32
        measured = torch.float32 if dtype == torch.float64 else dtype
        if self._merges_in_encoder:
            _merge_rows(encoder, dtype)
        for layer in sorted(set(recorder_for(self._encoders, method).layers)) if measures else ():
            bare = copy.copy(encoder)
            bare.attentions = list(encoder.attentions)
            bare.attentions[layer - 1] = without_weights(encoder.attentions[layer - 1])
            for length in (each for each in _ENCODER_LENGTHS if each <= max(4, max_tokens)):
                for tiles, measure in product((1, 3), measures):
                    try:
                        _encode(bare, getattr(bare, measure), layer, tiles, length, measured)
                    except Exception as error:  # whatever an encoder raises on tensors without data
                        self._note_unfollowed("the vision encoder", error)

    def _states(self, batch: int, length: int) -> torch.Tensor:
        return torch.empty(batch, length, self._hidden_size, dtype=self._dtype, device="meta")

    def _positions(self, batch: int, length: int) -> torch.Tensor:
        axes = self._anatomy.family.position_axes
        shape = (axes, batch, length) if self._reads_axes else (batch, length)
        return torch.empty(shape, dtype=torch.int64, device="meta")

    @property
    def _reads_axes(self) -> bool:
        # text models without positions have no rotary embedding, and those of one axis no sections
        rotary = getattr(self._anatomy.text, "rotary_emb", None)
        return getattr(rotary, "mrope_section", None) is not None

    def _context(self, prompt: Prompt, states: torch.Tensor, positions: torch.Tensor | None) -> Context:
        """Make what the method may ask besides the states that enter the scoring layer."""
        method, rotary, seen, scale, attention = self._chooser.method, None, None, None, None
        if self._needs_rotary:
            rotary = rotary_of_first_layer(self._anatomy, states, positions)
        if self._is_inside:
            rotary = rotary_of_layer(self._layer, None if rotary is None else (rotary.cos, rotary.sin), states)
            seen = torch.empty(prompt.ids.shape, dtype=torch.bool, device="meta")
            scale = 1.0
        entered = (states, prompt) if self._is_inside else None
        lengths = prompt.visual.sum(axis=1).tolist()
        if method.reads_encoder():
            received = torch.empty(sum(lengths), device="meta")
            rows = torch.empty(sum(lengths), self._hidden_size, dtype=self._dtype, device="meta")
            values = {
                "object": received,
                "deep": received,
                "cls": received,
                "local": received,
                "features": rows,
                "keys": rows.unsqueeze(1),
            }
            grids = [[[(1, 1, length)]] for length in lengths]
            attention = PromptAttention(values, grids, np.zeros_like(prompt.visual))
        return Context(
            attention=attention,
            frames=lambda: [[[(1, length)]] for length in lengths],
            rotary=rotary,
            seen=seen,
            scale=scale,
            states=(lambda: states) if self._has_layers_before and not self._is_inside else None,
            entered=entered,
        )

    def _note_unfollowed(self, what: str, error: Exception) -> None:
        message = " ".join(str(error).split())
        note = f"{what} cannot be followed on tensors without data, so its kernels are compiled at its first call"
        if not any(earlier.startswith(note) for earlier in self.notes):
            self.notes.append(f"{note} ({type(error).__name__}: {message})")


def ranking_layer(text: Any, stage: int, method: Method) -> Any:
    """Return the layer whose input ranks the tokens of a stage after layer `stage`, counted from 1."""
    if stage == 0:
        return first_attention_layer(text)[1]
    return text.layers[stage - 1 if method.ranks_by == "last" else stage]


def prompt_of(shape: Shape) -> Prompt:
    """Make a batch of prompts: one image each, then the question."""
    batch, num_visual, num_text, is_uneven = shape
    ids = np.full((batch, num_visual + num_text), _WORD, dtype=np.int64)
    ids[:, :num_visual] = _VISUAL
    valid = np.ones(ids.shape, dtype=bool)
    visual = ids == _VISUAL
    query = ~visual
    if is_uneven:
        # padded on the left, and one token of the text ranks nothing
        if num_visual > 1:
            valid[0, 0] = visual[0, 0] = False
        if num_text > 1:
            query[0, -1] = False
    return Prompt(ids, valid, visual, query, [""] * batch, ids.shape[1])


def dtype_of_embeddings(anatomy: Anatomy) -> torch.dtype:
    """Return the dtype of what enters the text model."""
    text: Any = anatomy.text
    weight: Any = getattr(text.get_input_embeddings(), "weight", None)
    is_plain = isinstance(weight, torch.Tensor) and weight.dtype.is_floating_point
    dtype: torch.dtype = weight.dtype if is_plain else text.dtype
    return dtype


def _devices(anatomy: Anatomy) -> list[torch.device]:
    """Return the devices on which kernels may be launched: of the embeddings, the scoring layer, the vision encoder."""
    model: Any = anatomy.multimodal
    _, layer = first_attention_layer(anatomy.text)
    tower = next((getattr(model, name) for name in ("visual", "vision_tower") if hasattr(model, name)), model)
    found = [
        weight.device
        for module in (model.get_input_embeddings(), layer, tower)
        for weight in list(module.parameters())[:1]
    ]
    return list(dict.fromkeys(device for device in found if device.type != "meta"))


def _with_weightless_rotary(text: Any) -> Any:
    """Return a shallow copy of the text model whose rotary embedding has no weights."""
    rotary = getattr(text, "rotary_emb", None)
    if rotary is None:
        return text
    bare: Any = copy.copy(text)
    weightless = without_weights(rotary)
    # other kinds look at the positions on the host, and change no shape
    if isinstance(getattr(weightless, "rope_type", None), str):
        weightless.rope_type = "default"
    bare._modules = {**text._modules, "rotary_emb": weightless}
    return bare


def _encode(
    encoder: Any, measure: Callable[..., object], layer: int, tiles: int, length: int, dtype: torch.dtype
) -> None:
    """Measure the attention of an encoder's layer in `tiles` images of `length` patches, by a method of the encoder."""
    attention = encoder.attentions[layer - 1]
    total = tiles * length
    widths = [getattr(attention, group[-1]).weight.shape[0] for group in encoder.projections]
    if isinstance(encoder, TileEncoder):
        projected = [torch.empty(tiles, length, width, dtype=dtype, device="meta") for width in widths]
        measure(layer, projected, {"hidden_states": projected[0]})
        # tiles with padding are laid out one after the other
        packed = torch.empty(total, attention.num_heads, widths[0] // attention.num_heads, dtype=dtype, device="meta")
        starts = torch.empty(tiles + 1, dtype=torch.int32, device="meta")
        heads = packed.transpose(0, 1)
        attention_column_mean(heads, heads, cu_seqlens=starts, reduction="sum", scale=attention.scale)
        return
    num_heads = attention.num_heads + 2 * getattr(attention, "num_key_value_heads", attention.num_heads)
    angles = torch.empty(total, widths[0] // num_heads, device="meta")
    arguments = {
        "position_embeddings": (angles, angles),
        "cu_seqlens": torch.empty(tiles + 1, dtype=torch.int32, device="meta"),
    }
    measure(layer, [torch.empty(total, widths[0], dtype=dtype, device="meta")], arguments)


def _merge_rows(encoder: VisionEncoder, dtype: torch.dtype) -> None:
    """Merge rows that enter the projector of an encoder, of every width that its visual tokens may have."""
    attention = encoder.attentions[0]
    channels = next(module for module in attention.modules() if isinstance(module, nn.Linear)).in_features
    places = torch.empty(1, 8, dtype=torch.int64, device="meta")
    merge = Merge(places, places, torch.empty(1, 8, device="meta"))
    mask = torch.empty(1, 64, dtype=torch.bool, device="meta")
    for side in _SQUARES:
        rows = torch.empty(1, 64, channels * side**2, dtype=dtype, device="meta")
        compact(rows, mask, length=16, merge=merge)


def model_of_config(config: Any, dtype: torch.dtype) -> Any:
    """Make a model of a config on the meta device."""
    from transformers import AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText
    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype)
    return model.eval()


def launches_of_config(
    config: Any, dtype: torch.dtype, architecture: str, arguments: dict[str, Any], *, reach: tuple[int, int]
) -> tuple[list[Launch], tuple[str, ...]]:
    """Return what prompts of a model that is known by its config launch; see `launches_of_prune`.

    Args:
        config: of the model.
        dtype: of its weights.
        architecture: as tables are named.
        arguments: of `prune`, besides the model.
        reach: the most tokens in a row, and the most rows.
    """
    model = model_of_config(config, dtype)
    anatomy = dissect(model)
    text: Any = anatomy.text
    named = {name: arguments[name] for name in arguments.keys() - {"keep_ratio", "method", "budget", "query"}}
    mode = named.pop("mode", None)
    stages, _ = stages_of(anatomy, arguments["keep_ratio"], arguments["method"], mode, named)
    for stage in stages:
        give_layer_weights(ranking_layer(text, stage.layer, stage.method))
    weights = {"head_weights": "uniform"} if any(stage.method.uses_head_weights for stage in stages) else {}
    pruning = prune(model, **{**arguments, **weights})
    return launches_of_prune(pruning._anatomy, pruning._choosers, architecture, reach=reach)
