"""Which backend serves, how it is chosen, every instruction set, and why one is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import disalign_ops
from disalign_ops._ops import backends
from disalign_ops.errors import ArgumentError
from support import sets
from support.places import test_files

PACKAGE = Path(disalign_ops.__file__).parent
NATIVE = disalign_ops.backend_info()["native"]
COMPILED = NATIVE["instruction_sets_compiled"]
OTHERS = [name for name in COMPILED if name != NATIVE["instruction_set"]]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python away from this folder, which `-c` would put before PYTHONPATH."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=sys.prefix,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_backend_info_says_what_serves_and_what_was_compiled() -> None:
    info = disalign_ops.backend_info()
    assert info["version"] == disalign_ops.__version__
    assert info["torch"] == torch.__version__
    assert info["devices"] == {"cpu": "native", "cuda": "reference", "xpu": "reference"}
    assert info["native"]["available"] is True
    assert info["native"]["instruction_set"] in COMPILED
    assert info["native"]["torch_target"] == "2.10"
    assert info["native"]["why_not_cuda"]
    assert info["triton"]["available"] is True
    assert "GPU" in info["triton"]["why_not_cpu"]
    assert info["triton"]["why_not_cuda"] == "no cuda device was found"


def test_module_prints_backend_info() -> None:
    assert json.loads(python("-m", "disalign_ops", "--json").stdout) == disalign_ops.backend_info()


def test_set_backend_as_call_and_as_context_manager() -> None:
    z = torch.randn(3, 5, requires_grad=True)
    t = torch.tensor([0, 1, 2])

    def node() -> str:
        return type(disalign_ops.cross_entropy(z, t).grad_fn).__name__

    assert "_LossBackward" in node()
    with disalign_ops.set_backend("reference"):
        assert "_LossBackward" not in node()
    assert "_LossBackward" in node()
    disalign_ops.set_backend("reference")
    try:
        assert "_LossBackward" not in node()
    finally:
        disalign_ops.set_backend("auto")
    with pytest.raises(ArgumentError, match=r"name must be one of auto, native.*, got 'fast'"):
        disalign_ops.set_backend("fast")


def test_a_forced_backend_that_cannot_serve_raises() -> None:
    z, t = torch.randn(3, 5), torch.tensor([0, 1, 2])
    with (
        disalign_ops.set_backend("triton"),
        pytest.raises(ArgumentError, match="backend 'triton' is set but cannot serve cpu"),
    ):
        disalign_ops.cross_entropy(z, t)
    with (
        disalign_ops.set_backend("native"),
        pytest.raises(ArgumentError, match="backend 'native' is set but cannot serve meta"),
    ):
        disalign_ops.cross_entropy(z.to("meta"), t.to("meta"))


def test_the_environment_chooses_the_backend() -> None:
    program = "import disalign_ops; print(disalign_ops.backend_info()['backend'])"
    assert python("-c", program, DISALIGN_OPS_BACKEND="reference").stdout.strip() == "reference"
    wrong = python("-c", program, DISALIGN_OPS_BACKEND="fast")
    assert re.search("DISALIGN_OPS_BACKEND must be one of auto, native.*, got 'fast'", wrong.stderr)


def supported(instruction_set: str) -> bool:
    program = "import disalign_ops; print(disalign_ops.backend_info()['native']['available'])"
    run = python("-c", program, DISALIGN_OPS_CPU_CAPABILITY=instruction_set)
    return run.stdout.strip() == "True"


@pytest.mark.parametrize("part", sets.PARTS)
@pytest.mark.parametrize("instruction_set", OTHERS)
def test_every_other_instruction_set_passes_the_tests_of_the_kernels(
    instruction_set: str, part: str
) -> None:
    if not supported(instruction_set):
        pytest.skip(f"this processor has no {instruction_set}; its code cannot run here")
    names = ["row", "calibrate", "in_place", "dense", "upsample", "details"]
    tests = test_files(*names)
    run = python(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *sets.arguments(part), *tests,
        DISALIGN_OPS_CPU_CAPABILITY=instruction_set,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]


def test_an_unknown_instruction_set_is_named_and_the_reference_serves() -> None:
    program = (
        "import torch, disalign_ops as d;"
        "print(d.backend_info()['native']['why_not']);"
        "print(float(d.cross_entropy(torch.zeros(2, 4), torch.tensor([0, 1]))))"
    )
    run = python("-c", program, DISALIGN_OPS_CPU_CAPABILITY="avx9")
    why, loss = run.stdout.splitlines()
    assert "DISALIGN_OPS_CPU_CAPABILITY is 'avx9', this build and processor can use:" in why
    assert float(loss) == pytest.approx(1.3862944)


@pytest.mark.parametrize("reason", [None, "not compiled at installation: no C++ compiler (c++)"])
def test_without_the_library_the_reference_serves_and_the_reason_stands(
    tmp_path: Path, reason: str | None
) -> None:
    shutil.copytree(PACKAGE, tmp_path / "disalign_ops", ignore=shutil.ignore_patterns("lib"))
    if reason:
        (tmp_path / "disalign_ops" / "lib").mkdir()
        (tmp_path / "disalign_ops" / "lib" / "not_built.txt").write_text(reason + "\n")
    program = (
        "import torch, disalign_ops as d; i = d.backend_info();"
        "print(i['devices']['cpu']); print(i['native']['why_not']);"
        "x = torch.zeros(2, 4, requires_grad=True);"
        "d.cross_entropy(x, torch.tensor([0, 1])).backward(); print(float(x.grad[0, 0]))"
    )
    run = python("-c", program, PYTHONPATH=str(tmp_path))
    backend, why, grad = run.stdout.splitlines()
    assert backend == "reference"
    assert (reason or f"{backends.LIBRARY.name} is not in the package") in why
    assert float(grad) == pytest.approx(-0.375)


@pytest.mark.parametrize("index", [0, 1, None])
def test_a_compiled_call_goes_to_the_backend_of_the_eager_one(
    monkeypatch: pytest.MonkeyPatch, index: int | None
) -> None:
    # GPU 0: too old for the library and for Triton; 1, the current one: for the library alone.
    asked: list[int] = []

    def capability(device: int) -> tuple[int, int]:
        asked.append(device)
        return (7, 0) if device == 0 else (9, 0)

    state = backends._state
    monkeypatch.setattr(state, "why_not_cuda", None)
    monkeypatch.setattr(state, "triton_missing", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    device = torch.device("cuda") if index is None else torch.device("cuda", index)
    numbers = {"native": 1.0, "triton": 2.0, "reference": 3.0}

    def number(x: torch.Tensor) -> torch.Tensor:
        return x + numbers[backends.serving(device)]

    def forget(why_not_native: dict[int, str]) -> None:
        monkeypatch.setattr(state, "cuda_devices", why_not_native)
        monkeypatch.setattr(state, "triton_devices", {})
        torch.compiler.reset()

    for why_not, serves in (
        ("no code", "reference" if index == 0 else "triton"), ("", "native"),
    ):  # fmt: skip
        forget({0: why_not, 1: why_not})
        compiled = torch.compile(number, backend="eager", fullgraph=True)
        assert float(compiled(torch.zeros(()))) == numbers[serves]
        assert float(number(torch.zeros(()))) == numbers[serves]
    assert asked == [0 if index == 0 else 1]  # once, and of this device alone


def test_fake_tensors_do_not_keep_a_device_from_being_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not backends._state.cuda_loaded:
        pytest.skip("the CUDA library is not built")
    monkeypatch.setattr(backends._state, "why_not_cuda", None)
    monkeypatch.setattr(backends._state, "cuda_devices", {})
    with torch._subclasses.FakeTensorMode():
        assert isinstance(backends._why_not_cuda_device(0), str)
