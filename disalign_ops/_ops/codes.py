"""The numbers by which operators are told what is wanted; csrc/common/codes.h has the same."""

from __future__ import annotations

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}

# What 'mean' divides by; "given": the caller's number.
NORMALIZERS = {"weights": 0, "valid": 1, "count": 2, "given": 3}

# Bits of what an operator is to make: gradients of these, in this order; details; the most probable
# class; the entropy; the statistics and the denominator, which backward reads.
LOGITS, SCALE, BIAS, CONFIDENCE, DETAILS, PREDICTION, ENTROPY = 1, 2, 4, 8, 16, 32, 64
STATISTICS = 128
GRADIENTS = (LOGITS, SCALE, BIAS, CONFIDENCE)
CALIBRATION = SCALE | BIAS | CONFIDENCE

SHARD_VALUES = 5  # of a row's sums and factors: kShardValues of csrc/common/loss_args.h
