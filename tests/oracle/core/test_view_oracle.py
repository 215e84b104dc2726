"""Placement of negative crops against walking through every position."""

import itertools
import random
from fractions import Fraction

import pytest

from vzero_core.config import NegativeCropConfig
from vzero_core.errors import NoDisjointCropError
from vzero_core.views import Crop, DisjointPlaces, PixelBox, Size, negative_crop


def disjoint(left: PixelBox, right: PixelBox) -> bool:
    return left.x2 <= right.x1 or right.x2 <= left.x1 or left.y2 <= right.y1 or right.y2 <= left.y1


def enumerate_places(frame: Size, size: Size, forbidden: PixelBox) -> list[PixelBox]:
    boxes = (
        PixelBox(x, y, x + size.width, y + size.height)
        for y in range(frame.height - size.height + 1)
        for x in range(frame.width - size.width + 1)
    )
    return [box for box in boxes if disjoint(box, forbidden)]


def all_boxes(frame: Size) -> list[PixelBox]:
    return [
        PixelBox(x1, y1, x2, y2)
        for x1, x2 in itertools.combinations(range(frame.width + 1), 2)
        for y1, y2 in itertools.combinations(range(frame.height + 1), 2)
    ]


@pytest.mark.parametrize("frame", [Size(1, 1), Size(4, 3), Size(5, 5), Size(1, 6), Size(6, 2)])
def test_every_number_is_one_place_and_every_place_has_a_number(frame: Size) -> None:
    """Every forbidden box and every size (larger than the frame too) in small frames."""
    for forbidden in all_boxes(frame):
        for width, height in itertools.product(range(1, frame.width + 2), range(1, frame.height + 2)):
            size = Size(width, height)
            places = DisjointPlaces(frame, size, forbidden)
            expected = enumerate_places(frame, size, forbidden)
            assert places.count == len(expected)
            assert [places.at(number) for number in range(places.count)] == expected


@pytest.mark.parametrize("seed", range(20))
def test_larger_frames(seed: int) -> None:
    source = random.Random(seed)
    frame = Size(source.randint(10, 40), source.randint(10, 40))
    x1, x2 = sorted(source.sample(range(frame.width + 1), 2))
    y1, y2 = sorted(source.sample(range(frame.height + 1), 2))
    size = Size(source.randint(1, 15), source.randint(1, 15))
    places = DisjointPlaces(frame, size, PixelBox(x1, y1, x2, y2))
    expected = enumerate_places(frame, size, PixelBox(x1, y1, x2, y2))
    assert [places.at(number) for number in range(places.count)] == expected


def reduced(positive: Crop, frame: Size) -> PixelBox:
    """Pixels of the frame that the positive's box touches, found one by one."""
    width, height = positive.frame_size
    columns = [
        i
        for i in range(frame.width)
        if i * width < positive.box.x2 * frame.width and (i + 1) * width > positive.box.x1 * frame.width
    ]
    rows = [
        i
        for i in range(frame.height)
        if i * height < positive.box.y2 * frame.height and (i + 1) * height > positive.box.y1 * frame.height
    ]
    return PixelBox(columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


def test_all_places_are_drawn_about_equally_often() -> None:
    positive = Crop(Size(16, 12), PixelBox(5, 3, 8, 6), Size(3, 3))
    config = NegativeCropConfig(downsample=2)
    frame = Size(8, 6)
    expected = enumerate_places(frame, Size(3, 3), reduced(positive, frame))
    draws = 200 * len(expected)
    counts = dict.fromkeys(expected, 0)
    for number in range(draws):
        counts[negative_crop(positive, config, seed=0, sample_id=str(number)).box] += 1
    # chi-square of n - 1 degrees of freedom: mean n - 1, variance 2 (n - 1)
    chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
    degrees = len(expected) - 1
    assert degrees > 3
    assert abs(chi_square - degrees) < 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("downsample", [1, 2, 3])
def test_every_case_of_a_small_image(downsample: int) -> None:
    """Possible: an enumerated place. Impossible: quarantined, or the largest that walking through all boxes finds."""
    image = Size(7, 5)
    frame = Size(max(1, 7 // downsample), max(1, 5 // downsample))
    for box in all_boxes(image):
        positive = Crop(image, box, Size(99, 77))
        forbidden = reduced(positive, frame)
        places = enumerate_places(frame, box.size, forbidden)
        free = [other for other in all_boxes(frame) if disjoint(other, forbidden)]
        largest = NegativeCropConfig(downsample=downsample, when_impossible="largest")
        quarantine = NegativeCropConfig(downsample=downsample, when_impossible="quarantine")
        if places:
            drawn = negative_crop(positive, largest, seed=3, sample_id="x")
            assert drawn.box in places
            assert drawn == negative_crop(positive, quarantine, seed=3, sample_id="x")
            continue
        with pytest.raises(NoDisjointCropError):
            negative_crop(positive, quarantine, seed=3, sample_id="x")
        if not free:
            with pytest.raises(NoDisjointCropError):
                negative_crop(positive, largest, seed=3, sample_id="x")
            continue
        drawn = negative_crop(positive, largest, seed=3, sample_id="x")
        assert drawn.size == positive.size
        assert drawn.box in free
        # The largest factor at which the box fits into anything free, then whole pixels.
        width, height = box.size
        factor = max(min(Fraction(other.size.width, width), Fraction(other.size.height, height)) for other in free)
        assert drawn.box.size == (max(1, int(factor * width)), max(1, int(factor * height)))
