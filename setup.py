"""Runs CMake with ninja and puts the libraries into the package. What is built: CMakeLists.txt."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import setuptools

if int(setuptools.__version__.partition(".")[0]) < 77:  # pyproject.toml's `license`
    raise SystemExit(
        f"setuptools must be 77 or newer, got {setuptools.__version__}: pip install --upgrade "
        "setuptools, or leave out --no-build-isolation"
    )

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT))
from buildtools import machine  # noqa: E402

WHY_PURE = machine.why_pure()


def write_reasons(package: Path, native: str, cuda: str) -> Path:
    """Into package/lib, for backend_info(): why a library is missing, "" where it is not."""
    lib = package / "lib"
    lib.mkdir(parents=True, exist_ok=True)
    for name, reason in (("not_built.txt", native), ("cuda_not_built.txt", cuda)):
        if reason:
            (lib / name).write_text(reason + "\n")
        else:
            (lib / name).unlink(missing_ok=True)
    return lib


class CMakeBuild(build_ext):
    """Which libraries are built: buildtools/machine.py. MAX_JOBS: how many compilers at once."""

    def run(self) -> None:
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "disalign_ops"
        if WHY_PURE:
            self.warn(WHY_PURE)
            write_reasons(package, WHY_PURE, WHY_PURE)
            return
        cuda = machine.cuda()
        lib = write_reasons(package, "", cuda.why_not)
        (lib / "libdisalign_ops_cuda.so").unlink(missing_ok=True)
        self.build("disalign_ops_cpu", lib, machine.Cuda())
        if cuda.nvcc is None:
            return
        try:
            self.build("disalign_ops_cuda", lib, cuda)
        except subprocess.CalledProcessError as error:
            if cuda.required:
                raise
            command = " ".join(str(part) for part in error.cmd[:3])
            text = f"not compiled at installation: '{command} ...' failed with {cuda.nvcc}"
            self.warn(text)
            write_reasons(package, "", text)

    def build(self, target: str, lib: Path, cuda: machine.Cuda) -> None:
        cmake, torch = machine.required_tool("cmake"), machine.required_torch()
        folder = ROOT / "build" / ("inplace" if self.inplace else "wheel")
        environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": cuda.architectures}
        jobs = os.environ.get("MAX_JOBS")
        for arguments in (
            [
                "-S", ROOT, "-B", folder, "-G", "Ninja",
                f"-DCMAKE_MAKE_PROGRAM={machine.required_tool('ninja')}",
                f"-DDISALIGN_TORCH_INCLUDE={torch / 'include'}",
                f"-DDISALIGN_TORCH_LIB={torch / 'lib'}",
                f"-DCMAKE_INSTALL_PREFIX={lib}",
                f"-DDISALIGN_NVCC={cuda.nvcc or ''}",
            ],
            ["--build", folder, "--target", target, *(["--parallel", jobs] if jobs else [])],
            ["--install", folder, "--component", target],
        ):  # fmt: skip
            subprocess.run([cmake, *map(str, arguments)], env=environment, check=True)

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
        base = ROOT if self.editable_mode else Path(self.build_lib)
        write_reasons(base / "disalign_ops", WHY_PURE or "", WHY_PURE or "")


class PlatformWheel(bdist_wheel):
    """The library knows no Python: one wheel a platform serves every Python."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if WHY_PURE:
    setuptools.setup(cmdclass={"build_ext": CMakeBuild, "build_py": PurePackage})
else:
    setuptools.setup(
        ext_modules=[setuptools.Extension("disalign_ops.lib.native", sources=[])],
        cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
    )
