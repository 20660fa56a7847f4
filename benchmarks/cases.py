"""The registry of cases."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch

from disalign_ops._bench.case import Case, Mode

_MODE_REASONS = {
    Mode.FULL: "gradients of logits, confidence, scale and bias",
    Mode.STAGE2: "frozen logits: gradients of confidence, scale and bias",
    Mode.PLAIN: "the drop-in for F.cross_entropy, gradient of the logits",
    Mode.IN_PLACE: "all gradients, that of the logits written over them; peers allocate theirs",
    Mode.PLAIN_IN_PLACE: "the gradient of the logits written over them; peers allocate theirs",
}
_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}

# Rows shrink as classes grow: the logits stay near 64 MB, beyond every cache and far below the
# memory of a small machine, of which the eager composition takes eight times as much.
_SHAPES = (
    ("imagenet", 256, 1000, "ImageNet-LT, its batch: 1 MB, inside the cache"),
    ("lvis", 4096, 1204, "LVIS with background, 8 images of 512 boxes"),
    ("inat", 2048, 8142, "iNaturalist 2018"),
    ("100k", 256, 100_000, "a row larger than the first-level cache"),
    (
        "1m",
        16,
        1_000_000,
        "a row larger than the second-level cache, fewer rows than work to share",
    ),
)
_ROW_MODES = (Mode.FULL, Mode.STAGE2, Mode.PLAIN, Mode.IN_PLACE)
_UPSTREAM = (
    ("third", 171 / 512, "1/3 in bfloat16: the mean of three losses"),
    ("65536", 65536.0, "GradScaler's first factor"),
)
_ADE = "ADE20K, 150 classes, ignored frame"
_DENSE = (
    ("dense-plain", 2, (256, 256), (), Mode.PLAIN, "logits at the target's size", True),
    ("dense-in-place", 2, (256, 256), (), Mode.PLAIN_IN_PLACE, "the same over the logits", True),
    ("dense-stage2", 2, (256, 256), (), Mode.STAGE2, "frozen logits at the target's size", False),
    ("upsample-full", 2, (32, 32), (256, 256), Mode.FULL, "logits at 1/8 of the target", True),
    ("upsample-stage2", 2, (32, 32), (256, 256), Mode.STAGE2, "the same, frozen", False),
    ("upsample-large", 4, (128, 128), (512, 512), Mode.FULL, "mmsegmentation's batch", False),
)
_HEADS = (
    ("inat-head-plain", 4096, 8142, Mode.PLAIN, "iNaturalist 2018: all gradients of a head", True),
    ("inat-head-full", 4096, 8142, Mode.FULL, "the same, calibrated", False),
    ("inat-head-stage2", 4096, 8142, Mode.STAGE2, "frozen head and features", True),
    ("60k-head-plain", 1024, 60_000, Mode.PLAIN, "few whole rows in a chunk", False),
    ("100k-head-plain", 1024, 100_000, Mode.PLAIN, "chunks of classes, logits made twice", False),
)
_SOFT: tuple[tuple[str, int, int, tuple[int, ...]], ...] = (
    ("lvis-soft", 4096, 1204, ()),
    ("ade-soft", 2, 150, (256, 256)),
)
_QUICK = ("lvis-full", "lvis-stage2", "lvis-plain", "inat-in-place", "inat-stage2")


def _registry() -> dict[str, Case]:
    cases = []
    for data, rows, classes, why in _SHAPES:
        for dtype, dtype_name in _DTYPE_NAMES.items():
            for mode in _ROW_MODES:
                name = f"{data}-{mode.value}" + ("" if dtype == torch.float32 else f"-{dtype_name}")
                reason = f"{why}; {_MODE_REASONS[mode]}"
                cases.append(Case(name, rows, classes, dtype, mode, reason, name in _QUICK))
    for dtype, dtype_name in _DTYPE_NAMES.items():
        for times, upstream, why in _UPSTREAM:
            name = f"lvis-plain-{dtype_name}-upstream-{times}"
            case = Case(name, 4096, 1204, dtype, Mode.PLAIN, why, upstream=upstream)
            cases.append(case)
    for mode in (Mode.PLAIN, Mode.FULL, Mode.STAGE2):
        cases.append(
            Case(
                f"small-{mode.value}",
                64,
                1000,
                torch.float32,
                mode,
                f"a batch so small that the overhead per call is most of it; {_MODE_REASONS[mode]}",
                mode is Mode.PLAIN,
            )
        )
    for name, images, size, target_size, mode, why, quick in _DENSE:
        reason = f"{_ADE}: {why}; {_MODE_REASONS[mode]}"
        case = Case(
            f"ade-{name}", images, 150, torch.float32, mode, reason, quick, size, target_size
        )
        cases.append(case)
    for dtype, dtype_name in _DTYPE_NAMES.items():
        for name, rows, classes, planes in _SOFT:
            case = Case(
                f"{name}-{dtype_name}",
                rows,
                classes,
                dtype,
                Mode.PLAIN,
                "class probabilities of mixup: as many bytes again to read",
                size=planes,
                soft=True,
            )
            cases.append(case)
    for name, rows, classes, mode, why, quick in _HEADS:
        reason = f"features at hand, the head with its loss: {why}"
        cases.append(Case(name, rows, classes, torch.float32, mode, reason, quick, features=512))
    return {case.name: case for case in cases}


CASES = _registry()


def select(patterns: list[str], full: bool) -> list[Case]:
    """The cases that a pattern names (shell wildcards), or else the quick set or all.

    Raises ValueError for a pattern that matches nothing.
    """
    if not patterns:
        return [case for case in CASES.values() if full or case.quick]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in CASES):
            raise ValueError(f"a case must be one of {', '.join(CASES)}, got {pattern!r}")
    return [c for c in CASES.values() if any(fnmatchcase(c.name, p) for p in patterns)]
