"""The methods of a comparison, read with their options from a command line, and the `prune` block of each."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hawk_kernels.evaluation.stages import Stages
from hawk_kernels.head_weights import find_weights_file
from hawk_kernels.hf.prune import KeepRatio, prune
from hawk_kernels.hf.stages import named_stages
from hawk_kernels.methods import METHODS, Method, resolve_method
from hawk_kernels.recipes import RECIPES

_WORDS: dict[str, Any] = {"none": None, "null": None, "true": True, "false": False}
_NOT_OPTIONS = ("model", "keep_ratio", "method", "options")


@dataclass(frozen=True, eq=False)
class Contender:
    """A method that takes part in a comparison. Two contenders are never equal.

    Attributes:
        label: what tables call it.
        method: its name in `METHODS`, or a method object.
        options: further keyword arguments of `prune`: the method's own, `head_weights`, `budget`, `recipe`, ...
        after: the layer after which it chooses, counted from 1; None leaves that to the method or to the keep ratio.
        head_weights: for the method and for those of stages, where they use any and `options` brings none.
    """

    label: str
    method: str | Method
    options: Mapping[str, Any] = field(default_factory=dict)
    after: int | None = None
    head_weights: Any = None

    @classmethod
    def from_text(cls, text: str) -> Contender:
        """Read `name[@layer][:option=value,...]` or `name[@layer]:{JSON}`; the name is that of a method or a recipe.

        Raises:
            ValueError: it is neither.
        """
        name, colon, rest = (part.strip() for part in text.strip().partition(":"))
        name, at, layer = (part.strip() for part in name.partition("@"))
        spelled = f"methods: expected NAME, NAME@LAYER or NAME:OPTION=VALUE,..., got {text!r}"
        if at and not layer.isdecimal():
            raise ValueError(f"{spelled}; write after which layer the method chooses, counted from 1, as in cdpruner@2")
        after = int(layer) if at else None
        if not name or (colon and not rest):
            raise ValueError(f"{spelled}; leave out the colon, or name an option as in fastv:layer=2")
        if rest.startswith("{"):
            try:
                options = json.loads(rest)
            except ValueError as error:
                raise ValueError(f"{spelled}, whose options are no JSON object: {error}") from error
            return cls._named(text.strip(), name, options, after)
        options = {}
        for part in filter(None, rest.split(",")):
            option, equals, value = (word.strip() for word in part.partition("="))
            if not option or not equals:
                raise ValueError(f"{spelled}; write {part.strip()!r} as OPTION=VALUE, as in fastv:layer=2")
            options[option] = _value(value)
        return cls._named(text.strip(), name, options, after)

    @classmethod
    def _named(cls, label: str, name: str, options: Mapping[str, Any], after: int | None) -> Contender:
        if name in RECIPES and name not in METHODS:
            return cls(label, RECIPES[name].method, {"recipe": name, **options}, after)
        return cls(label, name, options, after)

    def keep_ratio(self, keep: KeepRatio) -> KeepRatio:
        """Return what `prune` takes as `keep_ratio` to keep so much.

        Raises:
            ValueError: the method and `keep` both say after which layers tokens leave.
        """
        if self.after is None:
            return keep
        if isinstance(keep, Mapping):
            raise ValueError(
                f"expected the layers in the method or in the keep ratio, got both: {self.label} and {keep}; leave one "
                "of them out"
            )
        return {self.after: keep}

    def block(self, model: Any, keep: KeepRatio) -> AbstractContextManager[Any]:
        """Return the `prune` block of this method.

        Raises:
            TypeError, ValueError: as `prune` and `keep_ratio` do.
        """
        return prune(model, self.keep_ratio(keep), method=self.method, **self._options(keep))

    def uses_head_weights(self, keep: KeepRatio) -> bool:
        """Tell whether `head_weights` counts: the method or that of a stage uses some, and no option brings others."""
        stages = keep.values() if isinstance(keep, Mapping) else ()
        methods = [self.method, *(stage[0] for stage in stages if isinstance(stage, tuple))]
        uses = any((METHODS[method] if isinstance(method, str) else method).uses_head_weights for method in methods)
        return uses and self.head_weights is not None and "head_weights" not in self.options

    def _options(self, keep: KeepRatio) -> Mapping[str, Any]:
        given = {"head_weights": self.head_weights} if self.uses_head_weights(keep) else {}
        return {**self.options, **given}

    @property
    def key(self) -> str:
        """A string with the method, its options and its layer."""
        name = self.method if isinstance(self.method, str) else f"{self.method.name} {self.method.options()}"
        options = {option: _mark(option, value) for option, value in self.options.items()}
        after = "" if self.after is None else f" after {self.after}"
        return f"{name} {json.dumps(options, sort_keys=True, default=repr)}{after}"


@dataclass(frozen=True)
class Way:
    """One way to ask a question: with a method and how much it keeps, or with nothing pruned.

    Attributes:
        contender: the method, or None.
        keep: how much it keeps.
    """

    contender: Contender | None = None
    keep: KeepRatio = 1.0

    def block(self, model: Any) -> AbstractContextManager[Any]:
        """Return the `prune` block, or one that does nothing."""
        return nullcontext() if self.contender is None else self.contender.block(model, self.keep)

    @property
    def key(self) -> str:
        """A string with all that an answer depends on except the model and the prompt."""
        if self.contender is None:
            return "unpruned"
        key = f"{self.contender.key} keep {self.keep}"
        if self.contender.uses_head_weights(self.keep):
            key += f" weights {_mark('head_weights', self.contender.head_weights)}"
        return key

    @property
    def label(self) -> str:
        """What messages call it; a share or a number of tokens is left out, since all of these are alike."""
        if self.contender is None:
            return "unpruned"
        return self.contender.label + (f" at {self.keep}" if isinstance(self.keep, Stages) else "")


UNPRUNED = Way()


def split_words(words: Sequence[str]) -> list[str]:
    """Split words at commas into methods; a comma before `option=value` continues the options of a method."""
    found: list[str] = []
    for word in words:
        if "{" in word:
            found.append(word)
            continue
        for number, part in enumerate(word.split(",")):
            goes_on = number > 0 and "=" in part and ":" not in part.partition("=")[0]
            if goes_on:
                found[-1] += f",{part}"
            elif part.strip():
                found.append(part)
    return [text.strip() for text in found]


def check_contenders(contenders: Sequence[Contender], keeps: Sequence[KeepRatio] = ()) -> None:
    """Check, before a model is loaded, that the methods exist and know their options.

    Args:
        contenders: the methods.
        keeps: how much they keep; what is wrong with their stages is found here too.

    Raises:
        ValueError: a method or an option that does not exist, two of one label, or no method at all; stages that do not
            go with a method's options or with each other.
    """
    if not contenders:
        raise ValueError("methods: expected at least one, got none; name one such as 'hawk'")
    of_prune = set(inspect.signature(prune).parameters) - {*_NOT_OPTIONS}
    for contender in contenders:
        own = {name: value for name, value in contender.options.items() if name not in of_prune}
        try:
            resolve_method(contender.method, own)
        except (TypeError, ValueError) as error:
            raise ValueError(f"methods: {contender.label}: {error}") from error
        for way in (Way(contender, keep) for keep in keeps):
            with naming_way(way):
                stages = contender.keep_ratio(way.keep)
                if isinstance(stages, Mapping):
                    named_stages(stages, contender.method, own)
    labels = [contender.label for contender in contenders]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"methods: expected each once, got {', '.join(twice)} more than once; leave out the copies")


@contextmanager
def naming_way(way: Way) -> Iterator[None]:
    """Name the method in an error about its arguments.

    An error about the argument `method` is suppressed: the method cannot serve the model, which `refusal` finds.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        if not str(error).startswith("method: "):
            raise ValueError(f"methods: {way.label}: {error}") from error


def refusal(way: Way, model: Any, ask: Callable[[], object]) -> str | None:
    """Try a method on a question, and return why it cannot serve the model's family, if it cannot.

    A method says so with an error about its name, the argument `method`. Every other error is raised.
    """
    try:
        with way.block(model):
            ask()
    except (TypeError, ValueError) as error:
        if not str(error).startswith("method: "):
            raise
        return str(error)
    return None


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _mark(option: str, value: Any) -> Any:
    """Return what represents an option in a key; for head weights this is their content, since files change."""
    if option != "head_weights" or value is None or value == "uniform":
        return value
    if isinstance(value, (str, Path)):
        path = find_weights_file(value)
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else str(value)
    numbers = value.tolist() if isinstance(value, torch.Tensor) else list(value)
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:16]
