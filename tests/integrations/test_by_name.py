"""mmsegmentation and mmdetection: what a config names, with them or their stand-ins."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from registered import COUNTS, close, grads
from torch import Tensor, nn
from torch.nn import functional as F

from disalign_ops import class_stats
from disalign_ops import nn as dnn
from disalign_ops.errors import ArgumentError


@pytest.fixture(autouse=True)
def _seed() -> None:  # `make test-integrations` runs without the conftest.py that does it
    torch.manual_seed(0)


# --- mmsegmentation


def seg_models() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mmseg.models  # noqa: F401
        from mmseg.registry import MODELS

        import disalign_ops.integrations.mmseg  # noqa: F401
    return MODELS


GRW = {"type": "GRWCrossEntropyLoss", "counts": COUNTS, "rho": 0.2}


def seg_head(kind: str, loss: Any = GRW, **options: Any) -> Any:
    torch.manual_seed(0)
    head = seg_models().build(
        {
            "type": kind, "in_channels": 5, "channels": 5, "num_convs": 0, "concat_input": False,
            "num_classes": 3, "dropout_ratio": 0, "loss_decode": loss, **options,
        }
    )  # fmt: skip
    return head.train()


def samples(target: Tensor) -> list[Any]:
    return [SimpleNamespace(gt_sem_seg=SimpleNamespace(data=y[None])) for y in target]


def masks() -> Tensor:
    target = torch.randint(0, 3, (2, 19, 30))
    target[:, :4] = 255
    return target


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("form", ["interpolated", "residual"])
def test_a_head_of_mmseg_is_calibrated_and_its_loss_not_resized(
    align_corners: bool, form: str
) -> None:
    head = seg_head("DisAlignFCNHead", align_corners=align_corners, form=form)
    with torch.no_grad():
        head.logit_scale.uniform_(0.5, 2)
        head.logit_bias.normal_()
        head.conv_seg.weight.normal_()
    x, target = torch.randn(2, 5, 5, 8), masks()
    logits = head([x])
    z = head.conv_seg(x)
    c = torch.sigmoid(head.confidence_layer(x))
    scale = head.logit_scale if form == "residual" else head.logit_scale - 1
    u = (1 + c * scale) * z + c * head.logit_bias
    close(logits, u)

    found = head.loss([x], samples(target), None)
    full = F.interpolate(u, target.shape[1:], mode="bilinear", align_corners=align_corners)
    weight = class_stats.grw_weights(COUNTS, 0.2)
    expected = F.cross_entropy(full, target, weight, ignore_index=255)
    close(found["loss_ce"], expected)
    fused, reference = grads(found["loss_ce"], head), grads(expected, head)
    assert set(fused) == set(reference)
    for name, grad in fused.items():
        close(grad, reference[name])
    counted = target != 255
    right = (full.argmax(1) == target)[counted].float().mean()
    assert found["acc_seg"].shape == (1,)
    close(found["acc_seg"][0], 100 * right)


def test_the_fused_loss_is_mmsegs_own_path() -> None:
    """The same head and losses, fused and resized."""
    losses = [
        {**GRW, "loss_weight": 0.4},
        {"type": "GRWCrossEntropyLoss", "class_weight": [1.0, 2.0, 0.5], "loss_name": "loss_b",
         "label_smoothing": 0.1},
        {"type": "GRWCrossEntropyLoss", "normalizer": "count"},
    ]  # fmt: skip
    head = seg_head("DisAlignFCNHead", losses)
    x, target = torch.randn(2, 5, 5, 8), samples(masks())
    with torch.no_grad():
        head.conv_seg.weight.normal_()
    (plain,) = [c for c in type(head).__mro__ if c.__name__ == "BaseDecodeHead"]
    logits = head([x])
    fused, resized = head.loss_by_feat(logits, target), plain.loss_by_feat(head, logits, target)
    assert set(fused) == set(resized) == {"loss_ce", "loss_b", "acc_seg"}
    for name in fused:
        assert fused[name].shape == resized[name].shape
        close(fused[name], resized[name])


def test_what_the_fused_loss_does_not_serve_goes_mmsegs_way() -> None:
    class Sampler:
        def sample(self, logits: Tensor, label: Tensor) -> Tensor:
            assert (logits.shape, label.shape) == ((2, 3, 19, 30), (2, 1, 19, 30))
            return (torch.arange(30) < 12).float().expand(2, 19, 30)

    head = seg_head("DisAlignFCNHead")
    x, target = [torch.randn(2, 5, 5, 8)], masks()
    head.sampler = Sampler()
    found = head.loss(x, samples(target), None)
    target[..., 12:] = 255
    head.sampler = None
    close(found["loss_ce"], head.loss(x, samples(target), None)["loss_ce"])
    with pytest.raises(ArgumentError, match="got one channel"):
        seg_head("DisAlignFCNHead", num_classes=2, out_channels=1).loss(x, samples(target), None)


def test_a_stage_1_checkpoint_of_mmseg_loads_and_only_the_calibration_learns() -> None:
    plain = seg_head("FCNHead")
    stage2 = seg_models().build(
        {
            "type": "DisAlignStage2",
            "model": {
                "type": "DisAlignFCNHead", "in_channels": 5, "channels": 5, "num_convs": 0,
                "concat_input": False, "num_classes": 3, "loss_decode": GRW,
            },
        }
    )  # fmt: skip
    missing, unexpected = stage2.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert {name.split(".")[0] for name in missing} == {
        "logit_scale", "logit_bias", "confidence_layer",
    }  # fmt: skip
    learns = {name for name, p in stage2.named_parameters() if p.requires_grad}
    assert learns == {
        "logit_scale", "logit_bias", "confidence_layer.conv.weight", "confidence_layer.bn.weight",
        "confidence_layer.bn.bias",
    }  # fmt: skip
    x = [torch.randn(2, 5, 4, 4)]
    close(stage2.eval()(x), plain.eval()(x))


def test_what_a_head_of_mmseg_cannot_be() -> None:
    seg_models()
    from disalign_ops.integrations.mmseg import disalign_head

    with pytest.raises(ArgumentError, match="head must be a class with cls_seg"):
        disalign_head(nn.Linear)
    with pytest.raises(ArgumentError, match=r"form must be .*, got 'both'"):
        seg_head("DisAlignFCNHead", form="both")


# --- the losses of both


def test_a_loss_called_as_the_frameworks_call_it(tmp_path: Path) -> None:
    models = seg_models()
    weight = class_stats.grw_weights(COUNTS, 0.8)
    file = tmp_path / "counts.csv"
    file.write_text("class,count\n0,400\n1,60\n2,9\n")
    z, target = torch.randn(7, 3), torch.tensor([0, 1, 2, 2, 1, 0, 0])
    sample = torch.rand(7)
    each = F.cross_entropy(z, target, weight, reduction="none")
    for counts in (COUNTS, str(file)):
        loss = models.build({"type": "GRWCrossEntropyLoss", "counts": counts, "rho": 0.8})
        assert loss.loss_name == "loss_ce"
        assert not loss.state_dict()
        close(loss(z, target), (each / weight[target].sum()).sum())
        close(loss(z, target, sample, avg_factor=5.0), (sample * each).sum() / 5)
        close(loss(z, target, avg_factor=torch.tensor(5.0)), each.sum() / 5)
        close(loss(z, target, sample, reduction_override="none"), sample * each)
        close(loss(z, target, avg_factor=5.0, reduction_override="none"), each)
        close(loss(z, target, reduction_override="sum"), each.sum())
        ignored = each[target != 1].sum() / weight[target[target != 1]].sum()
        close(loss(z, target, ignore_index=1), ignored)
        close(loss(z, target, ignore_index=None), (each / weight[target].sum()).sum())
    with pytest.raises(ArgumentError, match="where avg_factor is given, got 'sum'"):
        loss(z, target, avg_factor=3.0, reduction_override="sum")
    with pytest.raises(ArgumentError, match="counts or class_weight must be None, got both"):
        models.build({**GRW, "class_weight": [1.0, 1.0, 1.0]})


# --- mmdetection


def box_models() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mmdet.models  # noqa: F401
        from mmdet.registry import MODELS

        import disalign_ops.integrations.mmdet  # noqa: F401
    return MODELS


def box_head(**options: Any) -> dict[str, Any]:
    return {
        "type": "Shared2FCBBoxHead", "in_channels": 2, "fc_out_channels": 6, "roi_feat_size": 2,
        "num_classes": 3, "cls_predictor_cfg": {"type": "Linear"}, "loss_cls": GRW, **options,
    }  # fmt: skip


def test_a_cosine_head_of_mmdet_has_a_stage_1() -> None:
    models = box_models()
    head = models.build(
        {
            "type": "DisAlignStage1",
            "model": box_head(cls_predictor_cfg={"type": "DisAlignCosineLinear"}),
        }
    )  # fmt: skip
    frozen = {name for name, p in head.named_parameters() if not p.requires_grad}
    assert {name.removeprefix("fc_cls.") for name in frozen} == {
        "logit_scale", "logit_bias", "confidence_layer.weight", "confidence_layer.bias",
    }  # fmt: skip


def test_a_box_head_of_mmdet_from_stage_1_to_stage_2() -> None:
    models = box_models()
    torch.manual_seed(0)
    plain = models.build(box_head())
    calibrated = {"type": "DisAlignLinear"}
    loss = {"type": "GRWCrossEntropyLoss", "counts": COUNTS, "rho": 0.8, "loss_weight": 2.0}
    head = models.build(
        {
            "type": "DisAlignStage2", "bn": "train",
            "model": box_head(cls_predictor_cfg=calibrated, loss_cls=loss),
        }
    )  # fmt: skip
    head.init_weights()
    assert torch.equal(head.fc_cls.confidence_layer.bias, torch.zeros(1))
    assert float(head.fc_cls.confidence_layer.weight.detach().abs().max()) < 0.1
    missing, unexpected = head.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(name.split(".")[1] in ("logit_scale", "logit_bias", "confidence_layer")
               for name in missing)  # fmt: skip
    x = torch.randn(9, 2, 2, 2)
    for actual, expected in zip(head(x), plain(x), strict=True):
        close(actual, expected)
    with torch.no_grad():
        head.fc_cls.logit_bias.normal_()
    scores, boxes = head(x)
    assert torch.equal(scores[:, 3], plain(x)[0][:, 3])  # the background
    labels = torch.tensor([0, 1, 2, 3, 3, 3, 3, 0, 1])
    label_weights = torch.tensor([1.0, 1, 1, 1, 1, 1, 0, 1, 1])
    found = head.loss(
        scores, boxes, torch.zeros(9, 5), labels, label_weights, torch.zeros(9, 4),
        torch.zeros(9, 4),
    )  # fmt: skip
    weight = class_stats.grw_weights(COUNTS, 0.8, background="last")
    assert float(weight[3]) == 1.0
    each = F.cross_entropy(scores, labels, weight, reduction="none")
    close(found["loss_cls"], 2.0 * (each * label_weights).sum() / 8)
    assert set(grads(found["loss_cls"], head)) == {
        "fc_cls.logit_scale", "fc_cls.logit_bias", "fc_cls.confidence_layer.weight",
        "fc_cls.confidence_layer.bias",
    }  # fmt: skip


def test_a_cosine_classifier_by_name() -> None:
    head = box_models().build(box_head(cls_predictor_cfg={"type": "DisAlignCosineLinear"}))
    assert isinstance(head.fc_cls, dnn.DisAlignCosineLinear)
    assert head.fc_cls.background == "last"
    assert head.fc_cls.form == "interpolated"


# --- the losses of both frameworks, without them


def openmm_loss(**options: Any) -> Any:
    from disalign_ops.integrations._openmm import GRWCrossEntropyLoss

    return GRWCrossEntropyLoss(**options)


def test_a_crop_of_ignored_pixels_is_0_as_in_mmsegmentation() -> None:
    mask = torch.full((2, 4, 4), 255)
    for options in (
        {}, {"class_weight": [1.0, 2.0, 0.5]}, {"label_smoothing": 0.1}, {"normalizer": "valid"},
        {"normalizer": "count"}, {"counts": COUNTS, "rho": 1.0},
    ):  # fmt: skip
        classes = len(options.get("counts", (0, 0, 0)))  # type: ignore[arg-type]
        z = torch.randn(2, classes, 4, 4, requires_grad=True)
        loss = openmm_loss(**options)(z, mask, ignore_index=255)
        loss.backward()
        assert loss == 0
        assert not z.grad.any()  # type: ignore[union-attr]
    z = torch.randn(2, 3, 4, 4)
    mask[0, 0, 0] = 2
    # A weight of 0 for all that is left, and of 0 for every position.
    assert openmm_loss(class_weight=[1.0, 1.0, 0.0])(z, mask, ignore_index=255) == 0
    assert openmm_loss()(z, mask, torch.zeros(2, 4, 4), ignore_index=255) == 0
    broken = torch.full_like(z, math.nan)
    assert openmm_loss()(broken, mask, ignore_index=255).isnan()  # what is wrong still shows


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_normalizers_are_those_of_the_frameworks(weighted: bool, dtype: torch.dtype) -> None:
    z, mask = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4)).to(dtype)
    mask[:, 0] = 255
    weight = torch.tensor([1.0, 2.0, 0.5])
    pixels = torch.rand(2, 4, 4)
    own = {"class_weight": weight.tolist()} if weighted else {}
    each = F.cross_entropy(
        z, mask.long(), weight if weighted else None, ignore_index=255, reduction="none"
    )
    valid = mask != 255
    for normalizer, divisor in (("valid", valid.sum()), ("count", torch.tensor(valid.numel()))):
        loss = openmm_loss(normalizer=normalizer, **own)(z, mask, pixels, ignore_index=255)
        close(loss, (each * pixels).sum() / divisor)
    shares = weight[torch.where(valid, mask.long(), 0)] if weighted else torch.ones(2, 4, 4)
    loss = openmm_loss(**own)(z, mask, pixels, ignore_index=255)
    close(loss, (each * pixels).sum() / (shares * pixels)[valid].sum())
    with pytest.raises(IndexError, match="out of bounds"):
        openmm_loss(**own)(z, torch.full((2, 4, 4), 9), ignore_index=255)
