"""Modules of dense prediction: the segmentation head and the upsampling loss."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import disalign_ops
from disalign_ops import nn as dnn
from disalign_ops.errors import ArgumentError
from support.tolerances import assert_close

SHAPES = {  # of the released checkpoints' decode_head, for 8 features and 5 classes
    "conv_seg.weight": (5, 8, 1, 1),
    "conv_seg.bias": (5,),
    "logit_scale": (1, 5, 1, 1),
    "logit_bias": (1, 5, 1, 1),
    "confidence_layer.conv.weight": (1, 8, 1, 1),
    "confidence_layer.bn.weight": (1,),
    "confidence_layer.bn.bias": (1,),
    "confidence_layer.bn.running_mean": (1,),
    "confidence_layer.bn.running_var": (1,),
    "confidence_layer.bn.num_batches_tracked": (),
}


def make_head(**options: Any) -> dnn.DisAlignSegHead:
    head = dnn.DisAlignSegHead(8, 5, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return head


def released(head: dnn.DisAlignSegHead, x: Tensor) -> Tensor:
    """The released head's forward, from its formulas."""
    confidence = torch.relu(head.confidence_layer.bn(head.confidence_layer.conv(x))).sigmoid()
    z = head.conv_seg(x)
    if head.form == "interpolated":
        return confidence * (z * head.logit_scale + head.logit_bias) + (1 - confidence) * z
    return (1 + confidence * head.logit_scale) * z + confidence * head.logit_bias


def test_parameters_have_the_released_names_and_shapes() -> None:
    shapes = {k: tuple(v.shape) for k, v in make_head().state_dict().items()}
    assert shapes == SHAPES | {"calibration_form": (2,)}


def test_a_released_checkpoint_loads_strictly() -> None:
    head = make_head()
    state = {k: torch.randn(shape) for k, shape in SHAPES.items()}
    state["confidence_layer.bn.num_batches_tracked"] = torch.tensor(3)
    head.load_state_dict(state)
    assert torch.equal(head.logit_scale.float(), state["logit_scale"])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", ["interpolated", "residual"])
def test_forward_is_the_released_formula(backend: str, form: str, training: bool) -> None:
    head = make_head(form=form).train(training)
    x = torch.randn(2, 8, 4, 3, dtype=torch.float64)
    expected = released(copy.deepcopy(head), x)
    assert_close(head(x), expected, torch.float64, "logits")


@pytest.mark.parametrize("align_corners", [False, True])
def test_loss_and_predict_are_those_of_upsampled_logits(backend: str, align_corners: bool) -> None:
    head = make_head(align_corners=align_corners).eval()
    x = torch.randn(2, 8, 4, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 5, (2, 13, 9))
    target[:, 0] = 255
    weight = torch.rand(5, dtype=torch.float64)
    u = F.interpolate(released(head, x), (13, 9), mode="bilinear", align_corners=align_corners)
    expected = F.cross_entropy(u, target, weight, ignore_index=255)
    found = head.loss(x, target, weight, inplace_backward=True)
    assert_close(found, expected, torch.float64, "loss")
    assert torch.equal(head.predict(x, (13, 9)), u.argmax(1))
    inputs = [x, *head.parameters()]
    for a, e in zip(
        torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert_close(a, e, torch.float64, "gradient")


def test_the_start_of_stage_2_is_the_classifier_itself() -> None:
    head = dnn.DisAlignSegHead(8, 5)
    x = torch.randn(2, 8, 4, 3)
    assert_close(head(x), head.raw_logits(x), torch.float32, "logits")


@pytest.mark.parametrize("bn", ["eval", "train"])
def test_stage_2_trains_the_calibration_and_its_own_batch_norm(bn: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), make_head().float())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    parameters = dnn.freeze_for_stage2(model, bn=bn)
    model.train()
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    head = model[2]
    assert isinstance(head, dnn.DisAlignSegHead)
    head.loss(model[:2](torch.randn(2, 3, 4, 4)), torch.randint(0, 5, (2, 16, 16))).backward()
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    learned = {f"2.{k}" for k in SHAPES if not k.startswith("conv_seg")}
    statistics = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert changed == learned | (statistics if bn == "train" else set())


def test_converting_the_form_keeps_the_logits_and_a_state_dict_remembers_it() -> None:
    head = make_head().eval()
    x = torch.randn(2, 8, 4, 3, dtype=torch.float64)
    expected = head(x)
    residual = copy.deepcopy(head)
    dnn.convert_form(residual, "residual")
    assert_close(residual(x), expected, torch.float64, "logits")
    with pytest.raises(RuntimeError, match="form must be 'interpolated', as in this layer, got"):
        head.load_state_dict(residual.state_dict())


def test_errors() -> None:
    with pytest.raises(ArgumentError, match=r"form must be .*, got 'sum'"):
        dnn.DisAlignSegHead(8, 5, form="sum")
    with pytest.raises(
        ArgumentError, match="in_channels and num_classes must be at least 1, got 0 and 5"
    ):
        dnn.DisAlignSegHead(0, 5)
    with pytest.raises(
        ArgumentError, match=r"features must have shape \(N, 8, h, w\), got \(2, 7, 4, 4\)"
    ):
        dnn.DisAlignSegHead(8, 5)(torch.zeros(2, 7, 4, 4))


def test_the_loss_module_is_the_function() -> None:
    logits = torch.randn(2, 5, 3, 4, requires_grad=True)
    target = torch.randint(0, 5, (2, 9, 8), dtype=torch.uint8)
    target[0, 0] = 255
    weight = torch.rand(5)
    prior = torch.randn(5)
    module = dnn.UpsampleCrossEntropyLoss(
        weight, label_smoothing=0.1, align_corners=True, prior=prior, focal_gamma=1.0
    )
    expected = disalign_ops.upsample_cross_entropy(
        logits, target, weight, label_smoothing=0.1, align_corners=True, prior=prior,
        focal_gamma=1.0,
    )  # fmt: skip
    assert torch.equal(module(logits, target), expected)
    assert set(module.state_dict()) == {"weight"}
    details = module(logits, target, return_details=True)
    assert details.prediction.shape == target.shape
