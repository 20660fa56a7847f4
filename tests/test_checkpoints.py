"""Released checkpoints, folded layers, ONNX."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from disalign_ops import checkpoints
from disalign_ops import nn as dnn
from disalign_ops.errors import ArgumentError

D, K = 6, 9


def normal(*shape: int) -> Tensor:
    return torch.randn(shape)


def classification(bias: bool = True) -> dict[str, Tensor]:
    """Keys and shapes of a released ImageNet-LT checkpoint, with some of its backbone."""
    found = {
        "network.backbone.conv1.weight": normal(4, 3, 7, 7),
        "network.linear.weight": normal(K, D),
        "network.linear.logit_scale": normal(1, K),
        "network.linear.logit_bias": normal(1, K),
        "network.linear.confidence_layer.weight": normal(1, D),
        "network.linear.confidence_layer.bias": normal(1),
    }
    return found | ({"network.linear.bias": normal(K)} if bias else {})


def detection(cosine: bool) -> dict[str, Tensor]:
    """Of a released LVIS checkpoint: K classes and the background, which is last."""
    prefix = "roi_heads.box_predictor."
    found = {
        "backbone.bottom_up.stem.conv1.weight": normal(4, 3, 7, 7),
        f"{prefix}cls_score.weight": normal(K + 1, D),
        f"{prefix}logit_scale": normal(K),
        f"{prefix}logit_bias": normal(K),
        f"{prefix}confidence_layer.weight": normal(1, D),
        f"{prefix}confidence_layer.bias": normal(1),
        f"{prefix}bbox_pred.weight": normal(4, D),
        f"{prefix}bbox_pred.bias": normal(4),
    }
    own = {"cls_score.scale": normal(1).abs()} if cosine else {"cls_score.bias": normal(K + 1)}
    return found | {prefix + name: value for name, value in own.items()}


def segmentation() -> dict[str, Tensor]:
    return {
        "decode_head.bottleneck.conv.weight": normal(D, D, 3, 3),
        "decode_head.conv_seg.weight": normal(K, D, 1, 1),
        "decode_head.conv_seg.bias": normal(K),
        "decode_head.logit_scale": normal(1, K, 1, 1),
        "decode_head.logit_bias": normal(1, K, 1, 1),
        "decode_head.confidence_layer.conv.weight": normal(1, D, 1, 1),
        "decode_head.confidence_layer.bn.weight": normal(1),
        "decode_head.confidence_layer.bn.bias": normal(1),
        "decode_head.confidence_layer.bn.running_mean": normal(1),
        "decode_head.confidence_layer.bn.running_var": normal(1).abs(),
        "decode_head.confidence_layer.bn.num_batches_tracked": torch.tensor(7),
    }


def _classified(s: dict[str, Tensor], x: Tensor) -> Tensor:
    """The released DisAlign layer's forward."""
    s = {k.removeprefix("network.linear."): v for k, v in s.items()}
    z = F.linear(x, s["weight"], s.get("bias"))
    c = torch.sigmoid(F.linear(x, s["confidence_layer.weight"], s["confidence_layer.bias"]))
    return (1 + c * s["logit_scale"]) * z + c * s["logit_bias"]


def _detected(s: dict[str, Tensor], x: Tensor) -> Tensor:
    s = {k.removeprefix("roi_heads.box_predictor."): v for k, v in s.items()}
    if "cls_score.scale" in s:
        z = s["cls_score.scale"] * F.linear(F.normalize(x), F.normalize(s["cls_score.weight"]))
    else:
        z = F.linear(x, s["cls_score.weight"], s["cls_score.bias"])
    c = torch.sigmoid(F.linear(x, s["confidence_layer.weight"], s["confidence_layer.bias"]))
    scores = c * (z[:, :-1] * s["logit_scale"] + s["logit_bias"]) + (1 - c) * z[:, :-1]
    return torch.cat([scores, z[:, -1:]], 1)


def _segmented(s: dict[str, Tensor], x: Tensor) -> Tensor:
    s = {k.removeprefix("decode_head."): v for k, v in s.items()}
    z = F.conv2d(x, s["conv_seg.weight"], s["conv_seg.bias"])
    y = F.conv2d(x, s["confidence_layer.conv.weight"])
    bn = [s[f"confidence_layer.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
    c = torch.sigmoid(F.relu(F.batch_norm(y, *bn)))
    return c * (z * s["logit_scale"] + s["logit_bias"]) + (1 - c) * z


Case = tuple[str, Callable[[], dict[str, Tensor]], Callable[[str], nn.Module], Any, Tensor]
CASES: dict[str, Case] = {
    "classification": (
        "classification", classification, lambda form: dnn.DisAlignLinear(D, K, form=form),
        _classified, torch.randn(5, D),
    ),
    "detection": (
        "detection", lambda: detection(False),
        lambda form: dnn.DisAlignLinear(D, K + 1, form=form, background="last"),
        _detected, torch.randn(5, D),
    ),
    "detection, cosine": (
        "detection", lambda: detection(True),
        lambda form: dnn.DisAlignCosineLinear(
            D, K + 1, form=form, background="last", normalize_confidence=False
        ),
        _detected, torch.randn(5, D),
    ),
    "segmentation": (
        "segmentation", segmentation, lambda form: dnn.DisAlignSegHead(D, K, form=form),
        _segmented, torch.randn(2, D, 4, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", ["residual", "interpolated"])
@pytest.mark.parametrize("name", CASES)
def test_a_released_layer_gives_the_released_outputs(name: str, form: str, tmp_path: Path) -> None:
    layout, made, module_of, formula, x = CASES[name]
    torch.manual_seed(0)
    torch.save(made(), tmp_path / "released.pth")
    state = torch.load(tmp_path / "released.pth", weights_only=True)
    wrapped = {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}
    for given, which in ((state, layout), (wrapped, "auto"), ({"model": state}, "auto")):
        module = module_of(form).eval()
        assert checkpoints.load_released(module, given, which) == layout  # type: ignore[arg-type]
        torch.testing.assert_close(module(x), formula(state, x), rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_listed_and_nothing_is_loaded() -> None:
    module = dnn.DisAlignLinear(D, K)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    state = classification()
    del state["network.linear.confidence_layer.bias"]
    state["network.linear.weight"] = normal(K, D + 1)
    state["network.linear.scale"] = normal(1)
    with pytest.raises(ArgumentError) as error:
        checkpoints.load_released(module, state)
    for part in (
        "missing network.linear.confidence_layer.bias",
        f"network.linear.weight of shape ({K}, {D + 1}), not ({K}, {D})",
        "unexpected network.linear.scale",
    ):
        assert part in str(error.value)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_layouts_that_cannot_be_told() -> None:
    module = dnn.DisAlignLinear(D, K)
    with pytest.raises(
        ArgumentError, match=r"state_dict must have one of .*, got no released layout"
    ):
        checkpoints.load_released(module, {"fc.weight": normal(K, D)})
    with pytest.raises(ArgumentError, match="got the layouts classification, segmentation"):
        checkpoints.load_released(module, classification() | segmentation())
    with pytest.raises(ArgumentError, match=r"module must be a DisAlignLinear.*, got a Linear"):
        checkpoints.load_released(nn.Linear(2, 2), classification())
    with pytest.raises(ArgumentError, match=r"layout must be .*, got 'other'"):
        checkpoints.load_released(module, classification(), "other")  # type: ignore[arg-type]
    # A cosine layer has no bias: the one that is there would be lost.
    with pytest.raises(ArgumentError, match=r"missing network\.linear\.scale; unexpected .*bias"):
        checkpoints.load_released(dnn.DisAlignCosineLinear(D, K), classification())


def layer_of(name: str, form: str) -> tuple[nn.Module, Tensor]:
    _, made, module_of, _, x = CASES[name]
    torch.manual_seed(1)
    module = module_of(form).double().eval()
    checkpoints.load_released(module, made())
    return module, x.double()


@pytest.mark.parametrize("form", ["residual", "interpolated"])
@pytest.mark.parametrize("name", CASES)
def test_a_constant_confidence_folds_into_a_plain_layer(name: str, form: str) -> None:
    module, x = layer_of(name, form)
    with pytest.raises(
        ArgumentError, match="confidence must be given where the module's depends on its input"
    ):
        checkpoints.export_folded(module)
    layer: Any = module.get_submodule("confidence_layer")
    with torch.no_grad():
        (layer.conv if name == "segmentation" else layer).weight.zero_()
    folded = checkpoints.export_folded(module)
    assert isinstance(folded, nn.Conv2d if name == "segmentation" else nn.Linear)
    assert not folded.training
    torch.testing.assert_close(folded(x), module(x), rtol=1e-10, atol=1e-10)


def test_a_confidence_that_is_given() -> None:
    module, x = layer_of("classification", "residual")
    raw: Any = module
    folded = checkpoints.export_folded(module, 0.3)
    expected = (1 + 0.3 * raw.logit_scale) * raw.raw_logits(x) + 0.3 * raw.logit_bias
    torch.testing.assert_close(folded(x), expected)
    with pytest.raises(ArgumentError, match=r"confidence must be a number from 0 to 1, got 1\.5"):
        checkpoints.export_folded(module, 1.5)
    with pytest.raises(ArgumentError, match=r"module must be .*, got a ReLU"):
        checkpoints.export_folded(nn.ReLU(), 0.5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")  # of torch's exporter
def test_onnxruntime_gives_the_same_outputs(name: str) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra disalign_ops[onnx]")
    module, x = layer_of(name, "interpolated")
    module, x = module.float().train(), x.float()
    file = io.BytesIO()
    checkpoints.export_onnx(module, file, x[:1])
    assert module.training
    module.eval()
    session = runtime.InferenceSession(file.getvalue())
    for rows in (1, 2, 7):
        more = torch.cat([x] * math.ceil(rows / len(x)))[:rows]
        found = session.run(None, {session.get_inputs()[0].name: more.numpy()})[0]
        np.testing.assert_allclose(found, module(more).detach().numpy(), rtol=1e-4, atol=1e-5)
