"""Lightning: stage 2 as a callback, with accuracy by many / medium / few after every epoch."""

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

from disalign_ops import nn as dnn
from disalign_ops.integrations.lightning import DisAlignStage2

torch.manual_seed(0)
counts = torch.tensor([300, 60, 9])
y = torch.repeat_interleave(torch.arange(3), counts)
data = TensorDataset(torch.eye(3, 8)[y] * 2 + torch.randn(len(y), 8), y)
loader = DataLoader(data, batch_size=64, shuffle=True)


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Linear(8, 3)
        self.criterion = dnn.CrossEntropyLoss()

    def training_step(self, batch, _):
        return self.criterion(self.model(batch[0]), batch[1])

    def validation_step(self, batch, _):
        return {"logits": self.model(batch[0]), "target": batch[1]}

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


options = {"max_epochs": 3, "logger": False, "enable_checkpointing": False}
lightning.Trainer(**options).fit(classifier := Classifier(), loader)
dnn.convert_to_disalign(classifier)
classifier.criterion = dnn.GRWCrossEntropyLoss(counts)
trainer = lightning.Trainer(callbacks=[DisAlignStage2(counts)], **options)
trainer.fit(classifier, loader, loader)
print({name: round(value.item(), 2) for name, value in trainer.callback_metrics.items()})
