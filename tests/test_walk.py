"""How many files a stranger reads to follow one call: the house stays one that can be walked through."""

import sys
import threading
from pathlib import Path

import torch

import hawk_kernels
from hawk_kernels import prune
from tests.tiny_models import Picture, question, qwen_batch, qwen_vl

MOST = 24
PACKAGE = f"{Path(hawk_kernels.__file__).parent}/"


def files_that_run(call):
    """Each file of the package in which `call` runs a function, with the names of these functions.

    The body of a module does not count: importing is not walking.
    """
    ran = {}

    def note(frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_name != "<module>" and code.co_filename.startswith(PACKAGE):
            ran.setdefault(code.co_filename.removeprefix(PACKAGE), set()).add(code.co_name)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return ran


def test_one_pruned_generation_walks_through_few_files():
    model, inputs = qwen_vl(layers=2), qwen_batch(question(Picture(4, 4)))

    def call():
        with prune(model, 0.2, head_weights="uniform"):
            model.generate(**inputs, max_new_tokens=3, do_sample=False)

    ran = files_that_run(call)
    assert {"hf/prune.py", "methods/hawk.py"} <= ran.keys()
    walk = "\n".join(f"  {file}: {', '.join(sorted(names))}" for file, names in sorted(ran.items()))
    assert len(ran) <= MOST, f"expected at most {MOST} files, got {len(ran)}:\n{walk}"


def test_the_tracer_sees_what_runs_in_threads_too():
    model = qwen_vl(layers=1)

    def call():
        thread = threading.Thread(target=prune, args=(model, 0.2), kwargs={"head_weights": torch.ones(4)})
        thread.start()
        thread.join()

    assert "hf/anatomy.py" in files_that_run(call)
