"""timm: a classifier trained in two stages on made-up long-tailed images."""

import timm
import torch
from torch import nn

from disalign_ops import nn as dnn
from disalign_ops.integrations.timm import GRWLoss, disalign_timm_model

torch.manual_seed(0)
counts = torch.tensor([120, 40, 12, 6])
target = torch.repeat_interleave(torch.arange(4), counts)
images = torch.randn(4, 3, 32, 32)[target] + 0.7 * torch.randn(len(target), 3, 32, 32)
model = timm.create_model("resnet10t", num_classes=4)


def train(parameters, loss_fn, lr, steps):
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    for _ in range(steps):
        rows = torch.randint(0, len(target), (64,))
        optimizer.zero_grad()
        loss = loss_fn(model(images[rows]), target[rows])
        loss.backward()
        optimizer.step()
    return loss.item()


print(f"stage 1: loss {train(model.parameters(), nn.CrossEntropyLoss(), 0.05, 20):.3f}")

disalign_timm_model(model)  # the classifier keeps its weights
parameters = dnn.freeze_for_stage2(model.train())
train(parameters, GRWLoss(counts, rho=1.2), 0.1, 20)
model.eval()
with torch.no_grad():
    right = (model(images).argmax(1) == target).float()
each = [round(right[target == k].mean().item(), 2) for k in range(4)]
print("stage 2: accuracy of each class", each)
