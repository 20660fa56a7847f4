"""That every planted fault can still be planted; what catches it: support/planted_faults.py."""

from __future__ import annotations

from typing import Any

import pytest

from support.planted_faults import FAULTS, ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0]}: {fault[1]}")
def test_its_place_is_there(fault: tuple[Any, ...]) -> None:
    _, _, file, text, other = fault
    assert text in (ROOT / file).read_text()
    assert text != other
