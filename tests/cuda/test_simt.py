"""The host model of CUDA kernels: planted faults are caught, and their right twins pass."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from simt import build

REASON = build.why_not()
if REASON:
    pytest.skip(REASON, allow_module_level=True)

SOURCE = build.HERE / "planted_kernels.cuh"
GRID, BLOCK = 4, 256
# None: threads in order. Each seed: another order.
SEEDS = [None, 0, 1, 2, 3]
Array = np.ndarray[Any, np.dtype[np.float32]]


def shifted(x: Array) -> Array:
    result = np.roll(x.reshape(GRID, BLOCK), 1, axis=1)
    result[:, 0] = 0
    return result


def rounded(x: Array) -> Array:
    pairs = torch.from_numpy(x).view(-1, 2)
    result = torch.stack([pairs[:, 0].bfloat16().float(), pairs[:, 1].half().float()], dim=1)
    return np.asarray(result.numpy())


def every_fourth(x: Array) -> Array:
    return np.asarray(x.reshape(-1, 4).sum(1).repeat(4))


def first_lanes(x: Array) -> Array:
    result = x.reshape(-1, 32).copy()
    result[:, :16] = result[:, :1]
    return result


def lane_before(x: Array) -> Array:
    result = np.roll(x.reshape(-1, 32), 1, axis=1)
    result[:, 0] = 0
    return result


def without_first_lanes(x: Array) -> Array:
    result = x.reshape(-1, 32).copy()
    result[:, 0] = 0
    return result


def cluster_sums(x: Array) -> Array:
    return np.asarray(x.reshape(GRID // 2, 2, BLOCK)[:, :, :3].sum((1, 2)).repeat(2))


def next_in_cluster(x: Array) -> Array:
    return np.asarray(x.reshape(GRID // 2, 2, BLOCK)[:, ::-1])


# What each right kernel leaves at the start of its output.
EXPECTED: dict[str, Callable[[Array], Any]] = {
    "block_sum": lambda x: np.full(GRID, x.sum(dtype=np.float64)),
    "shift": shifted,
    "same_table": lambda x: np.full_like(x, x[:4].sum()),
    "swap_lanes": lambda x: x.reshape(-1, 2)[:, ::-1],
    "meet_by_shuffle": lambda x: x.reshape(-1, 32)[:, 0].repeat(32),
    "shuffle_from": first_lanes,
    "outside_own_mask": lambda x: x,
    "early_return": lambda x: x,
    "many_masks": lambda x: x,
    "divergent_barrier": lambda x: x,
    "deadlock": lambda x: x,
    "load_outside": lambda x: x,
    "plain_load_outside": lambda x: x,
    "store_into_input": lambda x: x,
    "load_misaligned": every_fourth,
    "plain_load_misaligned": every_fourth,
    "shared_unwritten": lambda x: x.reshape(GRID, BLOCK)[:, ::-1],
    "shared_overflow": lambda x: x,
    "blocks_write": lambda x: np.full(GRID, x[0]),
    "blocks_chain": lambda x: x[:GRID],
    "blocks_ticket": lambda x: [*x[:GRID], x[:GRID].sum()],
    "static_reverse": lambda x: x.reshape(GRID, BLOCK)[:, ::-1],
    "round_trip": rounded,
    "vote": lambda x: np.ones_like(x),
    "copy_read_early": lambda x: x,
    "copy_wait_for_few": lambda x: x,
    "copy_empty_group": lambda x: x,
    "copy_uncommitted": lambda x: x,
    "copy_of_other_lane": lane_before,
    "copy_barrier_early": lane_before,
    "copy_over_other_lane": lane_before,
    "copy_over_unread": lambda x: x + np.roll(x, -1),
    "copy_over_store": without_first_lanes,
    "copy_twice": lambda x: x,
    "copy_of_changed_source": lambda x: x,
    "copy_outside": lambda x: x,
    "copy_from_shared": lambda x: x,
    "copy_misaligned": lambda x: x,
    "copy_three_bytes": lambda x: x,
    "copy_of_outside": lambda x: x,
    "copy_at_exit": lambda x: x,
    "cluster_sum": cluster_sums,
    "cluster_exit": next_in_cluster,
    "cluster_deadlock": lambda x: x,
    "cluster_arrival": lambda x: x,
    "cluster_rank": lambda x: x,
    "cluster_no_arrival": lambda x: x,
    "cluster_blocks": lambda x: x,
    "cluster_pointer": lambda x: x,
}

# The faults that launch reports by itself.
ERRORS = {
    "shuffle_from": r"lane \d+ reads lane 20, which is not in the mask 0x0000ffff",
    "outside_own_mask": r"lane \d+ is not in its own mask",
    "early_return": "lanes that have exited|exits, but a warp collective waits for it",
    "many_masks": "more than 16 different lane masks",
    "divergent_barrier": "divergent barrier",
    "deadlock": "deadlock: not all threads reach the same barrier",
    "round_trip": r"assert\(!kFault \|\| value == rounded\)",
    "vote": "__trap",
    "load_outside": "load outside every buffer: 4 bytes at byte 4096 of in, which has 4096",
    "store_into_input": r"store into a read-only buffer: 4 bytes at byte \d+ of in",
    "load_misaligned": r"misaligned load: 16 bytes at byte \d+ of in",
    "shared_overflow": "shared memory overflow: byte 1024 of 1024 was written",
    "copy_over_store": "a store to where an asynchronous copy is under way",
    "copy_twice": "a store to where an asynchronous copy is under way",
    "copy_of_changed_source": "a store to the source of an asynchronous copy",
    "copy_outside": "an asynchronous copy to where no shared memory is",
    "copy_from_shared": "an asynchronous copy from shared memory",
    "copy_misaligned": "a misaligned asynchronous copy",
    "copy_three_bytes": "an asynchronous copy of 3 bytes",
    "copy_at_exit": "a thread exits that has not waited for its copies",
    "cluster_exit": "shared memory of block [01], which has exited",
    "cluster_deadlock": "deadlock: not all threads reach the same barrier",
    "cluster_arrival": "a second arrival at the cluster's barrier",
    "cluster_rank": "block 2 of a cluster of 2 blocks",
    "cluster_no_arrival": "a wait at the cluster's barrier, not arrived",
    "cluster_blocks": "deadlock: not all threads reach the same barrier",
    "cluster_pointer": "a pointer outside dynamic shared memory is mapped to another block",
}

# The faults that the thread sanitizer reports, and what is special about each.
RACES = {
    "block_sum": "another warp's sum",
    "shift": "right in order",
    "same_table": "right in every order",
    "swap_lanes": "no __syncwarp",
    "meet_by_shuffle": "right in every order, and no barrier",
    "blocks_write": "two blocks",
    "blocks_chain": "two blocks",
    "blocks_ticket": "right in every order",
    "static_reverse": "static shared memory",
    "copy_of_other_lane": "right in order",
    "copy_barrier_early": "a barrier that orders no copies",
    "copy_over_other_lane": "right in every order",
    "cluster_sum": "memory of another block of the cluster",
}

# The faults that leave NaN in any order: memory that nothing was written to, or not yet.
UNWRITTEN = [
    "block_sum", "swap_lanes", "shared_unwritten", "copy_read_early", "copy_wait_for_few",
    "copy_empty_group", "copy_uncommitted", "copy_barrier_early", "copy_over_unread",
]  # fmt: skip
# Out of bounds or misaligned, by plain accesses.
ADDRESSES = {
    "plain_load_outside": "heap-buffer-overflow",
    "shared_overflow": "heap-buffer-overflow",
    "plain_load_misaligned": "misaligned address",
    "copy_of_outside": "heap-buffer-overflow",
}


@pytest.fixture(scope="module")
def planted() -> ModuleType:
    with ThreadPoolExecutor(2) as pool:
        list(
            pool.map(lambda sanitizer: build.build("planted", sanitizer), ("", "address", "thread"))
        )
    return build.module("planted")


@pytest.fixture(autouse=True)
def _ordinary_options(planted: ModuleType) -> Iterator[None]:
    planted.set_options()
    yield
    planted.set_options()


def values() -> Array:
    return np.random.default_rng(0).standard_normal(GRID * BLOCK).astype(np.float32)


def run(planted: ModuleType, name: str, fault: bool, seed: int | None = None) -> Array:
    planted.set_options(shuffle=seed is not None, seed=seed or 0)
    x = values()
    out = np.full_like(x, -9)
    planted.run(name, fault, x, out, GRID, BLOCK, BLOCK * 4, watch=True)
    return out


def is_right(name: str, out: Array) -> bool:
    expected = np.asarray(EXPECTED[name](values())).reshape(-1)
    return np.allclose(out[: expected.size], expected, rtol=1e-5, atol=1e-5)


def test_every_fault_is_caught() -> None:
    """By an error, by NaN, or by a sanitizer."""
    assert {*ERRORS, *UNWRITTEN, *RACES, *ADDRESSES} == set(EXPECTED)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", EXPECTED)
def test_right_twin(planted: ModuleType, name: str, seed: int | None) -> None:
    assert is_right(name, run(planted, name, False, seed))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ERRORS)
def test_error(planted: ModuleType, name: str, seed: int | None) -> None:
    with pytest.raises(planted.Error, match=ERRORS[name]) as caught:
        run(planted, name, True, seed)
    assert "block (" in str(caught.value)
    if name != "shared_overflow":
        assert re.search(r"planted_kernels\.cuh:\d+", str(caught.value))
    # The fibers that were abandoned leave nothing behind.
    assert is_right(name, run(planted, name, False, seed))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", UNWRITTEN)
def test_memory_that_was_not_written_is_nan(
    planted: ModuleType, name: str, seed: int | None
) -> None:
    assert np.isnan(run(planted, name, True, seed)).any()


def test_what_an_order_shows(planted: ModuleType) -> None:
    """Why orders are shuffled, and why they do not replace the thread sanitizer."""
    for name, what in RACES.items():
        if what == "right in order":
            assert is_right(name, run(planted, name, True))
    for seed in range(4):
        for name, what in RACES.items():
            if what == "right in order":
                assert not is_right(name, run(planted, name, True, seed))
            elif "every order" in what:
                assert is_right(name, run(planted, name, True, seed))


def test_a_seed_is_an_order(planted: ModuleType) -> None:
    first, again, other = (run(planted, "shift", True, seed) for seed in (5, 5, 6))
    assert np.array_equal(first, again, equal_nan=True)
    assert not np.array_equal(first, other, equal_nan=True)


@pytest.mark.parametrize("os_threads", [1, 2])
def test_traffic(planted: ModuleType, os_threads: int) -> None:
    planted.set_options(os_threads=os_threads)
    n, grid = 1003, 64  # 250 vectors of 4 and 3 single ones in each block
    x, out = np.ones(n, np.float32), np.zeros(grid, np.float32)
    for _ in range(2):
        planted.run("block_sum", False, x, out, grid, 64, 8, watch=True)
        loads = {"loads": 253 * grid, "wide_loads": 250 * grid, "load_bytes": 4 * n * grid}
        stores = {"stores": grid, "wide_stores": 0, "store_bytes": 4 * grid}
        assert planted.traffic("in") == loads | dict.fromkeys(stores, 0)
        assert planted.traffic("out") == dict.fromkeys(loads, 0) | stores
    assert np.all(out == n)
    with pytest.raises(planted.Error, match="no buffer is watched under the name other"):
        planted.traffic("other")


@pytest.mark.parametrize(("grid", "block"), [((3, 2, 2), (5, 3, 2)), ((1, 7, 1), (32, 1, 4))])
def test_indices(
    planted: ModuleType, grid: tuple[int, int, int], block: tuple[int, int, int]
) -> None:
    out = np.zeros(np.prod(grid + block), np.float32)
    planted.number(out, *grid, *block)
    assert np.array_equal(out, np.arange(out.size))


@pytest.mark.parametrize(
    ("kernel", "grid", "block", "shared", "message"),
    [
        ("shift", 1, 1025, 0, "more than 1024 threads"),
        ("shift", 0, 32, 0, "empty grid or block"),
        ("shift", 1, 32, 228 << 10, "more than 227 KiB"),
        ("cluster_sum", 3, 32, 0, "a grid that is no multiple of its clusters"),
    ],
)
def test_limits(
    planted: ModuleType, kernel: str, grid: int, block: int, shared: int, message: str
) -> None:
    x = np.zeros(1, np.float32)
    with pytest.raises(planted.Error, match=message):
        planted.run(kernel, False, x, x.copy(), grid, block, shared)


# ---- Under the sanitizers: each run is a process of its own ----

SCRIPT = """
import numpy as np, planted

def run(name, fault, seed=None, grid=4, block=64):
    planted.set_options(shuffle=seed is not None, seed=seed or 0)
    x = np.random.default_rng(0).standard_normal(grid * block).astype(np.float32)
    planted.run(name, fault, x, np.zeros_like(x), grid, block, block * 4)

def expect_error(name):
    try:
        run(name, True)
    except planted.Error:
        return
    raise AssertionError(name)
"""


def sanitized(sanitizer: str, *lines: str) -> tuple[int, str]:
    done = build.run_sanitized("\n".join([SCRIPT, *lines]), sanitizer)
    return done.returncode, done.stdout


def names_the_fault(report: str, name: str) -> bool:
    lines = SOURCE.read_text().splitlines()
    marked = [i for i, line in enumerate(lines, 1) if line.endswith(f"fault: {name}")]
    assert marked, name
    return any(re.search(rf"{SOURCE.name}:{i}\b", report) for i in marked)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_no_report_on_the_right_twins(planted: ModuleType, sanitizer: str) -> None:
    # Failed launches between them: their abandoned fibers must not give rise to reports either.
    code, report = sanitized(
        sanitizer,
        "for seed in (None, 0, 1):",
        f"    for name in {list(EXPECTED)}:",
        "        run(name, False, seed)",
        "    for fault in ('deadlock', 'vote', 'early_return'):",
        "        expect_error(fault)",
        "print('done')",
    )
    assert (code, report) == (0, "done\n")


@pytest.mark.parametrize(("name", "what"), ADDRESSES.items())
def test_address_sanitizer(planted: ModuleType, name: str, what: str) -> None:
    code, report = sanitized("address", f"run({name!r}, True)")
    assert code != 0
    assert what in report
    assert names_the_fault(report, name), report


def test_thread_sanitizer(planted: ModuleType) -> None:
    code, report = sanitized(
        "thread",
        f"for name in {list(RACES)}:",
        "    print('=== fault', name, flush=True)",
        "    run(name, True)",
        "    print('=== right', name, flush=True)",
        "    run(name, False)",
        "print('=== end of', 'all', flush=True)",
    )
    assert code == 66  # there were reports
    parts = re.split(r"=== (fault|right|end of) (\w+)\n", report)[1:-3]
    assert len(parts) == 3 * 2 * len(RACES)
    for kind, name, part in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        if kind == "fault":
            assert "WARNING: ThreadSanitizer: data race" in part, name
            assert names_the_fault(part, name), part
        else:
            assert part == "", name
