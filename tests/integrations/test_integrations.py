"""The adapters with the frameworks themselves: `make test-integrations`, in its own environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from trainer_steps import assert_alike, gradients_of_a_step

from disalign_ops import class_stats
from disalign_ops import nn as dnn
from disalign_ops.errors import ArgumentError

EXAMPLES = Path(__file__).parents[2] / "examples" / "integrations"
WHY = "`make test-integrations` installs it"
COUNTS = torch.tensor([400, 60, 9])


@pytest.fixture(autouse=True)
def _seed() -> None:  # `make test-integrations` runs without the conftest.py that does it
    torch.manual_seed(0)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "framework", "prints"),
    [
        ("timm_two_stages", "timm", "stage 2: accuracy of each class"),
        ("torchvision_detection", "torchvision", "stage 2: 4 tensors learn"),
        ("torchvision_segmentation", "torchvision", "classes (2, 96, 96)"),
        ("transformers_segformer", "transformers", "classes (8, 64, 64)"),
        ("smp_unet", "segmentation_models_pytorch", "logits (2, 4, 16, 16)"),
        ("lightning_stage2", "lightning", "'val/few'"),
    ],
)
def test_an_example_runs(name: str, framework: str, prints: str) -> None:
    pytest.importorskip(framework, reason=WHY)
    file = EXAMPLES / f"{name}.py"
    assert len(file.read_text().splitlines()) < 40
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(file)], capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert prints in run.stdout


def test_every_example_is_run() -> None:
    names = {file.stem for file in EXAMPLES.glob("*.py")}
    (mark,) = test_an_example_runs.pytestmark  # type: ignore[attr-defined]
    assert names == {case[0] for case in mark.args[1]}


# --- timm


def test_a_timm_model_keeps_its_logits() -> None:
    timm = pytest.importorskip("timm", reason=WHY)
    from disalign_ops.integrations.timm import GRWLoss, disalign_timm_model

    model = timm.create_model("resnet10t", num_classes=5).eval()
    x = torch.randn(2, 3, 32, 32)
    before = model(x)
    assert disalign_timm_model(model, form="interpolated") is model
    assert isinstance(model.get_classifier(), dnn.DisAlignLinear)
    close(model(x), before)
    with pytest.raises(ArgumentError, match=r"must be one nn.Linear .* got DisAlignLinear"):
        disalign_timm_model(model)
    with pytest.raises(ArgumentError, match="must be one of timm's"):
        disalign_timm_model(nn.Linear(2, 2))
    with pytest.raises(ArgumentError, match=r"must be one nn.Linear .* got Identity"):
        disalign_timm_model(timm.create_model("resnet10t", num_classes=0))
    # Mixup gives class probabilities.
    loss = GRWLoss(COUNTS, 1.0, smoothing=0.1)
    logits, soft = torch.randn(4, 3), torch.softmax(torch.randn(4, 3), 1)
    weight = class_stats.grw_weights(COUNTS, 1.0)
    close(loss(logits, soft), F.cross_entropy(logits, soft, weight, label_smoothing=0.1))


@pytest.mark.parametrize("mode", ["batch", "elem", "pair"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_timms_mixup_hands_out(mode: str, smoothing: float) -> None:
    data = pytest.importorskip("timm.data", reason=WHY)
    from disalign_ops import loss_denominator
    from disalign_ops.integrations.timm import GRWLoss

    mixup = data.Mixup(
        mixup_alpha=0.8, cutmix_alpha=1.0, mode=mode, label_smoothing=smoothing, num_classes=3
    )
    images, target = mixup(torch.rand(8, 3, 16, 16), torch.arange(8) % 3)
    assert target.shape == (8, 3)
    assert target.is_floating_point()
    logits, weight = images.flatten(1)[:, :3].contiguous(), class_stats.grw_weights(COUNTS, 1.0)
    loss = GRWLoss(COUNTS, 1.0)
    expected = F.cross_entropy(logits, target.float(), weight)
    close(loss(logits, target), expected)
    loss.normalizer = loss_denominator(target.split(3), loss.weight)
    close(loss(logits[:3], target[:3]) + loss(logits[3:], target[3:]), expected)


# --- torchvision


def test_a_predictor_takes_over_a_trained_one() -> None:
    pytest.importorskip("torchvision", reason=WHY)
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

    from disalign_ops.integrations.torchvision import DisAlignFastRCNNPredictor

    old = FastRCNNPredictor(6, 4)
    new = DisAlignFastRCNNPredictor.from_predictor(old)
    x = torch.randn(5, 6, 1, 1)
    for actual, expected in zip(new(x), old(x), strict=True):
        close(actual, expected)
    with torch.no_grad():
        new.cls_score.logit_bias.add_(3.0)
    assert torch.equal(new(x)[0][:, 0], old(x)[0][:, 0])  # the background is not calibrated
    with pytest.raises(ArgumentError, match="must be a FastRCNNPredictor"):
        DisAlignFastRCNNPredictor.from_predictor(nn.Linear(2, 2))


def test_a_cosine_predictor_of_torchvision() -> None:
    pytest.importorskip("torchvision", reason=WHY)
    from disalign_ops.integrations.torchvision import DisAlignFastRCNNPredictor

    predictor = DisAlignFastRCNNPredictor(6, 4, cosine_scale=20.0)
    layer = predictor.cls_score
    assert isinstance(layer, dnn.DisAlignCosineLinear)
    assert layer.background == "first"
    x = torch.randn(5, 6)
    close(predictor(x)[0], 20 * F.normalize(x) @ F.normalize(layer.weight).T)
    assert layer.scale in set(dnn.freeze_for_stage1(predictor))
    assert layer.scale not in set(dnn.freeze_for_stage2(predictor))


def test_the_detectors_loss_is_weighted_while_it_is_replaced() -> None:
    pytest.importorskip("torchvision", reason=WHY)
    from torchvision.models.detection import roi_heads

    from disalign_ops.integrations.torchvision import replace_fastrcnn_loss

    weight = class_stats.grw_weights(COUNTS, 0.8, background="first")
    logits, boxes = torch.randn(6, 4), torch.randn(6, 16)
    labels = [torch.tensor([0, 1, 3]), torch.tensor([2, 0, 0])]
    targets = [torch.randn(3, 4), torch.randn(3, 4)]
    plain = roi_heads.fastrcnn_loss
    expected = plain(logits, boxes, labels, targets)
    with replace_fastrcnn_loss(weight):
        found = roi_heads.fastrcnn_loss(logits, boxes, labels, targets)
    assert roi_heads.fastrcnn_loss is plain
    close(found[0], F.cross_entropy(logits, torch.cat(labels), weight))
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("aux", [False, True])
def test_a_segmentation_loss_is_that_of_the_models_output(aux: bool) -> None:
    models = pytest.importorskip("torchvision.models.segmentation", reason=WHY)
    from disalign_ops.integrations.torchvision import low_resolution_logits, segmentation_loss

    model = models.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3, aux_loss=aux
    ).eval()
    images, masks = torch.rand(1, 3, 64, 48), torch.randint(0, 3, (1, 64, 48))
    masks[:, :3] = 255
    out = model(images)
    expected = F.cross_entropy(out["out"], masks, ignore_index=255)
    if aux:
        expected = expected + 0.5 * F.cross_entropy(out["aux"], masks, ignore_index=255)
    close(segmentation_loss(model, images, masks), expected)
    with pytest.raises(ArgumentError, match="must be a segmentation model"):
        low_resolution_logits(nn.Linear(2, 2), images)


# --- transformers


def test_segformers_own_loss() -> None:
    transformers = pytest.importorskip("transformers", reason=WHY)
    from disalign_ops.integrations.transformers import semantic_segmentation_loss

    config = transformers.SegformerConfig(
        num_labels=4, depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32],
        num_attention_heads=[1, 1, 1, 1], decoder_hidden_size=16,
    )  # fmt: skip
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    x, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 4, (2, 64, 64))
    labels[:, :5] = 255
    own = model(x, labels=labels)
    close(semantic_segmentation_loss()(own, labels), own.loss)
    assert own.logits.shape[2:] == (16, 16)


def test_a_step_of_trainer_is_the_mean_of_its_batches(tmp_path: Path) -> None:
    """However its rows are divided: Trainer adds up what it accumulates, and does not divide."""
    transformers = pytest.importorskip("transformers", reason=WHY)
    from disalign_ops.integrations.transformers import semantic_segmentation_loss

    labels = torch.randint(0, 4, (4, 64, 64))
    labels[:, :5] = 255
    labels[:, 32:] = 0  # else the gradient is next to 0 at the start
    assert_alike(gradients_of_a_step(
        transformers, tmp_path, labels, lambda trainer: None,
        compute_loss_func=semantic_segmentation_loss(),
    ))  # fmt: skip


def test_upernet_keeps_its_low_resolution() -> None:
    transformers = pytest.importorskip("transformers", reason=WHY)
    from disalign_ops.integrations.transformers import (
        keep_low_resolution,
        semantic_segmentation_loss,
    )

    backbone = transformers.ConvNextConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.UperNetConfig(
        backbone_config=backbone, num_labels=4, hidden_size=16, use_auxiliary_head=False
    )
    model = transformers.UperNetForSemanticSegmentation(config).eval()
    x, labels = torch.randn(1, 3, 64, 64), torch.randint(0, 4, (1, 64, 64))
    labels[:, :5] = 255
    expected = F.cross_entropy(model(x).logits, labels, ignore_index=255)
    assert keep_low_resolution(model) is model
    outputs = model(x)
    assert outputs.logits.shape[2:] == (16, 16)
    close(semantic_segmentation_loss()(outputs, labels), expected)
    with pytest.raises(ArgumentError, match="must be a UperNet"):
        keep_low_resolution(nn.Linear(2, 2))


# --- segmentation-models-pytorch


@pytest.mark.parametrize("architecture", ["DeepLabV3Plus", "FPN", "Unet"])
def test_the_loss_upsamples_as_smp_does(architecture: str) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch", reason=WHY)
    from disalign_ops.integrations.smp import without_upsampling

    model = getattr(smp, architecture)("resnet18", encoder_weights=None, classes=3).eval()
    x, masks = torch.rand(1, 3, 64, 64), torch.randint(0, 3, (1, 64, 64))
    full = model(x)
    model, criterion = without_upsampling(model)
    logits = model(x)
    assert logits.shape[2] < 64 or architecture == "Unet"  # whose decoder ends at full size
    close(criterion(logits, masks), F.cross_entropy(full, masks))
    assert float((criterion.predict(logits, (64, 64)) == full.argmax(1)).float().mean()) > 0.999


def test_what_smp_cannot_have() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch", reason=WHY)
    from disalign_ops.integrations.smp import without_upsampling

    with pytest.raises(ArgumentError, match="must be a model of smp"):
        without_upsampling(nn.Linear(2, 2))
    model = smp.FPN("resnet18", encoder_weights=None, classes=3, activation="softmax2d")
    with pytest.raises(ArgumentError, match="activation=None"):
        without_upsampling(model)


# --- Lightning


def test_the_callback_freezes_and_logs() -> None:
    lightning = pytest.importorskip("lightning", reason=WHY)
    from disalign_ops.integrations.lightning import DisAlignStage2

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, returns: Any) -> None:
            super().__init__()
            self.norm, self.layer = nn.BatchNorm1d(4), dnn.DisAlignLinear(4, 3)
            self.returns = returns

        def training_step(self, batch: Any, _: int) -> Tensor:
            loss: Tensor = self.layer.loss(self.norm(batch[0]), batch[1])
            return loss

        def validation_step(self, batch: Any, _: int) -> Any:
            return self.returns(self.layer(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(30, 4), torch.arange(30) % 3)
    loader = torch.utils.data.DataLoader(data, batch_size=10)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}

    def fit(module: Any) -> Any:
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", callbacks=[DisAlignStage2(COUNTS)], **options
        )
        trainer.fit(module, loader, loader)
        return trainer

    module = Module(lambda z, t: {"logits": z, "target": t})
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = fit(module)
    changed = {n for n, v in module.state_dict().items() if not torch.equal(v, before[n])}
    parts = ("logit_scale", "logit_bias", "confidence_layer.weight", "confidence_layer.bias")
    assert changed == {f"layer.{name}" for name in parts}  # and no BatchNorm statistics
    target = data.tensors[1]
    right = (module.layer(data.tensors[0]).argmax(1) == target).float()
    found = trainer.callback_metrics
    assert set(found) == {"val/overall", "val/many", "val/medium", "val/few", "confidence"}
    assert 0 < float(found["confidence"]) < 1
    close(found["val/overall"], right.mean())
    close(found["val/few"], right[target == 2].mean())
    with pytest.raises(ArgumentError, match="must return a dictionary"):
        fit(Module(lambda z, t: z))
