"""The namespace of torch.ops that has the operators.

Each build for the Hugging Face kernels hub has one of its own, so that several can be loaded into
one process: buildtools/kernels_hub.py writes another file in this place.
"""

from __future__ import annotations

NAMESPACE = "disalign_ops"
LINKED = False  # whether importing this module has loaded the compiled operators
