"""Plants one fault at a time in a copy of this tree; the tests of make test-fast must fail there.

    python tests/support/planted_faults.py [backend ...]

Prints the table fault x backend -> the test that fails first. Exits with 1 where a fault passes.
CUDA kernels run under simt, whose module is built for each fault, and so is the CPU library for a
native one: minutes each.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REFERENCE, TRITON = "disalign_ops/_ops/reference.py", "disalign_ops/_ops/triton/loss.py"
TRITON_TILES = "disalign_ops/_ops/triton/tiles.py"
TRITON_BACKWARD = "disalign_ops/_ops/triton/loss_backward.py"
COMPOSED, COMMON = "disalign_ops/_ops/composed.py", "csrc/common/loss_math.h"
# The backend's tests in make test-fast.
TESTS = {
    "reference": ["tests/_ops/test_reference.py", "tests/_ops/test_row.py"],
    "triton": ["tests/_ops/test_triton.py", "-k", "few and row"],
    "cuda": ["tests/cuda/test_cuda_simt.py", "-k", "few and order"],
    "composed": ["tests/_ops/test_composed.py"],
    "native": ["tests/_ops/test_row.py", "tests/_ops/test_dense.py"],
}
# (backend, fault, file, text, text in its place)
FAULTS = [
    ("reference", "ignore_index missed", REFERENCE,
     "return target, target != ignore_index", "return target, target == target"),
    ("reference", "wrong sign of the bias", REFERENCE, "c * bias\n    # A", "-c * bias\n    # A"),
    ("reference", "wrong sign of the prior", REFERENCE, "return u + (prior", "return u - (prior"),
    ("triton", "ignore_index missed", TRITON_TILES,
     "valid = inside & (t != ignore_index)", "valid = inside & (t == t)"),
    ("triton", "class weight of the target lost", TRITON,
     "w_t = entries(weight, at, mask, 1.0, ACC)", "w_t = entries(None, at, mask, 1.0, ACC)"),
    ("triton", "sample weight lost in forward", TRITON,
     "v = entries(sample_weight, i, valid, 1.0, ACC)",
     "v = entries(None, i, valid, 1.0, ACC)"),
    ("triton", "sample weight lost in backward", TRITON_BACKWARD,
     "factor = entries(sample_weight, i, valid, 1.0, ACC)",
     "factor = entries(None, i, valid, 1.0, ACC)"),
    ("triton", "wrong sign of smoothing's gradient", TRITON_BACKWARD,
     "q -= tl.where(own, smooth", "q += tl.where(own, smooth"),
    ("cuda", "smoothing term lost", COMMON,
     "out.loss += share * (weight_sum * log_sum - smooth_sum);", ""),
    ("cuda", "class weight lost in the gradient", COMMON,
     "out.target = (1 - smoothing) * target_weight * focal.slope;",
     "out.target = (1 - smoothing) * focal.slope;"),
    ("cuda", "ignore_index missed", "csrc/cuda/kernels/position.cuh",
     "if (t == args.ignore_index) return kNoTarget;", ""),
    ("cuda", "denominator without sample weights", "csrc/cuda/kernels/block_sums.cuh",
     "target_weight * sample_weight", "target_weight"),
    ("cuda", "confidence's gradient not divided", "csrc/cuda/kernels/finish_kernel.cuh",
     "out[i] = scaled(static_cast<double>(out[i]));", ""),
    ("cuda", "sample weight lost in class planes", "csrc/cuda/kernels/dense_kernel.cuh",
     "vector_entry<A>(args.sample_weight, first_index + p, A(1))", "A(1)"),
    ("composed", "sample weight lost", COMPOSED,
     "losses = losses * sample_weight", "losses = losses * 1"),
    ("composed", "wrong sign of the margin", COMPOSED, "-margin[at]", "margin[at]"),
    ("composed", "class weight lost with focal", COMPOSED,
     "losses = losses * weight[torch.where(valid, t, 0)]", "losses = losses * 1"),
    ("native", "smoothing term lost", COMMON,
     "out.loss += share * (weight_sum * log_sum - smooth_sum);", ""),
    ("native", "class weight lost in the gradient", COMMON,
     "out.target = (1 - smoothing) * target_weight * focal.slope;",
     "out.target = (1 - smoothing) * focal.slope;"),
    ("native", "ignored rows in the denominator", "csrc/cpu/ops/device.h",
     "if (t == args.ignore_index) continue;\n      if (args.normalizer == kByValid)",
     "if (args.normalizer == kByValid)"),
    ("native", "confidence's derivative lost", "csrc/cpu/kernels/row_kernel.cpp",
     "g * c * (1 - c) * slope_sum", "g * c * slope_sum"),
    ("native", "the same in class planes", "csrc/cpu/kernels/positions.h",
     "upstream * confidence * (1.0 - confidence) * slopes", "upstream * confidence * slopes"),
]  # fmt: skip


def caught_by(backend: str, file: str, text: str, fault: str) -> str | None:
    """The first test that fails with the fault, None where all pass."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        ignore = shutil.ignore_patterns(".git", ".venv*", "build", "out", "*_cache", "__pycache__")
        shutil.copytree(ROOT, tree, ignore=ignore)
        source = (tree / file).read_text()
        if text not in source:
            raise RuntimeError(f"{file} has no {text!r}: plant the fault elsewhere")
        (tree / file).write_text(source.replace(text, fault))
        if backend == "native":
            build = subprocess.run(
                [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree,
                env={**os.environ, "DISALIGN_OPS_CUDA": "0"},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if build.returncode:
                raise RuntimeError(f"the library was not built:\n{build.stderr[-3000:]}")
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--once",
             "-m", "not standard and not slow", *TESTS[backend]],
            cwd=tree, env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if run.returncode == 0:
        return None
    # Under another test's pytest, the test there that fails says more.
    failed = re.findall(r"^(?:E\s+)?FAILED (.+?)(?: - |$)", run.stdout, re.MULTILINE)
    if run.returncode != 1 or not failed:
        raise RuntimeError(f"the tests did not run:\n{run.stdout[-3000:]}{run.stderr[-2000:]}")
    return str(failed[0])


def main() -> int:
    chosen = sys.argv[1:] or list(TESTS)
    passed = 0
    for backend, what, file, text, fault in FAULTS:
        if backend in chosen:
            test = caught_by(backend, file, text, fault)
            passed += test is None
            print(f"{backend:10} {what:36} {test or 'NOT CAUGHT'}", flush=True)
    return int(passed > 0)


if __name__ == "__main__":
    sys.exit(main())
