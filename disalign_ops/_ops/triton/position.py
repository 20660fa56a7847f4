"""The loss and the gradient's factors of positions, from sums over their classes.

csrc/cuda/kernels/position.cuh and common/loss_math.h in Triton; docs/math.md has the formulas. The
target's term is kept out of the sums `rest` and `rest_du_dc`: the loss of a position with p_t next
to 1 is log1p of what is left.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lowest(x):
    """The least finite number of x's dtype, as a tensor like x: u - maximum is never NaN."""
    if x.dtype == tl.float64:
        least = tl.full(x.shape, -1.7976931348623157e308, x.dtype)
    else:
        least = tl.full(x.shape, -3.4028234663852886e38, x.dtype)
    return least


@triton.jit
def exp(x):
    """float32: an exponential of 2, whose subnormal results may be 0: tl.exp takes three more
    instructions to keep them.
    """
    if x.dtype == tl.float64:
        power = tl.exp(x)
    else:
        power = tl.exp2(x * 1.4426950408889634)
    return power


@triton.jit
def log1p_of(x, y, log_y):
    """log(1 + x) of x >= 0, from y, which is 1 + x rounded, and log_y = log(y).

    The rounding error of y is added to first order. For y >= 2 it is less than the rounding error
    of the logarithm.
    """
    return log_y + tl.where(y < 2.0, x - (y - 1.0), 0.0)


@triton.jit
def one_less_exp(x):
    """1 - exp(-x) for x > 0, by the same correction."""
    y = exp(-x)
    same = y == 1.0
    tiny = y == 0.0
    scaled = (1.0 - y) * (x / -tl.log(tl.where(same | tiny, 0.5, y)))
    return tl.where(same, x, tl.where(tiny, 1.0, scaled))


@triton.jit
def sigmoid(x):
    # exp(-|x|) does not overflow, and c near 0 stays exact.
    e = exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def finite_or_zero(x):
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def power(x, y):
    """x^y for x >= 0; 0^0 is 1."""
    zero = x == 0.0
    at_zero = tl.where(y == 0.0, 1.0, tl.where(y > 0.0, 0.0, float("inf")))
    return tl.where(zero, at_zero, exp(y * tl.log(tl.where(zero, 1.0, x))))


@triton.jit
def focal_terms(nll, gamma):
    """(1 - p)^gamma nll, and its derivative by the target's logit divided by p - 1.

    At p = 1 both are 0, their limit.
    """
    sure = nll <= 0.0
    positive = tl.where(sure, 1.0, nll)
    p = exp(-positive)
    rest = one_less_exp(positive)
    p_nll = tl.where(p == 0.0, 0.0, p * positive)  # p log p -> 0, not 0 * inf
    value = power(rest, gamma) * positive
    focal_grad_factor = power(rest, gamma) + gamma * power(rest, gamma - 1.0) * p_nll
    return tl.where(sure, 0.0, value), tl.where(sure, 0.0, focal_grad_factor)


@triton.jit
def row_terms(nll, target_weight, weights, smoothing, classes, gamma):
    """softmax, target and smooth of dloss/du_j = softmax p_j - smooth w_j - target [j = t], and
    the loss's value before weights.

    weights: sum_j w_j.
    """
    value = nll
    focal_grad_factor = tl.full(nll.shape, 1.0, nll.dtype)  # not of nll, which may be infinite
    if gamma > 0:
        value, focal_grad_factor = focal_terms(nll, gamma)
    target = (1.0 - smoothing) * target_weight * focal_grad_factor
    share = smoothing / classes
    return target + share * weights, target, share, value


@triton.jit
def add_sums(m, rest, rest_du_dc, smooth, weights, m2, rest2, rest_du_dc2, smooth2, weights2):
    """Sums over two parts of the classes, relative to the greater maximum."""
    maximum = tl.maximum(m, m2)
    ratio, ratio2 = exp(m - maximum), exp(m2 - maximum)
    # Without classes so far, or without smoothing, weights is 0, and 0 * infinity no number.
    lost = tl.where(weights == 0.0, 0.0, weights * (m - maximum))
    lost2 = tl.where(weights2 == 0.0, 0.0, weights2 * (m2 - maximum))
    return (
        maximum,
        rest * ratio + rest2 * ratio2,
        rest_du_dc * ratio + rest_du_dc2 * ratio2,
        smooth + smooth2 + lost + lost2,
        weights + weights2,
    )


@triton.jit
def position_loss(maximum, rest, target_logit, smooth, target_weight, weights, smoothing, classes,
                  gamma):  # fmt: skip
    """The loss without its sample weight, sum_j exp(u_j - maximum), and of the gradient
    q_j = softmax exp(u_j - maximum) - smooth w_j, at_target for j = t.
    """
    at_target = exp(target_logit - maximum)
    total = rest + at_target
    log_sum = tl.log(total)
    # inf - inf is NaN, as in PyTorch, where the target's logit is infinite.
    nll = (maximum - target_logit) + tl.where(
        target_logit == maximum, log1p_of(rest, total, log_sum), log_sum
    )
    softmax, target, share, value = row_terms(
        nll, target_weight, weights, smoothing, classes, gamma
    )
    loss = (1.0 - smoothing) * target_weight * value
    if smoothing > 0:
        loss += share * (weights * log_sum - smooth)
    # softmax p_t - target = (softmax - target) p_t - target (1 - p_t), without cancellation
    q_target = ((softmax - target) * at_target - target * rest) / total - share * target_weight
    return loss, total, softmax / total, share, q_target
