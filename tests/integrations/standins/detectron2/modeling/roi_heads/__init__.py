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


@ROI_HEADS_REGISTRY.register()
class CascadeROIHeads(StandardROIHeads):
    @classmethod
    def _init_box_head(cls, cfg: Any, input_shape: Any) -> dict[str, Any]:
        heads = [_BoxHead() for _ in cfg.MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS]
        predictors = [
            fast_rcnn.FastRCNNOutputLayers(cfg, head.output_shape, box2box_transform=weights)
            for head, weights in zip(
                heads, cfg.MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS, strict=True
            )
        ]
        return {"box_heads": heads, "box_predictors": predictors, "proposal_matchers": []}
