"""The methods that `prune(method=NAME)` knows; each file of this folder adds its own."""

from __future__ import annotations

import inspect
from typing import TypeVar

from hawk_kernels.methods.base import Method

MethodClass = TypeVar("MethodClass", bound=type[Method])

METHODS: dict[str, type[Method]] = {}


def register(method: MethodClass) -> MethodClass:
    """Make `prune(method=...)` know a class of methods by its `name`; a decorator, also for classes of your own.

    Defining a class of the same module and name again, as a notebook does, replaces the earlier one.

    Raises:
        TypeError: not a class derived from `Method`, or one that lacks an abstract method.
        ValueError: no name, or the name of another method.
    """
    if not (isinstance(method, type) and issubclass(method, Method)):
        got = method.__name__ if isinstance(method, type) else type(method).__name__
        raise TypeError(f"register: expected a class derived from hawk_kernels.methods.Method, got {got}; derive it")
    if inspect.isabstract(method):
        missing = ", ".join(sorted(method.__abstractmethods__))
        raise TypeError(f"register: expected a class that can be instantiated, got {method.__name__}; define {missing}")
    name = getattr(method, "name", None)
    if not isinstance(name, str) or not name:
        raise ValueError(f"name: expected a string, got {name!r}; {method.__name__} must say what prune calls it")
    known = METHODS.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (method.__module__, method.__qualname__):
        raise ValueError(
            f"name: expected one that no method has yet, got {name!r}, which is that of "
            f"{known.__module__}.{known.__qualname__}; choose another"
        )
    METHODS[name] = method
    return method


def resolve_method(method: str | Method, options: dict[str, object]) -> Method:
    """Return the method object that `method` stands for.

    Args:
        method: a name in `METHODS`, or an instance of a class derived from `Method`.
        options: keyword arguments of the named method; an object brings its own.

    Raises:
        ValueError: unknown name, or an option value the method refuses.
        TypeError: neither a name nor a method, or an option the method does not have.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(
                f"method: expected one of {', '.join(map(repr, sorted(METHODS)))} or an object, got {method!r}"
            )
        known = list(inspect.signature(METHODS[method]).parameters)
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise TypeError(
                f"method {method!r} has no option {', '.join(map(repr, unknown))}; its options are "
                f"{', '.join(map(repr, known)) or 'none'}"
            )
        return METHODS[method](**options)
    if not isinstance(method, Method):
        if isinstance(method, type):
            raise TypeError(
                f"method: expected a name or a method object, got the class {method.__name__}; pass an instance"
            )
        raise TypeError(
            f"method: expected a name or a method object, got {type(method).__name__}; derive it from "
            "hawk_kernels.methods.Method"
        )
    if options:
        raise TypeError(
            f"options {', '.join(map(repr, sorted(options)))} came beside a method object, which brings its own; "
            f"pass them to {type(method).__name__}(...)"
        )
    return method
