"""Which tests `make test-fast`, `make test` and `make test-slow` run.

A test is slow (`make test-slow` alone runs it), standard (`make test` runs it, `make test-fast`
does not) or fast (the reverse: it is part of a standard one) by a mark in its file or by a row
below. Of a test of many cases some are slow (`MANY`). Every other test is in `make test-fast` and
`make test`.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

# Start of a test's address, or a part of its name -> what the tests show.
STANDARD = {
    "tests/cuda/test_cuda_library.py": "the CUDA library without a GPU",
    "tests/cuda/test_cuda_build.py": "what nvcc makes of the CUDA kernels",
    "tests/cuda/test_launch_plans.py": "waves, balance, bytes in flight of the row kernels on GPUs",
    "tests/cuda/test_machine_code.py": "how many instructions a warp issues",
    "tests/cuda/test_cuda_simt.py::test_": "CUDA kernels at each tier and alignment; traffic",
    "tests/cuda/test_cuda_details.py": "prediction and entropy of CUDA's rows at each tier",
    "tests/cuda/test_cuda_soft.py": "CUDA kernels of class probabilities at each tier; traffic",
    "tests/cuda/test_simt.py": "the host model of CUDA finds the faults it is there for",
    "tests/_ops/test_triton_targets.py": "each option compiles with Triton for each layout",
    "tests/_ops/test_triton_soft.py": "class probabilities in Triton, interpreted and compiled",
    "tests/_ops/test_triton_details.py": "prediction and entropy in Triton",
    "tests/_ops/test_triton_machine_code.py": "how many instructions a warp of Triton's issues",
    "tests/_ops/test_triton.py::test_every_kernel_compiles": "registers of the Triton kernels",
    "tests/_ops/test_triton.py::test_aligned_rows": "16-byte reads of the Triton kernels",
    "tests/_ops/test_triton.py::test_new_sizes": "sizes and options that compile nothing again",
    "tests/_sharded/test_linear_memory.py": "peak memory of the losses without logits",
    "tests/_sharded/test_ranks.py": "sums over processes",
    "tests/test_class_parallel.py": "classes divided over two and four processes",
    "tests/test_distributed.py": "data parallelism",
    "tests/_cli/": "the command line, in processes",
    "tests/test_plots.py": "matplotlib",
    "tests/project/": "benchmarks, examples, exporters, wheels, types",
    "tests/recipes/": "recipes, from stage 1 to the evaluation on small data sets",
    "tests/integrations/": "other frameworks, by stand-ins",
    "accumulates_over_two_ranks": "metrics over two processes",
    "cpu_kernels[dense-few]": "options of class planes in Triton's interpreter",
    "beyond_the_cache": "stores that go around the cache, 2 GB of gradients",
    "compile": "torch.compile",
    "demo": "training runs",
    "gradcheck": "gradients against finite differences",
    "imported_only_when_asked": "imports, each in a new process",
    "importing_needs_no": "imports, each in a new process",
    "onnxruntime": "exports, run by onnxruntime",
    "opcheck": "torch.library.opcheck",
}
SLOW = {
    "machine_code_that_spills_what_is_known": "each option of Triton's kernels on four GPUs",
    "tests/cuda/test_cuda_simt.py::test_no_sanitizer": "out of bounds and races in every kernel",
    "tests/cuda/test_cuda_simt.py::test_every_kernel_and_tier[2]": "a further order of the threads",
    "tests/cuda/test_cuda_simt.py::test_every_kernel_and_tier[3]": "a further order of the threads",
    "test_peak_memory_is_chunk_bytes[reference": "peak memory of the reference in chunks",
    "tests/_sharded/test_scaling.py::test_the_example": "the example of classes over processes",
    "keep_their_budgets[80-": "instructions of the row kernels on an A100",
    "keeps_its_budgets[80-": "instructions of the kernel of class planes on an A100",
    "is_stored_by_vectors[80-": "the same of a slice",
    "less_than_their_launches[80]": "the same of the launches besides the rows",
    "takes_these_counts[80]": "what the model takes for the instructions on an A100",
    "rows_of_class_probabilities[float32-A100": "the same, and memory's time",
    "rows_of_class_probabilities[bfloat16-A100": "the same, and memory's time",
    "rows_of_class_probabilities[A100": "the same of calibrated rows",
    "keep_their_budgets[100-": "instructions of the row kernels on a B200",
    "keep_their_budgets[120-": "instructions of the row kernels on an RTX 5090",
    "cpu_kernels[seed 1-few]": "options under a further order of the threads",
    "cpu_kernels[seed 2-few]": "options under a further order of the threads",
    "cpu_kernels[upsample-few]": "options of the upsampled loss in Triton's interpreter: 6 minutes",
}
# Tests of one group run in one process of pytest-xdist: they share what a fixture or a cache made.
GROUPS = {
    "tests/cuda/test_cuda_build.py": "nvcc",
    "tests/cuda/test_launch_plans.py": "nvcc",
    "tests/cuda/test_machine_code": "nvcc",
    "tests/_ops/test_triton_targets.py": "triton",
    "tests/_ops/test_triton_machine_code.py": "triton machine code",
    "tests/_ops/test_triton.py::test_every_kernel_compiles": "triton registers",
    "tests/_ops/test_triton.py::test_aligned_rows": "triton registers",
    "tests/cuda/test_cuda_simt.py::test_every_kernel_and_tier": "simt",
    "tests/cuda/test_cuda_simt.py::test_row": "simt",
    "tests/cuda/test_cuda_details.py": "simt",
    "tests/cuda/test_cuda_soft.py": "simt",
    "tests/cuda/test_simt.py": "planted",
}

# How much of the tests of the CPU kernels runs with other operators or another instruction set.
PARTS = [
    pytest.param("few", marks=pytest.mark.fast),
    pytest.param("once", marks=pytest.mark.standard),
    pytest.param("all", marks=pytest.mark.slow),
]


def arguments(part: str, only: str = "") -> list[str]:
    """pytest's options for a part; only: the expression that chooses among all."""
    if part == "few":
        few = "every_combination_of_options or every_integer_type or goes_no_further"
        return ["--once", "-k", few]
    return [*(["--once"] if part == "once" else []), "-k", only]


def _matches(item: pytest.Item, key: str) -> bool:
    return item.nodeid.startswith(key) if "/" in key else key in item.name


def _is_marked(item: pytest.Item, *names: str) -> bool:
    return any(item.get_closest_marker(name) for name in names)


# Of a test of more cases than this, `make test` runs those that together hold every pair of values
# of two parameters; the others are slow.
MANY = 40


def mark(items: list[pytest.Item]) -> None:
    """Marks, and puts first what takes long: workers then end at about the same time."""
    for item in items:
        if any(_matches(item, key) for key in SLOW):
            item.add_marker("slow")
        elif not _is_marked(item, "standard", "slow", "fast") and any(
            _matches(item, key) for key in STANDARD
        ):
            item.add_marker("standard")
        for key, group in GROUPS.items():
            if _matches(item, key):
                item.add_marker(pytest.mark.xdist_group(group))
    for cases in _by_function(items):
        ordinary = [i for i in cases if not _is_marked(i, "slow", "fast")]
        if len(ordinary) > MANY:
            kept = _with_every_pair(ordinary)
            for item in ordinary:
                if item not in kept:
                    item.add_marker("slow")
    items.sort(key=lambda item: 0 if _long(item) else 1)


def _long(item: pytest.Item) -> bool:
    return item.get_closest_marker("xdist_group") is not None or _part(item) is not None


def _part(item: pytest.Item) -> Any:
    """Which of PARTS the test runs, None where it is no such test."""
    call = getattr(item, "callspec", None)
    return call.params.get("part") if call else None


def _by_function(items: list[pytest.Item]) -> list[list[pytest.Item]]:
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return list(functions.values())


def _with_every_pair(cases: list[pytest.Item]) -> set[pytest.Item]:
    """Cases with every pair of values that two parameters have in one of them. The next case is the
    first of those with the most pairs that no case has had yet.
    """
    pairs = {item: {*itertools.combinations(sorted(_values(item)), 2)} for item in cases}
    if not all(pairs.values()):
        return set(cases)  # of one parameter
    left = set().union(*pairs.values())
    kept = set()
    while left:
        best = max(cases, key=lambda item: len(pairs[item] & left))
        left -= pairs[best]
        kept.add(best)
    return kept


def once(items: list[pytest.Item]) -> list[pytest.Item]:
    """Of each test function, cases that together hold every value of every parameter.

    The next case is the one with the most values that no case has had yet, and of several the one
    whose values have been had least often: options are spread over shapes and dtypes.
    """
    kept: set[pytest.Item] = set()
    for cases in _by_function(items):
        values = {item: _values(item) for item in cases}
        uses = dict.fromkeys((value for case in values.values() for value in case), 0)
        while cases:
            best = min(cases, key=lambda item: _rank([uses[value] for value in values[item]]))
            if values[best] and all(uses[value] for value in values[best]):
                break
            kept.add(best)
            cases.remove(best)
            for value in values[best]:
                uses[value] += 1
    return [item for item in items if item in kept]


def _rank(uses: list[int]) -> tuple[int, int]:
    return -uses.count(0), sum(uses)


def _values(item: pytest.Item) -> list[tuple[str, int]]:
    call = getattr(item, "callspec", None)
    # Cases share the objects of a parameter's list; some of them (tensors) have no hash.
    return [(name, id(value)) for name, value in call.params.items()] if call else []
