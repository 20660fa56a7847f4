"""The kernels' machine code, and what it takes: registers, stack, spills, shared memory.

It is the library's, where that was built for the architecture of the sources that are here;
otherwise nvcc makes it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from disalign_ops._ops import backends
from machine_code import disassembly
from simt import build

from . import cuda_tools
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


Code = tuple[list[Path], list[Kernel]]  # the files, and the kernels in them


def every_kernel(architecture: str) -> Code:
    """The machine code of all kernels of csrc/cuda for one architecture, and what it takes."""
    if _is_library_for(architecture):
        version = hashlib.sha256(backends.CUDA_LIBRARY.read_bytes()).hexdigest()[:16]
        return _kept("library", architecture, version, _extract)
    return compile(_EVERY, architecture)


def compile(source: Path, architecture: str) -> Code:
    """The same of a file, compiled as the library is."""

    def make(architecture: str, folder: Path) -> None:
        _run_nvcc(source, architecture, folder / f"{source.stem}.cubin")

    return _kept(source.stem, architecture, digest(source.read_bytes()), make)


def _kept(name: str, architecture: str, version: str, make: Callable[[str, Path], None]) -> Code:
    """make's files, which build/reports keeps: they are made once."""
    _KEPT.mkdir(parents=True, exist_ok=True)
    name = f"{name}_{architecture}"
    folder = _KEPT / f"{name}_{version}"
    report = folder / "kernels.json"
    with Path(_KEPT, f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two processes of tests want the same
        if not report.exists():
            for old in _KEPT.glob(f"{name}_*"):
                shutil.rmtree(old, ignore_errors=True)
            folder.mkdir()
            make(architecture, folder)
            kernels = _describe(sorted(folder.glob("*.cubin")), architecture)
            unfinished = folder / "kernels.new"
            unfinished.write_text(json.dumps([dataclasses.asdict(kernel) for kernel in kernels]))
            unfinished.rename(report)
    return sorted(folder.glob("*.cubin")), [
        Kernel(**kernel) for kernel in json.loads(report.read_text())
    ]


def _is_library_for(architecture: str) -> bool:
    """Whether the library has this architecture's code, of the sources that are here."""
    native: Any = backends.backend_info()["native"]
    if not {architecture, f"{architecture}-real"} & set(native["cuda_architectures"]):
        return False
    return backends._parsed(torch.ops.disalign_ops.cuda_build_info())["sources"] == _sources()


@functools.cache
def _sources() -> str:
    """As CMakeLists.txt says of what code was made of."""
    patterns = ("common/**/*.*h", "cuda/**/*.*h", "cuda/**/*.cu")
    files = sorted({str(path) for pattern in patterns for path in (ROOT / "csrc").glob(pattern)})
    digests = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in files]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _extract(architecture: str, folder: Path) -> None:
    """The library's code for an architecture."""
    cuda_tools.run("cuobjdump", "-xelf", f"sm_{architecture}", backends.CUDA_LIBRARY, folder=folder)


def _describe(cubins: list[Path], architecture: str) -> list[Kernel]:
    reserved = 1024 if int(architecture) >= 90 else 0  # of a block's shared memory, by the driver
    usage = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    codes = disassembly.Kernels(*cubins)
    kernels = {}  # small ones are in several files
    for cubin in cubins:
        printed = cuda_tools.run("cuobjdump", "-res-usage", cubin)
        for symbol, registers, stack, shared in re.findall(usage, printed):
            spilled = _spilled(codes[symbol]) if int(stack) else 0
            kernels[symbol] = Kernel(
                symbol, int(registers), int(stack), spilled, int(shared) - reserved
            )
    return list(kernels.values())


def _spilled(kernel: disassembly.Kernel) -> int:
    """Bytes that a thread's instructions store to its stack, and load."""
    sizes = {"64": 8, "128": 16}
    return sum(
        next((sizes[m] for m in i.modifiers if m in sizes), 4)
        for i in kernel.instructions.values()
        if i.name in ("STL", "LDL")
    )


@functools.cache
def digest(source: bytes) -> str:
    """Of a file, and of the kernels that it may include."""
    folders = (ROOT / "csrc" / "common", ROOT / "csrc" / "cuda", TESTS / "simt")
    headers = [path for folder in folders for path in sorted(folder.rglob("*.*h"))]
    content = [source, str(build.cuda_home()).encode(), *(path.read_bytes() for path in headers)]
    return hashlib.sha256(b"".join(content)).hexdigest()[:16]


def _run_nvcc(source: Path, architecture: str, cubin: Path) -> None:
    home = build.cuda_home()
    assert home is not None
    virtual = max((v for v in VIRTUAL if int(v) <= int(architecture)), key=int)
    run = subprocess.run(
        [str(home / "bin" / "nvcc"), "-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", "-cubin",
         "-gencode", f"arch=compute_{virtual},code=sm_{architecture}",
         str(source), "-o", str(cubin)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]


Spill = tuple[str, str, tuple[int, ...], str]  # architecture; name, flags, type of the kernel
_WIDE_STAGE_2 = ("row_forward_kernel", (True, True))
_WARP_CALIBRATED, _WARPS_CALIBRATED, _CLUSTER_CALIBRATED = (
    ("row_warp_kernel", (True, False, keeper)) for keeper in range(3)
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
    "120": {_PLAIN_BY_ELEMENT: 348, _CALIBRATED: 64, _WITH_OPTIONS: 60},
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
    ("75", *_WIDE_STAGE_2, "f"): 32,
    ("75", *_WIDE_STAGE_2, _BF16): 32,
    **{("75", *_WARP_CALIBRATED, of): 20 for of in (_BF16, _FP16)},
    **{("75", *_WARPS_CALIBRATED, of): 16 for of in (_BF16, _FP16)},
    ("90", *_WIDE_STAGE_2, _BF16): 16,
    ("90", "soft_row_kernel", (False, False), "d"): 20,
    ("100", *_WIDE_STAGE_2, "f"): 76,
    ("100", *_WIDE_STAGE_2, _BF16): 112,
    ("100", *_WIDE_STAGE_2, _FP16): 112,
    **{("100", *_CLUSTER_CALIBRATED, of): 8 for of in (_BF16, _FP16)},
    ("100", "soft_row_kernel", (False, False), "d"): 20,
    **{("120", *_WARPS_CALIBRATED, of): 8 for of in (_BF16, _FP16)},
    ("120", *_WIDE_STAGE_2, _FP16): 16,
    ("120", *_WIDE_STAGE_2, _BF16): 64,
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
