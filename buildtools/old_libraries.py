"""Libraries to link against, so that what is built here runs where glibc is older.

    python -m buildtools.old_libraries FOLDER
    python -m buildtools.old_libraries --check FILE...
    LDFLAGS="-LFOLDER -Wl,--exclude-libs,ALL" pip wheel .

A library asks for the newest version of each symbol that its linker saw. glibc and libstdc++ still
have the old versions, and so this machine's tell what those of manylinux_2_28 had. FOLDER gets
libraries with these names and versions and no code. What GCC added to libstdc++ later is linked
from libstdc++.a, as Red Hat's compilers do for manylinux: torch and the library then throw and
catch through one libstdc++.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}
KINDS = {"OBJECT": "object", "TLS": "tls_object"}  # readelf's names to the assembler's
# Before glibc 2.34 these were libraries of their own.
MOVED = {
    "libpthread.so.0": r"(pthread|sem)_",
    "libdl.so.2": r"dl",
    "librt.so.1": r"(shm|mq|aio|lio|timer)_",
}
# libstdc++'s headers read it since glibc 2.32; 0 says that there may be threads.
COMPAT = """
.globl __libc_single_threaded
.hidden __libc_single_threaded
.type __libc_single_threaded,%object
.size __libc_single_threaded,1
.bss
__libc_single_threaded: .zero 1
.section .note.GNU-stack,"",%progbits
"""


class Symbol(NamedTuple):
    name: str
    kind: str
    size: int
    version: str


def newer(version: str) -> bool:
    """Whether a version, such as GLIBC_2.34, is newer than manylinux_2_28 has; others count too."""
    name, _, number = version.rpartition("_")
    if name not in NEWEST or not re.fullmatch(r"[\d.]+", number):
        return True
    return tuple(map(int, number.split("."))) > NEWEST[name]


def symbols(library: Path) -> dict[str, list[Symbol]]:
    """What a library exports: name -> its versions, oldest first."""
    run = subprocess.run(
        ["readelf", "--dyn-syms", "--wide", str(library)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, list[Symbol]] = {}
    for line in run.stdout.splitlines():
        match = re.match(
            r"\s*\d+: \S+\s+(\S+) (FUNC|OBJECT|TLS|IFUNC)\s+(?:GLOBAL|WEAK|UNIQUE)\s+DEFAULT\s+"
            r"(?:\[.*\]\s+)?(\d+) ([^@\s]+)@@?(\w+_[\d.]+)$",
            line,
        )
        if match:
            size, kind, _, name, version = match.groups()
            found.setdefault(name, []).append(Symbol(name, kind, int(size, 0), version))
    for versions in found.values():
        versions.sort(key=lambda s: [int(n) for n in re.findall(r"\d+", s.version)])
    return found


def write_library(folder: Path, name: str, chosen: list[Symbol], compiler: list[str]) -> None:
    assembly = ['.section .note.GNU-stack,"",%progbits', ".text"]
    nodes: dict[str, list[str]] = {}
    for symbol in sorted(chosen, key=lambda s: s.kind == "TLS"):
        if symbol.kind == "TLS":
            assembly += ['.section .tbss,"awT",%nobits']
        kind = KINDS.get(symbol.kind, "function")
        assembly += [f".globl {symbol.name}", f".type {symbol.name},%{kind}"]
        assembly += [f".size {symbol.name},{symbol.size}", f"{symbol.name}:"]
        assembly += [f".zero {symbol.size}"] if symbol.kind == "TLS" else []
        nodes.setdefault(symbol.version, []).append(symbol.name)
    source, script = folder / f"{name}.s", folder / f"{name}.map"
    source.write_text("\n".join(assembly) + "\n")
    script.write_text(
        "".join(f"{node} {{ global: {'; '.join(names)}; }};\n" for node, names in nodes.items())
    )
    subprocess.run(
        [*compiler, "-shared", "-nostdlib", f"-Wl,-soname,{name}", f"-Wl,--version-script={script}",
         str(source), "-o", str(folder / name)], check=True,
    )  # fmt: skip


def write(folder: Path, compiler: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()

    def installed(name: str) -> Path:
        command = [*compiler, f"-print-file-name={name}"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(text).is_absolute():
            raise FileNotFoundError(f"{compiler[0]} must have {name}, got none")
        return Path(text).resolve()

    libraries: dict[str, list[Symbol]] = {name: [] for name in MOVED}
    for name in ("libc.so.6", "libm.so.6", "libstdc++.so.6"):
        libraries[name] = []
        for versions in symbols(installed(name)).values():
            old = [symbol for symbol in versions if not newer(symbol.version)]
            if not old:
                continue
            # What moved into libc.so.6 with 2.34 has this version too.
            moved = name == "libc.so.6" and versions[-1].version == "GLIBC_2.34"
            places = [n for n, names in MOVED.items() if re.match(names, old[-1].name)]
            libraries[places[0] if moved and places else name].append(old[-1])
    for name, chosen in libraries.items():
        write_library(folder, name, chosen, compiler)
    (folder / "compat.s").write_text(COMPAT)
    archive = folder / "libcompat.a"
    archive.unlink(missing_ok=True)
    subprocess.run([*compiler, "-c", "compat.s", "-o", "compat.o"], cwd=folder, check=True)
    subprocess.run(["ar", "qc", str(archive), str(folder / "compat.o")], check=True)
    for name in libraries:
        inputs = [folder / name]
        if name == "libc.so.6":
            inputs += [installed("libc_nonshared.a"), archive]
        elif name == "libstdc++.so.6":
            inputs += [installed("libstdc++.a"), archive]
        script = f"GROUP ( {' '.join(map(str, inputs))} )\n"
        (folder / (name.partition(".so")[0] + ".so")).write_text(script)


def required_versions(library: Path) -> set[str]:
    """The versions of glibc and libstdc++ that a library asks for."""
    run = subprocess.run(
        ["readelf", "--version-info", "--wide", str(library)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(re.findall(r"\bName: ((?:GLIBC|GLIBCXX|CXXABI)_\w[\w.]*)", run.stdout))


def too_new(library: Path) -> list[str]:
    return sorted(version for version in required_versions(library) if newer(version))


def libraries_in(file: Path, folder: Path) -> dict[str, Path]:
    """The libraries in a wheel, unpacked into folder, by their names; of another file, itself."""
    if file.suffix != ".whl":
        return {str(file): file}
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if ".so" in name]
        return {name: Path(archive.extract(name, folder)) for name in names}


def check(files: list[Path]) -> bool:
    """Prints what each library asks for; whether manylinux_2_28 has all of it."""
    good = True
    for file in files:
        with tempfile.TemporaryDirectory() as folder:
            for name, library in libraries_in(file, Path(folder)).items():
                wrong = too_new(library)
                good = good and not wrong
                print(f"{name}: {' '.join(sorted(required_versions(library)))}")
                print(f"  too new: {' '.join(wrong)}" if wrong else "  serves manylinux_2_28")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="writes the libraries there")
    parser.add_argument("--check", type=Path, nargs="+", metavar="FILE", help="wheels, libraries")
    options = parser.parse_args()
    if options.folder:
        write(options.folder, shlex.split(os.environ.get("CXX") or "c++"))
    if options.check and not check(options.check):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
