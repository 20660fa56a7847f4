"""torchvision: DeepLab trained at the masks' size without upsampled logits."""

import torch
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

from disalign_ops import class_stats, upsample_predict
from disalign_ops.integrations.torchvision import low_resolution_logits, segmentation_loss

torch.manual_seed(0)
model = deeplabv3_mobilenet_v3_large(
    weights=None, weights_backbone=None, num_classes=5, aux_loss=True
).train()
images = torch.rand(2, 3, 96, 96)
masks = torch.randint(0, 5, (2, 96, 96), dtype=torch.uint8)
masks[:, :4] = 255  # not labelled
pixels = torch.bincount(masks[masks < 255].long(), minlength=5)
weight = class_stats.grw_weights(pixels, rho=0.2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
for _ in range(3):
    loss = segmentation_loss(model, images, masks, weight)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
model.eval()
with torch.no_grad():
    classes = upsample_predict(low_resolution_logits(model, images)["out"], masks.shape[1:])
print(f"loss {loss.item():.3f}, classes {tuple(classes.shape)}")
