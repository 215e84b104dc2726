"""Where the positive and the negative crop of a sample are cut. Geometry only: no pixel is touched here.

Boxes are `xyxy`, half-open, in absolute pixels of the EXIF-oriented full image (or of the frame named with them).
"""

import math
from dataclasses import dataclass
from hashlib import sha256
from random import Random
from typing import NamedTuple

from vzero_core.config import NegativeCropConfig, PositiveCropConfig
from vzero_core.errors import InputError, NoDisjointCropError


class Box(NamedTuple):
    """A region, as annotated: fractions of pixels are allowed."""

    x1: float
    y1: float
    x2: float
    y2: float


class PixelBox(NamedTuple):
    """A box of whole pixels."""

    x1: int
    y1: int
    x2: int
    y2: int

    @property
    def size(self) -> "Size":
        """Width and height."""
        return Size(self.x2 - self.x1, self.y2 - self.y1)


class Size(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int


@dataclass(frozen=True)
class Crop:
    """What to do to an image: resize it to `frame_size`, cut out `box`, resize the piece to `size`.

    Attributes:
        frame_size: size of the frame that is cut; the image's own where nothing is downsampled.
        box: what is cut, in that frame.
        size: size of the picture the model is given; equal for both crops of a sample, so that both cost the same
            number of visual tokens.
    """

    frame_size: Size
    box: PixelBox
    size: Size


@dataclass(frozen=True)
class DisjointPlaces:
    """All places of a box of one size inside a frame that do not meet the forbidden box, counted and numbered.

    They are all places less those that meet it, which form a rectangle of positions; so neither counting nor
    numbering walks through them. Boxes that only touch do not meet. Numbered by rows from the top left.

    Attributes:
        frame: size of the frame.
        size: size of the box to be placed.
        forbidden: the box not to be met, inside the frame.
    """

    frame: Size
    size: Size
    forbidden: PixelBox

    @property
    def count(self) -> int:
        """Number of places; 0 if there are none."""
        return self._columns * self._rows - len(self._bad_columns) * len(self._bad_rows)

    def at(self, number: int) -> PixelBox:
        """Give the place of this number, 0 <= number < count."""
        assert 0 <= number < self.count
        above = self._columns * self._bad_rows.start if self._bad_rows else self._columns * self._rows
        free_columns = self._columns - len(self._bad_columns)
        beside = free_columns * len(self._bad_rows)
        if number < above:
            row, column = divmod(number, self._columns)
        elif number < above + beside:
            row, column = divmod(number - above, free_columns)
            row += self._bad_rows.start
            if column >= self._bad_columns.start:
                column += len(self._bad_columns)
        else:
            row, column = divmod(number - above - beside, self._columns)
            row += self._bad_rows.stop
        return PixelBox(column, row, column + self.size.width, row + self.size.height)

    @property
    def _columns(self) -> int:
        return max(0, self.frame.width - self.size.width + 1)

    @property
    def _rows(self) -> int:
        return max(0, self.frame.height - self.size.height + 1)

    @property
    def _bad_columns(self) -> range:
        return range(
            min(self._columns, max(0, self.forbidden.x1 - self.size.width + 1)), min(self._columns, self.forbidden.x2)
        )

    @property
    def _bad_rows(self) -> range:
        return range(
            min(self._rows, max(0, self.forbidden.y1 - self.size.height + 1)), min(self._rows, self.forbidden.y2)
        )


def clip_box(box: Box, width: int, height: int) -> tuple[Box, bool]:
    """Clip a region to its image.

    Args:
        box: the region.
        width: the image's, in pixels.
        height: the image's, in pixels.

    Returns:
        The clipped box, and whether clipping changed it (a warning the caller records).

    Raises:
        InputError: the box is not finite, has no area, or lies outside the image; or the image has no pixel.
    """
    _require_image(width, height)
    if not all(math.isfinite(value) for value in box):
        raise InputError(f"box must be finite, got {tuple(box)}; correct or drop the region")
    if not (box.x1 < box.x2 and box.y1 < box.y2):
        raise InputError(
            f"box must be xyxy with x1 < x2 and y1 < y2, got {tuple(box)}; convert it (is it xywh?) or drop the region"
        )
    clipped = Box(max(box.x1, 0.0), max(box.y1, 0.0), min(box.x2, float(width)), min(box.y2, float(height)))
    if not (clipped.x1 < clipped.x2 and clipped.y1 < clipped.y2):
        raise InputError(
            f"box must meet the {width}x{height} image, got {tuple(box)}; "
            "check its coordinate system (pixels of the oriented image, not relative) or drop the region"
        )
    return clipped, clipped != box


def scale_box(box: Box, from_size: Size, to_size: Size) -> Box:
    """Carry a box over to another rendering of the same field of view (a sample's detail image).

    Args:
        box: in the frame of `from_size`.
        from_size: the rendering the box was drawn in, in pixels.
        to_size: the other rendering, in pixels.

    Raises:
        InputError: a rendering has no pixel.
    """
    _require_image(*from_size)
    _require_image(*to_size)
    # Multiply first: whole pixels then stay whole wherever they can, and outward rounding adds no pixel.
    return Box(
        box.x1 * to_size.width / from_size.width,
        box.y1 * to_size.height / from_size.height,
        box.x2 * to_size.width / from_size.width,
        box.y2 * to_size.height / from_size.height,
    )


def positive_crop(box: Box, width: int, height: int, config: PositiveCropConfig) -> Crop:
    """Give the crop of the question-relevant region.

    In this order: clip to the image; add the margin and clip again; round outward to whole pixels; grow a side
    shorter than `min_side_px` around its centre, shifted to stay inside the image (the whole side, where the image
    is shorter); enlarge the output to at least `min_pixels`, aspect ratio kept up to rounding up.

    Args:
        box: the region, in the image that is cut (see `scale_box` for a detail image).
        width: that image's, in pixels.
        height: that image's, in pixels.
        config: margin and minima.

    Returns:
        A crop in the image's own frame, which contains the clipped region.

    Raises:
        InputError: as `clip_box`.
    """
    region, _ = clip_box(box, width, height)
    margin_x, margin_y = config.margin * (region.x2 - region.x1), config.margin * (region.y2 - region.y1)
    widened = Box(region.x1 - margin_x, region.y1 - margin_y, region.x2 + margin_x, region.y2 + margin_y)
    context, _ = clip_box(widened, width, height)
    x1, x2 = _grown(math.floor(context.x1), math.ceil(context.x2), config.min_side_px, width)
    y1, y2 = _grown(math.floor(context.y1), math.ceil(context.y2), config.min_side_px, height)
    pixels = PixelBox(x1, y1, x2, y2)
    return Crop(frame_size=Size(width, height), box=pixels, size=_enlarged(pixels.size, config.min_pixels))


def negative_crop(positive: Crop, config: NegativeCropConfig, *, seed: int, sample_id: str) -> Crop:
    """Give a crop of equal size from outside the positive one.

    The frame is the positive's, reduced by `downsample`; the forbidden box is the positive's box in it, rounded
    outward. The place is uniform among all whole-pixel places where a box of the positive's pixel size does not
    meet the forbidden box, and depends on (seed, sample id) alone.

    Where there is no such place, `when_impossible` decides:
        largest: the box is shrunk, aspect ratio kept, by the largest factor at which it fits beside the forbidden
            one; its sides are then rounded down to whole pixels, at least 1. Its place is uniform among all
            disjoint places of that size, and its output is still resized to the positive's size.
        quarantine: NoDisjointCropError.

    Args:
        positive: the positive crop, in the image's own frame.
        config: reduction and policy.
        seed: the run's seed.
        sample_id: the sample's id.

    Returns:
        A crop in the reduced frame, disjoint from the positive's, of the positive's output size.

    Raises:
        NoDisjointCropError: no disjoint place of equal size, under `quarantine`; or, under either policy, the
            positive crop leaves not one pixel free.
    """
    full = positive.frame_size
    frame = Size(max(1, full.width // config.downsample), max(1, full.height // config.downsample))
    box = positive.box
    forbidden = PixelBox(
        box.x1 * frame.width // full.width,
        box.y1 * frame.height // full.height,
        -(-box.x2 * frame.width // full.width),
        -(-box.y2 * frame.height // full.height),
    )
    places = DisjointPlaces(frame, box.size, forbidden)
    if places.count == 0:
        if config.when_impossible == "quarantine":
            raise NoDisjointCropError(_no_place(positive, frame, forbidden, "set when_impossible to largest, or "))
        largest = _largest_disjoint(frame, box.size, forbidden)
        if largest is None:
            raise NoDisjointCropError(_no_place(positive, frame, forbidden, ""))
        places = DisjointPlaces(frame, largest, forbidden)
    digest = sha256(f"negative_crop/{seed}/{sample_id}".encode()).digest()
    number = Random(int.from_bytes(digest, "big")).randrange(places.count)
    return Crop(frame_size=frame, box=places.at(number), size=positive.size)


def _require_image(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise InputError(f"image must be at least 1x1 pixels, got {width}x{height}; drop the sample")


def _grown(low: int, high: int, min_side: int, limit: int) -> tuple[int, int]:
    side = min(max(high - low, min_side), limit)
    start = low - (side - (high - low)) // 2
    start = max(0, min(start, limit - side))
    return start, start + side


def _enlarged(size: Size, min_pixels: int) -> Size:
    width, height = size
    if width * height >= min_pixels:
        return size
    # Whole-number arithmetic: a float root may land on either side of a whole number, by platform.
    return Size(_ceil_sqrt(min_pixels * width, height), _ceil_sqrt(min_pixels * height, width))


def _ceil_sqrt(numerator: int, denominator: int) -> int:
    """Give ceil(sqrt(numerator / denominator)) of two positive whole numbers."""
    return math.isqrt(-(-numerator // denominator) - 1) + 1


def _largest_disjoint(frame: Size, shape: Size, forbidden: PixelBox) -> Size | None:
    # A box that does not meet the forbidden one lies wholly left of it, right of it, above it or below it.
    strips = (
        Size(forbidden.x1, frame.height),
        Size(frame.width - forbidden.x2, frame.height),
        Size(frame.width, forbidden.y1),
        Size(frame.width, frame.height - forbidden.y2),
    )
    fits = [_inscribed(strip, shape) for strip in strips if strip.width and strip.height]
    return max(fits, key=lambda size: size.width * size.height, default=None)


def _inscribed(strip: Size, shape: Size) -> Size:
    if strip.width * shape.height <= strip.height * shape.width:
        return Size(strip.width, max(1, strip.width * shape.height // shape.width))
    return Size(max(1, strip.height * shape.width // shape.height), strip.height)


def _no_place(positive: Crop, frame: Size, forbidden: PixelBox, remedy: str) -> str:
    return (
        f"a negative crop must not meet the positive one, got no such place for {positive.box.size.width}x"
        f"{positive.box.size.height} px beside {tuple(forbidden)} in a frame of {frame.width}x{frame.height}; "
        f"{remedy}give a smaller region"
    )
