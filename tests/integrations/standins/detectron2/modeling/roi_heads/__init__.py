from __future__ import annotations

from typing import Any

from torch import nn

from . import fast_rcnn as fast_rcnn


class _Registry(dict):  # type: ignore[type-arg]
    def register(self) -> Any:
        return lambda made: self.setdefault(made.__name__, made)


ROI_HEADS_REGISTRY = _Registry()


class _BoxHead(nn.Module):
    output_shape = fast_rcnn.ShapeSpec(channels=6)


class StandardROIHeads:
    @classmethod
    def _init_box_head(cls, cfg: Any, input_shape: Any) -> dict[str, Any]:
        head = _BoxHead()
        predictor = fast_rcnn.FastRCNNOutputLayers(cfg, head.output_shape)
        return {"box_in_features": ["p2"], "box_head": head, "box_predictor": predictor}
