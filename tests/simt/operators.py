"""A pytest plugin: the CUDA operators, executed by simt, in place of the native ones.

    python -m pytest -p simt.operators tests/_ops/test_row.py

The .cu files of csrc/cuda, launchers included, are compiled as C++ and registered as
`disalign_simt::row_forward` and so on, for tensors on the CPU. SIMT_SEED shuffles the threads.
"""

from __future__ import annotations

import ctypes
import functools
import os

import pytest
import torch

from support import operator_swap

from . import build


def pytest_configure(config: pytest.Config) -> None:
    from disalign_ops._ops import autograd, schemas

    library = build.build("operators")
    definitions = torch.library.Library("disalign_simt", "DEF")
    config.stash[pytest.StashKey[torch.library.Library]()] = definitions  # they end with the object
    for layout in schemas.LAYOUTS:
        for schema in schemas.schemas(layout):
            definitions.define(schema)
    for layout in (schemas.ROW, schemas.DENSE):
        for schema in schemas.calibrate_schemas(layout):
            definitions.define(schema)
        torch.library.register_autograd(
            f"disalign_simt::{layout.name}_calibrate",
            functools.partial(autograd.calibrate_backward, layout=layout),
            setup_context=autograd.save_calibrate,
            lib=definitions,
        )
    for schema in (*schemas.MADE_SCHEMAS, *schemas.SHARD_SCHEMAS, schemas.PREDICT_SCHEMA):
        definitions.define(schema)
    torch.ops.load_library(str(library))
    operator_swap.swap(lambda name: getattr(torch.ops.disalign_simt, name).default)
    seed = os.environ.get("SIMT_SEED")
    if seed:
        ctypes.CDLL(str(library)).simt_shuffle(ctypes.c_uint64(int(seed)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    operator_swap.leave_out(config, items)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    operator_swap.write_calls(terminalreporter)
