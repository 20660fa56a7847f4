"""Memory for the gradient of an operator's logits."""

from __future__ import annotations

from torch import Tensor

_VECTOR_BYTES = 16


def new_gradient(logits: Tensor) -> Tensor:
    """An uninitialised gradient of rows (N, C), class planes or images; csrc/ops/layouts.h has the
    same rule. It is contiguous, but for rows.

    Those begin at the logits' addresses modulo 16 bytes, so that a kernel stores the vectors that
    it loads: a slice of a padded head, `padded[:, :1203]`, has a gradient of the padded rows'
    stride. Such a stride costs at most an eighth more memory, or of few classes that of 8.
    """
    if logits.dim() != 2:
        return logits.new_empty(logits.shape)
    n, classes = logits.shape
    in_vector = _VECTOR_BYTES // logits.element_size()
    padding = logits.stride(0) - classes
    alike = padding % in_vector == 0  # without the padding, too
    little = not alike and padding > 0 and 8 * padding <= max(classes, 64)
    stride = logits.stride(0) if little else classes
    offset = logits.storage_offset() % in_vector if alike or little else 0
    if offset:
        memory = logits.new_empty((offset + n * stride,))
        return memory.as_strided((n, classes), (stride, 1), offset)
    if little:
        return logits.new_empty_strided((n, classes), (stride, 1))
    return logits.new_empty(logits.shape)
