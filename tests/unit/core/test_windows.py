"""The grid of candidate windows: it covers its frame, overlaps as asked, and has no window too many."""

import math
from itertools import pairwise

import pytest

from vzero_core.errors import InputError
from vzero_core.views import Box
from vzero_core.windows import WHOLE, windows

FRAMES = (WHOLE, Box(0.25, 0.5, 0.75, 1.0), Box(0.1, 0.0, 0.4, 0.7))
SCALES = (0.5, 0.3, 0.25, 0.1)
OVERLAPS = (0.0, 0.3, 0.5, 0.9)


def test_half_size_windows_that_overlap_by_half() -> None:
    # Starts at 0, 1/4 and 1/2 along either side, by rows.
    starts = (0.0, 0.25, 0.5)
    assert windows(WHOLE, 0.5, 0.5) == [Box(x, y, x + 0.5, y + 0.5) for y in starts for x in starts]


def test_windows_that_do_not_fit_evenly_are_spread_evenly() -> None:
    # Room for starts is 0.6 and a step at most 0.4: two steps of 0.3, though no overlap is asked for.
    found = windows(WHOLE, 0.4, 0.0)
    assert sorted({box.x1 for box in found}) == pytest.approx([0.0, 0.3, 0.6])
    assert len(found) == 9


def test_a_grid_inside_a_window_of_another_grid() -> None:
    found = windows(Box(0.5, 0.25, 1.0, 0.75), 0.25, 0.5)
    assert len(found) == 9
    assert found[0] == Box(0.5, 0.25, 0.75, 0.5)
    assert found[-1] == Box(0.75, 0.5, 1.0, 0.75)


def test_a_frame_no_larger_than_a_window_is_the_window() -> None:
    frame = Box(0.2, 0.1, 0.5, 0.8)
    assert {(box.x1, box.x2) for box in windows(frame, 0.3, 0.5)} == {(0.2, 0.5)}
    assert windows(WHOLE, 1.0, 0.5) == [WHOLE]
    assert len(windows(WHOLE, 0.99, 0.5)) == 4


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_each_side_is_covered_with_the_overlap_and_with_as_few_windows_as_that_takes(
    frame: Box, scale: float, overlap: float
) -> None:
    found = windows(frame, scale, overlap)
    for low, high, sides in (
        (frame.x1, frame.x2, sorted({(box.x1, box.x2) for box in found})),
        (frame.y1, frame.y2, sorted({(box.y1, box.y2) for box in found})),
    ):
        size = min(scale, high - low)
        assert sides[0][0] == low
        assert sides[-1][1] == pytest.approx(high)
        assert all(start >= 0 and end <= 1 and end - start == pytest.approx(size) for start, end in sides)
        shared = [first[1] - second[0] for first, second in pairwise(sides)]
        assert all(value >= overlap * size - 1e-9 for value in shared)
        if len(sides) > 2:
            # With one window fewer, steps would be longer than the overlap allows.
            assert (high - low - size) / (len(sides) - 2) > size * (1 - overlap) + 1e-9
        assert len(found) % len(sides) == 0
    assert len(found) == math.prod(len({box[side] for box in found}) for side in (0, 1))


@pytest.mark.parametrize("scale", [0.0, -0.5, 1.01])
def test_a_scale_that_is_no_fraction_is_refused(scale: float) -> None:
    with pytest.raises(InputError, match=r"scale must be above 0 and at most 1, got"):
        windows(WHOLE, scale, 0.5)


@pytest.mark.parametrize("overlap", [-0.1, 1.0])
def test_an_overlap_that_never_ends_is_refused(overlap: float) -> None:
    with pytest.raises(InputError, match=r"overlap must be at least 0 and below 1, got"):
        windows(WHOLE, 0.5, overlap)
