"""GPUs by their makers' data sheets: what predictions and the tests of the launches count with.

Nothing here is measured. Limits of a multiprocessor are those of its compute capability (CUDA C++
Programming Guide, "Technical Specifications per Compute Capability"); test_launch_plans.py compares
them with CUDA's occupancy calculator. test_benchmarks_model.py compares clocks and bandwidths with
other numbers of the data sheets.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Capability:
    """Of one multiprocessor of an architecture."""

    threads: int  # resident, at most
    blocks: int
    shared_bytes: int  # of all its blocks
    reserved_bytes: int  # of these, what CUDA takes for itself with every block
    has_clusters: bool

    @property
    def shared_bytes_of_a_block(self) -> int:
        return self.shared_bytes - self.reserved_bytes


KIB = 1024
REGISTERS = 64 * KIB  # of a multiprocessor, on every architecture below
SCHEDULERS = 4  # of a multiprocessor: each issues at most one warp instruction a cycle

CAPABILITIES = {
    "75": Capability(1024, 16, 64 * KIB, 0, False),
    "80": Capability(2048, 32, 164 * KIB, KIB, False),
    "89": Capability(1536, 24, 100 * KIB, KIB, False),
    "90": Capability(2048, 32, 228 * KIB, KIB, True),
    "100": Capability(2048, 32, 228 * KIB, KIB, True),
    "120": Capability(1536, 24, 100 * KIB, KIB, True),
}


@dataclass(frozen=True)
class Gpu:
    architecture: str
    multiprocessors: int
    boost_ghz: float
    gigabytes_per_second: float  # of its memory

    @property
    def capability(self) -> Capability:
        return CAPABILITIES[self.architecture]

    @property
    def instructions_per_second(self) -> float:
        """Warp instructions that all schedulers issue at most."""
        return self.multiprocessors * SCHEDULERS * self.boost_ghz * 1e9


GPUS = {
    # Product brief "NVIDIA T4 70W Low Profile PCIe GPU Accelerator"; Turing white paper.
    "T4": Gpu("75", 40, 1.590, 320),
    # Data sheet "NVIDIA A100 Tensor Core GPU"; A100 white paper.
    "A100 SXM 80 GB": Gpu("80", 108, 1.410, 2039),
    # Product brief "NVIDIA L4 GPU Accelerator".
    "L4": Gpu("89", 58, 2.040, 300),
    # White paper "NVIDIA Ada GPU Architecture".
    "RTX 4090": Gpu("89", 128, 2.520, 1008),
    # Data sheet "NVIDIA H100 Tensor Core GPU"; H100 white paper. The clock is the PCIe card's boost
    # clock. The SXM module's 67 TFLOPS of FP32 are those of 1.98 GHz: it may issue 13 % more than
    # counted here.
    "H100 SXM": Gpu("90", 132, 1.755, 3350),
    # "NVIDIA Blackwell Architecture Technical Brief"; the data sheet of HGX B200 has 7.7 TB/s.
    # Neither states multiprocessors and clock: those that the driver reports.
    "B200": Gpu("100", 148, 1.965, 8000),
    # White paper "NVIDIA RTX Blackwell GPU Architecture".
    "RTX 5090": Gpu("120", 170, 2.407, 1792),
}
