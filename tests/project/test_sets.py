"""Which cases of a test are in `make test`."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

from support import sets


class _Item:
    def __init__(self, values: tuple[Any, ...]) -> None:
        self.callspec = SimpleNamespace(params=dict(enumerate(values)))


def _cases(*parameters: list[Any]) -> list[Any]:
    return [_Item(values) for values in itertools.product(*parameters)]


def _pairs(cases: list[Any]) -> set[Any]:
    return {
        pair
        for case in cases
        for pair in itertools.combinations(sorted(case.callspec.params.items()), 2)
    }


def test_many_cases_keep_every_pair_of_values() -> None:
    cases = _cases([1, 2, 3], [4, 5, 6, 7], [8, 9, 10])
    kept = sets._with_every_pair(cases)
    assert _pairs(list(kept)) == _pairs(cases)
    assert 12 <= len(kept) < 20
    assert kept == sets._with_every_pair(cases)


def test_cases_of_one_parameter_are_all_kept() -> None:
    cases = _cases([*range(50)])
    assert sets._with_every_pair(cases) == set(cases)
