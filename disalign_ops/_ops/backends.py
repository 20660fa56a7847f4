"""Finds and loads the compiled library, knows which backend serves which device, and says why.

Backends: "native" (the compiled kernels), "triton" and "reference" (plain PyTorch). "auto" takes
the first of native, triton, reference that serves the tensor's device.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import ArgumentError
from .namespace import LINKED, NAMESPACE

_operators: Any = getattr(torch.ops, NAMESPACE)

NAMES = ("auto", "native", "triton", "reference")
LIBRARY = Path(__file__).parents[1] / "lib" / "libdisalign_ops_cpu.so"
CUDA_LIBRARY = LIBRARY.parent / "libdisalign_ops_cuda.so"
_ENVIRONMENT = "DISALIGN_OPS_BACKEND"


@dataclass
class _State:
    backend: str
    native_devices: tuple[str, ...] = ()
    why_not_native: str | None = None
    why_not_cuda: str | None = None
    cuda_loaded: bool = False
    cuda_devices: dict[int, str] = field(default_factory=dict)  # why not, "" if it serves
    triton_missing: str | None = None
    triton_devices: dict[int, str] = field(default_factory=dict)  # the same
    unserved: tuple[str, ...] = ()  # devices for which "auto" found nothing
    warned: bool = False  # that no kernel serves


def _check_name(name: str, source: str) -> str:
    if name not in NAMES:
        raise ArgumentError(f"{source} must be one of {', '.join(NAMES)}, got {name!r}")
    return name


_state = _State(_check_name(os.environ.get(_ENVIRONMENT) or "auto", _ENVIRONMENT))


def _why_missing(library: Path, note: str) -> str:
    reason = library.parent / note  # written at installation
    if reason.exists():
        return reason.read_text().strip()
    return f"{library.name} is not in the package: install it with pip, which builds it"


def load_native() -> None:
    """Load the compiled libraries; called once by _ops/schemas.py after it defined the schemas."""
    _state.why_not_native = _load(LIBRARY, "not_built.txt", "build_info")
    if _state.why_not_native is None:
        _state.native_devices = ("cpu",)
    _state.why_not_cuda = _load(CUDA_LIBRARY, "cuda_not_built.txt", "cuda_build_info")
    _state.cuda_loaded = _state.why_not_cuda is None
    if _state.cuda_loaded and torch.version.cuda is None:
        _state.why_not_cuda = "this PyTorch is built without CUDA"
    if _state.why_not_cuda is None:
        _state.native_devices += ("cuda",)


def _load(library: Path, note: str, probe: str) -> str | None:
    """Loads a library and calls an operator of it; or says why that cannot be."""
    try:
        if not LINKED:
            if not library.exists():
                raise FileNotFoundError(_why_missing(library, note))
            torch.ops.load_library(str(library))
        getattr(_operators, probe)()
    except (OSError, RuntimeError) as error:
        return f"{library.name} is not in this build" if LINKED else str(error).splitlines()[0]
    return None


def is_automatic() -> bool:
    """Whether nobody chose a backend."""
    return _state.backend == "auto"


def cpu_is_native() -> bool:
    """Whether `serving` finds "native" for the CPU without being asked for it."""
    return _state.backend == "auto" and _state.why_not_native is None


def serving(device: torch.device) -> str:
    """The backend that a tensor on `device` goes to: "native", "triton" or "reference".

    Raises ArgumentError if `set_backend` or DISALIGN_OPS_BACKEND forces one that cannot serve it.
    """
    wanted = _state.backend
    if wanted == "reference" or (wanted == "auto" and device.type in _state.unserved):
        return "reference"
    for name, why_not in (("native", _why_not), ("triton", _why_not_triton)):
        if wanted not in ("auto", name):
            continue
        reason = why_not(device)
        if reason is None:
            return name
        if wanted == name:
            raise ArgumentError(f"backend {name!r} is set but cannot serve {device.type}: {reason}")
    if not torch.compiler.is_compiling():
        if device.type == "cpu":
            _state.unserved = (
                "cpu",
            )  # whatever the index; to ask again costs a small batch a tenth
        if not _state.warned:
            _warn(device)
    return "reference"


_WHAT_TO_INSTALL = {
    # pip keeps the wheel that it built without one.
    "cpu": "Install a C++ compiler, such as g++, and then disalign_ops again, with pip install "
    "--force-reinstall --no-deps --no-cache-dir",
    "cuda": "pip install triton, or install nvcc and then disalign_ops again, with pip",
    "xpu": "pip install triton-xpu, or the triton of your PyTorch",
}


def _warn(device: torch.device) -> None:
    """Once a process, of a device that kernels could serve."""
    if device.type not in _WHAT_TO_INSTALL:
        return
    _state.warned = True
    reasons = [_why_not(device)] if device.type != "xpu" else []
    reasons += [_why_not_triton(device)] if device.type != "cpu" else []
    level, frame = 1, inspect.currentframe()
    while frame and frame.f_globals.get("__name__", "").startswith(("disalign_ops.", "torch.")):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"disalign_ops has no kernels for {device.type}: PyTorch's own functions compute, slower "
        f"and in more memory. Why: {'; '.join(str(reason) for reason in reasons)}. "
        f"{_WHAT_TO_INSTALL[device.type]}.",
        stacklevel=level,
    )


def _why_not(device: torch.device) -> str | None:
    """Why the native backend does not serve this device; None if it does."""
    if device.type == "cpu":
        return _state.why_not_native
    if device.type != "cuda":
        return f"no kernels for {device.type}"
    if _state.why_not_cuda is not None:
        return _state.why_not_cuda
    return _why_not_cuda_device(device.index) or None


Function = TypeVar("Function", bound=Callable[..., object])


def constant_in_graphs(function: Function) -> Function:
    """torch.compiler.assume_constant_result, without importing dynamo: a trace calls the function
    and keeps its answer, so that what serves does not depend on whether a call is compiled.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def _why_not_cuda_device(index: int | None) -> str:
    """Why the CUDA library does not serve this device (None: the current one); "" if it does."""
    if index is None:
        index = torch.cuda.current_device()
    if index not in _state.cuda_devices:  # the driver and the device's architecture
        with _disable_current_modes():  # fake tensors have no use for a question about a device
            _state.cuda_devices[index] = _operators.cuda_why_not(index)
    return _state.cuda_devices[index]


_OLDEST_NVIDIA = (7, 5)


def _why_not_triton(device: torch.device) -> str | None:
    """Why Triton does not serve this device; None if it does."""
    if _state.triton_missing is not None:
        return _state.triton_missing
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "Triton compiles for GPUs (with TRITON_INTERPRET=1 it interprets on the CPU, slowly)"
    if device.type not in ("cuda", "xpu"):
        return f"no Triton kernels for {device.type}"
    if device.type == "xpu" or torch.version.hip is not None:
        return None
    return _why_not_triton_device(device.index) or None


@constant_in_graphs
def _why_not_triton_device(index: int | None) -> str:
    """As _why_not_cuda_device."""
    if index is None:
        index = torch.cuda.current_device()
    if index not in _state.triton_devices:
        found = torch.cuda.get_device_capability(index)
        old = f"compute capability {found[0]}.{found[1]}, Triton needs 7.5 or newer"
        _state.triton_devices[index] = old if found < _OLDEST_NVIDIA else ""
    return _state.triton_devices[index]


def _find_triton() -> str | None:
    """Why there is no Triton; does not import it."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton, or the extra disalign_ops[triton]"
    return None


_state.triton_missing = _find_triton()


def _parsed(info: str) -> dict[str, str]:
    return dict(item.split("=", 1) for item in info.split(";"))


class set_backend:  # noqa: N801 - a function to its users, and a context manager
    """Choose the backend: "auto", "native", "triton" or "reference".

    "reference" is the formulas in plain PyTorch, to compare with; where there are no kernels "auto"
    is faster. As a call it holds from now on; as a context manager until the block's end. The
    setting is the process's, not the thread's. DISALIGN_OPS_BACKEND gives the value at import.
    Raises ValueError for another name; a backend that cannot serve a tensor raises when it is
    called with one.
    """

    def __init__(self, name: str) -> None:
        self._previous = _state.backend
        _state.backend = _check_name(name, "name")

    def __enter__(self) -> set_backend:
        return self

    def __exit__(self, *_: object) -> None:
        _state.backend = self._previous


def _after_native(triton: dict[str, object], kind: str) -> str:
    serves = triton["available"] and triton[f"why_not_{kind}"] is None
    return "triton" if serves else "reference"


def backend_info() -> dict[str, object]:
    """What is available and what serves each device, as a dictionary of plain values.

    Keys: version, torch, backend (as set), devices (device -> backend in use under "auto"),
    native / triton / reference (available, and why not; native also: instruction sets compiled and
    in use, compilers, torch target, the CUDA architectures of the CUDA library if it is built and
    loaded, and why it does not serve; triton also: version, and why it serves no GPU of a kind).
    """
    from .. import __version__

    native: dict[str, object] = {"available": bool(_state.native_devices)}
    if _state.why_not_native is None:
        built = _parsed(_operators.build_info())
        native |= {
            "devices": list(_state.native_devices),
            "instruction_set": built["used"],
            "instruction_sets_compiled": built["compiled"].split(","),
            "compiler": built["compiler"],
            "torch_target": built["torch_target"],
        }
    else:
        native["why_not"] = _state.why_not_native
    why_not_cuda = _state.why_not_cuda
    if why_not_cuda is None:
        available = torch.cuda.is_available()
        why_not_cuda = _why_not(torch.device("cuda")) if available else "no CUDA device was found"
    cuda = _parsed(_operators.cuda_build_info()) if _state.cuda_loaded else {}
    architectures = cuda.get("architectures", "").split(",") if cuda else []
    native |= {
        "cuda_architectures": architectures,
        "cuda_compiler": cuda.get("compiler"),
        "why_not_cuda": why_not_cuda,
    }
    triton: dict[str, object] = {"available": _state.triton_missing is None}
    if _state.triton_missing is not None:
        triton["why_not"] = _state.triton_missing
    else:
        triton["version"] = importlib.metadata.version("triton")
        there = {"cpu": True, "cuda": torch.cuda.is_available(), "xpu": torch.xpu.is_available()}
        for kind, found in there.items():
            why = _why_not_triton(torch.device(kind)) if found else f"no {kind} device was found"
            triton[f"why_not_{kind}"] = why
    why_not_native = {"cpu": _state.why_not_native, "cuda": why_not_cuda, "xpu": "no kernels"}
    devices = {
        kind: "native" if why is None else _after_native(triton, kind)
        for kind, why in why_not_native.items()
    }
    return {
        "version": __version__,
        "torch": torch.__version__,
        "backend": _state.backend,
        "devices": devices,
        "native": native,
        "triton": triton,
        "reference": {"available": True},
    }
