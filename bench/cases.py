"""The shapes that everything is measured on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KEEP_RATIO = 0.2


@dataclass(frozen=True)
class Decoder:
    """Attention of a model's first decoder layer."""

    name: str
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int


QWEN_7B = Decoder("Qwen2.5-VL-7B", 28, 4, 128, 3584)
QWEN_3B = Decoder("Qwen2.5-VL-3B", 16, 2, 128, 2048)
INTERNVL = Decoder("InternVL3-8B", 28, 4, 128, 3584)
LLAVA = Decoder("LLaVA-1.5-7B", 32, 32, 128, 4096)
DECODERS = (QWEN_7B, QWEN_3B, INTERNVL, LLAVA)
NUM_KEYS = (256, 576, 1296, 2880, 5120, 16384, 65536, 131072)
NUM_QUERIES = (8, 20, 64, 256)


@dataclass(frozen=True)
class Case:
    """One row of a table.

    Attributes:
        kind: where the way to the kept tokens begins: "scores", "queries" (and keys) or "hidden" states.
        decoder: heads and sizes.
        num_queries: text tokens that are averaged, N.
        num_keys: visual tokens, M.
        dtype: a name in `DTYPES`.
        batch: rows.
        normalize: as in `score_and_select`.
        compiled: whether the contenders under torch.compile take part, which takes them seconds to get ready.
    """

    kind: str
    decoder: Decoder
    num_queries: int
    num_keys: int
    dtype: str
    batch: int = 1
    normalize: str | None = "l2"
    compiled: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON and for selecting rows."""
        return asdict(self)

    def __str__(self) -> str:
        parts = [self.kind, self.decoder.name]
        if self.kind != "scores":
            parts += [f"N={self.num_queries}"]
        parts += [f"M={self.num_keys}", "fp32" if self.kind == "scores" else self.dtype]
        if self.kind != "scores":
            parts += [str(self.normalize).lower()]
        return " ".join(parts + ([f"B={self.batch}"] if self.batch > 1 else []))


def _queries(decoder: Decoder, num_queries: int, num_keys: int, dtype: str = "bf16", **options: Any) -> Case:
    return Case("queries", decoder, num_queries, num_keys, dtype, **options)


def _hidden(decoder: Decoder, num_queries: int, num_keys: int, dtype: str = "bf16", **options: Any) -> Case:
    return Case("hidden", decoder, num_queries, num_keys, dtype, **options)


def _scores(num_keys: int, batch: int = 1) -> Case:
    return Case("scores", QWEN_7B, 64, num_keys, "fp32", batch=batch)


_COMPILED = (1296, 16384)

# In the order of their worth: what does not fit the time is left out from the end.
GPU = (
    *(_queries(QWEN_7B, 64, m, compiled=m in _COMPILED) for m in (1296, 16384, 131072)),
    *(_hidden(QWEN_7B, 64, m, compiled=m in _COMPILED) for m in (1296, 16384)),
    *(_queries(QWEN_7B, 64, m) for m in (5120, 256, 576, 2880, 65536)),
    *(_hidden(QWEN_7B, 64, m) for m in (5120, 65536)),
    *(_queries(QWEN_7B, 64, m, normalize=None) for m in (1296, 16384, 131072)),
    *(_queries(QWEN_7B, n, 1296) for n in (8, 20, 256)),
    _queries(LLAVA, 64, 576),
    _queries(QWEN_3B, 64, 1296),
    _queries(INTERNVL, 20, 2880),
    *(_scores(m) for m in (1296, 16384, 131072)),
    *(_queries(QWEN_7B, 64, 1296, dtype) for dtype in ("fp16", "fp32")),
    _queries(QWEN_7B, 64, 1296, batch=8),
    _hidden(LLAVA, 64, 576),
    _hidden(QWEN_3B, 64, 1296),
    *(_queries(QWEN_7B, n, 16384) for n in (8, 256)),
    *(_queries(decoder, 64, m) for decoder in (QWEN_3B, LLAVA) for m in (5120, 16384)),
    *(_scores(m) for m in (576, 5120, 65536)),
    *(_queries(QWEN_7B, 64, 16384, dtype) for dtype in ("fp16", "fp32")),
    *(_queries(QWEN_7B, 64, 1296, normalize=mode) for mode in ("softmax", "minmax")),
    _scores(1296, batch=8),
)

CPU = (
    _queries(QWEN_7B, 64, 1296, "fp32", compiled=True),
    _queries(QWEN_7B, 20, 1296, compiled=True),
    _queries(QWEN_7B, 64, 4096),
    *(_queries(QWEN_7B, 64, m, "fp32") for m in (16384, 256, 576, 2880, 5120, 65536)),
    _hidden(QWEN_7B, 64, 1296, "fp32"),
    _hidden(QWEN_7B, 64, 1296),
    _queries(QWEN_3B, 64, 1296),
    _queries(LLAVA, 64, 576),
    _queries(INTERNVL, 256, 2880),
    _queries(QWEN_7B, 64, 1296, "fp32", normalize=None),
    _queries(QWEN_7B, 64, 1296, "fp32", batch=4),
    *(_scores(m) for m in (1296, 16384, 131072)),
)

_TINY = Decoder("tiny", 4, 2, 16, 64)
TINY = (
    _queries(_TINY, 5, 48, "bf16"),
    _hidden(_TINY, 5, 48, "fp32"),
    _scores(300),
)

FULL = tuple(
    Case(kind, decoder, n, m, dtype)
    for kind, decoder, n, m, dtype in product(
        ("queries", "hidden"), (QWEN_7B, QWEN_3B, LLAVA), NUM_QUERIES, NUM_KEYS, ("bf16", "fp32")
    )
) + tuple(_scores(m) for m in NUM_KEYS)

SLICES = {"cpu": CPU, "gpu": GPU, "tiny": TINY, "full": FULL}
