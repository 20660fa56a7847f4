"""`python -m disalign_ops` prints backend_info()."""

from __future__ import annotations

import json

from . import backend_info

if __name__ == "__main__":
    print(json.dumps(backend_info(), indent=2))
