"""The layout that the Hugging Face kernels hub builds from, out of this tree.

    python -m buildtools.kernels_hub FOLDER [--compiled] [--repository OWNER/NAME]

FOLDER gets build.toml, flake.nix, CARD.md, tests and torch-ext/disalign_ops, the package with three
differences:
  - its folder `_ops` is `_operators`, because kernel-builder writes a module `_ops`;
  - its operators are in the namespace of that module, one of its own for each build;
  - it has no compiled libraries of its own, and no command line.

Without --compiled it is the variant "torch-noarch": Triton's kernels on CUDA, ROCm and XPU,
PyTorch's operations on CPUs; it needs no compiler. With it, the sources of the compiled kernels for
CPUs and CUDA on torch's stable ABI: kernels_hub_compiled.py. kernel-builder needs Nix and was not
run: the tests import builds beside the package, as the `kernels` package does, and compile the CPU
variant by CMake from what its build.toml lists.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

from buildtools import kernels_hub_compiled

ROOT = Path(__file__).parents[1]
PACKAGE = "disalign_ops"
NAME = "disalign-ops"
FUNCTIONS = ("cross_entropy", "disalign_cross_entropy", "calibrate", "upsample_cross_entropy")

BUILD = (
    kernels_hub_compiled.GENERAL
    + """\
backends = ["cpu", "cuda", "rocm", "xpu"]

[general.hub]
repo-id = "{repository}"

[torch-noarch]
pyext = ["py", "txt"]
"""
)

FLAKE = """\
{
  description = "Losses for long-tailed recognition";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""

CARD = """\
---
library_name: kernels
license: apache-2.0
tags: [loss, cross-entropy, long-tailed-recognition, triton]
---
# {name}

Softmax cross-entropy with class weights, label smoothing, logit adjustment, margins and DisAlign's
calibrated logits (https://arxiv.org/abs/2103.16370), forward and backward in one Triton kernel
each: the only tensor of the logits' size is their gradient. Rows (N, C), class planes (N, C, H, W),
and planes under a mask of another size.

```python
import torch
from kernels import get_kernel

ops = get_kernel("{repository}", version={version}, trust_remote_code=True)
logits = torch.randn(64, 1204, device="cuda", requires_grad=True)
target = torch.randint(1204, (64,), device="cuda")
loss = ops.cross_entropy(logits, target, weight=torch.rand(1204, device="cuda"))
loss.backward()
```

Functions: {functions}; with `shard=` for classes divided over processes. Modules: `nn`, `losses`.
`backend_info()` says which kernels serve, and why others do not. The Python package of the same
name has compiled kernels for CPUs and NVIDIA GPUs besides.
"""

NAMESPACE = '''\
"""The namespace of torch.ops that has the operators: kernel-builder's, another in each build."""

from __future__ import annotations

from .._ops import add_op_namespace_prefix

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
LINKED = False
'''

TESTS = """\
import kernels
import pytest
import torch
import torch.nn.functional as F

ops = kernels.get_kernel("{repository}", version={version})
DEVICE = next((d for d in ("cuda", "xpu") if getattr(torch, d).is_available()), "cpu")


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 1204), (2, 19, 5, 6)])
def test_cross_entropy(shape, dtype):
    logits = torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), device=DEVICE)
    weight = torch.rand(shape[1], device=DEVICE)
    loss = ops.cross_entropy(logits, target, weight, label_smoothing=0.1)
    (grad,) = torch.autograd.grad(loss, logits)
    wide = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(wide, target, weight.double(), label_smoothing=0.1)
    (expected_grad,) = torch.autograd.grad(expected, wide)
    torch.testing.assert_close(loss, expected.to(dtype), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(grad, expected_grad.to(dtype), rtol=2e-2, atol=1e-3)
"""


def rewritten(path: Path) -> str:
    """A module of the package, with its own folder of operators by its other name."""
    text = re.sub(r"^(\s*from \.+)_ops\b", r"\1_operators", path.read_text(), flags=re.MULTILINE)
    return re.sub(r"^(\s*from \.+ import )_ops\b", r"\1_operators", text, flags=re.MULTILINE)


def write_package(folder: Path) -> None:
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        name = path.relative_to(ROOT / PACKAGE)
        if name.parts[0] in ("__main__.py", "_cli"):
            continue
        if name.parts[0] == "_ops":
            name = Path("_operators", *name.parts[1:])
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(rewritten(path))
    (folder / "_operators" / "namespace.py").write_text(NAMESPACE)
    (folder / "lib").mkdir()
    for reason in ("not_built.txt", "cuda_not_built.txt"):
        (folder / "lib" / reason).write_text("not compiled: this is the kernels hub's build\n")


def write(folder: Path, repository: str, version: int, compiled: bool = False) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    package = folder / "torch-ext" / PACKAGE
    write_package(package)
    values = {
        "name": NAME,
        "version": version,
        "repository": repository,
        "functions": ", ".join(f"`{name}`" for name in FUNCTIONS),
    }
    if compiled:
        kernels_hub_compiled.write(folder, package, **values)
    else:
        (folder / "build.toml").write_text(BUILD.format(**values))
    (folder / "flake.nix").write_text(FLAKE)
    (folder / "CARD.md").write_text(CARD.format(**values))
    shutil.copy(ROOT / "LICENSE", folder)
    (folder / "tests").mkdir()
    (folder / "tests" / "__init__.py").touch()
    # Only these two: the code below has braces of its own.
    tests = TESTS.replace("{repository}", repository).replace("{version}", str(version))
    (folder / "tests" / f"test_{PACKAGE}.py").write_text(tests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repository", default=f"OWNER/{NAME}", help="where it is published")
    parser.add_argument("--version", type=int, default=1, help="of the hub: one number")
    parser.add_argument("--compiled", action="store_true", help="for CPUs and CUDA, with sources")
    options = parser.parse_args()
    write(options.folder, options.repository, options.version, options.compiled)


if __name__ == "__main__":
    main()
