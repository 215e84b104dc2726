"""What holds for every crop: inside its frame, of the right size, around or beside the region."""

from fractions import Fraction

from hypothesis import assume, given
from hypothesis import strategies as st

from vzero_core.config import NegativeCropConfig, PositiveCropConfig
from vzero_core.errors import NoDisjointCropError
from vzero_core.views import Box, Crop, PixelBox, Size, clip_box, negative_crop, positive_crop, scale_box

SIDE = st.integers(1, 400)
COORDINATE = st.floats(-50, 450)


@st.composite
def regions(draw: st.DrawFn) -> tuple[Box, int, int]:
    width, height = draw(SIDE), draw(SIDE)
    x1, x2 = sorted((draw(COORDINATE), draw(COORDINATE)))
    y1, y2 = sorted((draw(COORDINATE), draw(COORDINATE)))
    assume(x1 < x2 and y1 < y2 and x1 < width and y1 < height and x2 > 0 and y2 > 0)
    return Box(x1, y1, x2, y2), width, height


positive_configs = st.builds(
    PositiveCropConfig,
    margin=st.floats(0, 2),
    min_side_px=st.integers(1, 64),
    min_pixels=st.integers(1, 100_000),
)
negative_configs = st.builds(NegativeCropConfig, downsample=st.integers(1, 3))


def inside(box: PixelBox, frame: Size) -> bool:
    return 0 <= box.x1 < box.x2 <= frame.width and 0 <= box.y1 < box.y2 <= frame.height


@given(regions())
def test_clipping_twice_is_clipping_once(case: tuple[Box, int, int]) -> None:
    box, width, height = case
    clipped, changed = clip_box(box, width, height)
    assert changed == (clipped != box)
    assert clip_box(clipped, width, height) == (clipped, False)


@given(regions(), positive_configs)
def test_positive_contains_its_region_and_keeps_its_promises(
    case: tuple[Box, int, int], config: PositiveCropConfig
) -> None:
    box, width, height = case
    crop = positive_crop(box, width, height, config)
    region, _ = clip_box(box, width, height)
    assert crop.frame_size == (width, height)
    assert inside(crop.box, crop.frame_size)
    assert crop.box.x1 <= region.x1
    assert region.x2 <= crop.box.x2
    assert crop.box.y1 <= region.y1
    assert region.y2 <= crop.box.y2
    assert crop.box.size.width >= min(config.min_side_px, width)
    assert crop.box.size.height >= min(config.min_side_px, height)
    pixels = crop.size.width * crop.size.height
    assert pixels >= config.min_pixels or crop.size == crop.box.size
    assert crop.size.width >= crop.box.size.width
    assert crop.size.height >= crop.box.size.height
    if crop.size != crop.box.size:
        # no larger than needed, and the aspect ratio is off by the rounding of a side at most
        assert (crop.size.width - 1) * (crop.size.height - 1) < config.min_pixels
        stretch_x = Fraction(crop.size.width, crop.box.size.width)
        stretch_y = Fraction(crop.size.height, crop.box.size.height)
        assert abs(stretch_x - stretch_y) <= Fraction(1, min(crop.box.size))


@given(regions(), positive_configs, negative_configs, st.integers(0, 9), st.text(max_size=5))
def test_negative_is_disjoint_inside_and_of_equal_output(
    case: tuple[Box, int, int], config: PositiveCropConfig, how: NegativeCropConfig, seed: int, sample_id: str
) -> None:
    positive = positive_crop(*case, config)
    try:
        negative = negative_crop(positive, how, seed=seed, sample_id=sample_id)
    except NoDisjointCropError:
        return  # when this is right is the enumeration oracle's
    frame = negative.frame_size
    assert inside(negative.box, frame)
    assert negative.size == positive.size
    assert negative == negative_crop(positive, how, seed=seed, sample_id=sample_id)
    # disjoint in exact fractions of the field of view, not only in the rounded forbidden box
    scale_x, scale_y = Fraction(frame.width, case[1]), Fraction(frame.height, case[2])
    assert (
        negative.box.x2 <= positive.box.x1 * scale_x
        or negative.box.x1 >= positive.box.x2 * scale_x
        or negative.box.y2 <= positive.box.y1 * scale_y
        or negative.box.y1 >= positive.box.y2 * scale_y
    )


@given(regions(), SIDE, SIDE)
def test_scaling_there_and_back_is_nothing(case: tuple[Box, int, int], width: int, height: int) -> None:
    box, *size = case
    there = scale_box(box, Size(*size), Size(width, height))
    back = scale_box(there, Size(width, height), Size(*size))
    assert all(abs(a - b) < 1e-9 * 500 for a, b in zip(box, back, strict=True))


@given(regions(), st.integers(1, 4))
def test_a_detail_image_is_cut_at_the_same_field_of_view(case: tuple[Box, int, int], factor: int) -> None:
    box, width, height = case
    region, _ = clip_box(box, width, height)
    whole = Box(*(float(int(value)) for value in region))
    assume(whole.x1 < whole.x2 and whole.y1 < whole.y2)
    plain = PositiveCropConfig(min_side_px=1, min_pixels=1)
    small = positive_crop(whole, width, height, plain)
    detail_size = Size(width * factor, height * factor)
    large = positive_crop(scale_box(whole, Size(width, height), detail_size), *detail_size, plain)
    assert large == Crop(
        detail_size,
        PixelBox(*(value * factor for value in small.box)),
        Size(*(value * factor for value in small.size)),
    )
