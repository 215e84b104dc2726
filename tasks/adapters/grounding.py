"""Boxes in a model's words: what it replies when it is asked for a place, and what its numbers mean.

Families count differently. Qwen3-VL and Qwen3.5 (and Qwen2-VL) give thousandths of the image's sides; Qwen2.5-VL gives
pixels of the image as its processor resized it. A reply does not say which, so the convention is a setting.
"""

import re
from typing import Any

from PIL import Image

from vzero_core.errors import InputError
from vzero_core.views import Box, Size, clip_box, scale_box

PER_MILLE = Size(1000, 1000)
"""The frame of replies that count in thousandths of the image's sides."""
OVERSHOOT = 0.05
"""Share of a side by which a coordinate may miss the frame; further out, the reply counts in other units."""
_QUOTED = 120

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_FOUR = rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]"
# The first of these that is found counts: numbers named as a box outweigh numbers that only look like one.
_FORMS = (
    re.compile(rf"""["']bbox_2d["']\s*:\s*{_FOUR}"""),
    re.compile(rf"\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)"),
    re.compile(_FOUR),
)


def parse_box(reply: str) -> Box:
    """Give the box of a reply, in the reply's own units.

    Understood are `"bbox_2d": [x1, y1, x2, y2]` (in JSON or not, fenced or not, cut off after it or not),
    `(x1,y1),(x2,y2)` (between box tokens or not) and a bare list of four numbers. Of several boxes the smallest one
    that holds them all is given: a question about two things needs both. Swapped corners are put in order.

    Raises:
        InputError: there is no box, or it has no area.
    """
    for form in _FORMS:
        found = [[float(number) for number in match.groups()] for match in form.finditer(reply)]
        if found:
            break
    else:
        raise InputError(f"reply must hold a box of four numbers, got {reply[:_QUOTED]!r}")
    xs = [value for numbers in found for value in numbers[0::2]]
    ys = [value for numbers in found for value in numbers[1::2]]
    box = Box(min(xs), min(ys), max(xs), max(ys))
    if not (box.x1 < box.x2 and box.y1 < box.y2):
        raise InputError(f"reply must hold a box with an area, got {tuple(box)} in {reply[:_QUOTED]!r}")
    return box


def to_pixels(box: Box, frame: Size, image: Size) -> Box:
    """Carry a reply's box over to the full image.

    Args:
        box: in the reply's units.
        frame: what the reply's units count: `PER_MILLE`, or the resized image (`resized_size`).
        image: the full image, in pixels.

    Returns:
        xyxy, pixels of the full image, clipped to it.

    Raises:
        InputError: the box reaches further out of the frame than a slip does.
    """
    slack_x, slack_y = OVERSHOOT * frame.width, OVERSHOOT * frame.height
    if box.x1 < -slack_x or box.y1 < -slack_y or box.x2 > frame.width + slack_x or box.y2 > frame.height + slack_y:
        raise InputError(
            f"reply must hold a box inside {frame.width}x{frame.height}, got {tuple(box)}; if many replies are so, set "
            "regions.convention to the model's own"
        )
    clipped, _ = clip_box(scale_box(box, frame, image), image.width, image.height)
    return clipped


def resized_size(image_processor: Any, image: Image.Image) -> Size:
    """Give the size to which a processor of the Qwen-VL kind resizes an image: its patches times their side.

    Args:
        image_processor: gives `image_grid_thw` (time, height, width; in patches) and has a `patch_size`.
        image: the full image.

    Raises:
        InputError: the processor is of another kind.
    """
    pixels = image_processor(images=[image], return_tensors="pt")
    if "image_grid_thw" not in pixels:
        raise InputError(
            f"regions.convention resized_pixels needs an image processor of the Qwen-VL kind, got "
            f"{type(image_processor).__name__}; use per_mille or the grid"
        )
    _, rows, columns = pixels["image_grid_thw"][0].tolist()
    return Size(columns * image_processor.patch_size, rows * image_processor.patch_size)
