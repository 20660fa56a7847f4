"""How many instructions a warp issues, counted in the machine code (tests/machine_code)."""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path

import pytest

from machine_code import disassembly, rows
from machine_code.warp import Launch, Unknown, Warp
from simt import build


@pytest.fixture(scope="module", autouse=True)
def _tools() -> None:
    home = build.cuda_home()
    if home is None or not (home / "bin" / "nvcc").exists():
        pytest.skip("needs nvcc")
    if disassembly.nvdisasm() is None:
        pytest.skip("needs nvdisasm (package nvidia-cuda-nvdisasm)")


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
    kernel = disassembly.kernels(cubin)["planted"]

    def issued(rounds: int, parts: int, large: bool) -> Counter[str]:
        arguments = b"".join(n.to_bytes(8, "little") for n in (1 << 32, rounds, parts))
        constants = bytes(kernel.constant_bytes - 24) + arguments

        def decide(unknown: Unknown) -> bool:
            assert unknown.source is not None
            assert unknown.source.name == "FSETP"
            # x > 3, or its opposite with NaN on the same side.
            return large == ("GT" in unknown.source.modifiers)

        warp = Warp(kernel, Launch(constants, (0, 0), 32), decide)
        assert warp.run() == sum(warp.issued.values())
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


# Instructions for 512 bytes of logits: those of today and 3 %. (architecture, dtype) -> for each of
# rows.CLASSES those of (forward, stage2, backward).
BUDGETS = {
    ("80", "float32"): ((131, 303, 134), (145, 311, 158), (82, 168, 93), (81, 165, 88)),
    ("80", "bfloat16"): ((269, 664, 260), (295, 638, 315), (169, 373, 185), (165, 368, 175)),
    ("90", "float32"): ((135, 329, 142), (148, 333, 166), (82, 173, 94), (81, 170, 89)),
    ("90", "bfloat16"): ((275, 706, 278), (299, 669, 333), (172, 370, 189), (168, 365, 179)),
    ("100", "float32"): ((129, 300, 140), (144, 323, 163), (79, 170, 89), (77, 168, 84)),
    ("100", "bfloat16"): ((264, 647, 292), (284, 655, 347), (163, 370, 194), (159, 365, 184)),
    ("120", "float32"): ((135, 299, 142), (150, 334, 162), (82, 174, 85), (80, 171, 80)),
    ("120", "bfloat16"): ((275, 645, 317), (296, 681, 362), (169, 378, 190), (165, 372, 180)),
}


@pytest.mark.parametrize(("architecture", "dtype"), BUDGETS)
def test_row_kernels_keep_their_budgets(architecture: str, dtype: str) -> None:
    cases = [(classes, step) for classes in rows.CLASSES for step in rows.STEPS]
    found = {case: rows.count(architecture, dtype, *case) for case in cases}
    # The walk goes where it should: each logit is read once, and its gradient written once.
    for step in rows.STEPS:
        opcodes = found[8192, step].opcodes
        assert opcodes["LDG.E.128"] == pytest.approx(1)
        assert opcodes.get("STG.E.128", 0) == pytest.approx(float(step == "backward"))
    budgets = dict(zip(cases, sum(BUDGETS[architecture, dtype], ()), strict=True))
    over = {
        case: (n.vector, budgets[case]) for case, n in found.items() if n.vector > budgets[case]
    }
    assert not over
