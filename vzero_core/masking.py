"""Masked arithmetic in which padding cannot matter: it may hold anything, NaN too.

Padding is replaced before any arithmetic, not multiplied by zero after it: NaN * 0 is NaN, in the value and in the
gradient.
"""

import torch
from torch import Tensor

from vzero_core.errors import InputError


def zero_padding(values: Tensor, mask: Tensor) -> Tensor:
    """Give `values` where the mask is set and 0 elsewhere; the gradient elsewhere is exactly 0.

    Args:
        values: [..., *] any float type.
        mask: bool, of the leading shape of `values`; trailing axes are masked as a whole.

    Returns:
        A tensor like `values`.
    """
    trailing = values.dim() - mask.dim()
    return torch.where(mask.reshape(mask.shape + (1,) * trailing), values, torch.zeros_like(values))


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Give the sum over the last axis of the values under the mask.

    Args:
        values: [..., T] any float type.
        mask: [..., T] bool.

    Returns:
        [...]; 0 where the mask is empty.
    """
    return zero_padding(values, mask).sum(dim=-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Give the mean over the last axis of the values under the mask.

    Args:
        values: [..., T] any float type.
        mask: [..., T] bool.

    Returns:
        [...]; 0 where the mask is empty.
    """
    count = mask.sum(dim=-1).clamp(min=1)  # an empty row's sum is 0, so any positive count gives its 0
    return masked_sum(values, mask) / count


def at_least_float32(values: Tensor) -> Tensor:
    """Give `values` in float32 if they are of a narrower type, else unchanged (float64 stays float64)."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def require_mask(name: str, mask: Tensor) -> None:
    """Refuse a mask that is not [B, T] bool.

    Raises:
        InputError: wrong type or number of axes.
    """
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise InputError(
            f"{name} must be [B, T] bool, got shape {tuple(mask.shape)} of {mask.dtype}; convert it with .bool()"
        )


def require_shape(name: str, values: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape: broadcasting would hide the mistake.

    Raises:
        InputError: the shapes differ.
    """
    if tuple(values.shape) != tuple(shape):
        raise InputError(
            f"{name} must be of shape {tuple(shape)}, got {tuple(values.shape)}; pass tensors of one batch"
        )


def require_finite(name: str, values: Tensor, mask: Tensor) -> None:
    """Refuse NaN and infinities under the mask; outside it anything goes.

    Args:
        name: how the message calls `values`.
        values: [..., *] any float type.
        mask: bool, of the leading shape of `values`.

    Raises:
        InputError: a value under the mask is not finite; the message names the first such position.
    """
    bad = ~torch.isfinite(zero_padding(values.detach(), mask))
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        raise InputError(
            f"{name} must be finite under the mask, got {values[where].item()} at {where}; "
            "check the model that produced it, or drop the response"
        )
