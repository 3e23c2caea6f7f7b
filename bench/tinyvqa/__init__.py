"""A synthetic VQA, tiny Qwen2.5-VL models that answer it, and a comparison of the pruning methods.

* `python -m bench.tinyvqa.train --out FOLDER --seed N` trains a checkpoint; `hawk_kernels/assets/tinyvqa` is seed 2.
* `python -m bench.tinyvqa.evaluate` measures it on held-out digits.
* `hawk-kernels calibrate --model FOLDER --data tinyvqa` measures its head weights on training digits.
* `python -m bench.tinyvqa.table` compares pruning methods on held-out digits.
* `python -m bench.tinyvqa.samples` writes the sample pictures and the README's overlays.
"""
