"""What nvcc makes of the CUDA kernels: registers, spills, instructions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from machine_code import library
from support import compiler_report, cuda_tools
from support.compiler_report import Code, Kernel

ARCHITECTURES = [
    pytest.param(a, marks=() if a in compiler_report.MAIN else pytest.mark.slow)
    for a in compiler_report.ARCHITECTURES
]

# Registers a thread, at most, over sm_80 and sm_90. Kernels are compiled for as few
# registers as they need without spilling; a budget keeps a change from halving the threads that run
# at once.
# (kernel, storage is float64): the other storage types share their arithmetic.
REGISTERS = {
    ("row_forward_kernel plain", False): 128,  # as with 103 or more: 4 blocks a multiprocessor
    ("row_forward_kernel plain", True): 184,
    ("row_forward_kernel calibrated", False): 208,  # as with 176: 2 blocks
    ("row_forward_kernel calibrated", True): 232,
    ("row_warp_kernel plain", False): 168,  # 3 blocks of 128 threads
    ("row_warp_kernel all registers", False): 255,  # 2 blocks, or one of 256 threads
    ("soft_row_warp_kernel", False): 168,  # 3 blocks of 128 threads
    ("soft_row_warp_kernel wide", False): 128,  # 2 blocks of 256 threads, or one of 512
    ("soft_row_sums_kernel", False): 255,  # 2 blocks of 128 threads, or one of 256
    ("divisor_kernel", False): 40,
    ("divisor_kernel", True): 40,
    ("row_backward_kernel plain", False): 96,
    ("row_backward_kernel plain", True): 160,
    ("row_backward_kernel calibrated", False): 128,
    ("row_backward_kernel calibrated", True): 168,
    ("row_backward_kernel class sums", False): 200,
    ("row_backward_kernel class sums", True): 200,
    ("row_combine_kernel", False): 80,
    ("row_combine_kernel", True): 96,
    ("row_target_kernel", False): 32,
    ("row_target_kernel", True): 32,
    ("finish_kernel", False): 56,
    ("finish_kernel", True): 64,
    ("dense_kernel plain", False): 128,  # 2 blocks
    ("dense_kernel plain", True): 152,
    ("dense_kernel calibrated", False): 128,
    ("dense_kernel by element", False): 224,  # 1 block; calibrated, half precision
    ("dense_kernel calibrated", True): 184,
    ("row_calibrate_kernel forward", False): 128,
    ("row_calibrate_kernel forward", True): 128,
    ("row_calibrate_kernel backward", False): 184,
    ("row_calibrate_kernel backward", True): 168,
    ("dense_calibrate_kernel forward", False): 64,
    ("dense_calibrate_kernel forward", True): 64,
    ("dense_calibrate_kernel backward", False): 80,
    ("dense_calibrate_kernel backward", True): 64,
    ("upsample_axis_kernel", False): 56,
    ("upsample_axis_kernel", True): 56,
    ("upsample_forward_kernel", False): 128,
    ("upsample_forward_kernel", True): 255,
    ("upsample_backward_kernel", False): 128,
    ("upsample_backward_kernel", True): 255,
    ("soft_row_kernel plain", False): 96,  # 5 blocks of 128 threads
    ("soft_row_kernel plain", True): 168,  # 3 blocks of 128 threads
    ("soft_row_kernel plain wide", True): 128,
    ("soft_row_kernel calibrated", False): 168,
    ("soft_row_kernel calibrated", True): 248,  # as with 216: 2 blocks
    ("soft_row_kernel calibrated wide", True): 232,  # as with 208: 1 block of 256
    ("soft_combine_kernel", False): 72,
    ("soft_combine_kernel", True): 80,
    ("soft_dense_kernel plain", False): 128,  # 2 blocks
    ("soft_dense_kernel plain", True): 128,
    ("soft_dense_kernel calibrated", False): 128,
    ("soft_dense_kernel by element", False): 184,  # 1 block; calibrated
    ("soft_dense_kernel calibrated", True): 160,  # as with 144: 1 block
    ("soft_upsample_forward_kernel", False): 128,  # 2 blocks
    ("soft_upsample_forward_kernel", True): 176,
    ("soft_upsample_backward_kernel", False): 128,
    ("soft_upsample_backward_kernel", True): 184,
    ("upsample_nodes_kernel", False): 104,
    ("upsample_nodes_kernel", True): 152,
}
OF_WARPS = ("row_warp_kernel", "soft_row_warp_kernel", "soft_row_sums_kernel")
_NARROW = ("row_forward_kernel calibrated", False)
ROW_FORWARD_WIDE = 128  # calibrated: more would leave no room for a block of 512 threads


def _budget(kernel: Kernel) -> tuple[str, bool]:
    """The kernel's entry of REGISTERS."""
    if kernel.name == "soft_row_sums_kernel":
        return kernel.name, False
    if kernel.name == "soft_row_warp_kernel":
        return kernel.name + (" wide" if kernel.flags[0] else ""), False
    kinds = {(): "", (False,): " plain", (True,): " calibrated"}
    if "calibrate" in kernel.name:
        kinds = {(False,): " forward", (True,): " backward"}
    kind = "" if kernel.name == "row_combine_kernel" else kinds[kernel.flags[:1]]
    if kernel.name == "row_warp_kernel" and (kernel.flags[0] or kernel.elements == 80):
        kind = " all registers"
    if kernel.name == "row_backward_kernel" and kernel.flags[2]:
        kind = " class sums"
    if kernel.name == "dense_kernel" and kernel.flags[:2] == (True, False):
        kind = " calibrated" if kernel.type in "df" else " by element"
    if kernel.name == "soft_dense_kernel" and kernel.flags == (True, False) and kernel.type != "d":
        kind = " by element"
    if kernel.name == "soft_row_kernel" and kernel.flags[1]:
        kind += " wide"
    return kernel.name + kind, kernel.type == "d"


@pytest.fixture
def compiled(architecture: str) -> Code:
    return _every_kernel(architecture)


def _every_kernel(architecture: str) -> Code:
    if why := library.why_not():
        pytest.skip(why)
    return compiler_report.every_kernel(architecture)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a.values[0] in ("80", "90")])
def test_kernels_keep_their_budgets(compiled: Code, architecture: str) -> None:
    kernels = compiled[1]
    assert {_budget(k) for k in kernels} == set(REGISTERS)
    over = []
    for kernel in kernels:
        most = REGISTERS[_budget(kernel)]
        if _budget(kernel) == _NARROW and kernel.flags[1]:
            most = ROW_FORWARD_WIDE
        if kernel.registers > most:
            over.append((kernel, most))
    assert not over


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_spill_what_is_known(compiled: Code, architecture: str) -> None:
    kernels = compiled[1]
    compiler_report.assert_known_spills(architecture, kernels)
    assert not [kernel for kernel in kernels if kernel.static_shared]


def _machine_code(cubins: list[Path]) -> dict[str, str]:
    """Each kernel's instructions."""
    printed = "".join(cuda_tools.run("cuobjdump", "-sass", cubin) for cubin in cubins)
    parts = re.split(r"Function : (\S+)", printed)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.slow
def test_code_for_8_6_is_all_that_8_9_needs() -> None:
    # CMakeLists.txt makes none for 8.9, which runs what 8.6 does. What packs two halves has
    # longer names there.
    instruction = re.compile(r"^ +/\*[0-9a-f]{4,5}\*/([^;]*);", re.M)
    older, newer = (
        {
            symbol: instruction.findall(
                re.sub(r"F2FP(\.BF16|)(\.F16)?\.F32\.PACK", r"F2FP\1.PACK", text)
            )
            for symbol, text in _machine_code(_every_kernel(a)[0]).items()
        }
        for a in ("86", "89")
    )
    assert all(older.values())
    assert older == newer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_machine_code_reads_and_writes_rows_by_16_bytes(
    compiled: Code, architecture: str
) -> None:
    cubins, kernels = compiled
    code = _machine_code(cubins)
    assert set(code) == {k.symbol for k in kernels}
    for kernel in kernels:
        found = {
            opcode.removesuffix(".SYS")  # sm_75
            for opcode in re.findall(
                r"(?<!\.)\b(?:LDG|STG|LDL|STL|ATOMG?|RED)(?:\.[A-Z0-9]+)*", code[kernel.symbol]
            )
        }
        local = {i for i in found if i.startswith(("LDL", "STL"))}
        spills = compiler_report.spill_of(architecture, kernel) in compiler_report.KNOWN_SPILLS
        assert spills or not local, f"{kernel.symbol} keeps registers in memory"
        # Blocks that are done are counted: integers, so that no result depends on their order.
        atomics = {i for i in found if i.startswith(("ATOM", "RED"))}
        floats = {i for i in atomics if re.search(r"\.(F16|F32|F64|BF16)", i)}
        assert not floats, f"{kernel.symbol} adds in no order"
        assert not atomics or kernel.name in (
            "row_forward_kernel", "row_warp_kernel", "dense_kernel", "soft_row_kernel",
            "soft_dense_kernel", "soft_row_warp_kernel", "soft_row_sums_kernel",
        )  # fmt: skip
        if kernel.name in OF_WARPS and kernel.flags[-1] == 2:
            clusters = "UCGABAR_WAIT" in code[kernel.symbol]
            assert clusters == (int(architecture) >= 90), kernel.symbol
            if not clusters:
                continue  # not launched there
        if kernel.name in (
            "row_forward_kernel", "row_backward_kernel", "soft_row_kernel", "soft_row_warp_kernel",
            "soft_row_sums_kernel",
        ):  # fmt: skip
            # How often, at C = 1203 and others: test_cuda_simt.py counts.
            assert "LDG.E.128" in found, kernel.symbol
        if kernel.name == "row_warp_kernel" or (
            kernel.name in ("dense_kernel", "soft_dense_kernel") and kernel.flags[1]
        ):
            copies = "LDGSTS.E.BYPASS.128" if int(architecture) >= 80 else "LDG.E.128"
            assert copies in code[kernel.symbol], kernel.symbol
        of_planes = kernel.name in ("dense_kernel", "soft_dense_kernel")
        by_element = of_planes and not kernel.flags[1]
        if of_planes or kernel.name in (
            "row_backward_kernel", "soft_row_kernel", *OF_WARPS,
        ):  # fmt: skip
            assert ("STG.E.128" in found) == (not by_element), kernel.symbol
