"""Data-parallel training with two gloo processes."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tolerances import assert_close
from torch import Tensor, nn

import disalign_ops


def _model() -> tuple[nn.Linear, nn.Linear, Tensor, Tensor]:
    torch.manual_seed(3)
    return nn.Linear(6, 17), nn.Linear(6, 1), torch.randn(8, 6), torch.randint(0, 17, (8,))


class _Calibrated(nn.Module):
    def __init__(self, classifier: nn.Linear, confidence: nn.Linear) -> None:
        super().__init__()
        self.classifier, self.confidence = classifier, confidence
        self.scale = nn.Parameter(torch.full((17,), 1.1))
        self.bias = nn.Parameter(torch.full((17,), 0.2))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return disalign_ops.disalign_cross_entropy(
            self.classifier(x), target, self.confidence(x), self.scale, self.bias
        )


def _worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    torch.set_num_threads(1)
    classifier, confidence, x, target = _model()
    module = nn.parallel.DistributedDataParallel(_Calibrated(classifier, confidence))
    half = slice(4 * rank, 4 * rank + 4)
    module(x[half], target[half]).backward()
    if rank == 0:
        grads = {n: p.grad for n, p in module.module.named_parameters()}
        torch.save(grads, Path(folder) / "grads.pt")
    dist.destroy_process_group()


def test_ddp_gives_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    actual = torch.load(tmp_path / "grads.pt")
    classifier, confidence, x, target = _model()
    whole = _Calibrated(classifier, confidence)
    whole(x, target).backward()
    for name, parameter in whole.named_parameters():
        assert parameter.grad is not None
        assert_close(actual[name], parameter.grad, torch.float32, name)
