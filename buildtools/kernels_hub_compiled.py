"""The compiled variants of the Hugging Face kernels hub: C++ and CUDA sources, and build.toml.

kernel-builder compiles each file that build.toml lists once, with the flags of its component, and
needs headers in the lists. So a file that the package compiles several times (CPU kernels for each
instruction set, CUDA's row kernels for each dtype) becomes a header, which as many files include.
Instruction sets of x86-64 are asked for on x86-64 alone. Importing the extension registers the
operators in the namespace of the build; the schemas are defined in Python, as in the package.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCH = "2.10"  # whose stable ABI is targeted: CMakeLists.txt
CAPABILITIES = ["7.5", "8.0", "8.6", "9.0+PTX", "10.0", "12.0"]
KERNEL_FLAGS = ("-fno-trapping-math", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi")
AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mprfchw")
X86_FLAGS = {
    "avx2": AVX2,
    "avx512": (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
}
DTYPES = ("kFloat64", "kFloat32", "kBFloat16", "kFloat16")

GENERAL = """\
[general]
name = "{name}"
version = {version}
edition = 5
license = "Apache-2.0"
"""
BUILD = (
    GENERAL
    + """\
backends = ["cpu", "cuda"]

[general.cuda]
minver = "12.8"

[general.hub]
repo-id = "{repository}"

[torch]
src = ["torch-ext/torch_binding.cpp"]

[torch.stable-abi]
cpu = "{torch}"
cuda = "{torch}"
"""
)

BINDING = """\
// The module that Python imports; the operators register themselves (csrc/*/ops).
#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
"""

NAMESPACE = '''\
"""The namespace of torch.ops that has the operators: kernel-builder's, another in each build."""

from __future__ import annotations

from .._ops import add_op_namespace_prefix  # loads the extension

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
LINKED = True
'''

# What CMakeLists.txt defines for these files.
DEFINITIONS = {
    "csrc/cpu/ops/capability.h": """\
#if defined(__x86_64__)
#define DISALIGN_HAVE_X86_KERNELS
#endif
""",
    "csrc/cpu/ops/capability.cpp": "#define DISALIGN_COMPILER __VERSION__\n",
    "csrc/cuda/ops/build_info.cpp": """\
#define DISALIGN_COMPILER "nvcc, by kernel-builder"
#define DISALIGN_ARCHITECTURES "{architectures}"
#define DISALIGN_SOURCES ""
""",
}


def architectures() -> str:
    """As the library names them: code of a GPU alone is "-real"."""
    names = [name.replace(".", "") for name in CAPABILITIES]
    return ",".join(n.removesuffix("+PTX") if "+" in n else f"{n}-real" for n in names)


def _rewritten(path: str, text: str) -> str:
    text = re.sub(r"(STABLE_TORCH_LIBRARY_IMPL\()disalign_ops,", r"\1TORCH_EXTENSION_NAME,", text)
    text = text.replace("LIBRARY disalign_ops\n", "LIBRARY TORCH_EXTENSION_NAME\n")
    definitions = DEFINITIONS.get(path, "").replace("{architectures}", architectures())
    if "#pragma once\n" in text:
        return text.replace("#pragma once\n", f"#pragma once\n{definitions}", 1)
    return definitions + text


def _write(folder: Path, path: str, text: str) -> str:
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    return path


def _cpu_kernels(folder: Path, sources: Iterable[str], capability: str) -> list[str]:
    """A file a kernel file, in a folder of the instruction set."""
    written = []
    for path in sources:
        header = path.removeprefix("csrc/").replace(".cpp", "_source.h")
        text = f'#define DISALIGN_CAPABILITY {capability}\n#include "{header}"\n'
        if capability in X86_FLAGS:
            text = f"#if defined(__x86_64__)\n{text}#endif\n"
        name = path.replace("/kernels/", f"/kernels/{capability}/")
        written.append(_write(folder, name, text))
    return written


def _on_x86(flag: str) -> str:
    """kernel-builder's flags become CMake's, which knows the processor."""
    return f"$<$<STREQUAL:${{CMAKE_SYSTEM_PROCESSOR}},x86_64>:{flag}>"


def _component(name: str, backend: str, sources: list[str], **options: list[str]) -> str:
    lines = [f"\n[kernel.{name}]", f'backend = "{backend}"', 'depends = ["torch"]']
    for key, value in {"include": ["csrc"], **options, "src": sources}.items():
        items = "".join(f"\n    {json.dumps(item)}," for item in value)
        lines.append(f"{key.replace('_', '-')} = [{items}\n]")
    return "\n".join(lines) + "\n"


def write_sources(folder: Path) -> str:
    """Copies csrc into folder. Returns build.toml's components."""
    headers, compiled = [], []
    for file in sorted((ROOT / "csrc").rglob("*")):
        path = file.relative_to(ROOT).as_posix()
        if not file.is_file():
            continue
        text = _rewritten(path, file.read_text())
        if file.suffix in (".h", ".cuh"):
            headers.append(_write(folder, path, text))
        elif path.startswith("csrc/cpu/kernels/"):
            headers.append(_write(folder, path.replace(".cpp", "_source.h"), text))
            compiled.append(path)
        elif path == "csrc/cuda/launch/row.cu":
            headers.append(_write(folder, path.replace(".cu", "_source.cuh"), text))
        else:
            compiled.append(_write(folder, path, text))

    def of(prefix: str) -> list[str]:
        return [path for path in compiled if path.startswith(prefix)]

    host = {"ops": of("csrc/cpu/ops/")}
    for capability in ("baseline", *X86_FLAGS):
        host[capability] = _cpu_kernels(folder, of("csrc/cpu/kernels/"), capability)
    cuda = of("csrc/cuda/")
    for dtype in DTYPES:
        text = f'#define DISALIGN_DTYPE {dtype}\n#include "cuda/launch/row_source.cuh"\n'
        cuda.append(_write(folder, f"csrc/cuda/launch/row_{dtype}.cu", text))
    components = []
    for backend in ("cpu", "cuda"):  # tensors of the CPU have kernels in CUDA's build too
        for name, sources in host.items():
            flags = list(KERNEL_FLAGS) if name != "ops" else []
            flags += [_on_x86(flag) for flag in X86_FLAGS.get(name, ())]
            components.append(
                _component(
                    f"{backend}_host_{name}",
                    backend,
                    sources + (headers if name == "ops" else []),
                    cxx_flags=["-O3", *flags],
                )
            )
    # A target that is no class must stop the kernel: its assert stays.
    components.append(
        _component("cuda_device", "cuda", cuda, cuda_capabilities=CAPABILITIES,
                   cuda_flags=["-O3", "-UNDEBUG"], cxx_flags=["-O3"])
    )  # fmt: skip
    return "".join(components)


def write(folder: Path, package: Path, **values: object) -> None:
    """package: torch-ext's, as the other variant has it."""
    components = write_sources(folder)
    (folder / "build.toml").write_text(BUILD.format(**values, torch=TORCH) + components)
    (folder / "torch-ext" / "torch_binding.cpp").write_text(BINDING)
    (package / "_operators" / "namespace.py").write_text(NAMESPACE)
    shutil.rmtree(package / "lib")
