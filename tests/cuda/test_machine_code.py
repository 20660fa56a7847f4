"""How many instructions a warp issues, counted in the machine code (tests/machine_code)."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import model, model_planes
from benchmarks.gpus import GPUS
from machine_code import disassembly, flow, library, planes, rows, upsample
from machine_code.warp import Launch, Unknown, Warp
from simt import build

# The same of class planes: for each of planes.SHAPES those of planes.STEPS; `python -m
# machine_code.planes budgets` prints this.
PLANES = {
    ("80", "float32"): (
        (69, 103, 186, 97),
        (105, 150, 256, 122),
        (99, 143, 245, 116),
        (46, 87, 191, 77),
    ),
    ("80", "bfloat16"): (
        (111, 191, 331, 163),
        (184, 286, 469, 214),
        (173, 273, 451, 205),
        (85, 220, 332, 141),
    ),
    ("90", "float32"): (
        (51, 108, 194, 79),
        (88, 155, 267, 104),
        (83, 149, 256, 100),
        (49, 91, 171, 76),
    ),
    ("90", "bfloat16"): (
        (88, 200, 346, 140),
        (165, 300, 492, 192),
        (186, 286, 473, 214),
        (86, 174, 318, 140),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _tools() -> None:
    if library.why_not():
        pytest.skip(str(library.why_not()))


# Each kind of work has an instruction of its own, so that it can be counted: cosines in a loop of
# known length, a sine by one lane alone, logarithms by half of the lanes, square roots where data
# say so.
PLANTED = """
extern "C" __global__ void planted(float* data, long long rounds, long long parts) {
  float x = data[threadIdx.x];
#pragma unroll 1
  for (long long i = 0; i < rounds / parts; ++i) x += __cosf(x) * __cosf(x + 1);
  if (threadIdx.x % 32 == 3) {
    x = __sinf(x) + data[1];
    data[2] = x;
  }
  if (threadIdx.x % 32 < 16) {
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < 18; i += 4) x += __log2f(x);
  }
  __syncwarp();
  if (x > 3) {
#pragma unroll 1
    for (int i = 0; i < 4; ++i) x = 3 * rsqrtf(x);
  }
  data[threadIdx.x] = x;
}
"""


@pytest.mark.parametrize("architecture", rows.DEVICES)
def test_a_planted_kernel_issues_what_it_must(architecture: str, tmp_path: Path) -> None:
    home = build.cuda_home()
    assert home is not None
    source, cubin = tmp_path / "planted.cu", tmp_path / "planted.cubin"
    source.write_text(PLANTED)
    subprocess.run(
        [str(home / "bin" / "nvcc"), "-O3", f"-arch=sm_{architecture}", "-cubin", str(source), "-o",
         str(cubin)], check=True,
    )  # fmt: skip
    kernel = disassembly.Kernels(cubin)["planted"]

    def issued(rounds: int, parts: int, large: bool) -> Counter[str]:
        arguments = b"".join(n.to_bytes(8, "little") for n in (1 << 32, rounds, parts))
        constants = bytes(kernel.constant_bytes - 24) + arguments

        def decide(unknown: Unknown) -> bool:
            assert unknown.source is not None
            assert unknown.source.name == "FSETP"
            # x > 3, or its opposite with NaN on the same side.
            return large == ("GT" in unknown.source.modifiers)

        warp = Warp(kernel, Launch(constants, (0, 0), 32), decide)
        assert warp.run() == warp.opcodes().total()
        return warp.opcodes()

    few, many = issued(6, 2, True), issued(70, 10, True)
    assert few["MUFU.COS"] == 2 * 3
    assert many["MUFU.COS"] == 2 * 7
    assert few["MUFU.SIN"] == 1
    assert few["MUFU.RSQ"] == 4
    # Lanes 0 and 1 go round five times, the others four or less: the warp five times.
    assert few["MUFU.LG2"] == 5
    small = issued(6, 2, False)
    assert small["MUFU.RSQ"] == 0
    assert sum(small.values()) < sum(few.values())


@pytest.mark.parametrize("dtype", rows.DTYPES)
@pytest.mark.parametrize("step", ["stage2", "forward"])
def test_what_is_not_followed_decides_nothing(dtype: str, step: str) -> None:
    codes, registers = library.kernels("90")
    symbol = rows.launch("90", dtype, 1203, step).symbol
    kernel, code = rows.launch("90", dtype, 1203, step, registers[symbol]), codes[symbol]
    found = rows.block(kernel, 3, code, "90", dtype, 1203, step)
    assert len(code.flow.followed) < 0.7 * len(code.instructions)
    every = flow.Flow(followed=frozenset(code.instructions), unknown=frozenset())
    all_followed = dataclasses.replace(code, runs={}, flow=every)
    assert rows.block(kernel, 3, all_followed, "90", dtype, 1203, step) == found


# Instructions for 512 bytes of logits: those of nvcc 13.0 and 3 %. (architecture, dtype) -> for
# each of rows.CLASSES those of rows.STEPS. `python -m machine_code.rows budgets` prints this.
BUDGETS = {
    ("80", "float32"): (
        (67, 90, 146, 174, 82),
        (56, 77, 125, 147, 70),
        (38, 52, 93, 115, 52),
        (38, 52, 92, 114, 52),
    ),
    ("80", "bfloat16"): (
        (140, 192, 301, 366, 176),
        (116, 163, 253, 312, 150),
        (72, 103, 198, 253, 102),
        (72, 102, 197, 251, 101),
    ),
    ("90", "float32"): (
        (73, 99, 156, 185, 88),
        (61, 83, 133, 156, 74),
        (41, 56, 94, 117, 55),
        (41, 55, 94, 116, 54),
    ),
    ("90", "bfloat16"): (
        (153, 209, 330, 399, 187),
        (128, 177, 278, 341, 159),
        (73, 104, 207, 264, 103),
        (72, 103, 206, 262, 102),
    ),
    ("100", "float32"): (
        (77, 103, 162, 191, 91),
        (64, 87, 138, 162, 77),
        (41, 56, 95, 117, 55),
        (41, 56, 94, 116, 55),
    ),
    ("100", "bfloat16"): (
        (161, 218, 342, 411, 194),
        (134, 185, 289, 352, 165),
        (73, 105, 208, 266, 103),
        (73, 104, 207, 264, 102),
    ),
    ("120", "float32"): (
        (68, 93, 166, 194, 82),
        (57, 79, 138, 163, 69),
        (39, 53, 110, 135, 53),
        (39, 53, 110, 134, 52),
    ),
    ("120", "bfloat16"): (
        (145, 200, 351, 422, 178),
        (121, 170, 290, 354, 152),
        (74, 105, 236, 298, 104),
        (73, 104, 234, 296, 103),
    ),
}


@pytest.mark.parametrize(("architecture", "dtype"), BUDGETS)
def test_row_kernels_keep_their_budgets(architecture: str, dtype: str) -> None:
    cases = [(classes, step) for classes in rows.CLASSES for step in rows.STEPS]
    found = {case: rows.count(architecture, dtype, *case) for case in cases}
    # The walk goes where it should: each logit is read once, and its gradient written once. What is
    # issued for vectors that a warp of a row's last has not is counted, too.
    for step in rows.STEPS:
        opcodes = found[8192, step].opcodes
        kernel = rows.launch(architecture, dtype, 8192, step)
        size = rows.DTYPES[dtype][1]
        warps = kernel.threads // 32 * kernel.grid[1]  # of a cluster's blocks, too
        most = warps * kernel.vectors_of_a_warp(size) / (8192 * size / 16)
        read = {"LDG.E.128", "LDGSTS.E.BYPASS.128"} & set(opcodes)
        # A warp with fewer vectors branches round some copies.
        assert 0.999 < sum(opcodes[name] for name in read) <= most + 0.001
        if rows.STEPS[step]["grad_logits"]:
            assert 0.999 < opcodes["STG.E.128"] <= most + 0.001
        else:
            assert opcodes.get("STG.E.128", 0) == 0
    budgets = dict(zip(cases, sum(BUDGETS[architecture, dtype], ()), strict=True))
    over = {
        case: (n.vector, budgets[case]) for case, n in found.items() if n.vector > budgets[case]
    }
    assert not over


# The same of class probabilities: for each of rows.SOFT_CLASSES those of rows.SOFT; `python -m
# machine_code.rows soft` prints this.
SOFT_ROWS = {
    ("80", "float32"): (
        (81, 100, 116, 100, 145, 165, 62),
        (67, 84, 97, 84, 123, 140, 51),
        (73, 87, 98, 87, 106, 121, 53),
        (72, 86, 97, 86, 105, 120, 53),
        (72, 72, 82, 72, 74, 74, 53),
    ),
    ("80", "bfloat16"): (
        (185, 229, 258, 222, 317, 362, 152),
        (154, 193, 219, 188, 267, 307, 129),
        (149, 181, 202, 175, 228, 262, 113),
        (148, 179, 201, 174, 227, 260, 112),
        (147, 147, 168, 142, 156, 156, 113),
    ),
    ("90", "float32"): (
        (91, 112, 128, 112, 156, 177, 65),
        (76, 93, 107, 93, 133, 150, 54),
        (73, 87, 98, 87, 117, 132, 54),
        (72, 87, 98, 87, 116, 131, 54),
        (80, 93, 104, 93, 116, 131, 52),
    ),
    ("90", "bfloat16"): (
        (203, 249, 279, 242, 339, 386, 156),
        (169, 210, 237, 205, 286, 328, 133),
        (150, 182, 204, 177, 239, 274, 116),
        (149, 181, 203, 176, 238, 272, 115),
        (174, 205, 226, 200, 252, 287, 123),
    ),
}


@pytest.mark.parametrize(("architecture", "dtype"), SOFT_ROWS)
def test_rows_of_class_probabilities_keep_their_budgets(architecture: str, dtype: str) -> None:
    cases = [(classes, step) for classes in rows.SOFT_CLASSES for step in rows.SOFT]
    found = {case: rows.count(architecture, dtype, *case) for case in cases}
    size = rows.DTYPES[dtype][1]
    for step, ratio in {"soft forward": 1, "soft gradient": 1, "soft float": 4 / size}.items():
        # Logits and probabilities are read once, and the gradient written once; what a warp with
        # fewer vectors leaves out is issued all the same.
        n, opcodes = rows.launch(architecture, dtype, 8192, step), found[8192, step].opcodes
        most = n.threads // 32 * n.vectors_of_a_warp(size) * n.grid[1] / (8192 * size / 16)
        assert 0.999 < opcodes["LDG.E.128"] / (1 + ratio) <= most + 0.001
        written = opcodes.get("STG.E.128", 0)
        assert 0.999 < written <= most + 0.001 if step != "soft forward" else written == 0
    budgets = dict(zip(cases, sum(SOFT_ROWS[architecture, dtype], ()), strict=True))
    assert not {c: (n.vector, budgets[c]) for c, n in found.items() if n.vector > budgets[c]}


# The same with prediction and entropy of every row: for each of rows.CLASSES_WITH_DETAILS those of
# rows.DETAILS; `python -m machine_code.rows details` prints this.
DETAILS = {
    ("80", "float32"): (
        (125, 145, 231),
        (108, 122, 199),
    ),
    ("80", "bfloat16"): (
        (261, 308, 488),
        (219, 249, 430),
    ),
    ("90", "float32"): (
        (130, 152, 240),
        (111, 126, 202),
    ),
    ("90", "bfloat16"): (
        (273, 323, 518),
        (220, 251, 442),
    ),
}


@pytest.mark.parametrize(("architecture", "dtype"), DETAILS)
def test_rows_with_details_keep_their_budgets(architecture: str, dtype: str) -> None:
    cases = [(classes, step) for classes in rows.CLASSES_WITH_DETAILS for step in rows.DETAILS]
    found = {case: rows.count(architecture, dtype, *case).vector for case in cases}
    budgets = dict(zip(cases, sum(DETAILS[architecture, dtype], ()), strict=True))
    assert not {c: (n, budgets[c]) for c, n in found.items() if n > budgets[c]}


@pytest.mark.parametrize(("name", "classes"), [("H100 SXM", 131_072), ("A100 SXM 80 GB", 16_384)])
@pytest.mark.parametrize("dtype", rows.DTYPES)
def test_memory_bounds_rows_of_class_probabilities(name: str, classes: int, dtype: str) -> None:
    """By the model's constants: both inputs are read and the gradient is written in more time than
    the instructions take, but for the overhead of short rows in bfloat16."""
    gpu = GPUS[name]
    bandwidth = model.SHARE_OF_BANDWIDTH * gpu.gigabytes_per_second * 1e9
    issue = model.SHARE_OF_ISSUE * gpu.instructions_per_second
    for c in rows.SOFT_CLASSES:
        if c > classes:
            continue
        counted = rows.count(gpu.architecture, dtype, c, "soft gradient").vector
        share = counted / issue * bandwidth / (3 * rows.BYTES)
        assert share <= (1.05 if dtype == "bfloat16" and c < 1203 else 1), (c, share)


# Of calibrated rows: what a warp issues, of what memory allows while it reads both inputs
# ("stage2") and writes the gradient ("all"); for each of 1000, 1203 and 8192 classes. In float32
# memory bounds them. bfloat16 has twice the elements, each of which takes about 17 instructions: 2
# of u, 5 of the exponential and the sums, 6 of the class sums and the confidence's gradient, 3 that
# unpack, 1 of the maximum and shared memory. 512 bytes are 8 elements of a lane, 136 instructions;
# with what is of a row and of a block they take longer than memory.
CALIBRATED_SHARES = {
    ("H100 SXM", "float32"): (1, 1, 1),
    ("H100 SXM", "bfloat16"): (2.15, 1.8, 1.5),
    ("A100 SXM 80 GB", "float32"): (1, 1, 1),
    ("A100 SXM 80 GB", "bfloat16"): (1.9, 1.6, 1.35),
}


@pytest.mark.parametrize(("name", "dtype"), CALIBRATED_SHARES)
def test_memory_and_calibrated_rows_of_class_probabilities(name: str, dtype: str) -> None:
    gpu = GPUS[name]
    bandwidth = model.SHARE_OF_BANDWIDTH * gpu.gigabytes_per_second * 1e9
    issue = model.SHARE_OF_ISSUE * gpu.instructions_per_second
    for classes, most in zip((1000, 1203, 8192), CALIBRATED_SHARES[name, dtype], strict=True):
        for step, passes in (("soft stage2", 2), ("soft all", 3)):
            counted = rows.count(gpu.architecture, dtype, classes, step).vector
            share = counted / issue * bandwidth / (passes * rows.BYTES)
            assert share <= most, (classes, step, share)


@pytest.mark.parametrize(("architecture", "dtype"), PLANES)
def test_the_dense_kernel_keeps_its_budgets(architecture: str, dtype: str) -> None:
    cases = [(classes, step) for classes in planes.SHAPES for step in planes.STEPS]
    found = {case: planes.count(architecture, dtype, *case) for case in cases}
    for (_, step), opcodes in found.items():
        # Each logit is read once, in vectors; a tile that leaves positions out has a few more.
        assert 0.999 < opcodes["LDGSTS.E.BYPASS.128"] < 2.05
        written = opcodes.get("STG.E.128", 0)
        assert 0.999 < written < 1.05 if planes.STEPS[step]["grad_logits"] else written == 0
    budgets = dict(zip(cases, sum(PLANES[architecture, dtype], ()), strict=True))
    over = {
        case: (sum(n.values()), budgets[case])
        for case, n in found.items()
        if sum(n.values()) > budgets[case]
    }
    assert not over


def test_the_model_of_planes_takes_these_counts() -> None:
    assert set(model_planes.INSTRUCTIONS) == set(itertools.product(planes.SHAPES, planes.STEPS))
    for key, counts in model_planes.INSTRUCTIONS.items():
        found = tuple(sum(planes.count("90", d, *key).values()) for d in planes.DTYPES)
        assert counts == pytest.approx(found, rel=0.01, abs=0.5), key


@pytest.mark.parametrize("architecture", ["80", "90", pytest.param("89", marks=pytest.mark.slow)])
def test_the_model_takes_these_counts(architecture: str) -> None:
    assert set(model.INSTRUCTIONS) == set(rows.MODEL)
    for key, (a, classes, step) in rows.MODEL.items():
        if a == architecture:
            found = tuple(rows.count(a, d, classes, step).vector for d in rows.DTYPES)
            assert model.INSTRUCTIONS[key] == pytest.approx(found, rel=0.01, abs=0.5), key


def test_every_count_of_the_model_is_compared() -> None:
    assert {a for a, _, _ in rows.MODEL.values()} == {"80", "89", "90"}


# Instructions for 32 output positions and classes, of logits at an eighth of the height and width:
# those of nvcc 13.0 and 3 %. (architecture, dtype) -> for each of upsample.SHAPES those of
# upsample.STEPS. `python -m machine_code.upsample budgets` prints this.
UPSAMPLE = {
    ("80", "float32"): (
        (8.6, 13.2, 8.8, 14.5),
        (20.9, 23.3, 21.4, 24.6),
    ),
    ("80", "bfloat16"): (
        (8.7, 13.3, 8.9, 14.6),
        (21.0, 23.3, 21.4, 24.7),
    ),
    ("90", "float32"): (
        (8.7, 13.5, 8.9, 14.9),
        (21.1, 24.0, 21.6, 25.4),
    ),
    ("90", "bfloat16"): (
        (8.8, 13.6, 9.1, 15.1),
        (21.3, 24.1, 21.8, 25.6),
    ),
    ("100", "float32"): (
        (8.6, 13.9, 8.9, 15.3),
        (20.9, 24.6, 21.4, 26.1),
    ),
    ("100", "bfloat16"): (
        (8.6, 13.9, 8.9, 15.3),
        (20.9, 24.6, 21.4, 26.2),
    ),
    ("120", "float32"): (
        (8.6, 13.8, 8.9, 15.2),
        (20.5, 24.0, 20.9, 25.5),
    ),
    ("120", "bfloat16"): (
        (8.7, 13.8, 8.9, 15.3),
        (20.7, 24.0, 21.2, 25.5),
    ),
}


@pytest.mark.parametrize(("architecture", "dtype"), UPSAMPLE)
def test_upsample_kernels_keep_their_budgets(architecture: str, dtype: str) -> None:
    cases = [(shape, step) for shape in upsample.SHAPES for step in upsample.STEPS]
    found = {case: upsample.count(architecture, dtype, *case) for case in cases}
    # The walk goes where it should: an exponential of each class, those that fill the last vector
    # of classes included, and a few of each position; a store of each logit's gradient.
    for (shape, step), kernels in found.items():
        of = upsample.SHAPES[shape]
        ratio = math.prod(of.size) / math.prod(of.low)
        opcodes = sum(kernels.values(), Counter())
        exponentials = -(-of.classes // 4) * 4 / of.classes
        assert exponentials < opcodes["MUFU.EX2"] < exponentials + 5 / of.classes
        stores = opcodes["STG.E" if dtype == "float32" else "STG.E.U16"] * ratio
        if step == "backward":  # of eight classes a thread
            assert 0.999 < stores * of.classes / (-(-of.classes // 8) * 8) <= 1.001
    budgets = dict(zip(cases, sum(UPSAMPLE[architecture, dtype], ()), strict=True))
    counts = {case: sum(c.total() for c in kernels.values()) for case, kernels in found.items()}
    assert not {case: (n, budgets[case]) for case, n in counts.items() if n > budgets[case]}
