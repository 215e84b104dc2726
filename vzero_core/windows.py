"""Candidate windows for a region nobody drew. Geometry only, in fractions of the image's sides."""

import math

from vzero_core.errors import InputError
from vzero_core.views import Box

WHOLE = Box(0.0, 0.0, 1.0, 1.0)
"""The whole image."""
_ROUNDING = 1e-9


def windows(frame: Box, scale: float, overlap: float) -> list[Box]:
    """Give windows of one size that cover a frame, by rows from the top left.

    Along each side they stand evenly from edge to edge, as few as the overlap allows.

    Args:
        frame: what is covered, in fractions of the image's sides.
        scale: a window's sides in fractions of the image's; a frame's shorter side is taken whole.
        overlap: least share of a window's side that it has in common with its neighbour, 0 <= overlap < 1.

    Returns:
        At least one window, all inside the frame.

    Raises:
        InputError: scale or overlap is out of range.
    """
    if not 0 < scale <= 1:
        raise InputError(f"scale must be above 0 and at most 1, got {scale}; use a fraction of the image's sides")
    if not 0 <= overlap < 1:
        raise InputError(f"overlap must be at least 0 and below 1, got {overlap}; use a fraction of a window's side")
    columns = _spans(frame.x1, frame.x2, scale, overlap)
    rows = _spans(frame.y1, frame.y2, scale, overlap)
    return [Box(x1, y1, x2, y2) for y1, y2 in rows for x1, x2 in columns]


def _spans(low: float, high: float, scale: float, overlap: float) -> list[tuple[float, float]]:
    room = high - low - scale
    if room <= _ROUNDING:
        return [(low, high)]
    steps = math.ceil(room / (scale * (1 - overlap)) - _ROUNDING)
    starts = [low + room * step / steps for step in range(steps + 1)]
    return [(start, min(start + scale, high)) for start in starts]
