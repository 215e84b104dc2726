"""Replies to "where is it?": understood or refused with the reason, and carried over to the full image.

The replies are written after the forms in Qwen's documents and in users' reports; none was recorded from a model here.
"""

import math

import numpy as np
import pytest
from PIL import Image
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from tasks.adapters.grounding import PER_MILLE, parse_box, resized_size, to_pixels
from vzero_core.errors import InputError
from vzero_core.views import Box, Size

UNDERSTOOD = {
    "fenced list, as Qwen2.5-VL and Qwen3-VL reply": (
        '```json\n[\n\t{"bbox_2d": [341, 258, 397, 360], "label": "white mug"}\n]\n```',
        (341, 258, 397, 360),
    ),
    "bare object": ('{"bbox_2d": [135, 114, 1016, 672], "label": "house"}', (135, 114, 1016, 672)),
    "key of other tools": ('{"bbox": [1, 2, 30, 40]}', (1, 2, 30, 40)),
    "Python's quotes": ("[{'bbox_2d': [1, 2, 30, 40], 'label': 'mug'}]", (1, 2, 30, 40)),
    "no white space": ('[{"bbox_2d":[1,2,30,40]}]', (1, 2, 30, 40)),
    "several: the smallest box that holds all": (
        '[{"bbox_2d": [100, 200, 150, 260], "label": "left"}, {"bbox_2d": [300, 180, 340, 230], "label": "right"}]',
        (100, 180, 340, 260),
    ),
    "cut off inside the second": (
        '```json\n[{"bbox_2d": [10, 20, 30, 40], "label": "mug"}, {"bbox_2d": [50, 6',
        (10, 20, 30, 40),
    ),
    "cut off after the box": ('```json\n[{"bbox_2d": [10, 20, 30, 40], "la', (10, 20, 30, 40)),
    "Qwen-VL": ("<ref>the mug</ref><box>(341,258),(397,360)</box>", (341, 258, 397, 360)),
    "Qwen2-VL": (
        "<|object_ref_start|>the eyes<|object_ref_end|><|box_start|>(176,106),(232,160)<|box_end|>",
        (176, 106, 232, 160),
    ),
    "Qwen2-VL without its special tokens": ("the eyes(176, 106), (232, 160)", (176, 106, 232, 160)),
    "bare list": ("[341, 258, 397, 360]", (341, 258, 397, 360)),
    "nested list": ("[[341, 258, 397, 360]]", (341, 258, 397, 360)),
    "list in prose": ("The mug is at [341, 258, 397, 360] in the image.", (341, 258, 397, 360)),
    "decimals": ('{"bbox_2d": [12.5, 0.25, 100.0, 99.75]}', (12.5, 0.25, 100, 99.75)),
    "negative": ('{"bbox_2d": [-3, 0, 100, 50]}', (-3, 0, 100, 50)),
    "swapped corners": ('{"bbox_2d": [397, 360, 341, 258]}', (341, 258, 397, 360)),
    "one corner swapped": ('{"bbox_2d": [397, 258, 341, 360]}', (341, 258, 397, 360)),
    "a named box outweighs other numbers": (
        'Four dates, [2019, 2020, 2021, 2022], and (1,2),(3,4). {"bbox_2d": [10, 20, 30, 40]}',
        (10, 20, 30, 40),
    ),
    "a pair of points outweighs a bare list": ("[1, 2, 3, 4] <box>(10,20),(30,40)</box>", (10, 20, 30, 40)),
}

REFUSED = {
    "nothing": ("", "reply must hold a box of four numbers, got ''"),
    "prose": ("The mug is on the table.", "reply must hold a box of four numbers, got 'The mug"),
    "empty list": ("```json\n[]\n```", "reply must hold a box of four numbers"),
    "cut off inside the only box": ('```json\n[{"bbox_2d": [341, 258, 3', "reply must hold a box of four numbers"),
    "the form that was asked for, unfilled": ('{"bbox_2d": [x1, y1, x2, y2]}', "reply must hold a box of four numbers"),
    "a point": ('{"point_2d": [346, 328], "label": "mug"}', "reply must hold a box of four numbers"),
    "three numbers": ('{"bbox_2d": [341, 258, 397]}', "reply must hold a box of four numbers"),
    "five numbers": ('{"bbox_2d": [341, 258, 397, 360, 9]}', "reply must hold a box of four numbers"),
    "no width": ('{"bbox_2d": [341, 258, 341, 360]}', "reply must hold a box with an area"),
    "no height": ("[341, 258, 397, 258]", "reply must hold a box with an area"),
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_a_box_is_understood(name: str) -> None:
    reply, box = UNDERSTOOD[name]
    assert parse_box(reply) == Box(*box)


@pytest.mark.parametrize("name", REFUSED)
def test_a_reply_without_a_box_is_refused_with_the_reason(name: str) -> None:
    reply, message = REFUSED[name]
    with pytest.raises(InputError) as caught:
        parse_box(reply)
    assert str(caught.value).startswith(message)


def test_a_long_reply_is_quoted_in_part() -> None:
    with pytest.raises(InputError) as caught:
        parse_box("I see nothing. " * 1000)
    assert len(str(caught.value)) < 200


def test_thousandths_count_from_the_full_image_whatever_its_size() -> None:
    assert to_pixels(Box(100, 200, 300, 400), PER_MILLE, Size(2000, 500)) == Box(200, 100, 600, 200)


def test_resized_pixels_count_from_what_the_processor_made_of_the_image() -> None:
    # 1000 x 700 becomes multiples of 28: 1008 x 700. So 504 is the middle, and 700 stays the bottom.
    frame = resized_size(Qwen2VLImageProcessorPil(), Image.new("RGB", (1000, 700)))
    assert frame == Size(1008, 700)
    assert to_pixels(Box(504, 350, 1008, 700), frame, Size(1000, 700)) == Box(500, 350, 1000, 700)


@pytest.mark.parametrize(("width", "height"), [(1000, 700), (4000, 300), (29, 83), (3000, 5000)])
@pytest.mark.parametrize("patch", [14, 16])
def test_the_resized_size_is_that_of_transformers(width: int, height: int, patch: int) -> None:
    limits = {"shortest_edge": 56 * 56, "longest_edge": 1_000_000}
    processor = Qwen2VLImageProcessorPil(patch_size=patch, size=limits)
    expected = smart_resize(height, width, 2 * patch, limits["shortest_edge"], limits["longest_edge"])
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    assert resized_size(processor, Image.fromarray(pixels)) == Size(expected[1], expected[0])


def test_a_processor_of_another_kind_is_refused() -> None:
    processor = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    with pytest.raises(InputError, match=r"resized_pixels needs an image processor of the Qwen-VL kind, got Idefics3"):
        resized_size(processor, Image.new("RGB", (32, 32)))


def test_a_slip_over_the_edge_is_clipped() -> None:
    assert to_pixels(Box(-20, 10, 500, 1040), PER_MILLE, Size(200, 100)) == Box(0, 1, 100, 100)


@pytest.mark.parametrize(
    "box", [(10, 10, 1051, 20), (10, 10, 20, 1051), (-51, 10, 20, 20), (10, -51, 20, 20), (10, 10, math.inf, 20)]
)
def test_a_box_in_other_units_is_refused_and_the_setting_named(box: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match=r"reply must hold a box inside 1000x1000, got .* set regions\.convention"):
        to_pixels(Box(*box), PER_MILLE, Size(4000, 3000))


def test_a_box_beyond_the_edge_is_refused() -> None:
    with pytest.raises(InputError, match=r"box must meet the 200x100 image"):
        to_pixels(Box(1001, 10, 1040, 20), PER_MILLE, Size(200, 100))
