"""Lets PyPI's torchvision, which is built for CUDA, be imported beside a torch for CPUs.

Python imports a module of this name when it starts, if its folder is on the path. torchvision registers a fake kernel
for its operators `nms` and `qnms`, which only its CUDA library defines; here they are declared first. Nothing in the
tests calls them.
"""

import sys


class _DeclareOperators:
    """Finds nothing; declares the operators when torchvision is about to be imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            global _library
            _library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _DeclareOperators())
