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
        if args and isinstance(args[0], CfgNode):  # keywords go before what from_config says
            init(self, **{**type(self).from_config(*args), **kwargs})
        else:
            init(self, *args, **kwargs)

    return wrapped


def get_cfg() -> CfgNode:
    head = CfgNode({"NAME": "", "NUM_FC": 0, "FC_DIM": 6, "CLS_AGNOSTIC_BBOX_REG": False})
    cascade = CfgNode({"BBOX_REG_WEIGHTS": ((10.0,) * 4, (20.0,) * 4, (30.0,) * 4)})
    model = {
        "ROI_HEADS": CfgNode({"NUM_CLASSES": 80, "IN_FEATURES": ["res4"]}),
        "ROI_BOX_HEAD": head,
        "ROI_BOX_CASCADE_HEAD": cascade,
    }
    return CfgNode({"MODEL": CfgNode(model)})
