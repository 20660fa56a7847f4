"""`python -m benchmarks.model_planes`: the prediction of model.py for class planes."""

from __future__ import annotations

from benchmarks.gpus import GPUS
from benchmarks.model import (
    BYTES_OF_A_READ,
    SHARE_OF_BANDWIDTH,
    SHARE_OF_ISSUE,
    SHOWN,
    SIZES,
)  # fmt: skip

# Images, classes, height, width.
SHAPES = ((2, 150, 512, 512), (4, 19, 1024, 2048), (8, 21, 512, 512), (1, 1203, 100, 100))
STEPS = ("forward", "backward", "gradient", "stage2")
# As model.INSTRUCTIONS, in the machine code for sm_90: (classes, step) -> in fp32 and in bf16.
# `python -m machine_code.planes model` of tests/ prints this.
INSTRUCTIONS = {
    (150, "forward"): (49, 85),
    (150, "gradient"): (104, 194),
    (150, "stage2"): (188, 336),
    (150, "backward"): (76, 135),
    (19, "forward"): (85, 160),
    (19, "gradient"): (150, 291),
    (19, "stage2"): (259, 477),
    (19, "backward"): (101, 186),
    (21, "forward"): (80, 180),
    (21, "gradient"): (144, 278),
    (21, "stage2"): (248, 459),
    (21, "backward"): (97, 207),
    (1203, "forward"): (47, 83),
    (1203, "gradient"): (87, 168),
    (1203, "stage2"): (166, 308),
    (1203, "backward"): (73, 135),
}
# Logits read and written, and bytes of a position besides: its target, two statistics; of stage 2
# also its confidence and that one's gradient, of a forward that makes the gradient of the logits
# its target once more, for the denominator.
TRAFFIC = {"forward": (1, 16), "backward": (2, 16), "gradient": (2, 24), "stage2": (1, 24)}
AIM, OF_AIM = 0.75, "H100 SXM"


def share_of_copy(
    gpu: str, step: str, dtype: str, shape: tuple[int, int, int, int]
) -> tuple[float, str]:
    """Of a copy that moves the same logits, and what limits it: memory or issue."""
    images, classes, height, width = shape
    device, (passes, besides) = GPUS[gpu], TRAFFIC[step]
    positions = images * height * width
    logits = positions * classes * SIZES[dtype]
    bandwidth = SHARE_OF_BANDWIDTH * device.gigabytes_per_second * 1e9
    memory = (passes * logits + besides * positions) / bandwidth
    issued = INSTRUCTIONS[classes, step][list(SIZES).index(dtype)] * logits / BYTES_OF_A_READ
    issue = issued / (SHARE_OF_ISSUE * device.instructions_per_second)
    share = passes * logits / bandwidth / max(memory, issue)
    return share, "memory" if memory >= issue else "issue"


HEADINGS = ("N x C x H x W", "dtype", "step", *SHOWN)


def markdown() -> str:
    """The table of benchmarks/results/README.md."""
    lines = [list(HEADINGS), ["---"] * len(HEADINGS)]
    for shape in SHAPES:
        for dtype in SIZES:
            for step in STEPS:
                found = (share_of_copy(gpu, step, dtype, shape) for gpu in SHOWN)
                cells = (f"{share:.0%}, {limit}" for share, limit in found)
                lines.append([" x ".join(map(str, shape)), dtype, step, *cells])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    print(markdown())
