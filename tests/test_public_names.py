"""What `import disalign_ops` gives, and what it does not import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import disalign_ops

PROGRAM = """
import sys
import disalign_ops
for name in disalign_ops.__all__:
    getattr(disalign_ops, name)
frameworks = ("matplotlib", "rich", "timm", "torchvision", "transformers", "lightning", "triton")
print([name for name in frameworks if name in sys.modules])
try:
    disalign_ops.integrations.no_such
except AttributeError as error:
    print(error)
"""


def test_every_name_is_there_after_import_and_no_framework_is_imported() -> None:
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines == ["[]", "module 'disalign_ops.integrations' has no attribute 'no_such'"]


def test_adapters_are_attributes() -> None:
    folder = Path(disalign_ops.integrations.__file__).parent
    adapters = {path.stem for path in folder.glob("[a-z]*.py")}
    assert adapters <= set(dir(disalign_ops.integrations))
    assert "Shard" in dir(disalign_ops)
    # The name of an adapter whose framework is not here raises its ImportError, no AttributeError.
    assert tuple(sorted(adapters)) == disalign_ops.integrations._ADAPTERS
