"""Runs CMake with ninja and puts the library into the package. What is compiled: CMakeLists.txt."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Without a C++ compiler the package installs all the same, and backend_info() says why."""

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
            self.warn(text)
            return
        import torch

        include = Path(torch.__file__).parent / "include"
        build = ROOT / "build" / ("inplace" if self.inplace else "wheel")
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DDISALIGN_TORCH_INCLUDE={include}",
            f"-DDISALIGN_TORCH_LIB={include.parent / 'lib'}",
            f"-DCMAKE_INSTALL_PREFIX={lib}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "install"], check=True)

    def get_outputs(self) -> list[str]:
        return []

    def get_source_files(self) -> list[str]:
        return []


class PlatformWheel(bdist_wheel):
    """The library knows no Python: one wheel a platform serves every Python."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("disalign_ops.lib.native", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
