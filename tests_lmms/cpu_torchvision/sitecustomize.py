"""Let torchvision import where its package is built for CUDA and torch is not, as on an index without CPU builds.

Python imports this at its start where PYTHONPATH has the folder. torchvision registers shape functions of two operators
that its compiled library would have defined; they are declared here, and nothing in these tests calls them.
"""

import torch

_torchvision = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _torchvision.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
