"""Head importance of known checkpoints: one JSON file each, found by a fingerprint of the model's config.

A file is an object with `weights` (a list of `H` numbers) and, for the registry, `model`, `fingerprint`, `layer`,
`source`, `definition` and `date`; `hawk-kernels calibrate` writes these and more. The fingerprint holds the fields of
the config that a fine-tuned or renamed copy shares with the checkpoint that the weights were measured on, so a local
path finds its weights too.

Reading files and listing them needs no torch, so that `hawk-kernels info` works without it.
"""

from __future__ import annotations

import json
import math
import shlex
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

_FOLDER = Path(__file__).parent
_TEXT_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_CALIBRATE = "hawk-kernels calibrate"
_EXAMPLE_LINE = '{"image": "chart.png", "question": "How many bars?", "answer": "7"}'


class HeadWeights(NamedTuple):
    """Importance of the attention heads of the layer whose queries and keys score the tokens.

    Attributes:
        values: float32 `[H]`, non-negative, at least one above zero.
        source: where they come from, for statistics.
    """

    values: torch.Tensor
    source: str


def fingerprint(config: Any) -> dict[str, Any]:
    """Return the fields of a model's config that tell checkpoints apart, whatever path they were loaded from."""
    text = _text_config(config)
    return {"model_type": config.model_type, **{field: getattr(text, field, None) for field in _TEXT_FIELDS}}


def resolve_head_weights(head_weights: Any, config: Any, num_heads: int) -> HeadWeights:
    """Find the head weights for a model.

    Args:
        head_weights: None looks the model up in the shipped registry; "uniform"; the name of a shipped file, as
            `hawk-kernels weights list` shows them; a `[H]` tensor or sequence; or the path of a weights file.
        config: the model's config.
        num_heads: `H`, the query heads of the scoring layer.

    Raises:
        ValueError: a model without known weights, or weights that are not finite, non-negative, `num_heads` long
            and not all zero.
        TypeError: none of the above kinds.
    """
    import torch

    if head_weights is None:
        return _from_registry(config, num_heads)
    if isinstance(head_weights, str) and head_weights == "uniform":
        return HeadWeights(torch.full((num_heads,), 1.0 / num_heads), "uniform")
    if isinstance(head_weights, (str, Path)):
        return load_head_weights(find_weights_file(head_weights), num_heads, config)
    if isinstance(head_weights, torch.Tensor):
        if head_weights.dtype == torch.bool or head_weights.is_complex():
            raise TypeError(f"head_weights: expected real numbers, got dtype {head_weights.dtype}; use .float()")
        if head_weights.dim() != 1:
            raise ValueError(
                f"head_weights: expected a tensor of shape [{num_heads}], got {list(head_weights.shape)}; pass one "
                "weight a head"
            )
        values = head_weights.detach().to("cpu", torch.float64).tolist()
        return HeadWeights(_checked(values, num_heads, "head_weights"), "given")
    if hasattr(head_weights, "__array__"):
        import numpy as np

        return resolve_head_weights(torch.from_numpy(np.array(head_weights)), config, num_heads)
    if isinstance(head_weights, Sequence) and not isinstance(head_weights, bytes | bytearray):
        return HeadWeights(_checked(list(head_weights), num_heads, "head_weights"), "given")
    raise TypeError(
        "head_weights: expected None (the registry), 'uniform', the name of a shipped file, a [H] tensor or sequence, "
        f"or the path of a weights file, got {type(head_weights).__name__}"
    )


def load_head_weights(path: str | Path, num_heads: int, config: Any = None) -> HeadWeights:
    """Load head weights from a JSON file with a `weights` list, as `hawk-kernels calibrate` writes it.

    Args:
        path: the file.
        num_heads: `H`, the query heads of the scoring layer.
        config: the config of the model that they are for; a file with a `fingerprint` of another one gets a warning.

    Raises:
        ValueError: no such file, not such a file, or weights that are not finite, non-negative, `num_heads` long and
            not all zero.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"head_weights: expected 'uniform', the name of a shipped file ({', '.join(shipped_weights())}) or the "
            f"path of a weights file, got {str(path)!r}, which is no file; `{_CALIBRATE}` writes one"
        )
    content = read_weights_file(path)
    values = _checked(content["weights"], num_heads, str(path))
    if config is not None and content.get("fingerprint"):
        _warn_of_another_model(path, content, fingerprint(config))
    return HeadWeights(values, f"file {path.name}")


def _warn_of_another_model(path: Path, content: Mapping[str, Any], marks: Mapping[str, Any]) -> None:
    measured = content["fingerprint"]
    differing = [
        f"{name} {value} instead of {marks.get(name)}" for name, value in measured.items() if marks.get(name) != value
    ]
    if differing:
        warnings.warn(
            f"{path}: expected head weights of this model, got those of {content.get('model', 'another one')} "
            f"({', '.join(differing)}); measure this one with `{_CALIBRATE}`",
            UserWarning,
            stacklevel=2,
        )


def shipped_weights() -> dict[str, Path]:
    """Return the weights files that come with the package, by name."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.json"))}


def find_weights_file(name: str | Path) -> Path:
    """Find a weights file by the package's name for it ("tinyvqa"), or by its path."""
    return shipped_weights().get(str(name), Path(name))


def _from_registry(config: Any, num_heads: int) -> HeadWeights:
    marks = fingerprint(config)
    for path in shipped_weights().values():
        content = read_weights_file(path)
        if content.get("fingerprint") and all(marks.get(k) == v for k, v in content["fingerprint"].items()):
            return HeadWeights(_checked(content["weights"], num_heads, path.name), f"registry: {content['model']}")
    known = sorted(read_weights_file(path)["model"] for path in shipped_weights().values())
    checkpoint = str(getattr(config, "_name_or_path", "") or "")
    name = checkpoint or config.model_type
    raise ValueError(
        f"head_weights: no weights are known for {name} (known: {', '.join(known)}); measure them with "
        f"`{_CALIBRATE} --model {shlex.quote(checkpoint or 'FOLDER_OF_THE_MODEL')} --data questions.jsonl "
        f"--out weights.json`, where questions.jsonl has lines such as {_EXAMPLE_LINE}, and pass "
        "head_weights='weights.json'; or count every head the same with head_weights='uniform'"
    )


def read_weights_file(path: str | Path) -> dict[str, Any]:
    """Read a weights file, a JSON object with a list `weights`.

    Raises:
        ValueError: the file holds something else.
    """
    path = Path(path)
    try:
        # some editors begin a file with a byte order mark
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected a JSON file of head weights, got {error}; `{_CALIBRATE}` writes one"
        ) from error
    if not isinstance(content, Mapping) or not isinstance(content.get("weights"), list):
        raise ValueError(f"{path}: expected a JSON object with a list 'weights'; `{_CALIBRATE}` writes one")
    if not isinstance(content.get("fingerprint") or {}, Mapping):
        raise ValueError(
            f"{path}: expected 'fingerprint' to be an object with fields of the model's config, got "
            f"{content['fingerprint']!r}; leave it out where they are not known"
        )
    return dict(content)


def _checked(weights: list[Any], num_heads: int, origin: str) -> torch.Tensor:
    import torch

    for head, weight in enumerate(weights):
        if isinstance(weight, bool) or not hasattr(weight, "__float__"):
            raise ValueError(f"{origin}: expected numbers, got {weight!r} for head {head}; pass one number a head")
    tensor = torch.tensor([_as_float(weight) for weight in weights], dtype=torch.float32)
    values = tensor.tolist()
    remedy = f"measure them with `{_CALIBRATE}` or use head_weights='uniform'"
    if len(values) != num_heads:
        raise ValueError(
            f"{origin}: expected {num_heads} weights, one for each attention head of the model, got {len(values)}; "
            f"{remedy}"
        )
    for head, value in enumerate(values):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{origin}: expected finite weights >= 0, got {value} for head {head}; {remedy}")
    if not any(value > 0 for value in values):
        raise ValueError(f"{origin}: expected at least one weight above zero, got {num_heads} zeros; {remedy}")
    return tensor


def _as_float(weight: Any) -> float:
    try:
        return float(weight)
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else getattr(config, "text_config", config)
