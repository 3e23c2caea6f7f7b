"""vLLM's models with pruning: what the encoder returns, what the language model reads, and where its tokens stand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeProcessingInfo
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from hawk_kernels.head_weights import resolve_head_weights
from hawk_kernels.hf.choose_tokens import Chooser
from hawk_kernels.hf.families import FAMILIES
from hawk_kernels.hf.question import Markers, find_markers
from hawk_kernels.vllm.choosing import Grid, PictureChooser, Place
from hawk_kernels.vllm.folding import Noted, Unfolded, fold, unfold
from hawk_kernels.vllm.positions import Media, media_positions, positions_among_texts, prompt_positions
from hawk_kernels.vllm.processing import Qwen2_5_VLProcessor, Qwen2VLProcessor, Qwen3VLProcessor, frame_texts
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
        # the class of vLLM that comes next takes these
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
            hidden_size=self._hidden_size,
        )

    def _packed(self, rows: torch.Tensor, patches: Sequence[int], seconds: float = 1.0) -> torch.Tensor:
        """Turn the `n` rows of a picture or video into the `K` that vLLM caches, with their positions."""
        grid = self._grid(patches)
        positions = torch.from_numpy(media_positions(*grid, seconds)).to(rows.device)
        return self._cached(Noted(rows, positions, torch.ones_like(positions[:, 0], dtype=torch.bool)), grid)

    def _packed_images(self, rows_of_images: Iterable[torch.Tensor], image_input: Any) -> tuple[torch.Tensor, ...]:
        grids = image_input["image_grid_thw"].tolist()
        return tuple(self._packed(rows, grid) for rows, grid in zip(rows_of_images, grids, strict=True))

    def _grid(self, patches: Sequence[int]) -> Grid:
        """Count the frames of a picture or video, and the lines and columns of its visual tokens."""
        frames, height, width = patches
        side = self.visual.spatial_merge_size
        return frames, height // side, width // side

    def _cached(self, item: Noted, grid: Grid) -> torch.Tensor:
        """Return what vLLM caches of a picture or video: one row for each of its placeholders."""
        if self._settings.reads_prompt:
            num_visual = grid[0] * grid[1] * grid[2]
            dropped = num_visual - self._settings.kept_count(num_visual)
            return fold(item.joined(), len(item.rows) - dropped, grid)
        return self._staying(item, grid).joined()

    def _staying(self, item: Noted, grid: Grid, place: Place | None = None) -> Noted:
        """Choose among the visual rows of a picture or video, and take off what was recorded of them in the encoder.

        Its texts stay.
        """
        rows, recorded = item.rows, None
        # unlike a mask, an order is found without waiting for the device
        order = item.visual.int().argsort(descending=True, stable=True)
        visual, texts = order.tensor_split([grid[0] * grid[1] * grid[2]])
        if self._recorder is not None:
            rows, of_all = self._recorder.columns.separated(rows)
            recorded = {name: values[visual] for name, values in of_all.items()}
        places, merged = self._chooser.choose(rows[visual], grid, place, recorded)
        group = get_tp_group()
        if group.world_size > 1:
            # ranks that differed in a single token would compute nonsense together
            places = group.broadcast(places.contiguous(), src=0)
            merged = None if merged is None else group.broadcast(merged.contiguous(), src=0)
        if merged is not None:
            rows = rows.index_copy(0, visual[places], merged)
        stays = torch.cat([visual[places], texts]).sort().values
        return Noted(rows[stays], item.positions[stays], item.visual[stays])

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[torch.Tensor, int]:
        """Lay out the positions of a prompt whose placeholders are already as many as its tokens that stay."""
        positions, delta = prompt_positions(len(input_tokens), self._media(mm_features))
        return torch.from_numpy(positions), delta

    def _media(self, mm_features: list[Any]) -> Iterator[Media]:
        ordered = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        # a method of the class of vLLM that comes next
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
        rows_of_slices = []
        with gpu_sync_allowed():
            if len(multimodal_embeddings):
                ids = np.asarray(input_ids.cpu() if isinstance(input_ids, torch.Tensor) else input_ids, dtype=np.int64)
                placeholders = np.flatnonzero(np.isin(ids, self._chooser.visual_token_ids))
                mrope_positions = mrope_positions.clone()
            at = num_computed_tokens
            for part in multimodal_embeddings:
                item = unfold(part) if self._settings.reads_prompt else Noted.separated(part)
                if item.start == 0:
                    # the first place of an item is a placeholder, the last ones need not be
                    at = int(placeholders[np.searchsorted(placeholders, at)])
                start = at - item.start
                rows, positions = self._in_prompt(item, ids, start, len(part))
                corner = 0 if start == 0 else mrope_positions[:, start - 1].max() + 1
                mrope_positions[:, at : at + len(part)] = corner + positions.T.to(mrope_positions)
                rows_of_slices.append(rows)
                at += len(part)
            # not after the largest one: a video can last longer than the text after it stands away
            delta = int(mrope_positions[:, -1].max()) + 1 - len(input_ids)
        return rows_of_slices, mrope_positions, delta

    def _in_prompt(
        self, item: Noted | Unfolded, ids: np.ndarray, start: int, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows and positions of a slice, `length` places of an item that begins at `start` of the prompt."""
        if isinstance(item, Noted):
            return item.rows, item.positions
        whole = Noted.separated(item.rows)
        place = Place(ids, start, item.places, whole.visual.cpu().numpy())
        staying = self._staying(whole, item.grid, place)
        part = slice(item.start, item.start + length)
        return staying.rows[part], staying.positions[part]

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
class HawkQwen2_5_VLForConditionalGeneration(PrunesVisualTokens, Qwen2_5_VLForConditionalGeneration):  # noqa: N801
    """Qwen2.5-VL with pruning."""

    def _postprocess_image_embeds_evs(self, image_embeds_split: Any, image_input: Any) -> tuple[torch.Tensor, ...]:
        return self._packed_images(image_embeds_split, image_input)

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
class HawkQwen2VLForConditionalGeneration(PrunesVisualTokens, Qwen2VLForConditionalGeneration):
    """Qwen2-VL with pruning."""

    def _process_image_input(self, image_input: Any) -> tuple[torch.Tensor, ...]:
        return self._packed_images(super()._process_image_input(image_input), image_input)

    def _process_video_input(self, video_input: Any) -> tuple[torch.Tensor, ...]:
        grids = video_input["video_grid_thw"].tolist()
        rows_of_items = super()._process_video_input(video_input)
        return tuple(self._packed(rows, grid) for rows, grid in zip(rows_of_items, grids, strict=True))

    def get_encoder_cudagraph_config(self) -> Any:
        """Leave the encoder without CUDA graphs, which would pass over the pruning of what it returns."""
        config = super().get_encoder_cudagraph_config()
        config.modalities = []
        return config


class PrunesVideosWithTimestamps(PrunesVisualTokens):
    """Adds pruning to Qwen3-VL, which writes a video as one run of visual tokens for each frame, with texts between.

    How many tokens of a frame stay depends on the video, but vLLM wants to know first where text stands. In the prompt,
    therefore, the placeholders of all frames come first and the texts after them, and all of these are placeholders in
    what vLLM replaces: frames and texts, each in its place.

    The rows of a visual token are those that enter the language model and, beside them in further columns, the ones
    that are added after its first layers (DeepStack). They are dropped together. Nothing is added to text.
    """

    _tokenizer: Any

    def _postprocess_image_embeds_evs(self, image_embeds_split: Any, image_input: Any) -> tuple[torch.Tensor, ...]:
        return self._packed_images(image_embeds_split, image_input)

    def _postprocess_video_embeds_evs(self, video_embeds_split: Any, video_input: Any) -> tuple[torch.Tensor, ...]:
        grids = video_input["video_grid_thw"].tolist()
        return tuple(
            self._packed_video(rows, grid, timestamps)
            for rows, grid, timestamps in zip(video_embeds_split, grids, video_input["timestamps"], strict=True)
        )

    def _packed_video(self, rows: torch.Tensor, patches: Sequence[int], timestamps: Iterable[float]) -> torch.Tensor:
        """Turn the rows of a video into what vLLM caches, with the texts between its frames."""
        grid = self._grid(patches)
        _, height, width = grid
        config = self.config
        texts = frame_texts(self._tokenizer, timestamps, config.vision_start_token_id, config.vision_end_token_id)
        frame = [config.video_token_id] * (height * width)
        ids = torch.tensor([token for text in texts[:-1] for token in [*text, *frame]] + texts[-1])
        visual = ids == config.video_token_id
        positions = torch.from_numpy(positions_among_texts(visual.numpy(), height, width)).to(rows.device)
        visual = visual.to(rows.device)
        item = rows.new_zeros(len(ids), rows.shape[1])
        item[visual] = rows
        item[~visual, : self._hidden_size] = self._chooser.embed(ids.to(rows.device)[~visual]).to(rows.dtype)
        return self._cached(Noted(item, positions, visual), grid)

    def _media(self, mm_features: list[Any]) -> Iterator[Media]:
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            frames, height, width = self._grid(feature.data[f"{feature.modality}_grid_thw"].data.tolist())
            places = feature.mm_position.length
            texts = places - self._settings.kept_count(frames * height * width)
            yield Media(feature.mm_position.offset, places, frames, height, width, texts=texts)


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor, info=Qwen3VLProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class HawkQwen3VLForConditionalGeneration(PrunesVideosWithTimestamps, Qwen3VLForConditionalGeneration):
    """Qwen3-VL with pruning."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor, info=Qwen3VLMoeProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class HawkQwen3VLMoeForConditionalGeneration(PrunesVideosWithTimestamps, Qwen3VLMoeForConditionalGeneration):
    """Qwen3-VL with experts, and with pruning."""
