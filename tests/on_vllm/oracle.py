"""What transformers and `prune` answer: token ids, log-probabilities and prompt lengths."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from hawk_kernels import prune
from hawk_kernels.checkpoint import load_processor
from hawk_kernels.methods import Method
from hawk_kernels.methods.base import merged_segments
from hawk_kernels.methods.prefill_view import PrefillView
from hawk_kernels.selection import Selection
from tests.on_vllm.questions import Asked

NEW_TOKENS = 3


class OfEachPicture(Method):
    """A method that looks at one picture at a time, as it does in vLLM, instead of at all pictures of a prompt.

    The two differ where a method normalises scores over the visual tokens, in prompts with several pictures.
    """

    def __init__(self, method: Method) -> None:
        self._method = method
        self.name = f"{method.name} of each picture"
        self.uses_head_weights, self.uses_text = method.uses_head_weights, method.uses_text
        self.rounding = method.rounding

    def score(self, view: PrefillView) -> torch.Tensor:
        raise NotImplementedError("select does not need it")

    def select(self, view: PrefillView, r: float | int) -> Selection:
        segments = view.segments
        assert segments is not None
        scores, kept = torch.full(view.candidates.shape, -torch.inf), []
        for index, mask in zip(segments.index, segments.mask, strict=True):
            own = torch.zeros(view.candidates.numel(), dtype=torch.bool)
            own[index[mask]] = True
            own = own.view(view.candidates.shape)
            selection = self._method.select(OnePicture(view, own), r)
            scores = torch.where(own, selection.scores, scores)
            kept.append(selection.mask.reshape(-1)[index] & mask)
        return merged_segments(torch.stack(kept), scores, segments)


class OnePicture:
    """A view of a prompt in which only some of the visual tokens are candidates."""

    def __init__(self, view: PrefillView, candidates: torch.Tensor) -> None:
        self._view = view
        self.candidates = candidates
        self.segments = None

    def hidden_states(self) -> None:
        """Make the method project the tokens, since the scores of all pictures together are none of theirs."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)


@torch.no_grad()
def answers(
    folder: str, asked: list[Asked], keep_ratio: float, method: str | Method | None, **options: Any
) -> list[dict[str, Any]]:
    """Answer greedily, one question at a time.

    Returns:
        For each question `ids`, `logprobs` of these, `kept` visual tokens and the `prompt`'s length with these alone.
    """
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = load_processor(folder)
    found = []
    pruning = None if method is None else prune(model, keep_ratio, method=method, budget="per_image", **options)
    with pruning or nullcontext():
        for one in asked:
            text = processor.apply_chat_template(one.messages(), add_generation_prompt=True, tokenize=False)
            inputs = processor(text=[text], images=one.pictures or None, **_videos(one), return_tensors="pt")
            out = model.generate(
                **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            length = inputs["input_ids"].shape[1]
            ids = out.sequences[0, length:].tolist()
            steps = zip(out.logits, ids, strict=True)
            logprobs = [float(step[0].log_softmax(-1)[token]) for step, token in steps]
            prompt = length if pruning is None else pruning.stats.samples[0].prompt_tokens_after
            found.append({"ids": ids, "logprobs": logprobs, "prompt": prompt})
    return found


def _videos(asked: Asked) -> dict[str, Any]:
    """Return the arguments of a processor that describe the videos of a question."""
    from transformers.video_utils import VideoMetadata

    if not asked.videos:
        return {}
    return {
        "videos": [video.frames for video in asked.videos],
        "video_metadata": [VideoMetadata(**video.metadata()) for video in asked.videos],
        "do_sample_frames": False,
    }
