"""An evaluation that takes a second: `python -m tests.evaluation_job OUT PAUSE`, to be killed or launched twice."""

import sys

import torch

from tests.calibration_job import Reader, Riddles, tiny_model

if __name__ == "__main__":
    from hawk_kernels.evaluation import evaluate

    torch.set_num_threads(1)
    task = Riddles("one", 5, float(sys.argv[2]))
    out, methods = sys.argv[1], ["divprune", "random"]
    evaluate(tiny_model(), task, methods=methods, keep=[0.5], processor=Reader(), out=out, progress=False)
