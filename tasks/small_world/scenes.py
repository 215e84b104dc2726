"""Scenes of the small world: coloured shapes, each with a digit, on a 4x4 grid.

Two renderings of one scene exist. The *detail* (128x128, light noise) is what crops are cut from. The *picture*
(64x64, heavy noise) is the full image that student and teacher see: its digits can hardly be read, so evidence from a
crop is worth something. Everything is a function of (seed, split, index) and of nothing else.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]

GRID = 4
CELL = 32  # pixels of the detail rendering
DETAIL_SIZE = GRID * CELL
SCALE = 2  # detail pixels per picture pixel
PICTURE_SIZE = DETAIL_SIZE // SCALE
MIN_OBJECTS, MAX_OBJECTS = 7, 10
DETAIL_SIGMA = 12.0
PICTURE_SIGMA = 80.0
REGION_JITTER = 3  # detail pixels
BACKGROUND = 90

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 220, 50),
    "purple": (145, 50, 195),
    "orange": (245, 140, 30),
    "cyan": (50, 210, 220),
    "pink": (250, 150, 200),
    "brown": (130, 75, 35),
    "white": (240, 240, 240),
}
SHAPES = ("square", "circle", "triangle", "diamond")
DIGITS = tuple("0123456789")
CELLS = tuple(f"{row}{column}" for row in "abcd" for column in "1234")
# Even shifts keep each glyph pixel on one pixel of the half-size picture.
SHIFTS = ((0, 0), (2, 0), (-2, 0), (0, 2), (0, -2))
# One 5x7 bitmap a digit, rows from the top.
FONT = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00010 00100 01000 11111",
    "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)
LIGHT_INK, DARK_INK = 250, 10
LUMINANCE = (0.299, 0.587, 0.114)
INK_THRESHOLD = 128.0


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape with a digit, in one cell; indices into CELLS, COLOURS, SHAPES, DIGITS and SHIFTS."""

    cell: int
    colour: int
    shape: int
    digit: int
    shift: int


@dataclass(frozen=True)
class Question:
    """What is asked about a scene, and what only evaluation and the labelled model-building may see."""

    text: str
    trace: str
    answer: str
    cell: str


@dataclass(frozen=True)
class Sample:
    """One sample: both renderings (uint8, HxWx3), the question with its answer, and the region in picture pixels."""

    detail: Pixels
    picture: Pixels
    question: Question
    region: Box
    objects: tuple[SceneObject, ...]


def generator(seed: int, split: str, index: int, purpose: str) -> np.random.Generator:
    """Give the random generator of one purpose of one sample, independent of all others."""
    digest = hashlib.sha256(f"small-world/{seed}/{split}/{index}/{purpose}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))


def draw_objects(rng: np.random.Generator) -> tuple[SceneObject, ...]:
    """Draw the objects of a scene: cells and colours without repetition, the rest freely."""
    count = int(rng.integers(MIN_OBJECTS, MAX_OBJECTS + 1))
    cells = rng.permutation(len(CELLS))[:count]
    colours = rng.permutation(len(COLOURS))[:count]
    rest = rng.integers(0, [len(SHAPES), len(DIGITS), len(SHIFTS)], size=(count, 3))
    return tuple(
        SceneObject(int(cell), int(colour), int(shape), int(digit), int(shift))
        for cell, colour, (shape, digit, shift) in zip(cells, colours, rest, strict=True)
    )


def ask(target: SceneObject) -> Question:
    """Put the question about one object, with the trace that answers it: colour, cell, digit, answer."""
    colour, digit, cell = tuple(COLOURS)[target.colour], DIGITS[target.digit], CELLS[target.cell]
    return Question(
        text=f"digit on the {colour} {SHAPES[target.shape]} ?",
        trace=f"{colour} {cell} {digit} answer {digit}",
        answer=digit,
        cell=cell,
    )


@cache
def _tile(colour: int, shape: int, digit: int, shift: int) -> Pixels:
    """Draw the cell of one object, CELL x CELL x 3."""
    dx, dy = SHIFTS[shift]
    y, x = np.mgrid[0:CELL, 0:CELL] + 0.5
    x, y = x - 15 - dx, y - 15 - dy
    inside = (
        np.maximum(abs(x), abs(y)) < 12,
        x**2 + y**2 < 13**2,
        (abs(x) < (y + 12) * 13 / 24) & (y < 12),
        abs(x) + abs(y) < 13,
    )[shape]
    fill = tuple(COLOURS.values())[colour]
    tile = np.full((CELL, CELL, 3), BACKGROUND, np.uint8)
    tile[inside] = fill
    bitmap = np.array([[c == "1" for c in row] for row in FONT[digit].split()]).repeat(2, 0).repeat(2, 1)
    top = (12 if SHAPES[shape] == "triangle" else 8) + dy
    left = 10 + dx
    glyph = tile[top : top + bitmap.shape[0], left : left + bitmap.shape[1]]
    glyph[bitmap] = DARK_INK if float(np.dot(LUMINANCE, fill)) > INK_THRESHOLD else LIGHT_INK
    return tile


def render(objects: tuple[SceneObject, ...]) -> Pixels:
    """Render a scene without noise, DETAIL_SIZE x DETAIL_SIZE x 3."""
    scene = np.full((DETAIL_SIZE, DETAIL_SIZE, 3), BACKGROUND, np.uint8)
    for item in objects:
        row, column = divmod(item.cell, GRID)
        scene[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = _tile(
            item.colour, item.shape, item.digit, item.shift
        )
    return scene


def downsample(detail: Pixels) -> npt.NDArray[np.float32]:
    """Average SCALE x SCALE blocks: [..., 128, 128, 3] uint8 to [..., 64, 64, 3] float32."""
    total = np.zeros((*detail.shape[:-3], PICTURE_SIZE, PICTURE_SIZE, 3), np.uint16)
    for dy in range(SCALE):
        for dx in range(SCALE):
            total += detail[..., dy::SCALE, dx::SCALE, :]
    return total.astype(np.float32) / np.float32(SCALE**2)


def add_noise(
    pixels: npt.NDArray[np.uint8] | npt.NDArray[np.float32], sigma: float, rng: np.random.Generator
) -> Pixels:
    """Add Gaussian noise of the given sigma, independent in each pixel and channel, and clip to 0..255."""
    noise = rng.standard_normal(pixels.shape, dtype=np.float32)
    noise *= sigma
    noise += pixels
    return np.clip(np.rint(noise, out=noise), 0, 255, out=noise).astype(np.uint8)


def draw_window(cell: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draw the corner (left, top), in detail pixels, of the CELL x CELL window around a cell, jittered, kept inside."""
    row, column = divmod(cell, GRID)
    jitter_x, jitter_y = rng.integers(-REGION_JITTER, REGION_JITTER + 1, size=2)
    limit = DETAIL_SIZE - CELL
    return min(max(column * CELL + int(jitter_x), 0), limit), min(max(row * CELL + int(jitter_y), 0), limit)


def make_sample(seed: int, split: str, index: int) -> Sample:
    """Make one sample.

    Args:
        seed: of the run for training splits; fixed for held-out ones.
        split: name of the split. Splits share no generator, hence no scene.
        index: position in the split.

    Returns:
        The sample; its region is xyxy in pixels of the picture, and scales by SCALE to the window of the detail.
    """
    rng = generator(seed, split, index, "scene")
    objects = draw_objects(rng)
    target = objects[int(rng.integers(len(objects)))]
    left, top = draw_window(target.cell, rng)
    noise = generator(seed, split, index, "noise")
    detail = add_noise(render(objects), DETAIL_SIGMA, noise)
    return Sample(
        detail=detail,
        picture=add_noise(downsample(detail), PICTURE_SIGMA, noise),
        question=ask(target),
        region=(left / SCALE, top / SCALE, (left + CELL) / SCALE, (top + CELL) / SCALE),
        objects=objects,
    )
