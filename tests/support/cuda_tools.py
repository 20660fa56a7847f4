"""NVIDIA's tools that read machine code: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path


def _path() -> str:
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    tools = Path(sys.prefix, "lib", name, "site-packages", "nvidia", "cu13", "bin")
    return f"{tools}{os.pathsep}{os.environ['PATH']}"


def why_not() -> str | None:
    """Why machine code cannot be read here, if it cannot."""
    for name in ("cuobjdump", "nvdisasm"):
        if shutil.which(name, path=_path()) is None:
            return f"needs {name} (package nvidia-cuda-{name})"
    return None


def run(name: str, *arguments: str | Path, folder: Path | None = None) -> str:
    """What the tool prints. folder: where it runs, and writes."""
    tool = shutil.which(name, path=_path())
    assert tool, why_not()
    command = [tool, *map(str, arguments)]
    # cuobjdump calls nvdisasm.
    environment = {**os.environ, "PATH": _path()}
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=True
    ).stdout
