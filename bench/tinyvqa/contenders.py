"""The methods that the table compares, as data: a label, a name in `hawk_kernels.methods.METHODS`, and options.

A method joins the table by a line here; `python -m bench.tinyvqa.table` then asks only what its journal does not have.

A keep ratio is what is left in the end. Equal average cost would be fairer to methods that drop inside the stack, but
on so few layers it is out of reach: FastV after layer 2 of 3 reads two thirds of the tokens at least. So the table says
beside the accuracy what the layers read on average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hawk_kernels.evaluation import Contender as Compared

HAWK = "HAWK, L2"
KEEP_RATIOS = (0.4, 0.2, 0.1, 0.05)


@dataclass(frozen=True)
class Contender:
    """A line of the table.

    Attributes:
        label: what the table calls it.
        method: its name in `METHODS`.
        options: of the method.
        after: the layer after which it chooses, counted from 1; None leaves that to the method.
        heads: "first" or "all", weights calibrated by hiding heads of the first layer or of all layers; "uniform"; or
            the seed of a permutation of those of the first layer; None for a method without head weights.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    heads: str | int | None = None
    after: int | None = None

    def stages(self, ratio: float, depth: int) -> dict[int, float]:
        """List after which layers of a text model of `depth` layers which share of the visual tokens is left.

        Layer 0 stands for before the first.
        """
        from hawk_kernels.methods import resolve_method

        if self.after:
            return {self.after: ratio}
        stages = resolve_method(self.method, dict(self.options)).stages(ratio, depth)
        return {layer: float(str(share)) for layer, share in sorted(stages.items())}

    def mean_share(self, ratio: float, depth: int) -> float:
        """Return the share of the visual tokens that a layer reads, the mean over `depth` layers."""
        total, share, last = 0.0, 1.0, 0
        for layer, left in self.stages(ratio, depth).items():
            total, share, last = total + share * (layer - last), left, layer
        return (total + share * (depth - last)) / depth

    def head_weights(self, calibrated: Mapping[str, torch.Tensor]) -> Any:
        """What `prune` takes as `head_weights`, from the weights calibrated in the "first" and in "all" layers."""
        if isinstance(self.heads, int):
            generator = torch.Generator().manual_seed(self.heads)
            weights = calibrated["first"]
            return weights[torch.randperm(len(weights), generator=generator)]
        return calibrated.get(self.heads, self.heads) if self.heads else None

    def with_heads(self, calibrated: Mapping[str, torch.Tensor]) -> Compared:
        """Return the method with its head weights, as `hawk_kernels.evaluation` compares it."""
        return Compared(self.label, self.method, self.options, self.after, self.head_weights(calibrated))


CONTENDERS = (
    Contender(HAWK, "hawk", {"normalize": "l2"}, "first"),
    Contender("HAWK, no norm", "hawk", {"normalize": None}, "first"),
    Contender("HAWK, heads of all layers, L2", "hawk", {"normalize": "l2"}, "all"),
    Contender("uniform heads, L2", "hawk", {"normalize": "l2"}, "uniform"),
    Contender("uniform heads, no norm", "hawk", {"normalize": None}, "uniform"),
    Contender("permuted heads 1, L2", "hawk", {"normalize": "l2"}, 1),
    Contender("permuted heads 2, L2", "hawk", {"normalize": "l2"}, 2),
    Contender("permuted heads 3, L2", "hawk", {"normalize": "l2"}, 3),
    Contender("HAWK, maximum over text", "hawk", {"reduce": "max"}, "first"),
    Contender("uniform heads, maximum over text", "hawk", {"reduce": "max"}, "uniform"),
    Contender("HAWK with RoPE, L2", "hawk_rope", {"normalize": "l2"}, "first"),
    Contender("FastV, K = 1", "fastv", {"layer": 1}),
    Contender("FastV, K = 2", "fastv", {"layer": 2}),
    Contender("CDPruner", "cdpruner"),
    Contender("CDPruner, maximum over text", "cdpruner", {"text": "max"}),
    Contender("Heed", "heed"),
    Contender("PyramidDrop", "pyramiddrop"),
    Contender("SparseVLM", "sparsevlm"),
    Contender("SparseVLM, recycling", "sparsevlm", {"recycle": True}),
    Contender("DivPrune", "divprune"),
    Contender("DART", "dart"),
    Contender("DART, after layer 2", "dart", after=2),
    Contender("key norm", "key_norm"),
    Contender("HiPrune", "hiprune"),
    Contender("FasterVLM", "fastervlm"),
    Contender("VisPruner", "vispruner"),
    Contender("HoloV", "holov"),
    Contender("VisionZip", "visionzip"),
    Contender("PruMerge", "prumerge"),
    Contender("PruMerge, 4 neighbours", "prumerge", {"neighbours": 4}),
    Contender("PruMerge+, 4 neighbours", "prumerge", {"plus": True, "neighbours": 4}),
    Contender("PruMerge+", "prumerge", {"plus": True}),
    Contender("VScan", "vscan"),
    Contender("MMTok", "mmtok"),
    Contender("EVS", "evs"),
    Contender("VidCom2", "vidcom2"),
    Contender("random", "random", {"seed": 0}),
    Contender("down-sampling", "downsample"),
)


def check_contenders(contenders: Sequence[Contender]) -> None:
    """Stop before the work where a method is not there, or does not know an option.

    Raises:
        SystemExit: names every one of them.
    """
    from hawk_kernels.methods import resolve_method

    problems = []
    for contender in contenders:
        try:
            resolve_method(contender.method, dict(contender.options))
        except (TypeError, ValueError) as error:
            problems.append(f"{contender.label}: {error}")
    if problems:
        raise SystemExit("error: " + "\n       ".join(problems))
