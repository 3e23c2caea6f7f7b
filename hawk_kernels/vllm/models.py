"""vLLM's models with pruning: what the encoder returns, what the language model reads, and where its tokens stand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.distributed import get_tp_group
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from hawk_kernels.head_weights import resolve_head_weights
from hawk_kernels.hf.choose_tokens import Chooser
from hawk_kernels.hf.families import FAMILIES
from hawk_kernels.hf.question import Markers, find_markers
from hawk_kernels.vllm.choosing import Grid, PictureChooser, Place
from hawk_kernels.vllm.folding import POSITION_COLUMNS, fold, split_positions, unfold, with_positions
from hawk_kernels.vllm.positions import Media, media_positions, prompt_positions
from hawk_kernels.vllm.processing import Qwen2_5_VLProcessor, Qwen2VLProcessor
from hawk_kernels.vllm.projections import PackedProjections
from hawk_kernels.vllm.recording import EncoderRecorder, check_encoder
from hawk_kernels.vllm.settings import read_settings

_CPU_WORKER = "hawk_kernels.vllm.cpu_worker.CPUWorker"


class PrunesVisualTokens:
    """Adds pruning to a model of vLLM; it stands before vLLM's own class among the base classes.

    A method that looks at one picture alone chooses when the picture is encoded; vLLM caches the rows that stay. Any
    other one chooses when the language model is about to read the picture, because vLLM shows the prompt only then.
    Each chunk of a prompt repeats that choice, with the same result.
    """

    supports_multimodal_pruning: ClassVar[bool] = True
    supported_video_pruning_methods: ClassVar[tuple[str, ...]] = ("evs",)

    config: Any
    visual: Any
    language_model: Any
    _recorder: EncoderRecorder | None = None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        multimodal = vllm_config.model_config.get_multimodal_config()
        settings = read_settings(vllm_config.model_config.hf_config, multimodal.video_pruning_rate)
        check_worker(vllm_config.parallel_config.worker_cls)
        if settings.method.reads_encoder():
            check_encoder(vllm_config.compilation_config, settings.method.name)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._settings = settings
        if settings.method.reads_encoder():
            self._recorder = EncoderRecorder(self.visual, settings.method, self.config.vision_config.model_type)
        projections = PackedProjections(self.language_model.model.layers[0])
        weights = None
        if settings.method.uses_head_weights:
            weights = resolve_head_weights(settings.head_weights, self.config, projections.num_heads).values
        self._chooser = PictureChooser(
            chooser=Chooser(settings.method, settings.keep_ratio, head_weights=weights),
            projections=projections,
            visual_token_ids=(self.config.image_token_id, self.config.video_token_id),
            markers=_markers(vllm_config.model_config),
            embed=self.language_model.embed_input_ids,
            project=None if self._recorder is None else self._recorder.project,
        )

    def _packed(self, rows: torch.Tensor, patches: Sequence[int], seconds: float = 1.0) -> torch.Tensor:
        """Turn the `n` rows of a picture or video into the `K` that vLLM caches, with their positions.

        Rows that are to be chosen later keep what was recorded of them.
        """
        side = self.visual.spatial_merge_size
        grid = (patches[0], patches[1] // side, patches[2] // side)
        positions = torch.from_numpy(media_positions(*grid, seconds)).to(rows.device)
        if self._settings.reads_prompt:
            return fold(with_positions(rows, positions), self._settings.kept_count(len(rows)))
        return with_positions(*self._staying(rows, positions, grid))

    def _staying(
        self, rows: torch.Tensor, positions: torch.Tensor, grid: Grid, place: Place | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose among the rows of a picture or video, and take off what was recorded of them in the encoder."""
        recorded = None
        if self._recorder is not None:
            rows, recorded = self._recorder.columns.separated(rows)
        places, merged = self._chooser.choose(rows, grid, place, recorded)
        group = get_tp_group()
        if group.world_size > 1:
            # ranks that differed in a single token would compute nonsense together
            places = group.broadcast(places.contiguous(), src=0)
            merged = None if merged is None else group.broadcast(merged.contiguous(), src=0)
        return rows[places] if merged is None else merged, positions[places]

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[torch.Tensor, int]:
        """Lay out the positions of a prompt whose placeholders are already as many as its tokens that stay."""
        positions, delta = prompt_positions(len(input_tokens), self._media(mm_features))
        return torch.from_numpy(positions), delta

    def _media(self, mm_features: list[Any]) -> Iterator[Media]:
        ordered = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        grids = self.iter_mm_grid_thw(ordered)  # type: ignore[attr-defined]
        for feature, (offset, frames, height, width, seconds) in zip(ordered, grids, strict=True):
            yield Media(offset, feature.mm_position.length, frames, height, width, seconds)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | torch.Tensor,
        multimodal_embeddings: Sequence[torch.Tensor],
        mrope_positions: torch.Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[torch.Tensor], torch.Tensor, int]:
        """Take the rows and positions of the tokens that stay from what the encoder cache holds.

        Args:
            input_ids: int `[T]`, the whole pruned prompt.
            multimodal_embeddings: for each picture of this step, the slice of its cached item for this step.
            mrope_positions: int `[3, T]`.
            num_computed_tokens: where this step begins.

        Returns:
            The rows for each slice, the positions, and what is added to the index of a token after the prompt to get
            its position.
        """
        length = len(input_ids)
        rows_of_slices = []
        with gpu_sync_allowed():
            if len(multimodal_embeddings):
                ids = np.asarray(input_ids.cpu() if isinstance(input_ids, torch.Tensor) else input_ids, dtype=np.int64)
                placeholders = np.flatnonzero(np.isin(ids, self._chooser.visual_token_ids))
                mrope_positions = mrope_positions.clone()
            at = num_computed_tokens
            for part in multimodal_embeddings:
                at = int(placeholders[np.searchsorted(placeholders, at)])
                rows, positions, start = self._rows(part, ids, at)
                corner = 0 if start == 0 else mrope_positions[:, start - 1].max() + 1
                mrope_positions[:, at : at + len(part)] = corner + positions.T.to(mrope_positions)
                rows_of_slices.append(rows)
                at += len(part)
            delta = int(mrope_positions.max()) + 1 - length
        return rows_of_slices, mrope_positions, delta

    def _rows(self, part: torch.Tensor, ids: np.ndarray, at: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Return the rows and positions of a slice, and where its picture begins; its first token stands at `at`."""
        if not self._settings.reads_prompt:
            start = at
            while start and ids[start - 1] == ids[at]:
                start -= 1
            return *split_positions(part), start
        recorded_columns = 0 if self._recorder is None else self._recorder.columns.count
        item = unfold(part, self._hidden_size + recorded_columns + POSITION_COLUMNS)
        rows, positions = split_positions(item.rows)
        place = Place(ids, at - item.start, item.places)
        # positions of time may be stretched, so the frames are counted
        height, width = (int(positions[-1, axis]) + 1 for axis in (1, 2))
        grid = (len(rows) // (height * width), height, width)
        rows, positions = self._staying(rows, positions, grid, place)
        here = slice(item.start, item.start + len(part))
        return rows[here], positions[here], place.start

    @property
    def _hidden_size(self) -> int:
        size: int = self.config.get_text_config().hidden_size
        return size


def check_worker(worker: str) -> None:
    """Refuse vLLM's CPU worker, whose runner leaves pruning off and would feed placeholders with rows of another width.

    Raises:
        ValueError: names the worker to pass instead.
    """
    if current_platform.is_cpu() and worker == "vllm.v1.worker.cpu_worker.CPUWorker":
        raise ValueError(
            f"worker_cls: expected {_CPU_WORKER!r} on a CPU, got {worker!r}, which leaves pruning off; pass "
            f"--worker-cls {_CPU_WORKER}"
        )


def _markers(model_config: Any) -> Markers:
    config = model_config.hf_config
    generation = SimpleNamespace(**model_config.try_get_generation_config())
    ends = next(family.end_of_turn_ids for family in FAMILIES if family.model_type == config.model_type)
    return find_markers(SimpleNamespace(config=config, generation_config=generation), ends)


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2_5_VLProcessor, info=Qwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class HawkQwen2_5_VLForConditionalGeneration(PrunesVisualTokens, Qwen2_5_VLForConditionalGeneration):  # type: ignore[misc]  # noqa: N801
    """Qwen2.5-VL with pruning."""

    def _postprocess_image_embeds_evs(self, image_embeds_split: Any, image_input: Any) -> tuple[torch.Tensor, ...]:
        grids = image_input["image_grid_thw"].tolist()
        return tuple(self._packed(rows, grid) for rows, grid in zip(image_embeds_split, grids, strict=True))

    def _postprocess_video_embeds_evs(self, video_embeds_split: Any, video_input: Any) -> tuple[torch.Tensor, ...]:
        grids = video_input["video_grid_thw"].tolist()
        given = video_input.get("second_per_grid_ts")
        seconds = [1.0] * len(grids) if given is None else given.flatten().tolist()
        speed = self.config.vision_config.tokens_per_second
        return tuple(
            self._packed(rows, grid, speed * interval)
            for rows, grid, interval in zip(video_embeds_split, grids, seconds, strict=True)
        )


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2VLProcessor, info=Qwen2VLProcessingInfo, dummy_inputs=Qwen2VLDummyInputsBuilder
)
class HawkQwen2VLForConditionalGeneration(PrunesVisualTokens, Qwen2VLForConditionalGeneration):  # type: ignore[misc]
    """Qwen2-VL with pruning."""

    def _process_image_input(self, image_input: Any) -> tuple[torch.Tensor, ...]:
        grids = image_input["image_grid_thw"].tolist()
        rows_of_items = super()._process_image_input(image_input)
        return tuple(self._packed(rows, grid) for rows, grid in zip(rows_of_items, grids, strict=True))

    def _process_video_input(self, video_input: Any) -> tuple[torch.Tensor, ...]:
        grids = video_input["video_grid_thw"].tolist()
        rows_of_items = super()._process_video_input(video_input)
        return tuple(self._packed(rows, grid) for rows, grid in zip(rows_of_items, grids, strict=True))

    def get_encoder_cudagraph_config(self) -> Any:
        """Leave the encoder without CUDA graphs, which would pass over the pruning of what it returns."""
        config = super().get_encoder_cudagraph_config()
        config.modalities = []
        return config
