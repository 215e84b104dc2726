"""Images are opened as a viewer shows them, within limits, or refused by name."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.adapters.images import ImageReader
from vzero_core.errors import InputError

ORIENTATION = 0x0112


@pytest.fixture
def reader(tmp_path: Path) -> ImageReader:
    return ImageReader(str(tmp_path), max_pixels=10_000)


def gradient(mode: str = "RGB") -> Image.Image:
    pixels = np.arange(30 * 20 * 3, dtype=np.uint8).reshape(20, 30, 3)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA", "CMYK"])
def test_every_8_bit_mode_becomes_rgb(reader: ImageReader, tmp_path: Path, mode: str) -> None:
    name = "a.tif"
    gradient(mode).save(tmp_path / name)
    image = reader.read(reader.inspect(name))
    assert (image.mode, image.size) == ("RGB", (30, 20))
    assert np.abs(np.asarray(image, int) - np.asarray(gradient(mode).convert("RGB"), int)).max() <= 1


def test_exif_orientation_is_applied(reader: ImageReader, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    gradient().save(tmp_path / "a.png", exif=exif)
    ref = reader.inspect("a.png")
    assert (ref.width, ref.height) == (20, 30)
    assert np.array_equal(np.asarray(reader.read(ref)), np.asarray(gradient().transpose(Image.Transpose.ROTATE_270)))


def test_transparent_pixels_are_white(reader: ImageReader, tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert reader.read(reader.inspect("a.png")).getpixel((0, 0)) == (255, 255, 255)


def test_16_bit_is_refused(reader: ImageReader, tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 60_000, dtype=np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png must have 8 bits per channel, got mode I;16"):
        reader.inspect("a.png")


def test_size_is_limited_before_decoding(reader: ImageReader, tmp_path: Path) -> None:
    Image.new("RGB", (101, 100)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="at most 10000 pixels, got 10100"):
        reader.inspect("a.png")


def damaged(kind: str) -> bytes:
    buffer = io.BytesIO()
    gradient().resize((90, 90)).save(buffer, format="PNG")
    whole = buffer.getvalue()
    return {"empty": b"", "text": b"hello", "cut": whole[: len(whole) // 2]}[kind]


@pytest.mark.parametrize(
    ("kind", "message"), [("empty", "must not be empty"), ("text", "must be an image"), ("cut", "must be readable")]
)
def test_what_is_no_image_is_refused(reader: ImageReader, tmp_path: Path, kind: str, message: str) -> None:
    (tmp_path / "a.png").write_bytes(damaged(kind))
    with pytest.raises(InputError, match=f"image a.png {message}"):
        reader.inspect("a.png")


def test_missing_files_and_folders_are_refused(reader: ImageReader, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"image a\.png must exist"):
        reader.inspect("a.png")
    with pytest.raises(InputError, match="must be a file"):
        reader.inspect("folder")


def test_a_relative_path_cannot_leave_the_folder(reader: ImageReader) -> None:
    with pytest.raises(InputError, match="must stay inside"):
        reader.inspect("../secret.png")


def test_a_changed_image_is_refused(reader: ImageReader, tmp_path: Path) -> None:
    gradient().save(tmp_path / "a.png")
    ref, stamp = reader.inspect("a.png"), reader.stamp("a.png")
    gradient().transpose(Image.Transpose.ROTATE_180).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png must be the one that was validated"):
        reader.read(ref)
    assert reader.stamp("a.png") != stamp
    assert reader.stamp("missing.png") == []
