"""Finds the parts of one model that pruning touches, by the facts of its family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from hawk_kernels.hf.families import FAMILIES, OUT_OF_REACH, Family
from hawk_kernels.hf.projections import LayerProjections
from hawk_kernels.hf.question import Markers, find_markers


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model.

    Attributes:
        family: the family the model belongs to.
        head: the module the caller calls, with the language-model head.
        multimodal: the module below it, which merges text and images and sees `input_ids`.
        text: the decoder, which sees `inputs_embeds`.
        projections: queries and keys of the first attention layer of `text`.
        visual_token_ids: ids of the visual placeholders.
        markers: ids that close images and turns.
        kinds: for each visual placeholder whether it stands for an "image" or a "video".
    """

    family: Family
    head: nn.Module
    multimodal: nn.Module
    text: nn.Module
    projections: LayerProjections
    visual_token_ids: tuple[int, ...]
    markers: Markers
    kinds: dict[int, str]


def dissect(model: Any) -> Anatomy:
    """Find the parts of `model`, which may be wrapped.

    Raises:
        TypeError: a model of a family that is not supported, or a wrapper that runs copies of its model.
    """
    model = unwrapped(model)
    family = _family_of(model)
    text = _text_module(model)
    _, layer = first_attention_layer(text)
    config = model.config
    ids = {name.removesuffix("_token_id"): getattr(config, name, None) for name in family.visual_token_ids}
    return Anatomy(
        family=family,
        head=model,
        multimodal=model.base_model,
        text=text,
        projections=family.projections(layer),
        visual_token_ids=tuple(dict.fromkeys(token_id for token_id in ids.values() if token_id is not None)),
        markers=find_markers(model, family.end_of_turn_ids),
        kinds={token_id: kind for kind, token_id in ids.items() if token_id is not None},
    )


def unwrapped(model: Any) -> Any:
    """Return the transformers model inside wrappers whose calls, `generate` included, run the hooks of that model.

    These wrappers are `PeftModel`, `DistributedDataParallel`, `DataParallel` on one device, and what
    `torch.compile(model)` returns.

    Raises:
        TypeError: a `DataParallel` over several devices.
    """
    while True:
        names = {cls.__name__ for cls in type(model).__mro__}
        if "DataParallel" in names and len(getattr(model, "device_ids", ())) > 1:
            raise TypeError(
                f"model: expected one that no call copies, got a DataParallel over {len(model.device_ids)} devices; "
                "pass model.module and call that one, or use DistributedDataParallel"
            )
        if "PeftModel" in names:
            model = model.get_base_model()
        elif "OptimizedModule" in names:
            model = model._orig_mod
        elif names & {"DataParallel", "DistributedDataParallel"}:
            model = model.module
        else:
            return model


def first_attention_layer(text: Any) -> tuple[int, Any]:
    """Find the first decoder layer with attention, and its index from 0.

    Hybrid models begin with layers of linear attention or convolutions.
    """
    return next((index, layer) for index, layer in enumerate(text.layers) if hasattr(layer, "self_attn"))


def _family_of(model: object) -> Family:
    names = {cls.__name__ for cls in type(model).__mro__}
    for family in FAMILIES:
        if names & set(family.classes):
            return family
    known = getattr(getattr(type(model), "config_class", None), "model_type", None)
    whole = next((family.classes[0] for family in FAMILIES if family.model_type == known), None)
    remedy = "the transformers model itself, not a wrapper around it" if whole is None else f"the whole {whole}"
    raise TypeError(
        f"model: expected one of the {len(FAMILIES)} supported vision-language families (docs/families.md lists them), "
        f"got {type(model).__name__}{_why_not(model, known)}; pass {remedy}"
    )


def _why_not(model: Any, model_type: str | None) -> str:
    """Say why a model is refused; return an empty string if the reason is not known."""
    listed = next((reason for types, reason in OUT_OF_REACH.items() if model_type in types), None)
    if listed is not None:
        return f" ({listed})"
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return " (an encoder-decoder model: its prompt holds no visual tokens)"
    if hasattr(config, "vocab_size") and not hasattr(config, "vision_config"):
        return " (a text model: it reads no images)"
    return ""


def _text_module(model: Any) -> nn.Module:
    module = model.get_decoder()
    while not hasattr(module, "layers"):
        module = module.model
    text: nn.Module = module
    return text
