"""The codes of Python and of C++ are the same."""

from __future__ import annotations

import re

from disalign_ops._ops import codes
from support.places import ROOT

HEADER = (ROOT / "csrc" / "common" / "codes.h").read_text()


def enumerated(name: str) -> dict[str, int]:
    """The values of an enum of the header, without the prefix that its names share."""
    match = re.search(rf"enum {name} : int64_t \{{(.*?)\}};", HEADER, re.DOTALL)
    assert match is not None
    found = re.findall(r"k(?:Reduce|By|Want)(\w+) = (\d+)", match[1])
    assert len(found) == match[1].count("=")
    return {word.lower(): int(value) for word, value in found}


def test_reductions_and_normalizers() -> None:
    assert enumerated("ReductionCode") == codes.REDUCTIONS
    assert enumerated("NormalizerCode") == codes.NORMALIZERS


def test_what_is_wanted() -> None:
    names = ("logits", "scale", "bias", "confidence", "details", "prediction", "entropy")
    names += ("statistics",)
    assert enumerated("WantedCode") == {name: getattr(codes, name.upper()) for name in names}
    assert tuple(getattr(codes, name.upper()) for name in names[:4]) == codes.GRADIENTS
    assert sum(codes.GRADIENTS) == codes.LOGITS | codes.CALIBRATION


def test_values_of_a_shard() -> None:
    arguments = (ROOT / "csrc" / "common" / "loss_args.h").read_text()
    match = re.search(r"constexpr int kShardValues = (\d+);", arguments)
    assert match is not None
    assert int(match[1]) == codes.SHARD_VALUES
