from __future__ import annotations

import functools
from typing import Any


class CfgNode(dict):  # type: ignore[type-arg]
    def __getattr__(self, name: str) -> Any:
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


def configurable(init: Any) -> Any:
    """As detectron2's: called with a config first, the arguments are from_config's."""

    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        if args and isinstance(args[0], CfgNode):
            init(self, **type(self).from_config(*args, **kwargs))
        else:
            init(self, *args, **kwargs)

    return wrapped
