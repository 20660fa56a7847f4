"""Calls every operator with a few rows of each tier: what compute-sanitizer watches.

    compute-sanitizer --error-exitcode 9 python -m support.every_operator

Results are looked at only so far as that they are finite: other tests compare them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import disalign_ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Rows and classes: groups of threads; a warp a row, few rows and many; the warps of a block; a
# block or a cluster a row; tiles of a row. Some rows are not aligned to 16 bytes.
ROWS = ((7, 19), (9, 512), (9, 1203), (300, 1203), (5, 5001), (5, 8142), (3, 20_001), (3, 60_000))
IGNORED = 1


def _tensors(dtype: torch.dtype, device: str, *sizes: int) -> list[Tensor]:
    return [torch.randn(n, device=device, dtype=dtype).requires_grad_() for n in sizes]


def _check(loss: Tensor, wanted: list[Tensor], upstream: float = 1.0) -> None:
    grads = torch.autograd.grad(loss, wanted, torch.full_like(loss, upstream))
    for result in (loss, *grads):
        assert bool(result.isfinite().all())


def _rows(n: int, classes: int, dtype: torch.dtype, device: str) -> None:
    z = torch.randn(n, classes, device=device).to(dtype).requires_grad_()
    target = torch.randint(0, classes, (n,), device=device)
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    learned = _tensors(vectors, device, n, classes, classes)
    positive = torch.rand(classes, device=device, dtype=vectors) + 0.5
    each: dict[str, Any] = {
        "weight": positive, "prior": -positive, "margin": positive,
        "sample_weight": torch.rand(n, device=device, dtype=vectors),
        "label_smoothing": 0.1, "focal_gamma": 2.0, "ignore_index": int(target[IGNORED]),
    }  # fmt: skip
    for upstream in (1.0, 0.3):  # where it is not 1, backward makes the gradient anew
        _check(disalign_ops.cross_entropy(z, target, positive), [z], upstream)
        loss = disalign_ops.disalign_cross_entropy(z, target, *learned)
        _check(loss, [z, *learned], upstream)
    _check(disalign_ops.disalign_cross_entropy(z.detach(), target, *learned), learned)
    for options in ({"gradient": "backward"}, {"inplace_backward": True}, {"reduction": "sum"}):
        given = z.detach().clone().requires_grad_()
        # Not a leaf: what is overwritten must not be one.
        loss = disalign_ops.disalign_cross_entropy(given * 1, target, *learned, **each | options)
        _check(loss, [given, *learned])
    each_row = disalign_ops.cross_entropy(z, target, **each, reduction="none")
    _check(each_row, [z])
    _check(disalign_ops.calibrate(z, *learned), [z, *learned])


def _planes(dtype: torch.dtype, device: str) -> None:
    n, classes, size, larger = 2, 21, (8, 9), (17, 19)
    z = torch.randn(n, classes, *size, device=device).to(dtype).requires_grad_()
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    confidence = torch.randn(n, 1, *size, device=device, dtype=vectors).requires_grad_()
    learned = [confidence, *_tensors(vectors, device, classes, classes)]
    given = dict(zip(("confidence", "scale", "bias"), learned, strict=True))
    target = torch.randint(0, classes, (n, *size), device=device)
    large = torch.randint(0, classes, (n, *larger), device=device)
    backward = disalign_ops.disalign_cross_entropy(z, target, *learned, gradient="backward")
    _check(backward, [z, *learned])
    for options in ({}, {"inplace_backward": True}):
        loss = disalign_ops.disalign_cross_entropy(z * 1, target, *learned, **options)
        _check(loss, [z, *learned])
        loss = disalign_ops.upsample_cross_entropy(z * 1, large, **given, **options)
        _check(loss, [z, *learned])
    details: Any = disalign_ops.upsample_cross_entropy(z.detach(), large, return_details=True)
    assert bool(details.loss.isfinite().all())
    disalign_ops.upsample_predict(z.detach(), larger)
    _check(disalign_ops.calibrate(z, *learned), [z, *learned])


def _shards(device: str) -> None:
    features, head = torch.randn(9, 16, device=device), torch.randn(3000, 16, device=device)
    wanted = [features.requires_grad_(), head.requires_grad_()]
    target = torch.randint(0, 3000, (9,), device=device)
    # Chunks of classes.
    _check(disalign_ops.linear_cross_entropy(features, head, target, chunk_bytes=40_000), wanted)
    _check(disalign_ops.linear_cross_entropy(features, head, target, sample_rate=0.5), wanted)
    # A group of this process alone, which has nobody to exchange anything with.
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    z = torch.randn(9, 301, device=device).requires_grad_()
    _check(disalign_ops.cross_entropy(z, target % 301, shard=disalign_ops.Shard()), [z])
    torch.distributed.destroy_process_group()


def calls(device: str) -> Iterator[str]:
    """Makes the calls, and says which after each."""
    torch.manual_seed(0)
    for dtype in DTYPES:
        for rows, classes in ROWS:
            _rows(rows, classes, dtype, device)
            yield f"rows {rows} x {classes} {dtype}"
        _planes(dtype, device)
        yield f"planes {dtype}"
    _shards(device)
    yield "shards"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    with disalign_ops.set_backend("native"):  # raises where the library does not serve
        for what in calls(options.device):
            if options.device == "cuda":
                torch.cuda.synchronize()
            print(what, flush=True)


if __name__ == "__main__":
    main()
