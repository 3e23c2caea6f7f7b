"""A tiny Qwen2.5-VL that answers questions about coloured digits, and everything needed to train and check it.

* `python -m bench.tinyvqa.train --out hawk_kernels/assets/tinyvqa` trains the shipped checkpoint.
* `python -m bench.tinyvqa.evaluate` measures it on held-out digits, whole and pruned.
* `python -m bench.tinyvqa.samples` writes the sample pictures and the README overlay.
"""
