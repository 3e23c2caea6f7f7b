"""A calibration that takes a second or two: a tiny model with random weights, and tasks whose scores depend on answers.

`python -m tests.calibration_job OUT` runs it as a process of its own, to be killed or launched several times.
"""

import sys
import time
import zlib
from dataclasses import dataclass, field

import torch

from hawk_kernels.calibration import Sample
from tests.tiny_models import Picture, question, qwen_batch, qwen_vl

NUM_HEADS = 4


class Reader:
    """Stands for a tokenizer: an answer is the numbers of its tokens."""

    def decode(self, tokens, skip_special_tokens=True):
        return " ".join(map(str, tokens))


@dataclass
class Riddles:
    """Prompts with random pictures; the worth of an answer is a hash of it, so that every head counts."""

    name: str
    count: int = 6
    pause: float = 0.0
    max_new_tokens: int = 2
    asked: list = field(default_factory=list)

    @property
    def samples(self):
        return [Sample(str(i), f"riddle {i}", details={"seed": i}) for i in range(self.count)]

    def prompt(self, sample):
        return sample.question

    def encode(self, sample, processor):
        self.asked.append(sample.key)
        time.sleep(self.pause)
        seed = sample.details["seed"]
        return qwen_batch(question(Picture(2, 2 + seed % 2), seed=seed), seed=seed)

    def score(self, sample, answer):
        return zlib.crc32(f"{self.name} {sample.key} {answer}".encode()) % 1001 / 1000


def tiny_model():
    return qwen_vl(heads=NUM_HEADS, layers=2)


def tasks(pause=0.0):
    return [Riddles("one", 7, pause), Riddles("two", 6, pause)]


if __name__ == "__main__":
    from hawk_kernels import calibrate

    torch.set_num_threads(1)
    calibrate(
        tiny_model(), tasks(float(sys.argv[2])), processor=Reader(), out=sys.argv[1], layers="both", progress=False
    )
