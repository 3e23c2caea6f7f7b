"""Turns a sample into what the model reads: opens pictures, fills the chat template, moves tensors to the device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hawk_kernels.tasks.task import ImageSource, Sample, Task, VideoSource


def open_image(source: ImageSource) -> Any:
    """Open the picture of a source in RGB, upright as its camera noted (EXIF orientation).

    Raises:
        OSError: no such file, or no picture in it.
    """
    from PIL import Image, ImageOps

    if isinstance(source, (str, Path)):
        with Image.open(source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    image = source() if callable(source) else source
    return ImageOps.exif_transpose(image).convert("RGB")


def open_video(source: VideoSource) -> Any:
    """Return what a processor takes for a video: a path, or a list of frames."""
    if isinstance(source, (str, Path)):
        return str(source)
    frames = source() if callable(source) else source
    return [frame.convert("RGB") for frame in frames]


def encode(task: Task, sample: Sample, processor: Any, model: Any) -> dict[str, Any]:
    """Make the model's inputs of one sample, batch size 1, on its device and with pixels in its dtype."""
    own = getattr(task, "encode", None)
    inputs = _chat_inputs(task, sample, processor) if own is None else own(sample, processor)
    device, dtype = model.get_input_embeddings().weight.device, model.dtype
    if device.type == "meta":
        device = model.device
    return {name: _moved(value, device, dtype) for name, value in dict(inputs).items()}


def _chat_inputs(task: Task, sample: Sample, processor: Any) -> Mapping[str, Any]:
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            f"processor: expected one with a chat template, got {type(processor).__name__} without; give the task an "
            "encode(sample, processor) method that makes the model's inputs"
        )
    images = [open_image(source) for source in sample.images]
    videos = [open_video(source) for source in sample.videos]
    content = [{"type": "image"}] * len(images) + [{"type": "video"}] * len(videos)
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": task.prompt(sample)}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    visual = {name: values for name, values in (("images", images), ("videos", videos)) if values}
    return dict(processor(text=[text], return_tensors="pt", **visual))


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def decode(processor: Any, tokens: list[int]) -> str:
    """Decode the text of an answer, without special tokens and surrounding spaces."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def processor_of(model: Any) -> Any:
    """Load the processor of the checkpoint that a model was loaded from.

    Raises:
        ValueError: the model does not know one.
    """
    from hawk_kernels.checkpoint import load_processor

    name = getattr(model.config, "_name_or_path", "")
    if not name:
        raise ValueError(
            "processor: expected the model's processor, got None for a model without a checkpoint; pass it"
        )
    return load_processor(name)
