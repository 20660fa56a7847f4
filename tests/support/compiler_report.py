"""What nvcc says of the kernels it compiles: registers, stack, spills, shared memory."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from simt import build

from .places import ROOT, TESTS

# Of the library: CMakeLists.txt.
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
VIRTUAL = ("75", "80", "90")  # whose PTX serves those up to the next of these
# That of `make test`; the others are slow.
MAIN = ("90",)

_EVERY = TESTS / "simt" / "every_kernel.cu"
_KEPT = ROOT / "build" / "reports"


@dataclass(frozen=True)
class Kernel:
    """registers: a thread's. The others in bytes: stack and spilled (stores and loads) of a thread,
    static_shared of a block.
    """

    symbol: str
    registers: int
    stack: int
    spilled: int
    static_shared: int

    @property
    def name(self) -> str:
        return re.search(r"\d+([a-z_]+_kernel)I", self.symbol)[1]  # type: ignore[index]

    @property
    def type(self) -> str:
        return re.search(r"_kernelI(d|f|13__nv_bfloat16|6__half)", self.symbol)[1]  # type: ignore[index]

    @property
    def flags(self) -> tuple[int, ...]:
        """Of kernels of warps the last is Keeper of row_warp_tile.cuh."""
        keeper = re.findall(r"row_(?:warp|sums)_kernel.*Li(\d)EEEv", self.symbol)
        return tuple(int(f) for f in re.findall(r"Lb([01])E", self.symbol) + keeper)

    @property
    def elements(self) -> int:
        """Of a row that a lane keeps; row_warp_kernel alone."""
        vectors = int(re.search(r"Li(\d+)E", self.symbol)[1])  # type: ignore[index]
        return vectors * (4 if self.type == "f" else 8)


def compile(source: Path, architecture: str) -> tuple[Path, list[Kernel]]:
    """The machine code of a file that is compiled as the library is, for one architecture, and what
    nvcc says of its kernels. The same sources are compiled once: build/reports keeps the results.
    """
    version = digest(source.read_bytes())
    name = f"{source.stem}_{architecture}_"
    cubin, report = (_KEPT / f"{name}{version}.{kind}" for kind in ("cubin", "json"))
    _KEPT.mkdir(parents=True, exist_ok=True)
    with Path(_KEPT, f"{name}lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two processes of tests want the same
        if not report.exists():
            for old in _KEPT.glob(f"{name}*.*"):
                old.unlink()
            kernels = _run_nvcc(source, architecture, cubin)
            report.write_text(json.dumps([dataclasses.asdict(kernel) for kernel in kernels]))
    return cubin, [Kernel(**kernel) for kernel in json.loads(report.read_text())]


def every_kernel(architecture: str) -> tuple[Path, list[Kernel]]:
    """The same of all kernels of csrc/cuda."""
    return compile(_EVERY, architecture)


@functools.cache
def digest(source: bytes) -> str:
    """Of a file, and of the kernels that it may include."""
    folders = (ROOT / "csrc" / "common", ROOT / "csrc" / "cuda", TESTS / "simt")
    headers = [path for folder in folders for path in sorted(folder.rglob("*.*h"))]
    content = [source, str(build.cuda_home()).encode(), *(path.read_bytes() for path in headers)]
    return hashlib.sha256(b"".join(content)).hexdigest()[:16]


def _run_nvcc(source: Path, architecture: str, cubin: Path) -> list[Kernel]:
    home = build.cuda_home()
    assert home is not None
    virtual = max((v for v in VIRTUAL if int(v) <= int(architecture)), key=int)
    run = subprocess.run(
        [str(home / "bin" / "nvcc"), "-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", "-cubin",
         "-Xptxas", "-v",
         "-gencode", f"arch=compute_{virtual},code=sm_{architecture}",
         str(source), "-o", str(cubin)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    pattern = (
        r"Compiling entry function '(\S+)' for.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    )
    kernels = []
    for symbol, stack, stores, loads, registers, rest in re.findall(pattern, run.stderr, re.S):
        shared = re.search(r"(\d+) bytes smem", rest)
        static = int(shared[1]) if shared else 0
        kernels.append(Kernel(symbol, int(registers), int(stack), int(stores) + int(loads), static))
    return kernels


Spill = tuple[str, str, tuple[int, ...], str]  # architecture; name, flags, type of the kernel
_WIDE_STAGE_2 = ("row_forward_kernel", (True, True))
_WARP_CALIBRATED, _WARPS_CALIBRATED = (
    ("row_warp_kernel", (True, False, keeper)) for keeper in range(2)
)
_BF16, _FP16 = "13__nv_bfloat16", "6__half"

_PLAIN_BY_ELEMENT, _BY_ELEMENT = (False, False, True), (True, False, True)
_CALIBRATED, _WITH_OPTIONS = (True, True, False), (True, True, True)
# Of half precision; of float.
_DENSE_HALF = {
    "75": {_PLAIN_BY_ELEMENT: 124, _CALIBRATED: 40, _WITH_OPTIONS: 80},
    "80": {_PLAIN_BY_ELEMENT: 120, _WITH_OPTIONS: 80},
    "86": {_PLAIN_BY_ELEMENT: 120, _CALIBRATED: 108, _WITH_OPTIONS: 80},
    "90": {_PLAIN_BY_ELEMENT: 252, _CALIBRATED: 152, _WITH_OPTIONS: 188},
    "100": {_PLAIN_BY_ELEMENT: 300, _CALIBRATED: 124, _WITH_OPTIONS: 128},
    "120": {_PLAIN_BY_ELEMENT: 344, _CALIBRATED: 64, _WITH_OPTIONS: 60},
}
_DENSE_FLOAT = {"80": 40, "86": 28, "90": 168, "100": 272, "120": 52}
_AS_86 = {"89": "86"}  # which make the same code

# Bytes that a thread may spill, stores and loads. Blocks of up to 512 threads leave a thread 128
# registers (of backward 80, of warps 255 or 128), some fewer than the code of the widest
# kernels takes. It keeps in memory what all rows share: stored before the loop over rows, read two
# to five times a row.
# upsample_tile.cuh's kernels leave a thread 128 registers: of a tile, what all classes share.
KNOWN_SPILLS: dict[Spill, int] = {
    **{("75", "upsample_forward_kernel", (), of): 12 for of in ("f", _BF16, _FP16)},
    **{("75", "upsample_backward_kernel", (), of): 56 for of in ("f", _BF16, _FP16)},
    **{("120", "upsample_backward_kernel", (), of): 8 for of in ("f", _BF16, _FP16)},
    ("75", *_WIDE_STAGE_2, _BF16): 32,
    ("90", *_WARP_CALIBRATED, _BF16): 20,
    ("90", *_WARP_CALIBRATED, _FP16): 20,
    ("90", "row_warp_kernel", (False, False, 2), "f"): 8,
    ("90", *_WIDE_STAGE_2, _BF16): 16,
    ("90", "soft_row_kernel", (False, False), "d"): 20,
    ("100", *_WIDE_STAGE_2, "f"): 76,
    ("100", *_WIDE_STAGE_2, _BF16): 112,
    ("100", *_WIDE_STAGE_2, _FP16): 112,
    ("100", "soft_row_kernel", (False, False), "d"): 20,
    ("120", "row_warp_kernel", (True, True, 2), "f"): 8,
    ("120", *_WARPS_CALIBRATED, _BF16): 20,
    ("120", *_WARPS_CALIBRATED, _FP16): 20,
    ("120", *_WIDE_STAGE_2, _FP16): 16,
    ("120", *_WIDE_STAGE_2, _BF16): 108,
    ("120", "soft_row_warp_kernel", (2,), "f"): 12,
    ("120", "soft_row_warp_kernel", (2,), _BF16): 8,
    ("120", "soft_row_warp_kernel", (2,), _FP16): 8,
    ("120", "soft_row_kernel", (False, False), "d"): 12,
    # Of planes, what stays the same for a tile.
    **{
        (architecture, "dense_kernel", _BY_ELEMENT, "f"): most
        for architecture in ARCHITECTURES
        if (most := _DENSE_FLOAT.get(_AS_86.get(architecture, architecture), 0))
    },
    **{
        (architecture, "dense_kernel", flags, dtype): most
        for architecture in ARCHITECTURES
        for flags, most in _DENSE_HALF[_AS_86.get(architecture, architecture)].items()
        for dtype in (_BF16, _FP16)
    },
}


def spill_of(architecture: str, kernel: Kernel) -> Spill:
    return architecture, kernel.name, kernel.flags, kernel.type


def assert_known_spills(architecture: str, kernels: list[Kernel]) -> None:
    """Those of KNOWN_SPILLS, of the kernels' types: all of them, none other, and none larger."""
    types, names = {kernel.type for kernel in kernels}, {kernel.name for kernel in kernels}
    known = {
        spill: most
        for spill, most in KNOWN_SPILLS.items()
        if spill[0] == architecture and spill[1] in names and spill[-1] in types
    }
    spilled: dict[Spill, int] = {}
    for kernel in kernels:
        if kernel.spilled or kernel.stack:
            spill = spill_of(architecture, kernel)
            spilled[spill] = max(spilled.get(spill, 0), kernel.spilled)
    assert set(spilled) == set(known), spilled
    assert all(spilled[spill] <= most for spill, most in known.items()), spilled
