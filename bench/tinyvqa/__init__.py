"""A synthetic VQA, two makes of miniature that answer it, and a comparison of the pruning methods on them.

* `python -m bench.tinyvqa.train --out FOLDER --make MAKE --seed N` trains a checkpoint; `hawk_kernels/assets/tinyvqa`
  is seed 2 of "qwen", and `bench/tinyvqa/models/llava` is seed 0 of "llava".
* `python -m bench.tinyvqa.evaluate` measures it on held-out digits.
* `hawk-kernels calibrate --model FOLDER --data tinyvqa` measures its head weights on training digits.
* `python -m bench.tinyvqa.table --miniature NAME` compares pruning methods on held-out digits.
* `python -m bench.tinyvqa.alignment` measures how near visual tokens are to the words for what they show.
* `python -m bench.tinyvqa.samples` writes the sample pictures and the README's overlays.
"""
