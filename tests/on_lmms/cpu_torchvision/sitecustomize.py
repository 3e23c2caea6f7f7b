"""Let torchvision import where its wheel is built for CUDA and torch is not, as on an index without CPU builds.

Python imports this at its start where PYTHONPATH has the folder. torchvision registers shape functions of two operators
that its compiled library would have defined; they are declared here, and nothing in these tests calls them.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

_found = find_spec("torchvision")
_version = Path(_found.origin).with_name("version.py").read_text() if _found and _found.origin else ""
if torch.version.cuda is None and "+cu" in _version:
    _operators = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
