"""Ways to break pruning, which the fuzzer must notice: what it does not notice, it does not prove."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from hawk_kernels.hf.choose_tokens import Chooser
from hawk_kernels.hf.layer_cuts import PromptCut
from hawk_kernels.hf.packing import Packing
from hawk_kernels.hf.prune import Pruning
from hawk_kernels.hf.pruned_cache import CachedPrompt


class Mutant(NamedTuple):
    """A change of one function of the package.

    Attributes:
        name: of the mutant.
        owner: has the function.
        function: its name.
        broken: makes the broken function of the right one.
        modes: of the cases that are to show it; all where empty.
    """

    name: str
    owner: type
    function: str
    broken: Callable[[Callable[..., Any]], Callable[..., Any]]
    modes: tuple[str, ...] = ()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Break the package for the time of a block."""
        right = vars(self.owner)[self.function]
        setattr(self.owner, self.function, self.broken(right))
        try:
            yield
        finally:
            setattr(self.owner, self.function, right)


def _then(change: Callable[[Any], None]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """After the right function, change its object."""

    def broken(right: Callable[..., Any]) -> Callable[..., Any]:
        def function(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = right(self, *args, **kwargs)
            change(self)
            return result

        return function

    return broken


def _giving(change: Callable[[Any], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Change what the right function returns."""

    def broken(right: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: change(right(*args, **kwargs))

    return broken


def _number_again(packing: Packing) -> None:
    if packing.position_ids is not None:
        packing.position_ids = torch.arange(packing.length).expand_as(packing.position_ids)


def _forget_the_mask(packing: Packing) -> None:
    packing.mask = torch.ones_like(packing.mask)


def _cut_the_gradient(packing: Packing) -> None:
    packing.inputs_embeds = packing.inputs_embeds.detach()


def _drop_another(choice: Any) -> Any:
    """One visual token of each row less than chosen."""
    kept, counts = choice.kept.clone(), list(choice.counts)
    for row, scored in enumerate(choice.kept & (choice.scores > -torch.inf)):
        if scored.sum() > 1:
            kept[row, scored.nonzero()[0]] = False
            counts[row] -= 1
    return type(choice)(kept, counts, choice.scores, choice.budgets, choice.merge)


def _leave_a_hook(pruning: Pruning) -> None:
    pruning._anatomy.text.register_forward_hook(lambda *_: None)


def _first_angles(right: Callable[..., Any]) -> Callable[..., Any]:
    """The angles of the first tokens for those that stayed."""

    def angles(self: PromptCut, whole: torch.Tensor) -> torch.Tensor:
        return right(self, whole).roll(1, dims=-2)

    return angles


MUTANTS = [
    Mutant("positions are numbered again", Packing, "__init__", _then(_number_again)),
    Mutant("the mask is forgotten", Packing, "__init__", _then(_forget_the_mask)),
    Mutant("the gradient ends at the text model", Packing, "__init__", _then(_cut_the_gradient), ("gradient",)),
    Mutant("one token too few", Chooser, "choose", _giving(_drop_another)),
    Mutant("a hook stays", Pruning, "__exit__", _then(_leave_a_hook)),
    Mutant("the next position is the one before", CachedPrompt, "positions_for", _giving(lambda ids: ids - 1)),
    Mutant("angles of other tokens inside the stack", PromptCut, "_angles", _first_angles),
    Mutant("hidden states come back elsewhere", Packing, "unpack", _giving(lambda states: states.roll(1, dims=1))),
]
