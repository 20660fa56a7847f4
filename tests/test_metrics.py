"""LongTailAccuracy against a naive double loop, by hand, over ranks, and against torchmetrics."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from disalign_ops import metrics
from disalign_ops.metrics import LongTailAccuracy, split_classes
from support import ranks

IGNORED = -100


def naive_scores(
    train_counts: list[int], logits: torch.Tensor, target: torch.Tensor, ks: tuple[int, ...]
) -> dict[str, Any]:
    """The definitions, one sample and one class at a time."""
    c = len(train_counts)
    samples, predicted = [0] * c, [0] * c
    hits = {k: [0] * c for k in ks}
    for row, t in zip(logits.tolist(), target.tolist(), strict=True):
        if t == IGNORED:
            continue
        order = sorted(range(c), key=lambda j: (-row[j], j))
        samples[t] += 1
        predicted[order[0]] += 1
        for k in ks:
            hits[k][t] += t in order[:k]
    tested = [j for j in range(c) if samples[j]]
    splits = {
        "many": [j for j in tested if train_counts[j] > 100],
        "medium": [j for j in tested if 20 <= train_counts[j] <= 100],
        "few": [j for j in tested if train_counts[j] < 20],
    }

    def mean(values: list[float]) -> float:
        return sum(values) / len(values) if values else math.nan

    scores: dict[str, Any] = {}
    for k in ks:
        prefix = "" if k == 1 else f"top{k}_"
        scores[f"{prefix}overall"] = sum(hits[k]) / sum(samples) if tested else math.nan
        for name, classes in splits.items():
            scores[f"{prefix}{name}"] = mean([hits[k][j] / samples[j] for j in classes])
    f1 = []
    for j in tested:
        precision = hits[1][j] / predicted[j] if predicted[j] else 0.0
        recall = hits[1][j] / samples[j]
        both = precision + recall
        f1.append(2 * precision * recall / both if both else 0.0)
    scores["macro_f1"] = mean(f1)
    scores["per_class"] = [hits[1][j] / samples[j] if samples[j] else math.nan for j in range(c)]
    return scores


def assert_same(actual: dict[str, Any], expected: dict[str, Any], rel: float = 1e-12) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        got = actual[key].tolist() if isinstance(actual[key], torch.Tensor) else actual[key]
        assert got == pytest.approx(value, rel=rel, abs=1e-12, nan_ok=True), key


def batches(seed: int, sizes: tuple[int, ...], c: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits with ties, and targets some of which are ignored."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for n in sizes:
        target = torch.randint(0, c, (n,), generator=generator)
        target[torch.rand(n, generator=generator) < 0.1] = IGNORED
        out.append((torch.randint(0, 6, (n, c), generator=generator).float(), target))
    return out


# --- splits


def test_split_classes_bounds() -> None:
    many, medium, few = split_classes([101, 100, 20, 19, 0])
    assert many.tolist() == [True, False, False, False, False]
    assert medium.tolist() == [False, True, True, False, False]
    assert few.tolist() == [False, False, False, True, True]
    assert many.dtype == torch.bool
    assert split_classes(np.array([5, 4, 3, 2]), many=4, few=3)[1].tolist() == [0, 1, 1, 0]


@given(st.lists(st.integers(0, 300), min_size=1), st.integers(0, 150), st.integers(0, 150))
def test_every_class_is_in_one_split(counts, few, more) -> None:
    masks = torch.stack(split_classes(counts, many=few + more, few=few))
    assert masks.sum(dim=0).tolist() == [1] * len(counts)


def test_split_classes_errors() -> None:
    with pytest.raises(ValueError, match="few must be at most many, got few = 200 and many = 100"):
        split_classes([1, 2], few=200)
    with pytest.raises(
        ValueError, match=r"counts must have one number per class .*, got shape \(1, 2\)"
    ):
        split_classes([[1, 2]])


# --- values


def test_by_hand() -> None:
    metric = LongTailAccuracy([500, 200, 60, 3, 2])
    predicted = torch.tensor([0, 0, 1, 1, 1, 0, 2, 0])
    target = torch.tensor([0, 0, 0, 1, 1, 1, 2, 3])
    metric.update(predicted, target)
    scores = metric.compute()
    assert scores["overall"] == (2 + 2 + 1 + 0) / 8
    assert scores["per_class"].tolist()[:4] == [2 / 3, 2 / 3, 1.0, 0.0]
    assert math.isnan(scores["per_class"][4])  # no test sample
    assert scores["many"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert scores["medium"] == 1.0
    assert scores["few"] == 0.0  # class 4 is left out
    # 2 tp / (samples + predictions) of the classes 0 to 3
    f1 = [2 * 2 / (3 + 4), 2 * 2 / (3 + 3), 2 * 1 / (1 + 1), 0 / (1 + 0)]
    assert scores["macro_f1"] == pytest.approx(sum(f1) / 4)
    assert isinstance(scores["few"], float)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.lists(st.integers(0, 12), min_size=1, max_size=4),
    st.lists(st.sampled_from([0, 5, 19, 20, 60, 100, 101, 900]), min_size=5, max_size=9),
)
def test_against_the_naive_loop(seed, sizes, train_counts) -> None:
    data = batches(seed, tuple(sizes), len(train_counts))
    metric = LongTailAccuracy(train_counts, topk=(1, 3, 5))
    for logits, target in data:
        metric.update(logits, target)
    logits, target = (torch.cat(parts) for parts in zip(*data, strict=True))
    assert_same(metric.compute(), naive_scores(train_counts, logits, target, (1, 3, 5)))


def test_on_a_balanced_test_set_a_split_is_its_share_of_correct_samples() -> None:
    train_counts = [500, 300, 50, 30, 4, 2]
    target = torch.arange(6).repeat(10)
    logits = torch.randn(60, 6, generator=torch.Generator().manual_seed(1))
    metric = LongTailAccuracy(train_counts)
    metric.update(logits, target)
    correct = logits.argmax(dim=1) == target
    scores = metric.compute()
    masks = split_classes(train_counts)
    for name, mask in zip(("many", "medium", "few"), masks, strict=True):
        assert scores[name] == pytest.approx(correct[mask[target]].double().mean().item())
    assert scores["overall"] == pytest.approx(scores["per_class"].mean().item())


def test_equal_logits_do_not_count_as_hits() -> None:
    metric = LongTailAccuracy([9] * 4, topk=(2,))
    metric.update(torch.zeros(4, 4), torch.arange(4))
    scores = metric.compute()
    assert scores["overall"] == 1 / 4
    assert scores["top2_overall"] == 2 / 4


def test_a_row_with_nan_is_a_miss_and_predicts_nothing() -> None:
    logits = torch.eye(3)
    logits[1, 1] = math.nan  # argmax would take it for the largest
    metric = LongTailAccuracy([9] * 3, topk=(3,))
    metric.update(logits, torch.arange(3))
    scores = metric.compute()
    assert scores["per_class"].tolist() == [1.0, 0.0, 1.0]
    assert scores["top3_overall"] == 2 / 3
    assert scores["macro_f1"] == pytest.approx((1 + 0 + 1) / 3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_every_target_dtype(dtype) -> None:
    # 156 is what -100, the ignore_index, would wrap to in uint8.
    c = 120 if dtype != torch.uint8 else 200
    target = torch.tensor([0, 3, c - 44], dtype=dtype)
    metric = LongTailAccuracy([9] * c)
    metric.update(target.clone(), target)
    assert metric.compute()["overall"] == 1.0
    assert (~metric.compute()["per_class"].isnan()).sum() == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_logits_of_other_dtypes(dtype) -> None:
    metric = LongTailAccuracy([9] * 3, topk=(2,))
    metric.update(torch.eye(3, dtype=dtype).requires_grad_(), torch.tensor([0, 1, 1]))
    assert metric.compute()["overall"] == 2 / 3


def test_a_topk_that_is_one_number() -> None:
    assert "top2_few" in LongTailAccuracy([1, 2, 3], topk=2).compute()


def test_ignore_index_may_be_a_class() -> None:
    metric = LongTailAccuracy([9] * 3, ignore_index=2)
    metric.update(torch.tensor([0, 1, 2, 0]), torch.tensor([0, 0, 2, 2]))
    scores = metric.compute()
    assert scores["overall"] == 1 / 2
    assert math.isnan(scores["per_class"][2])
    assert scores["macro_f1"] == pytest.approx(2 * 1 / (2 + 1))  # class 1 has no sample


def test_nothing_seen_is_nan_and_reset_forgets() -> None:
    metric = LongTailAccuracy([500, 50, 5], topk=(2,))
    empty = metric.compute()
    metric.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    metric.update(torch.eye(3), torch.full((3,), IGNORED))
    assert repr(metric.compute()) == repr(empty)
    assert all(torch.as_tensor(value).isnan().all() for value in empty.values())
    metric.update(torch.eye(3), torch.arange(3))
    assert metric.compute()["overall"] == 1.0
    metric.reset()
    assert repr(metric.compute()) == repr(empty)


def test_memory_does_not_grow_with_samples() -> None:
    metric = LongTailAccuracy([9] * 7, topk=(1, 5))
    for logits, target in batches(0, (50, 50, 50), 7):
        metric.update(logits, target)
    tensors = [value for value in vars(metric).values() if isinstance(value, torch.Tensor)]
    assert [(t.shape, t.dtype) for t in tensors] == [((2 + 2, 7), torch.int64)]


T3 = torch.tensor([0, 1, 2])


# --- ranks

COUNTS = [500, 150, 60, 20, 5, 0]


def run_rank(folder: Path, rank: int, world: int) -> None:
    own = LongTailAccuracy(COUNTS, topk=(2,))
    theirs = metrics.LongTailAccuracyMetric(COUNTS, topk=(2,))
    for metric in (own, theirs):
        # Rank 1 sees fewer batches, then more.
        for logits, target in batches(rank, (30, 20)[: 2 - rank], len(COUNTS)):
            metric.update(logits, target)
    first = own.compute()
    torch.save([first, theirs.compute()], folder / f"first{rank}.pt")
    # compute leaves the counters as they are: a second sum must not count rank 0 twice.
    if rank == 1:
        own.update(*batches(7, (10,), len(COUNTS))[0])
    alone = own.compute(group=[dist.new_group([r]) for r in (0, 1)][rank])
    torch.save([own.compute(), alone], folder / f"second{rank}.pt")


def test_accumulates_over_two_ranks(tmp_path: Path) -> None:
    ranks.run(partial(run_rank, tmp_path), 2)
    per_rank = [batches(0, (30, 20), len(COUNTS)), batches(1, (30,), len(COUNTS))]

    def expected(data: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
        logits, target = (torch.cat(parts) for parts in zip(*data, strict=True))
        return naive_scores(COUNTS, logits, target, (1, 2))

    both = expected(per_rank[0] + per_rank[1])
    more = per_rank[1] + batches(7, (10,), len(COUNTS))
    for rank in (0, 1):
        own, theirs = torch.load(tmp_path / f"first{rank}.pt")
        assert_same(own, both)
        assert_same(theirs, both, rel=1e-6)
        second, alone = torch.load(tmp_path / f"second{rank}.pt")
        assert_same(second, expected(per_rank[0] + more))
        assert_same(alone, expected(more if rank else per_rank[0]))


def test_the_sum_is_taken_over_the_group_asked_for(monkeypatch) -> None:
    # Two real ranks cannot tell a group of two from the world, so torch.distributed is recorded.
    asked = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda group: asked.append(group) or "gloo")
    monkeypatch.setattr(dist, "get_world_size", lambda group: asked.append(group) or 2)
    monkeypatch.setattr(dist, "all_reduce", lambda total, op, group: asked.append(group))
    LongTailAccuracy([9] * 3).compute(group="some ranks")
    assert asked == ["some ranks"] * 3


# --- torchmetrics


def test_torchmetrics_gives_the_same_numbers() -> None:
    from torchmetrics import Metric, MetricCollection

    options = {"topk": (1, 3), "many": 60, "few": 10, "ignore_index": IGNORED}
    ours = LongTailAccuracy(COUNTS, **options)
    theirs = metrics.LongTailAccuracyMetric(COUNTS, **options)
    assert isinstance(theirs, Metric)
    collection = MetricCollection({"lt": theirs.clone()})
    for logits, target in batches(3, (20, 0, 33), len(COUNTS)):
        ours.update(logits, target)
        theirs.update(logits, target)
        collection.update(logits, target)
    expected = {**ours.compute(), "per_class": ours.compute()["per_class"].tolist()}
    scores = theirs.compute()
    assert_same(scores, expected, rel=1e-6)
    assert scores["per_class"].dtype == scores["few"].dtype == torch.float32
    assert expected.keys() <= {key.removeprefix("lt_") for key in collection.compute()}
    theirs.reset()
    theirs.update(torch.eye(len(COUNTS))[:2], torch.tensor([0, 0]))
    assert theirs.compute()["overall"] == 1 / 2


def test_torchmetrics_forward_gives_the_batch_and_accumulates() -> None:
    metric = metrics.LongTailAccuracyMetric([9] * 3)
    assert metric(T3, T3)["overall"] == 1.0
    assert metric(torch.tensor([0, 0, 0]), T3)["overall"] == pytest.approx(1 / 3)
    assert metric.compute()["overall"] == pytest.approx(4 / 6)


def test_torchmetrics_pickles_in_the_middle() -> None:
    metric = metrics.LongTailAccuracyMetric([9] * 3)
    metric.update(T3, T3)
    again = pickle.loads(pickle.dumps(metric))
    again.update(torch.tensor([0, 0, 0]), T3)
    assert again.compute()["overall"] == pytest.approx(4 / 6)


def run_python(code: str) -> str:
    root = Path(metrics.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torchmetrics_is_imported_only_when_asked_for_and_its_absence_is_explained() -> None:
    out = run_python(
        "import sys\n"
        "import disalign_ops.metrics as m\n"
        "print('torchmetrics' in sys.modules)\n"
        "sys.modules['torchmetrics'] = None\n"  # import then fails as if it were not installed
        "try:\n"
        "    m.LongTailAccuracyMetric\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "m.LongTailAccuracy([1, 2])\n"
    )
    imported, message = out.splitlines()
    assert imported == "False"
    assert message.startswith("LongTailAccuracyMetric needs torchmetrics, which cannot be imported")
    assert "pip install torchmetrics" in message


def test_other_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        _ = metrics.Nonsense
