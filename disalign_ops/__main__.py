"""`python -m disalign_ops`: what serves here; `bench` and `counts` beside it."""

from __future__ import annotations

import sys

from ._cli import main

if __name__ == "__main__":
    sys.exit(main())
