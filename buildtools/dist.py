"""What is published: a source distribution, a wheel of Python alone and a manylinux_2_28 wheel.

    python -m buildtools.dist [--pure] FOLDER

`make dist` calls it with the tools of requirements-release.txt on the PATH. The wheels are built
from the source distribution, as others would build them; each file is checked before FOLDER has it.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from buildtools import old_libraries

ROOT = Path(__file__).parents[1]


def call(*command: str | Path, cwd: Path = ROOT, **environment: str) -> None:
    subprocess.run(list(map(str, command)), cwd=cwd, env={**os.environ, **environment}, check=True)


def source_distribution(folder: Path) -> Path:
    call(sys.executable, "setup.py", "-q", "sdist", "-d", folder, DISALIGN_OPS_PURE="1")
    (archive,) = folder.glob("*.tar.gz")
    return archive


def unpacked(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return source


def wheel(source: Path, folder: Path, **environment: str) -> Path:
    folder.mkdir()
    call(
        sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-v",
        "-w", folder, ".", cwd=source, **environment,
    )  # fmt: skip
    (found,) = folder.glob("*.whl")
    return found


def native_wheel(source: Path, work: Path) -> Path:
    """Linked as manylinux_2_28 has it, and so tagged. torch's library is not put into the wheel."""
    old = work / "old"
    call(sys.executable, "-m", "buildtools.old_libraries", old, cwd=source)
    flags = f"-L{old} -Wl,--exclude-libs,ALL -Wl,-s {os.environ.get('LDFLAGS', '')}"
    built = wheel(source, work / "native", LDFLAGS=flags.strip())
    tag = f"manylinux_2_28_{platform.machine()}"
    repaired = work / "repaired"
    call(
        "auditwheel",
        "repair",
        "--plat",
        tag,
        "--only-plat",
        "--exclude",
        "libtorch_cpu.so",
        "-w",
        repaired,
        built,
    )
    (found,) = repaired.glob("*.whl")
    return found


def check(file: Path) -> None:
    call("twine", "check", "--strict", file)
    if file.suffix != ".whl":
        return
    call("check-wheel-contents", file)
    with tempfile.TemporaryDirectory() as folder:
        found = sorted(old_libraries.libraries_in(file, Path(folder)))
    if bool(found) == file.name.endswith("-py3-none-any.whl"):
        raise SystemExit(f"{file.name} must be tagged as what is in it, got {found}")
    if found:
        call("auditwheel", "show", file)
    if not old_libraries.check([file]):
        raise SystemExit(f"{file.name} must ask for no newer libraries than manylinux_2_28 has")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pure", action="store_true", help="without the manylinux wheel")
    options = parser.parse_args()
    folder = options.folder.resolve()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        archive = source_distribution(work)
        source = unpacked(archive, work / "source")
        files = [archive, wheel(source, work / "pure", DISALIGN_OPS_PURE="1")]
        if not options.pure:
            files.append(native_wheel(source, work))
        for file in files:
            check(file)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file in files:
            print(shutil.copy(file, folder))


if __name__ == "__main__":
    main()
