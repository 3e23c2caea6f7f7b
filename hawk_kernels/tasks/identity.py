"""Identifies a model and a run of it."""

from __future__ import annotations

import hashlib
import sys
from datetime import datetime, timezone
from typing import Any

import torch
from torch import nn

from hawk_kernels.head_weights import fingerprint
from hawk_kernels.hf.anatomy import dissect

_DIGESTED = 64


def identify(model: Any) -> dict[str, Any]:
    """Return, ready for JSON, what must be equal for one run to take over the scores of another."""
    import transformers

    import hawk_kernels

    text: Any = dissect(model).text
    return {
        "fingerprint": fingerprint(model.config),
        "parameters": digest_of_parameters(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": text.config._attn_implementation,
        "device": model.device.type,
        "versions": {
            "hawk_kernels": hawk_kernels.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": ".".join(map(str, sys.version_info[:3])),
        },
    }


def digest_of_parameters(model: nn.Module) -> str:
    """Hash some numbers of each parameter: a model that was trained further is another, whatever its config says."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(name.encode())
        if parameter.device.type != "meta" and parameter.numel():
            flat = parameter.detach().flatten()
            part = flat[:: max(1, flat.numel() // _DIGESTED)][:_DIGESTED].to("cpu").contiguous()
            found.update(part.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def name_of(model: Any) -> str:
    """Return the id or the folder that a model was loaded from, or its class."""
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)


def now() -> str:
    """Return the present second, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
