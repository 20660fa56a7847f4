"""Runs CMake with ninja and puts the libraries into the package. What is built: CMakeLists.txt."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()


def setting(name: str, values: tuple[str, ...], default: str) -> str:
    given = os.environ.get(name) or default
    if given not in values:
        raise ValueError(f"{name} must be one of {', '.join(values)}, got {given!r}")
    return given


# "1" leaves out all that is compiled: a wheel of Python alone, for any platform.
PURE = setting("DISALIGN_OPS_PURE", ("0", "1"), "0") == "1"


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME or CUDA_PATH, or the one that an nvcc on the PATH calls itself."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and (Path(home) / "bin" / "nvcc").exists():
            return Path(home) / "bin" / "nvcc"
    found = shutil.which("nvcc")
    if found is None:
        return None
    # What is on the PATH may be a script in another folder: nvcc says where it is.
    run = subprocess.run(
        [found, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    for line in run.stderr.splitlines():
        if line.startswith("#$ _HERE_="):
            return Path(line.removeprefix("#$ _HERE_=")) / "nvcc"
    return Path(found)


DRIVER_LIBRARY = "libcuda.so.1"
# Where the driver's library is not on the loader's path: its device and its version, WSL's copy.
DRIVER_FILES = (
    "/dev/nvidiactl",
    "/proc/driver/nvidia/version",
    "/usr/lib/wsl/lib/libcuda.so.1",
)


def driver_is_seen() -> bool:
    """Whether this machine has an NVIDIA driver. No device is asked: it may be hidden or busy."""
    if any(Path(file).exists() for file in DRIVER_FILES):
        return True
    try:
        ctypes.CDLL(DRIVER_LIBRARY)
    except OSError:
        return False
    return True


class CMakeBuild(build_ext):
    """Without a compiler the package installs all the same, and backend_info() says why.

    DISALIGN_OPS_CUDA: "auto" (the default) builds the CUDA library where nvcc is found, and goes on
    without it if it fails; "1" insists on it; "0" leaves it out. A checkout (pip install -e,
    build_ext --inplace) is for the machine that it is on: there "auto" asks for an NVIDIA driver
    too. TORCH_CUDA_ARCH_LIST chooses the architectures.
    """

    def run(self) -> None:
        base = ROOT if self.inplace else Path(self.build_lib).resolve()
        lib = base / "disalign_ops" / "lib"
        lib.mkdir(parents=True, exist_ok=True)
        reason = lib / "not_built.txt"
        reason.unlink(missing_ok=True)
        compiler = os.environ.get("CXX") or "c++"
        if shutil.which(compiler.split()[0]) is None:
            text = f"not compiled at installation: no C++ compiler ({compiler}) was found"
            reason.write_text(text + "\n")
            (lib / "cuda_not_built.txt").write_text(text + "\n")
            self.warn(text)
            return
        self.configure(lib, None)
        self.build("disalign_ops_cpu", lib)
        self.build_cuda(lib)

    def build_cuda(self, lib: Path) -> None:
        (lib / "libdisalign_ops_cuda.so").unlink(missing_ok=True)
        reason = lib / "cuda_not_built.txt"
        reason.unlink(missing_ok=True)
        wanted = setting("DISALIGN_OPS_CUDA", ("0", "1", "auto"), "auto")
        nvcc = None if wanted == "0" else find_nvcc()
        if wanted == "0":
            reason.write_text("not compiled at installation: DISALIGN_OPS_CUDA was 0\n")
        elif nvcc is None:
            if wanted == "1":
                raise FileNotFoundError(
                    "nvcc must be on the PATH or in CUDA_HOME where DISALIGN_OPS_CUDA is 1, got "
                    "none"
                )
            reason.write_text("not compiled at installation: no nvcc was found\n")
        elif wanted == "auto" and self.inplace and not driver_is_seen():
            reason.write_text(
                "not compiled at installation: a checkout compiles it where an NVIDIA driver is, "
                "and none was found (DISALIGN_OPS_CUDA=1 compiles it all the same)\n"
            )
        else:
            try:
                self.configure(lib, nvcc)
                self.build("disalign_ops_cuda", lib)
            except subprocess.CalledProcessError as error:
                if wanted == "1":
                    raise
                command = " ".join(str(part) for part in error.cmd[:3])
                text = f"not compiled at installation: '{command} ...' failed with {nvcc}"
                reason.write_text(text + "\n")
                self.warn(text)

    def build_folder(self) -> Path:
        return ROOT / "build" / ("inplace" if self.inplace else "wheel")

    def configure(self, lib: Path, nvcc: Path | None) -> None:
        import torch

        include = Path(torch.__file__).parent / "include"
        subprocess.run(
            [
                "cmake", "-S", str(ROOT), "-B", str(self.build_folder()), "-G", "Ninja",
                f"-DDISALIGN_TORCH_INCLUDE={include}",
                f"-DDISALIGN_TORCH_LIB={include.parent / 'lib'}",
                f"-DCMAKE_INSTALL_PREFIX={lib}",
                f"-DDISALIGN_NVCC={nvcc or ''}",
            ],
            check=True,
        )  # fmt: skip

    def build(self, target: str, lib: Path) -> None:
        folder = str(self.build_folder())
        subprocess.run(["cmake", "--build", folder, "--target", target], check=True)
        subprocess.run(["cmake", "--install", folder, "--component", target], check=True)

    def get_outputs(self) -> list[str]:
        return []

    def get_source_files(self) -> list[str]:
        return []


class PurePackage(build_py):
    """Without a library that lies in the source tree, and with the reason in its place."""

    def find_data_files(self, package: str, src_dir: str) -> list[str]:
        found = super().find_data_files(package, src_dir)
        return [name for name in found if Path(name).parent.name != "lib"]

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            lib = Path(self.build_lib) / "disalign_ops" / "lib"
            lib.mkdir(parents=True, exist_ok=True)
            for name in ("not_built.txt", "cuda_not_built.txt"):
                (lib / name).write_text("not compiled: this is the wheel of Python alone\n")


class PlatformWheel(bdist_wheel):
    """The library knows no Python: one wheel a platform serves every Python."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if PURE:
    setup(cmdclass={"build_py": PurePackage})
else:
    setup(
        ext_modules=[Extension("disalign_ops.lib.native", sources=[])],
        cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
    )
