"""Calls as people write them: type checkers find nothing to say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import assert_type

import disalign_ops as ops
from disalign_ops import class_stats, metrics
from disalign_ops import nn as dnn


def losses(
    z: Tensor, t: Tensor, w: Tensor, c: Tensor, split: DTensor, group: dist.ProcessGroup
) -> None:  # fmt: skip
    ops.cross_entropy(z, t, w, reduction="none", normalizer="valid").mean().backward()
    ops.cross_entropy(z, t, margin=w, prior=w, normalizer=4).backward()
    ops.cross_entropy(z, t, margin=0.5, normalizer=z.new_tensor(4.0), sample_weight=c).backward()
    ops.disalign_cross_entropy(z, t, c, w, w, form="residual", background="last").backward()
    ops.disalign_cross_entropy(z, t, c, w, w, gradient="forward").backward()
    ops.linear_cross_entropy(z, w, t, sample_rate=0.1, cosine_scale=64, reduction="sum").backward()
    ops.cross_entropy(z, t, w, reduction="sum", shard=ops.Shard()).backward()
    ops.disalign_cross_entropy(z, t, c, w, w, shard=ops.Shard(offset=3)).backward()
    ops.linear_cross_entropy(z, w, t, shard=ops.Shard(group, 3)).backward()
    ops.disalign_linear_cross_entropy(z, w, t, c, w, w, shard=ops.Shard.of(split)).backward()
    one = ops.loss_denominator([t, t], w, sample_weight=[c, c], group=group, ranks="sum")
    ops.cross_entropy(z, t, w, normalizer=one).backward()
    assert_type(ops.loss_denominator(t, normalizer="valid"), Tensor)
    assert_type(ops.cross_entropy(z, t, return_details=True), ops.LossDetails)
    assert_type(ops.linear_cross_entropy(z, w, t, return_details=True), ops.LossDetails)
    assert_type(ops.linear_cross_entropy(z, w, t, return_details="entropy"), ops.LossDetails)
    assert_type(ops.linear_cross_entropy(z, w, t, margin=0.5), Tensor)
    for reduction in ("mean", "sum"):
        assert_type(ops.cross_entropy(z, t, reduction=reduction), Tensor)
    dnn.CrossEntropyLoss(w, reduction="sum", normalizer=2.0, margin=w)
    dnn.GRWCrossEntropyLoss([5, 3, 1], gradient="backward")
    dnn.GRWCrossEntropyLoss([5, 3, 1], rho=1.2, background="first", label_smoothing=0.1)
    class_stats.grw_weights(torch.tensor([5, 3, 1]), background="last")
    metrics.LongTailAccuracy([5, 3, 1], topk=(1, 5))
    metrics.LongTailAccuracy([5, 3, 1], topk=5)


def dense(z: Tensor, masks: Tensor, w: Tensor, asked: bool, size: Sequence[int]) -> None:
    ops.upsample_cross_entropy(z, masks).backward()
    loss = ops.upsample_cross_entropy(
        z, masks, w, 255, "sum", 0.1, align_corners=True, form="residual"
    )
    assert_type(loss, Tensor)
    details = ops.upsample_cross_entropy(z, masks, return_details=True, reduction="none")
    assert_type(details, ops.UpsampleDetails)
    either = ops.upsample_cross_entropy(z, masks, return_details=asked)
    assert_type(either, Tensor | ops.UpsampleDetails)
    for each in (masks.shape[1:], masks.shape[-2:], (6, 7), [6, 7], size):
        assert_type(ops.upsample_predict(z, each), Tensor)


def layers(x: Tensor, t: Tensor, images: Tensor, masks: Tensor) -> None:
    layer = dnn.DisAlignLinear(8, 5, form="interpolated", background="first")
    layer.loss(x, t, weight=None, label_smoothing=0.1, chunk_bytes=1000).backward()
    head = dnn.DisAlignSegHead(8, 5)
    head.loss(images, masks, ignore_index=0, normalizer="count").backward()
    assert_type(head.loss(images, masks, return_details=True), ops.UpsampleDetails)
    assert_type(head.predict(images, masks.shape[1:]), Tensor)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(12, 8), nn.Linear(8, 5)

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x))


def conversions(net: Net, any_model: nn.Module) -> None:
    assert_type(dnn.convert_to_disalign(nn.Linear(8, 5)), dnn.DisAlignLinear)
    assert_type(dnn.convert_to_disalign(nn.Sequential(nn.Linear(8, 5))), nn.Sequential)
    assert_type(dnn.convert_to_disalign(net, name="head", form="residual"), Net)
    assert_type(dnn.convert_to_disalign(any_model), nn.Module)
    dnn.convert_to_disalign(net).features(torch.zeros(1, 12))
    assert_type(dnn.convert_form(net, "interpolated"), Net)
    torch.optim.SGD(dnn.freeze_for_stage2(net, bn="train"), lr=0.1)
