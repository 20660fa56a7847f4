"""How many instructions a warp issues, counted in the machine code (tests/machine_code)."""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import model
from machine_code import disassembly, rows
from machine_code.warp import Launch, Unknown, Warp
from simt import build


@pytest.fixture(scope="module", autouse=True)
def _tools() -> None:
    home = build.cuda_home()
    if build.why_not() or home is None or not (home / "bin" / "nvcc").exists():
        pytest.skip(build.why_not() or "needs nvcc")
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


# Instructions for 512 bytes of logits: those of nvcc 13.0 and 3 %. (architecture, dtype) -> for
# each of rows.CLASSES those of (forward, stage2, backward).
BUDGETS = {
    ("80", "float32"): ((127, 288, 121), (140, 292, 142), (73, 155, 81), (71, 152, 76)),
    ("80", "bfloat16"): ((256, 641, 235), (277, 603, 283), (155, 349, 160), (151, 344, 150)),
    ("90", "float32"): ((134, 317, 127), (142, 318, 147), (75, 162, 79), (73, 159, 74)),
    ("90", "bfloat16"): ((273, 687, 248), (294, 642, 294), (159, 352, 159), (155, 346, 150)),
    ("100", "float32"): ((124, 286, 127), (138, 305, 146), (74, 156, 76), (73, 153, 71)),
    ("100", "bfloat16"): ((249, 616, 266), (266, 615, 315), (148, 340, 169), (144, 334, 159)),
    ("120", "float32"): ((130, 284, 130), (144, 314, 147), (77, 158, 72), (76, 155, 68)),
    ("120", "bfloat16"): ((262, 616, 291), (278, 642, 329), (154, 347, 164), (150, 342, 155)),
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


@pytest.mark.parametrize("dtype", rows.DTYPES)
def test_the_model_takes_these_counts(dtype: str) -> None:
    short = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    for step in rows.STEPS:
        code = "stage 2" if step == "stage2" else step
        for classes, stated in zip((1203, 8192), model.INSTRUCTIONS[code, short], strict=True):
            assert stated == pytest.approx(rows.count("90", dtype, classes, step).vector, rel=0.01)
