"""Images as they stand inside a page."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from tasks.adapters.dataset import Dataset
from tasks.adapters.files import StoreUnavailableError
from tasks.artifacts import EvaluationSample, Sample
from vzero_core.errors import VZeroError

MAX_SIDE = 560
"""Pixels; larger pictures are shown smaller, since the page carries them."""
_PIXELATED_BELOW = 240
"""Pixels; a picture whose sides are shorter is enlarged as it is, so that a reader sees what the model sees."""
_MAX_PNG_BYTES = 60_000
"""Larger than this is a photograph, which JPEG holds in a tenth of the room."""


@dataclass(frozen=True)
class Picture:
    """An image inside the page."""

    uri: str
    width: int
    height: int

    @property
    def pixelated(self) -> bool:
        """Whether its pixels are to be seen one by one."""
        return max(self.width, self.height) < _PIXELATED_BELOW


@dataclass(frozen=True)
class Rectangle:
    """A box in percent of the picture it is drawn on."""

    x: float
    y: float
    width: float
    height: float


def picture(image: Image.Image, max_side: int = MAX_SIDE) -> Picture:
    """Encode an image for the page, no larger than `max_side` pixels."""
    if max(image.size) > max_side:
        image = image.copy()
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    content, kind = _encode(image, "PNG", optimize=True), "png"
    if len(content) > _MAX_PNG_BYTES:
        content, kind = _encode(image, "JPEG", quality=85), "jpeg"
    return Picture(f"data:image/{kind};base64,{base64.b64encode(content).decode()}", *image.size)


def full_picture(dataset: Dataset | None, sample: Sample | EvaluationSample) -> Picture | None:
    """Give a sample's full image; None where it cannot be read, or is no longer what was validated."""
    if dataset is None:
        return None
    try:
        return picture(dataset.image(sample))
    except StoreUnavailableError:
        # It may answer at the next try.
        raise
    except VZeroError:
        # Images lie outside the store, and a report may be built again long after the run; the page says so.
        return None


def rectangle(box: Sequence[float] | None, frame: Sequence[int]) -> Rectangle | None:
    """Give a box in percent of its frame: frames differ in size, but all show the same field of view."""
    if box is None:
        return None
    (x1, y1, x2, y2), (width, height) = box, frame
    percent = (100 * x1 / width, 100 * y1 / height, 100 * (x2 - x1) / width, 100 * (y2 - y1) / height)
    return Rectangle(*(round(value, 3) for value in percent))


def _encode(image: Image.Image, format_: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format_, **options)
    return buffer.getvalue()
