"""Mistakes that a type checker finds before the run: in every line marked so, and in no other."""

from __future__ import annotations

from torch import Tensor, nn

import disalign_ops as ops
from disalign_ops import class_stats, metrics
from disalign_ops import nn as dnn


def losses(z: Tensor, t: Tensor, w: Tensor, c: Tensor) -> None:
    ops.cross_entropy(z, t, reduction="avg")  # wrong
    ops.cross_entropy(z, t, normalizer="all")  # wrong
    ops.cross_entropy(z, t, label_smoothing="0.1")  # wrong
    ops.cross_entropy(z, t, gradient="both")  # wrong
    ops.cross_entropy(z.numpy(), t)  # wrong
    ops.disalign_cross_entropy(z, t, c, w, w, form="both")  # wrong
    ops.disalign_cross_entropy(z, t, c, w, w, background="middle")  # wrong
    ops.calibrate(z, c, w, w, form="both")  # wrong
    ops.linear_cross_entropy(z, w, t, reduction="avg")  # wrong
    ops.cross_entropy(z, t, shard=3)  # wrong
    ops.linear_cross_entropy(z, w, t, shard="nccl")  # wrong
    ops.Shard(offset="3")  # wrong
    ops.Shard.of(z)  # wrong
    dnn.CrossEntropyLoss(reduction="avg")  # wrong
    dnn.CrossEntropyLoss(normalizer="all")  # wrong
    dnn.CrossEntropyLoss(gradient=True)  # wrong
    dnn.GRWCrossEntropyLoss([5, 3, 1], background="middle")  # wrong
    dnn.GRWCrossEntropyLoss([5, 3, 1], reduction="avg")  # wrong
    dnn.GRWCrossEntropyLoss([5, 3, 1], sample_weight=c)  # wrong
    dnn.UpsampleCrossEntropyLoss(w, normalizer="all")  # wrong
    class_stats.grw_weights([5, 3, 1], background="middle")  # wrong
    metrics.LongTailAccuracy([5, 3, 1], topk="5")  # wrong


def dense(z: Tensor, masks: Tensor, asked: bool) -> None:
    ops.upsample_cross_entropy(z, masks, return_details=True).backward()  # wrong
    ops.upsample_cross_entropy(z, masks, return_details=asked).backward()  # wrong
    ops.upsample_cross_entropy(z, masks, reduction="avg")  # wrong
    ops.upsample_cross_entropy(z, masks, form="both")  # wrong
    ops.upsample_cross_entropy(z, masks, size=(6, 7))  # wrong
    ops.upsample_cross_entropy(z, masks, shard=ops.Shard())  # wrong
    ops.upsample_predict(z, 6)  # wrong
    ops.upsample_predict(z, "67")  # wrong


def layers(x: Tensor, t: Tensor, net: nn.Sequential) -> None:
    layer = dnn.DisAlignLinear(8, 5, form="both")  # wrong
    layer.loss(x, t, reduction="avg")  # wrong
    layer.loss(x, t, smoothing=0.1)  # wrong
    layer.loss(x, t, shard=ops.Shard())  # wrong
    head = dnn.DisAlignSegHead(8, 5)
    head.loss(x, t, normalizer="all")  # wrong
    head.loss(x, t, return_details=True).backward()  # wrong
    dnn.convert_form(net, "both")  # wrong
    dnn.freeze_for_stage2(net, bn="frozen")  # wrong
    dnn.convert_to_disalign(net, background="middle")  # wrong
    dnn.convert_to_disalign(nn.Linear(8, 5)).loss(x, t, form="residual")  # wrong
