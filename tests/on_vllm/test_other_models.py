"""Other architectures than Qwen2.5-VL, with random weights."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from hawk_kernels.methods import METHODS
from tests.on_vllm.checkpoint import write_qwen2_vl, write_qwen3_vl, write_qwen3_vl_moe
from tests.on_vllm.engine import CHUNKS, SMALL_BLOCKS
from tests.on_vllm.oracle import OfEachPicture

TOLERANCE = 1e-4
OF_EACH_KIND = 4


@pytest.fixture
def compare(served, expected, count_equal, tmp_path):
    """Return a function that writes a model, asks it by several methods, and compares all answers."""

    def compare(model_name, write, methods, *, keep=0.4, videos=False, of_each_kind=OF_EACH_KIND, **job):
        model = write(tmp_path)
        hawks = [{"method": name, **_head_weights(name)} for name in methods]
        # these two normalise scores over the visual tokens
        asked = [OfEachPicture(METHODS[name]()) if name in ("hawk", "heed") else name for name in methods]
        of_both = {"videos": videos, "of_each_kind": of_each_kind, "model": model}
        with ThreadPoolExecutor(1) as meanwhile:
            answers = meanwhile.submit(
                served, 1 - keep, hawks, architecture=f"Hawk{model_name}ForConditionalGeneration", **of_both, **job
            )
            wanted = [
                expected(keep, method, **of_both, **_head_weights(name))
                for name, method in zip(methods, asked, strict=True)
            ]
        every = answers.result()
        for name, of_vllm, of_prune in zip(methods, every, wanted, strict=True):
            assert len({tuple(answer["ids"]) for answer in of_prune}) >= 3
            what = "videos" if videos else "pictures"
            equal, worst = count_equal(f"{model_name} of random weights, {what}, {name}, {keep:.0%}", of_vllm, of_prune)
            assert equal == len(of_prune)
            assert worst < TOLERANCE
            assert [answer["prompt"] for answer in of_vllm] == [answer["prompt"] for answer in of_prune]
        return every

    return compare


def _head_weights(method):
    return {"head_weights": "uniform"} if method == "hawk" else {}


def test_qwen2_vl(compare):
    compare("Qwen2VL", write_qwen2_vl, ["divprune", "cdpruner"])


def test_qwen2_vl_reads_videos(compare):
    compare("Qwen2VL", write_qwen2_vl, ["evs", "vidcom2", "hawk"], videos=True)


def test_qwen3_vl(compare):
    compare("Qwen3VL", write_qwen3_vl, ["divprune", "downsample", "cdpruner", "heed", "hawk"])


def test_qwen3_vl_reads_videos(compare):
    """Texts stand between the frames, and each method keeps other numbers of tokens of them."""
    compare("Qwen3VL", write_qwen3_vl, ["evs", "vidcom2", "divprune", "cdpruner", "hawk"], videos=True)


def test_qwen3_vl_reads_videos_in_chunks_with_a_prefix_cache(compare):
    twice = [list(range(7 * OF_EACH_KIND))] * 2
    methods = ["evs", "cdpruner", "hawk"]
    for found in compare(
        "Qwen3VL", write_qwen3_vl, methods, keep=0.5, videos=True, rounds=twice, **SMALL_BLOCKS, **CHUNKS
    ):
        assert sum(answer["cached"] for answer in found) > 0


def test_qwen3_vl_with_experts(compare):
    """Some of the questions are about pictures too."""
    compare("Qwen3VLMoe", write_qwen3_vl_moe, ["divprune", "evs", "cdpruner"], videos=True, of_each_kind=2)


OF_THE_ENCODER = ["hiprune", "vispruner", "prumerge", "mmtok"]


@pytest.mark.parametrize("videos", [False, True], ids=["pictures", "videos"])
def test_qwen3_vl_with_methods_that_read_the_encoder(compare, videos):
    compare("Qwen3VL", write_qwen3_vl, OF_THE_ENCODER, videos=videos)


def test_qwen2_vl_reads_videos_with_methods_that_read_the_encoder(compare):
    compare("Qwen2VL", write_qwen2_vl, OF_THE_ENCODER, videos=True)
