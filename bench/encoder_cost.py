"""Time what reading a vision encoder's attention costs: time and memory of encoding images in three ways.

    python -m bench.encoder_cost [--device cuda] [--rounds 15] [--output FOLDER]

Plain, with PyTorch's attention; the same with the two hooks of `prune(method="hiprune")`; and with the weights of every
layer written out, as the release of HiPrune needs them (all kept until the end in CLIP, as `output_attentions=True`
does; those of two layers in Qwen2.5-VL). The encoders have their published shapes and random weights, which cost what
trained ones do. On a CPU they have fewer layers and see smaller images, and every row says so. Nothing is timed before
the attention that the hooks report has been compared with the written-out weights in float32, for images of at most 448
pixels a side: more do not fit everywhere. A way that runs out of memory says so.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import cli
from bench.environment import environment, write_json
from bench.timing import eager_sampler, peak_bytes, rotate, spread
from hawk_kernels.hf.encoders import VisionEncoder
from hawk_kernels.hf.encoders.recorder import VisionRecorder
from hawk_kernels.hf.families import ENCODERS

PLAIN, HOOKS, WEIGHTS = "sdpa", "sdpa, two hooks", "weights of every layer"
_TOLERANCE = 1e-4
_PARITY_SIDE = 448
# Sampling stops early where a case would take longer.
_CASE_SECONDS = {"cpu": 40.0, "cuda": 8.0}
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
_CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_QWEN2_5_VL = {
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "window_size": 112,
    "out_hidden_size": 64,
}


@dataclass(frozen=True)
class Case:
    """An encoder and the images it sees.

    Attributes:
        encoder: "clip-l-336" or "qwen2.5-vl".
        depth: layers.
        published_depth: layers of the published encoder.
        images: how many there are.
        side: of each, in pixels.
        dtype: of weights and activations while the clock runs.
    """

    encoder: str
    depth: int
    published_depth: int
    images: int
    side: int
    dtype: str

    @property
    def is_reduced(self) -> bool:
        """Whether layers were left out."""
        return self.depth < self.published_depth

    def __str__(self) -> str:
        layers = f", {self.depth} of {self.published_depth} layers" if self.is_reduced else ""
        return f"{self.encoder}, {self.images} x {self.side}^2{layers}, {self.dtype}"


CPU_CASES = (
    Case("clip-l-336", 4, 24, 1, 336, "float32"),
    Case("qwen2.5-vl", 4, 32, 1, 224, "float32"),
)
GPU_CASES = (
    Case("clip-l-336", 24, 24, 1, 336, "bfloat16"),
    Case("clip-l-336", 24, 24, 5, 336, "bfloat16"),
    Case("qwen2.5-vl", 32, 32, 1, 1008, "bfloat16"),
    Case("qwen2.5-vl", 32, 32, 1, 2016, "bfloat16"),
)


class Encoding:
    """Images on their way through one encoder, by `get_image_features` of a model with a tiny text part.

    Args:
        case: encoder and images.
        device: where they are.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        family, self._model = _model(case, device)
        self._case, self._device = case, device
        self._has_cls = family == "llava"
        self.encoder: VisionEncoder = ENCODERS[family](self._model.base_model)
        self.recorder = VisionRecorder(self.encoder, None)
        # the release keeps the weights of every layer of CLIP, and those of two in Qwen2.5-VL
        kept = self.encoder.attentions if self._has_cls else [self._attention(i) for i in self.recorder.layers]
        self._kept = {id(attention) for attention in kept}
        self._weights: dict[int, list[torch.Tensor]] = {}
        self.see(min(case.side, _PARITY_SIDE), torch.float32)

    def see(self, side: int, dtype: torch.dtype) -> None:
        """Cast the weights, and make images of so many pixels a side."""
        self._model.to(dtype)
        generator = torch.Generator().manual_seed(0)
        if self._has_cls:
            pixels = torch.randn(self._case.images, 3, side, side, generator=generator)
            self._inputs = {}
        else:
            patches = side // _QWEN2_5_VL["patch_size"]
            pixels = torch.randn(self._case.images * patches**2, 3 * 2 * 14 * 14, generator=generator)
            grids = torch.tensor([[1, patches, patches]] * self._case.images)
            self._inputs = {"image_grid_thw": grids.to(self._device)}
        self._inputs["pixel_values"] = pixels.to(self._device, dtype)

    @torch.no_grad()
    def plain(self) -> None:
        """Encode the images."""
        self._model.base_model.get_image_features(**self._inputs, return_dict=True)

    def with_hooks(self) -> tuple[torch.Tensor, ...]:
        """Encode and report the attention received in the two layers."""
        handles = self.recorder.attach()
        try:
            self.plain()
        finally:
            for handle in handles:
                handle.remove()
        run = self.recorder.recordings({})["image"]
        return run.values["object"], run.values["deep"]

    def with_weights(self) -> tuple[torch.Tensor, ...]:
        """Report the same from weights that every layer writes out."""
        try:
            with self._writing_weights():
                self.plain()
            layers = [self._weights[id(self._attention(layer))] for layer in self.recorder.layers]
            return tuple(
                torch.cat([weights.float().mean(dim=1).sum(dim=1).flatten() for weights in written])
                for written in layers
            )
        finally:
            self._weights = {}

    def error(self) -> float:
        """Largest difference between the two reports in float32, of values that are 1 on average.

        Where patches are merged, that between their averages, which the order of the windows does not change.
        """
        worst = 0.0
        for got, sums in zip(self.with_hooks(), self.with_weights(), strict=True):
            if self._has_cls:
                expected = sums.unflatten(0, (self._case.images, -1))[:, 1:].flatten()
            else:
                got, expected = got.sort().values, sums.unflatten(0, (len(got), -1)).mean(dim=1).sort().values
            worst = max(worst, (got - expected).abs().max().item())
        return worst

    def _attention(self, layer: int) -> nn.Module:
        return self.encoder.attentions[layer - 1]

    @contextmanager
    def _writing_weights(self) -> Iterator[None]:
        from transformers import AttentionInterface

        AttentionInterface.register("bench_weights", self._attend)
        config = self.encoder.tower.config
        before, config._attn_implementation = config._attn_implementation, "bench_weights"
        try:
            yield
        finally:
            config._attn_implementation = before

    def _attend(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *mask: Any, **more: Any
    ) -> tuple[torch.Tensor, None]:
        logits = query @ key.transpose(2, 3) * more["scaling"]
        weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
        if id(module) in self._kept:
            self._weights.setdefault(id(module), []).append(weights)
        return (weights @ value).transpose(1, 2).contiguous(), None


def _model(case: Case, device: torch.device) -> tuple[str, Any]:
    """Return `model_type` and a model with random weights whose encoder uses PyTorch's own attention."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    if case.encoder == "clip-l-336":
        family, vision = "llava", {**_CLIP_L, "num_hidden_layers": case.depth}
        more: dict[str, Any] = {"text_config": {"model_type": "llama", **_TEXT}}
    else:
        full = [layer for layer in range(case.depth) if layer % (case.depth // 4) == case.depth // 4 - 1]
        family, vision = "qwen2_5_vl", {**_QWEN2_5_VL, "depth": case.depth, "fullatt_block_indexes": full}
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
        more = {"text_config": {"model_type": "qwen2_5_vl_text", **_TEXT, "rope_parameters": rope}}
    config = AutoConfig.for_model(family, vision_config=vision, **more)
    with torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    return family, model.eval()


def measure(case: Case, rounds: int, device: torch.device) -> dict[str, Any]:
    """Measure one row: parity in float32, then times and memory."""
    encoding = Encoding(case, device)
    error = encoding.error()
    row: dict[str, Any] = {"title": str(case), **asdict(case), "reduced": case.is_reduced, "error": error}
    if error > _TOLERANCE:
        raise SystemExit(f"bench.encoder_cost: parity failed at {case} with an error of {error:.1e}; no time is given")
    row["layers"] = encoding.recorder.options()
    encoding.see(case.side, getattr(torch, case.dtype))
    ways: dict[str, Callable[[], object]] = {
        PLAIN: encoding.plain,
        HOOKS: encoding.with_hooks,
        WEIGHTS: encoding.with_weights,
    }
    row["ways"] = {name: _memory(way, device) for name, way in ways.items()}
    fitting = {name: way for name, way in ways.items() if "failed" not in row["ways"][name]}
    samplers = {name: eager_sampler(way, device) for name, way in fitting.items()}
    for name, values in rotate(samplers, rounds, _CASE_SECONDS[device.type]).items():
        row["ways"][name]["microseconds"] = spread(values)
    plain = row["ways"][PLAIN]
    for name in fitting:
        way = row["ways"][name]
        way["times_plain"] = way["microseconds"]["median"] / plain["microseconds"]["median"]
        way["memory_times_plain"] = way["peak_bytes"] / plain["peak_bytes"]
    return row


def _memory(way: Callable[[], object], device: torch.device) -> dict[str, Any]:
    try:
        return {"peak_bytes": peak_bytes(way, device)}
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return {"failed": f"out of memory: {str(error).splitlines()[0]}"}


def table(results: dict[str, Any]) -> str:
    """Render results as Markdown."""
    about = results["environment"]
    lines = [
        f"{about['device']}, torch {about['torch']}, transformers {about['transformers']}, {about['date']}",
        "",
        "| encoder and images | way | milliseconds (p20-p80) | time | peak MiB | memory |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        for name, way in row["ways"].items():
            if "failed" in way:
                lines.append(f"| {row['title']} | {name} | out of memory | | | |")
                continue
            times = {key: value / 1e3 for key, value in way["microseconds"].items()}
            lines.append(
                f"| {row['title']} | {name} | {times['median']:.2f} ({times['p20']:.2f}-{times['p80']:.2f}) "
                f"| {way['times_plain']:.2f}x | {way['peak_bytes'] / 2**20:.1f} | {way['memory_times_plain']:.2f}x |"
            )
    if any(row["reduced"] for row in results["rows"]):
        lines += [
            "",
            "Rows with fewer layers than were published check the benchmark, but do not measure the encoder.",
        ]
    return "\n".join(lines) + "\n"


def run(out_dir: Path, device: torch.device | None = None, rounds: int = 15) -> dict[str, Any]:
    """Measure all cases of the device and write `encoder_cost.json` and `.md`, anew after each case.

    Args:
        out_dir: folder for the results.
        device: a GPU if there is one.
        rounds: samples of each way.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = {"environment": environment(device), "rows": []}
    for case in GPU_CASES if device.type == "cuda" else CPU_CASES:
        row = measure(case, rounds, device)
        results["rows"].append(row)
        write_json(out_dir / "encoder_cost.json", results)
        (out_dir / "encoder_cost.md").write_text(table(results), encoding="utf-8")
        ratios = ", ".join(
            f"{name} {way['times_plain']:.2f}x" if "times_plain" in way else f"{name} {way['failed']}"
            for name, way in row["ways"].items()
        )
        print(f"{case}: {ratios}", file=sys.stderr, flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def main() -> None:
    """Measure, print the table, write it and the JSON."""
    parser = cli.parser(
        "bench.encoder_cost", __doc__, device=cli.default_device(), rounds=15, output="bench/results/<device>"
    )
    arguments = parser.parse_args()
    print(table(run(cli.results_directory(arguments), arguments.device, arguments.rounds)), end="")


if __name__ == "__main__":
    main()
