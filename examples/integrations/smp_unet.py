"""segmentation-models-pytorch: a model without its last upsampling, which the loss does."""

import segmentation_models_pytorch as smp
import torch

from disalign_ops.integrations.smp import without_upsampling

torch.manual_seed(0)
model = smp.DeepLabV3Plus("resnet18", encoder_weights=None, classes=4)
model, criterion = without_upsampling(model, weight=torch.tensor([1.0, 1, 2, 4]))
images = torch.rand(2, 3, 64, 64)
masks = torch.randint(0, 4, (2, 64, 64), dtype=torch.uint8)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for _ in range(3):
    logits = model(images)  # at a quarter of the masks' size
    loss = criterion(logits, masks)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
classes = criterion.predict(logits, masks.shape[1:])
print(f"logits {tuple(logits.shape)}, loss {loss.item():.3f}, classes {tuple(classes.shape)}")
