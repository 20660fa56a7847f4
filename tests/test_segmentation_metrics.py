"""SegmentationIoU by hand, against masks of one class at a time in numpy, and over ranks."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from disalign_ops import segmentation_metrics
from disalign_ops.segmentation_metrics import ADE20K_SPLIT, SegmentationIoU
from support import ranks

IGNORED = 255
SIGNED = [torch.int8, torch.int16, torch.int32, torch.int64]
UNSIGNED = [torch.uint8, torch.uint16, torch.uint32, torch.uint64]
Batch = tuple[torch.Tensor, torch.Tensor]


def brute_force(
    c: int, data: list[Batch], split: dict[str, list[int]] | None = None
) -> dict[str, object]:
    """The definitions, one class at a time over masks of pixels."""
    predictions = np.concatenate([p.numpy().ravel() for p, _ in data])
    targets = np.concatenate([t.numpy().ravel() for _, t in data])
    valid = targets != IGNORED
    predictions, targets = predictions[valid], targets[valid]
    iou, accuracy = [], []
    for j in range(c):
        here, said = targets == j, predictions == j
        both, either = (here & said).sum(), (here | said).sum()
        iou.append(both / either if either else math.nan)
        accuracy.append(both / here.sum() if here.any() else math.nan)

    def mean(values: list[float]) -> float:
        kept = [v for v in values if not math.isnan(v)]
        return sum(kept) / len(kept) if kept else math.nan

    return {
        "iou": iou,
        "mean": mean(iou),
        "accuracy": accuracy,
        "pixel_accuracy": float((targets == predictions).mean()) if len(targets) else math.nan,
        **{name: mean([iou[j] for j in group]) for name, group in (split or {}).items()},
    }


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, object]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == torch.float64
        assert actual[key].tolist() == pytest.approx(value, rel=1e-12, abs=0, nan_ok=True), key


def batches(seed: int, shapes: list[tuple[int, ...]], c: int) -> list[Batch]:
    """Maps that agree in places, with ignored pixels; nonsense is predicted where ignored."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for shape in shapes:
        target = torch.randint(0, c, shape, generator=generator)
        prediction = torch.randint(0, c, shape, generator=generator)
        prediction = torch.where(torch.rand(shape, generator=generator) < 0.5, target, prediction)
        ignored = torch.rand(shape, generator=generator) < 0.2
        out.append((prediction.masked_fill(ignored, 999), target.masked_fill(ignored, IGNORED)))
    return out


def run(metric: SegmentationIoU, data: list[Batch]) -> dict[str, torch.Tensor]:
    for prediction, target in data:
        metric.update(prediction, target)
    return metric.compute()


# --- values


def test_by_hand() -> None:
    metric = SegmentationIoU(5, split=([0], [1, 2], [3, 4]))
    target = torch.tensor([[0, 0, 0, 1], [1, 1, 2, 255]])
    metric.update(torch.tensor([[0, 0, 1, 1], [0, 1, 3, 2]]), target)
    scores = metric.compute()
    # 0: both 2, target 3, predicted 3. 1: both 2, target 3, predicted 3. 2: target 1. 3: predicted.
    assert scores["iou"].tolist()[:4] == [2 / 4, 2 / 4, 0.0, 0.0]
    assert scores["accuracy"].tolist()[:3] == [2 / 3, 2 / 3, 0.0]
    assert math.isnan(scores["iou"][4])  # occurs nowhere
    assert scores["accuracy"][3:].isnan().all()
    assert scores["mean"] == 1 / 4
    assert scores["pixel_accuracy"] == 4 / 7
    assert (scores["head"], scores["body"], scores["tail"]) == (1 / 2, 1 / 4, 0.0)
    assert {(v.dtype, v.device.type) for v in scores.values()} == {(torch.float64, "cpu")}
    assert {k: v.shape for k, v in scores.items() if v.dim()} == {"iou": (5,), "accuracy": (5,)}


def test_the_example_of_the_docstring() -> None:
    metric = SegmentationIoU(3, split=([0], [1], [2]))
    metric.update(torch.tensor([[0, 0], [1, 1]]), torch.tensor([[0, 1], [1, 255]]))
    assert repr(metric.compute()["mean"]) == "tensor(0.5000, dtype=torch.float64)"


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(3, 40),
    st.lists(st.lists(st.integers(0, 6), max_size=3).map(tuple), min_size=1, max_size=4),
)
def test_against_brute_force(seed, c, shapes) -> None:
    data = batches(seed, shapes, c)
    split = {"head": [0], "body": list(range(1, c - 1)), "tail": [c - 1]}
    metric = SegmentationIoU(c, split=tuple(split.values()))
    assert_same(run(metric, data), brute_force(c, data, split))


def test_streaming_is_one_call() -> None:
    data = batches(1, [(2, 8, 9), (2, 8, 9), (2, 8, 9)], 20)
    one = SegmentationIoU(20)
    one.update(*(torch.cat(parts) for parts in zip(*data, strict=True)))
    assert repr(run(SegmentationIoU(20), data)) == repr(one.compute())


def test_847_classes() -> None:
    generator = torch.Generator().manual_seed(2)
    target = torch.randint(-1, 847, (3, 50, 60), generator=generator)
    prediction = torch.where(torch.rand(target.shape, generator=generator) < 0.5, target, 255)
    metric = SegmentationIoU(847, ignore_index=-1)  # 255 is a class here
    metric.update(prediction, target)
    # The brute force ignores 255, so -1 becomes 255, and the class 255 goes to 847.
    moved = [torch.where(m == 255, 847, m) for m in (prediction, target)]
    moved[1] = torch.where(moved[1] == -1, IGNORED, moved[1])
    expected = brute_force(848, [(moved[0], moved[1])])["iou"]
    expected[255] = expected.pop()
    assert 0 < expected[255] < 1
    assert metric.compute()["iou"].tolist() == pytest.approx(expected, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("dtype", SIGNED + UNSIGNED)
def test_every_integer_dtype(dtype) -> None:
    ignored = -1 if dtype == torch.int8 else 255
    target = torch.tensor([[0, 3], [99, ignored]]).to(dtype)
    prediction = torch.tensor([[0, 3], [98, 100]]).to(dtype)
    for other in (dtype, torch.int64):
        metric = SegmentationIoU(100, ignore_index=ignored)
        metric.update(prediction, target.to(other))
        metric.update(prediction.to(other), target)
        scores = metric.compute()
        assert scores["pixel_accuracy"] == 2 / 3
        assert scores["iou"].nansum() == 2
        assert scores["iou"].isnan().sum() == 96


@pytest.mark.parametrize("dtype", UNSIGNED)
def test_ignore_index_is_compared_as_a_number(dtype) -> None:
    largest = torch.iinfo(dtype).max  # what -1 would wrap to
    target = torch.tensor([0, largest], dtype=dtype)
    metric = SegmentationIoU(3, ignore_index=-1)
    message = (
        rf"target must have classes from 0 to 2 or ignore_index = -1.*, got {largest} at \(1,\)"
    )
    with pytest.raises(IndexError, match=message):
        metric.update(torch.zeros(2, dtype=dtype), target)
    if dtype != torch.uint64:
        ignoring = SegmentationIoU(3, ignore_index=largest)
        ignoring.update(torch.zeros(2, dtype=dtype), target)
        assert ignoring.compute()["pixel_accuracy"] == 1.0


def test_a_negative_class_is_not_255() -> None:
    with pytest.raises(
        IndexError, match=r"target must have classes from 0 to 2 or .*, got -1 at \(0,\)"
    ):
        SegmentationIoU(3).update(torch.zeros(1).long(), torch.tensor([-1], dtype=torch.int8))


def test_ignore_index_may_be_a_class() -> None:
    metric = SegmentationIoU(3, ignore_index=0)
    metric.update(torch.tensor([0, 1, 2, 0]), torch.tensor([0, 0, 2, 2]))
    scores = metric.compute()
    assert scores["pixel_accuracy"] == 1 / 2
    assert scores["iou"].tolist() == pytest.approx([0.0, math.nan, 1 / 2], nan_ok=True)


def test_an_absent_class_is_left_out_and_one_only_predicted_is_not() -> None:
    metric = SegmentationIoU(4, split=([0, 3], [1], [2]))
    metric.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    scores = metric.compute()
    assert scores["iou"].tolist() == pytest.approx([0.5, 0, math.nan, math.nan], nan_ok=True)
    assert scores["mean"] == 0.25
    assert (scores["head"], scores["body"]) == (0.5, 0.0)
    assert math.isnan(scores["tail"])


def test_nothing_seen_is_nan_and_reset_forgets() -> None:
    metric = SegmentationIoU(3, counts=[990, 8, 2])
    empty = metric.compute()
    metric.update(torch.zeros(0, 4, 5, dtype=torch.uint8), torch.zeros(0, 4, 5, dtype=torch.int64))
    metric.update(torch.full((2, 2), 7), torch.full((2, 2), IGNORED))
    assert repr(metric.compute()) == repr(empty)
    assert all(value.isnan().all() for value in empty.values())
    metric.update(torch.tensor(2), torch.tensor(2))  # one pixel
    assert metric.compute()["mean"] == 1.0
    metric.reset()
    assert repr(metric.compute()) == repr(empty)


def test_compute_changes_nothing() -> None:
    metric = SegmentationIoU(6)
    data = batches(3, [(5, 6), (7, 8)], 6)
    first = run(metric, data[:1])
    assert_same(first, brute_force(6, data[:1]))
    assert repr(metric.compute()) == repr(first)
    assert_same(run(metric, data[1:]), brute_force(6, data))


def test_inference_mode() -> None:
    data = batches(4, [(5, 6), (7, 8)], 6)
    metric = SegmentationIoU(6)
    with torch.inference_mode():
        metric.reset()
        metric.update(*data[0])
    assert_same(run(metric, data[1:]), brute_force(6, data))


def test_maps_that_are_not_contiguous() -> None:
    prediction, target = batches(5, [(6, 7, 8)], 5)[0]
    metric = SegmentationIoU(5)
    metric.update(prediction.permute(2, 0, 1)[::2], target.permute(2, 0, 1)[::2])
    assert_same(metric.compute(), brute_force(5, [(prediction[..., ::2], target[..., ::2])]))


def test_memory_does_not_grow_with_pixels_and_inputs_stay() -> None:
    metric = SegmentationIoU(7)
    for prediction, target in batches(0, [(5, 50, 50)] * 3, 7):
        before = prediction.clone(), target.clone()
        metric.update(prediction, target)
        assert torch.equal(prediction, before[0])
        assert torch.equal(target, before[1])
    tensors = [value for value in vars(metric).values() if isinstance(value, torch.Tensor)]
    assert [(t.shape, t.dtype, t.device.type) for t in tensors] == [((7, 7), torch.int64, "cpu")]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_maps_on_a_gpu(dtype) -> None:
    data = batches(6, [(4, 30, 31), (4, 30, 31)], 150)
    data = [(p.clamp(max=254), t) for p, t in data]
    metric = SegmentationIoU(150, split="ade20k")
    scores = run(metric, [(p.to("cuda", dtype), t.to("cuda", dtype)) for p, t in data])
    assert repr(scores) == repr(run(SegmentationIoU(150, split="ade20k"), data))
    with pytest.raises(
        IndexError, match=r"target must have classes from 0 to .*, got 150 at \(0,\)"
    ):
        metric.update(torch.zeros(1).long().cuda(), torch.tensor([150]).cuda())


# --- the split of the metric

MASKS = [[j in group for j in range(5)] for group in ([0, 3], [1], [2])]


@pytest.mark.parametrize(
    "split",
    [
        ([0, 3], [1], [2]),
        [{3, 0}, range(1, 2), (2,)],
        (torch.tensor([3, 0]), np.array([1], dtype=np.uint8), torch.tensor([2]).to(torch.uint16)),
        MASKS,
        [torch.tensor(mask) for mask in MASKS],
        torch.tensor(MASKS),
        np.array(MASKS),
        (np.array(MASKS[0]), [1], torch.tensor(MASKS[2])),
        (iter([0, 3]), [np.int64(1)], (j for j in [2])),
    ],
)
def test_a_split_of_ids_or_masks(split) -> None:
    data = batches(7, [(9, 9)], 5)  # class 4 is in no group
    expected = brute_force(5, data, {"head": [0, 3], "body": [1], "tail": [2]})
    assert_same(run(SegmentationIoU(5, split=split), data), expected)


def test_an_empty_group_is_nan() -> None:
    scores = run(SegmentationIoU(3, split=([], [0, 1, 2], ())), batches(8, [(9, 9)], 3))
    assert math.isnan(scores["head"])
    assert math.isnan(scores["tail"])
    assert scores["body"] == scores["mean"]


def test_a_split_by_counts() -> None:
    data = batches(9, [(9, 9)], 4)
    for counts in ([2, 40_000, 500, 60_000], torch.tensor([2, 40_000, 120, 60_000])):
        expected = brute_force(4, data, {"head": [1, 3], "body": [2], "tail": [0]})
        assert_same(run(SegmentationIoU(4, counts=counts), data), expected)


def test_the_split_of_ade20k() -> None:
    data = batches(10, [(2, 40, 40)], 150)
    names = ("head", "body", "tail")
    expected = brute_force(
        150, data, {name: [*ids] for name, ids in zip(names, ADE20K_SPLIT, strict=True)}
    )
    assert_same(run(SegmentationIoU(150, split="ade20k"), data), expected)


def test_a_mask_given_may_change_later() -> None:
    masks = torch.tensor(MASKS)
    metric = SegmentationIoU(5, split=masks)
    masks.fill_(False)
    assert not run(metric, batches(7, [(9, 9)], 5))["head"].isnan()


# --- ranks

C = 6
SPLIT = {"head": [0, 1], "body": [2, 3], "tail": [4, 5]}


def run_rank(folder: Path, rank: int, world: int) -> None:
    metric = SegmentationIoU(C, split=tuple(SPLIT.values()))
    # Rank 1 sees fewer batches, then more.
    first = run(metric, batches(rank, [(3, 7), (4, 5)][: 2 - rank], C))
    # compute leaves the matrix as it is: a second sum must not count rank 0 twice.
    again = metric.compute()
    if rank == 1:
        metric.update(*batches(7, [(9,)], C)[0])
    alone = metric.compute(group=[dist.new_group([r]) for r in (0, 1)][rank])
    torch.save([first, again, metric.compute(), alone], folder / f"{rank}.pt")


def test_accumulates_over_two_ranks(tmp_path: Path) -> None:
    ranks.run(partial(run_rank, tmp_path), 2)
    per_rank = [batches(0, [(3, 7), (4, 5)], C), batches(1, [(3, 7)], C)]
    one = run(SegmentationIoU(C, split=tuple(SPLIT.values())), per_rank[0] + per_rank[1])
    more = per_rank[1] + batches(7, [(9,)], C)
    for rank in (0, 1):
        first, again, second, alone = torch.load(tmp_path / f"{rank}.pt")
        assert repr(first) == repr(again) == repr(one)
        assert_same(first, brute_force(C, per_rank[0] + per_rank[1], SPLIT))
        assert_same(second, brute_force(C, per_rank[0] + more, SPLIT))
        assert_same(alone, brute_force(C, more if rank else per_rank[0], SPLIT))


def test_the_sum_is_taken_over_the_group_asked_for(monkeypatch) -> None:
    # Two real ranks cannot tell a group of two from the world, so torch.distributed is recorded.
    asked = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda group: asked.append(group) or "gloo")
    monkeypatch.setattr(dist, "get_world_size", lambda group: asked.append(group) or 2)
    monkeypatch.setattr(dist, "all_reduce", lambda total, op, group: asked.append(group))
    SegmentationIoU(3).compute(group="some ranks")
    assert asked == ["some ranks"] * 3


def test_public_names() -> None:
    assert segmentation_metrics.__all__ == ["ADE20K_SPLIT", "SegmentationIoU", "split_pixels"]
