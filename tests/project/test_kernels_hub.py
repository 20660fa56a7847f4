"""The layout of the Hugging Face kernels hub: several builds in one process beside the package."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from buildtools import kernels_hub, kernels_hub_compiled
from simt.build import _which
from support.places import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:  # the fast tests run on 3.10
    tomllib = pytest.importorskip("tomli")

# What kernel-builder adds to a build without compiled code.
OPS = """
import torch
ops = torch.ops.{id}
def add_op_namespace_prefix(op_name: str) -> str:
    return f"{id}::{{op_name}}"
"""

# As the `kernels` package imports builds: by their folders, under names of its own.
USED = """
import importlib.util, sys
from pathlib import Path
sys.modules["numpy"] = None  # a kernel may use torch and the standard library alone
import warnings
warnings.simplefilter("ignore")
import torch

def loaded(folder):
    name = "kernel_" + Path(folder).name
    spec = importlib.util.spec_from_file_location(name, f"{folder}/__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module

import disalign_ops
torch.manual_seed(0)
builds = [disalign_ops, *map(loaded, sys.argv[1:])]
for kernel in builds:
    for shape, positions in (((5, 9), (5,)), ((2, 9, 3, 4), (2, 3, 4))):
        z = torch.randn(shape, requires_grad=True)
        target = torch.randint(9, positions)
        loss = kernel.cross_entropy(z, target, label_smoothing=0.1)
        expected = torch.nn.functional.cross_entropy(z, target, label_smoothing=0.1)
        torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(expected, z))
        plain = torch.nn.functional.cross_entropy(z, target)
        compiled = torch.compile(kernel.cross_entropy, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(z, target), plain)
    layer = kernel.nn.DisAlignLinear(4, 9)
    kernel.nn.CrossEntropyLoss()(layer(torch.randn(5, 4)), torch.arange(5)).backward()
assert len({kernel.nn.DisAlignLinear for kernel in builds}) == 3
for kernel, folder in zip(builds[1:], sys.argv[1:]):
    assert Path(kernel.__file__).is_relative_to(folder)
    assert hasattr(getattr(torch.ops, "_" + Path(folder).name), "row_forward")
"""


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    kernels_hub.write(folder, "someone/disalign-ops", 1)
    return folder


def test_every_operator_is_in_the_builds_namespace(layout: Path) -> None:
    package = layout / "torch-ext" / "disalign_ops"
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert "disalign_ops::" not in node.value, path
            if isinstance(node, ast.Attribute):
                assert not re.search(r"ops\.disalign_ops", ast.unparse(node)), path
            # Absolute imports of the package would find what is installed.
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").partition(".")[0] != "disalign_ops", path
    assert not (package / "_ops").exists(), "kernel-builder writes _ops.py there"
    assert not (package / "_ops.py").exists()


def test_the_layout_is_complete(layout: Path) -> None:
    names = {str(path.relative_to(layout)) for path in layout.rglob("*")}
    assert {"build.toml", "flake.nix", "CARD.md", "tests/test_disalign_ops.py"} <= names
    here = {p.relative_to(ROOT / "disalign_ops") for p in (ROOT / "disalign_ops").rglob("*.py")}
    there = {p.relative_to(layout / "torch-ext/disalign_ops") for p in layout.rglob("*.py")
             if "torch-ext" in p.parts}  # fmt: skip
    renamed = {Path("_operators", *p.parts[1:]) if p.parts[0] == "_ops" else p for p in here}
    assert {p for p in renamed - there if p.parts[0] not in ("__main__.py", "_cli")} == set()
    card = (layout / "CARD.md").read_text()
    assert 'get_kernel("someone/disalign-ops"' in card
    assert "OWNER" not in card + (layout / "build.toml").read_text()
    compile((layout / "tests" / "test_disalign_ops.py").read_text(), "test", "exec")


def test_two_builds_compute_in_one_process(layout: Path, tmp_path: Path) -> None:
    folders = []
    for build in ("disalign_ops_cpu_1a2b3c4", "disalign_ops_cpu_5d6e7f8"):
        folder = tmp_path / build
        shutil.copytree(layout / "torch-ext" / "disalign_ops", folder)
        (folder / "_ops.py").write_text(OPS.format(id=f"_{build}"))
        folders.append(folder)
    run = subprocess.run(
        [sys.executable, "-c", USED, *map(str, folders)], cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]


# --- with the compiled kernels


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    kernels_hub.write(folder, "someone/disalign-ops", 1, compiled=True)
    return folder


def components(folder: Path, backend: str) -> dict[str, Any]:
    listed = tomllib.loads((folder / "build.toml").read_text())["kernel"]
    return {name: kernel for name, kernel in listed.items() if kernel["backend"] == backend}


def test_every_file_is_listed_for_each_backend(sources: Path) -> None:
    csrc = {str(path.relative_to(sources)) for path in (sources / "csrc").rglob("*.*")}
    listed = [name for kernel in components(sources, "cuda").values() for name in kernel["src"]]
    assert len(listed) == len(set(listed)), "kernel-builder compiles a file once"
    assert set(listed) == csrc
    listed = [name for kernel in components(sources, "cpu").values() for name in kernel["src"]]
    headers = {name for name in csrc if name.endswith((".h", ".cuh"))}
    assert set(listed) - headers == {
        name for name in csrc - headers if name.startswith("csrc/cpu/")
    }


def test_what_is_compiled_and_how_is_as_in_the_package(sources: Path) -> None:
    text = " ".join((ROOT / "CMakeLists.txt").read_text().split())
    compiled = {
        re.sub(r"(?<=kernels/)(baseline|avx2|avx512)/|(?<=launch/row)_k[A-Z]\w+", "", name)
        for kernel in components(sources, "cuda").values()
        for name in kernel["src"]
        if name.endswith((".cpp", ".cu"))
    }
    assert compiled == set(re.findall(r"csrc/[\w/]+\.(?:cpp|cu)\b", text))
    assert f"set(kernel_flags {' '.join(kernels_hub_compiled.KERNEL_FLAGS)})" in text
    avx2, avx512 = kernels_hub_compiled.X86_FLAGS.values()
    assert f"set(flags_avx2 {' '.join(avx2)})" in text
    assert f"set(flags_avx512 ${{flags_avx2}} {' '.join(avx512[len(avx2) :])})" in text
    names = kernels_hub_compiled.architectures().replace(",", " ")
    assert f"set(architectures {names})" in text


def test_what_cmake_defines_is_defined(sources: Path) -> None:
    defined = set(re.findall(r"\b(DISALIGN_\w+)=", (ROOT / "CMakeLists.txt").read_text()))
    files = list((sources / "csrc").glob("*/ops/*.cpp"))
    used = {path.name: defined & set(re.findall(r"\w+", path.read_text())) for path in files}
    assert used["build_info.cpp"]
    for path in files:
        found = set(re.findall(r"^#define (\w+)", path.read_text(), re.MULTILINE))
        assert used[path.name] <= found, path


# What kernel-builder adds to a build with compiled code.
COMPILED_OPS = "from . import {id}\n" + OPS
REGISTRATION = """
#include <Python.h>
#define REGISTER_EXTENSION(name) REGISTER(name)
#define REGISTER(name)                                                                \\
  PyMODINIT_FUNC PyInit_##name() {                                                    \\
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, #name, nullptr, 0, nullptr,   \\
                                 nullptr, nullptr, nullptr, nullptr};                 \\
    return PyModule_Create(&module);                                                  \\
  }
"""
# As kernel-builder's: one target, flags and folders of headers as properties of the files.
CMAKE = """
cmake_minimum_required(VERSION 3.24)
project(hub LANGUAGES CXX)
set(CMAKE_CXX_STANDARD 17)
{properties}
add_library({id} MODULE {sources})
target_compile_definitions(
  {id} PRIVATE TORCH_EXTENSION_NAME={id} CPU_KERNEL Py_LIMITED_API=0x03090000
               TORCH_TARGET_VERSION=0x020a000000000000)
target_include_directories({id} SYSTEM PRIVATE {torch}/include {python})
target_link_directories({id} PRIVATE {torch}/lib)
target_link_libraries({id} PRIVATE torch_cpu)
set_target_properties({id} PROPERTIES PREFIX "" SUFFIX ".abi3.so")
"""


def build(folder: Path, identifier: str) -> Path:
    """The CPU variant of what is listed in folder's build.toml."""
    properties, files = [], ["torch-ext/torch_binding.cpp"]
    for kernel in components(folder, "cpu").values():
        files += kernel["src"]
        names = " ".join(kernel["src"])
        (include,) = kernel["include"]
        flags = ";".join(kernel["cxx-flags"])
        properties += [
            f"set_source_files_properties({names} PROPERTIES INCLUDE_DIRECTORIES "
            f'"${{CMAKE_SOURCE_DIR}}/{include}")',
            f"set_property(SOURCE {names} APPEND PROPERTY COMPILE_OPTIONS "
            f'"$<$<COMPILE_LANGUAGE:CXX>:{flags}>")',
        ]
    (folder / "torch-ext" / "registration.h").write_text(REGISTRATION)
    (folder / "CMakeLists.txt").write_text(
        CMAKE.format(
            id=identifier, properties="\n".join(properties), sources=" ".join(files),
            torch=Path(torch.__file__).parent, python=sysconfig.get_paths()["include"],
        )
    )  # fmt: skip
    for command in (
        ["-S", folder, "-B", folder / "build", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
         f"-DCMAKE_MAKE_PROGRAM={_which('ninja')}"],
        ["--build", folder / "build"],
    ):  # fmt: skip
        run = subprocess.run(
            [_which("cmake") or "cmake", *map(str, command)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return folder / "build" / f"{identifier}.abi3.so"


NATIVE = """
info = builds[1].backend_info()
assert info["devices"]["cpu"] == "native", info
assert info["native"]["instruction_sets_compiled"] == (
    disalign_ops.backend_info()["native"]["instruction_sets_compiled"])
assert builds[2].backend_info()["devices"]["cpu"] == "reference"
"""


@pytest.mark.slow  # compiles the CPU kernels
@pytest.mark.skipif(
    _which("cmake") is None or _which("ninja") is None, reason="cmake or ninja was not found"
)
@pytest.mark.skipif(
    not Path(sysconfig.get_paths()["include"], "Python.h").exists(), reason="no Python.h"
)
def test_the_listed_sources_are_a_build_that_computes(
    sources: Path, layout: Path, tmp_path: Path
) -> None:
    identifier = "_disalign_ops_cpu_9a8b7c6"
    extension = build(sources, identifier)
    compiled = tmp_path / identifier.removeprefix("_")
    shutil.copytree(sources / "torch-ext" / "disalign_ops", compiled)
    shutil.copy(extension, compiled)
    (compiled / "_ops.py").write_text(COMPILED_OPS.format(id=identifier))
    noarch = tmp_path / "disalign_ops_cpu_1a2b3c4"
    shutil.copytree(layout / "torch-ext" / "disalign_ops", noarch)
    (noarch / "_ops.py").write_text(OPS.format(id=f"_{noarch.name}"))
    run = subprocess.run(
        [sys.executable, "-c", USED + NATIVE, str(compiled), str(noarch)], cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
