"""transformers: Segformer by Trainer, with the fused loss at the labels' size."""

import tempfile

import torch
from transformers import (
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    TrainingArguments,
)

from disalign_ops import upsample_predict
from disalign_ops.integrations.transformers import semantic_segmentation_loss

torch.manual_seed(0)
config = SegformerConfig(
    num_labels=4, depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32],
    num_attention_heads=[1, 1, 1, 1], decoder_hidden_size=16,
)  # fmt: skip
model = SegformerForSemanticSegmentation(config)
labels = torch.randint(0, 4, (8, 64, 64))
labels[:, :2] = 255
images = torch.randn(8, 3, 64, 64)
data = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]
with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model,
        TrainingArguments(folder, per_device_train_batch_size=4, max_steps=3, report_to=[],
                          logging_steps=1, use_cpu=True, disable_tqdm=True),
        train_dataset=data,
        compute_loss_func=semantic_segmentation_loss(weight=torch.tensor([1.0, 1, 2, 3])),
    )  # fmt: skip
    loss = trainer.train().training_loss
model.eval()
with torch.no_grad():
    classes = upsample_predict(model(images).logits, (64, 64))
print(f"loss {loss:.3f}, classes {tuple(classes.shape)}")
