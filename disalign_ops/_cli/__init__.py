"""The command line of `python -m disalign_ops`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import about, bench, counts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m disalign_ops",
        description="Without a command: which kernels serve this machine, and why others do not.",
    )
    parser.add_argument("--json", action="store_true", help="backend_info() as JSON")
    parser.set_defaults(run=about.run)
    commands = parser.add_subparsers(title="commands", metavar="bench | counts")
    bench.add_parser(commands)
    counts.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except (OSError, ValueError) as error:  # a file that cannot be read, a wrong argument
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status
