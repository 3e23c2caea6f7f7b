"""A method of one object that tells what it was called with and what it returned."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


class WatchedMethod:
    """Watches a method that is no module and therefore has no hooks, until it is removed.

    Args:
        owner: the object; its class stays as it is.
        name: of the method.
        watch: a context manager around each call, from the arguments by name; what it yields is called with the result.
    """

    def __init__(
        self,
        owner: Any,
        name: str,
        watch: Callable[[dict[str, Any]], AbstractContextManager[Callable[[Any], None]]],
    ) -> None:
        self._owner, self._name = owner, name
        self._earlier = vars(owner).get(name)
        method = getattr(owner, name)
        parameters = tuple(inspect.signature(method).parameters)

        @functools.wraps(method)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with watch({**dict(zip(parameters, args, strict=False)), **kwargs}) as tell:
                result = method(*args, **kwargs)
                tell(result)
            return result

        setattr(owner, name, watched)

    def remove(self) -> None:
        """Put back what was there."""
        if self._earlier is None:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._earlier)
