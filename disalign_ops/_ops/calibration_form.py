"""The calibration's published forms and the background column, as the kernels' one form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class CalibrationForm(NamedTuple):
    """How scale and bias of the calibrated classes become a and b of all C classes, in
    u = (1 + c a) z + c b.

    scale_offset: taken off the scale, 1 in the interpolated form. pad_first, pad_last: the number
    of classes ahead of the calibrated ones and behind them; they have a = b = 0.
    """

    scale_offset: int
    pad_first: int
    pad_last: int

    @staticmethod
    def of(form: str, background: str | None) -> CalibrationForm:
        found = CalibrationForm(
            int(form == "interpolated"), int(background == "first"), int(background == "last")
        )
        return UNCHANGED if found == UNCHANGED else found

    def vectors(
        self, scale: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        if scale is None or bias is None:
            return None, None
        if self.scale_offset:
            scale = scale - self.scale_offset
        if self.pad_first or self.pad_last:
            # Concatenated, not padded: that is one operation, and padding is four.
            column = bias.new_zeros(1)
            if self.pad_first:
                return torch.cat((column, scale)), torch.cat((column, bias))
            return torch.cat((scale, column)), torch.cat((bias, column))
        return scale, bias

    def gradient(self, gradient: Tensor) -> Tensor:
        """Of the scale or the bias, from that of a or b; no view, which a caller of autograd.grad
        could not change in place.
        """
        if self.pad_first or self.pad_last:
            return gradient[self.pad_first : gradient.shape[0] - self.pad_last].clone()
        return gradient


UNCHANGED = CalibrationForm(0, 0, 0)  # scale and bias are a and b
