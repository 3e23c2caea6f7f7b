"""What transformers and `prune` answer: token ids, log-probabilities and prompt lengths."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from hawk_kernels import prune
from hawk_kernels.checkpoint import load_processor
from hawk_kernels.methods import Method
from hawk_kernels.methods.base import merged_segments
from hawk_kernels.methods.hawk import Hawk
from hawk_kernels.methods.prefill_view import PrefillView
from hawk_kernels.ops.score_and_select import score_tokens
from hawk_kernels.ops.select_topk import select_topk
from hawk_kernels.selection import Selection
from tests_vllm.questions import Asked

NEW_TOKENS = 3


class HawkOfEachPicture(Hawk):
    """HAWK that normalises over each picture by itself, as in vLLM, instead of over all pictures of a prompt."""

    name = "hawk_of_each_picture"

    def select(self, view: PrefillView, r: float | int) -> Selection:
        queries, query_mask = view.mean_text_query()
        segments = view.segments
        assert segments is not None
        keys = view.visual_keys()
        scores = torch.full(view.candidates.shape, -torch.inf)
        kept = []
        for index, mask in zip(segments.index, segments.mask, strict=True):
            own = torch.zeros_like(view.candidates.reshape(-1))
            own[index[mask]] = True
            own = own.view(view.candidates.shape)
            found = score_tokens(
                queries, keys, view.head_weights, q_mask=query_mask, k_mask=own, normalize=self.normalize
            )
            scores = torch.where(own, found, scores)
            kept.append(select_topk(found.reshape(1, -1)[:, index], r, mask=mask[None], rounding=self.rounding).mask[0])
        return merged_segments(torch.stack(kept), scores, segments)


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
            inputs = processor(text=[text], images=one.pictures, return_tensors="pt")
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
