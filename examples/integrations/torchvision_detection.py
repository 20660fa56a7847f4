"""torchvision: a Faster R-CNN whose box classifier is calibrated in stage 2, with GRW weights."""

import torch
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

from disalign_ops import class_stats
from disalign_ops import nn as dnn
from disalign_ops.integrations.torchvision import DisAlignFastRCNNPredictor, replace_fastrcnn_loss

torch.manual_seed(0)
counts = torch.tensor([400, 60, 9])  # boxes of each class; class 0 is the background
model = fasterrcnn_mobilenet_v3_large_320_fpn(
    weights=None, weights_backbone=None, num_classes=1 + len(counts)
)
images = [torch.rand(3, 160, 160) for _ in range(2)]
boxes = torch.tensor([[10.0, 10, 60, 70], [40, 30, 120, 150]])
targets = [{"boxes": boxes, "labels": torch.tensor([1, 3])} for _ in images]

heads = model.roi_heads
heads.box_predictor = DisAlignFastRCNNPredictor.from_predictor(heads.box_predictor)
parameters = dnn.freeze_for_stage2(model.train())
weight = class_stats.grw_weights(counts, rho=0.8, background="first")
optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9)
with replace_fastrcnn_loss(weight):
    for _ in range(3):
        losses = model(images, targets)
        optimizer.zero_grad()
        losses["loss_classifier"].backward()
        optimizer.step()
print(f"stage 2: {len(parameters)} tensors learn, loss {losses['loss_classifier'].item():.3f}")
