"""What mypy and pyright say of a user's script: nothing where it is right, and each mistake."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from support.places import ROOT, TESTS

TYPED = TESTS / "typed"
Found = dict[str, set[int]]  # file name -> lines with an error

# Section of the README -> what its blocks take for granted, as parameters of a function.
GIVEN = {
    "In place of F.cross_entropy": (
        "logits: Tensor, target: Tensor, weight: Tensor, train: Callable[[], None]"
    ),
    "Classification: the second stage in ten lines": (
        "model: nn.Module, loader: DataLoader[tuple[Tensor, Tensor]]"
    ),
    "Segmentation": (
        "logits: Tensor, masks: Tensor, weight: Tensor, model: nn.Module, features: Tensor, "
        "in_channels: int, num_classes: int, pixels_per_class: Tensor"
    ),
    "Very many classes": "features: Tensor, head: nn.Linear, target: Tensor",
    "Several GPUs": (
        "features: Tensor, local_weight: Tensor, target: Tensor, confidence: Tensor, "
        "local_scale: Tensor, local_bias: Tensor, group: Any"
    ),
    "Detection": "features: Tensor, labels: Tensor, boxes_per_class: Tensor",
}
HEAD = """
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader
"""


def readme_script() -> str:
    """The README's blocks, those of a section in a function; each loss has a backward."""
    sections = re.split(r"^## (.+)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)[1:]
    imports, functions = [], []
    for title, text in zip(sections[::2], sections[1::2], strict=True):
        blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        if not blocks:
            continue
        lines = "".join(blocks).splitlines()
        imports += [line for line in lines if re.match("(import|from) ", line)]
        body = [line for line in lines if not re.match("(import|from) ", line)]
        if any(line.startswith("loss = ") for line in body):
            body.append("loss.backward()")
        name = re.sub(r"\W+", "_", title.lower())
        # The names of another section may be of other types.
        body = textwrap.indent("\n".join(body), "    ").splitlines()
        functions += [f"def {name}({GIVEN[title]}) -> None:", *body, ""]
    return "\n".join([HEAD, *dict.fromkeys(imports), "", *functions])


def mypy(files: list[Path]) -> Found:
    pytest.importorskip("mypy")
    # With the project's configuration: what `make lint` has cached need not be read again.
    command = [sys.executable, "-m", "mypy", "--no-pretty", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found: Found = {file.name: set() for file in files}
    for line in done.stdout.splitlines():
        place = re.match(r"(.+?):(\d+): error: ", line)
        if place:
            found[Path(place[1]).name].add(int(place[2]))
    return found


def pyright(files: list[Path]) -> Found:
    pytest.importorskip("pyright")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    environment = os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    done = subprocess.run(
        [*command, *map(str, files)], capture_output=True, text=True, cwd=ROOT, env=environment,
        check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found: Found = {file.name: set() for file in files}
    for each in json.loads(done.stdout)["generalDiagnostics"]:
        if each["severity"] == "error":
            found[Path(each["file"]).name].add(each["range"]["start"]["line"] + 1)
    return found


@pytest.mark.parametrize("checker", [mypy, pyright])
def test_a_users_script(checker: Callable[[list[Path]], Found], tmp_path: Path) -> None:
    readme = tmp_path / "readme.py"
    readme.write_text(readme_script())
    misuse = TYPED / "misuse.py"
    found = checker([readme, TYPED / "correct.py", misuse])
    assert found["readme.py"] == set(), readme.read_text()
    assert found["correct.py"] == set()
    lines = misuse.read_text().splitlines()
    assert found["misuse.py"] == {n for n, s in enumerate(lines, 1) if s.endswith("# wrong")}
