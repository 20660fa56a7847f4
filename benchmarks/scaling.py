"""`python -m benchmarks.scaling`: what a step of a class-parallel DisAlign head costs, on paper.

Memory, traffic and time of one GPU, by the formulas below. tests/_sharded/test_scaling.py compares
the first two with what is allocated and carried at small size; the third divides by assumed rates.
docs/scaling.md has the table that this prints.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

FLOAT = 4
CHUNK_BYTES = 64 << 20
# Of one GPU. Assumed: float32 matmuls through TF32 at 40 % of the 495 TFLOP/s that NVIDIA's data
# sheet of the H100 SXM has; an all-reduce's bus at 300 GB/s between the 8 GPUs of a machine, at
# 40 GB/s of a 400 Gb/s network card beyond; 20 us to start a collective, and 5 us a doubling.
FLOPS = 0.4 * 495e12
BUS_WITHIN, BUS_BEYOND, MACHINE = 300e9, 40e9, 8
START_S, DOUBLING_S = 20e-6, 5e-6


@dataclass(frozen=True)
class Step:
    """A training step, forward and backward, of
    `disalign_linear_cross_entropy(features, local_weight, ..., shard=Shard())` in float32, with
    class weights, all gradients and SGD with momentum.

    rows: of the whole batch, the same on every GPU. sampled: share of the classes (sample_rate).
    """

    classes: int
    features: int
    rows: int
    gpus: int
    sampled: float = 1.0

    @property
    def local_classes(self) -> int:
        return -(-self.classes // self.gpus)

    @property
    def taken_classes(self) -> int:
        """Of a GPU's classes, those in the loss."""
        if self.sampled == 1:
            return self.local_classes
        return min(self.local_classes, max(round(self.sampled * self.local_classes), self.rows))

    @property
    def head_bytes(self) -> int:
        """Weight, scale and bias of a GPU's classes."""
        return self.local_classes * (self.features + 2) * FLOAT

    @property
    def loss_bytes(self) -> int:
        """Beyond head and features: their gradients, a chunk of logits, and some 40 numbers a row.
        Sampled, the weight and its gradient are copies, and the head's gradient is made when the
        logits are gone.
        """
        rows = self.rows * (self.features + 1 + 40) * FLOAT
        logits = min(self.rows * self.taken_classes * FLOAT, CHUNK_BYTES)
        if self.sampled == 1:
            return rows + self.head_bytes + logits
        copies = 2 * self.taken_classes * (self.features + 2) * FLOAT
        return rows + copies + max(self.head_bytes, logits)

    @property
    def memory_bytes(self) -> int:
        """Of a GPU, at the peak: head, momentum, features, and the loss's own."""
        return 2 * self.head_bytes + self.rows * self.features * FLOAT + self.loss_bytes

    @property
    def unfused_bytes(self) -> int:
        """Of the whole logits on one GPU and their gradient, which none of this makes."""
        return 2 * self.rows * self.classes * FLOAT

    @property
    def carried_bytes(self) -> tuple[int, ...]:
        """What a GPU gives to each all-reduce: forward's maxima, and sums (of exponentials, the
        target's logit, slope and weight; three numbers for all rows), backward's gradients of
        features and confidence.
        """
        return (
            self.rows * FLOAT,
            (4 * self.rows + 3) * FLOAT,
            self.rows * self.features * FLOAT,
            self.rows * FLOAT,
        )

    @property
    def sent_bytes(self) -> float:
        """Of a GPU by a ring: 2 (P - 1) / P of what is carried."""
        return 2 * (self.gpus - 1) / self.gpus * sum(self.carried_bytes)

    @property
    def matmul_s(self) -> float:
        """Logits in forward and again in backward, and the two gradients: 4 times 2 N C D."""
        return 4 * 2 * self.rows * self.taken_classes * self.features / FLOPS

    @property
    def exchange_s(self) -> float:
        bus = BUS_WITHIN if self.gpus <= MACHINE else BUS_BEYOND
        doublings = (self.gpus - 1).bit_length()
        start = len(self.carried_bytes) * (START_S + DOUBLING_S * doublings)
        return self.sent_bytes / bus + start

    @property
    def seconds(self) -> float:
        return self.matmul_s + self.exchange_s


FEATURES, ROWS_A_GPU = 512, 64


def table() -> list[str]:
    """In Markdown."""
    lines = [
        "| classes | GPUs | rows | sampled | memory a GPU | whole logits and gradient "
        "| sent a GPU | matmuls | exchange | step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for classes in (10**6, 10**7):
        for gpus in (8, 64, 512):
            for sampled in (1.0, 0.1):
                s = Step(classes, FEATURES, ROWS_A_GPU * gpus, gpus, sampled)
                share = "all" if sampled == 1 else f"{sampled:.0%}"
                lines.append(
                    f"| {classes:,} | {gpus} | {s.rows:,} | {share} "
                    f"| {s.memory_bytes / 1e9:.2f} GB | {s.unfused_bytes / 1e9:,.0f} GB "
                    f"| {s.sent_bytes / 1e6:.1f} MB | {s.matmul_s * 1e3:.2f} ms "
                    f"| {s.exchange_s * 1e3:.2f} ms | {s.seconds * 1e3:.1f} ms |"
                )
    return lines


def main() -> int:
    print("\n".join(table()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
