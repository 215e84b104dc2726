"""Images are opened as a viewer shows them, within limits, or refused by name."""

import base64
import csv
import io
import os
import struct
import threading
import tracemalloc
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image
from support.formats import png, save, write_parquet

from tasks.adapters import images as module
from tasks.adapters.files import StoreUnavailableError
from tasks.adapters.images import ImageReader, Inspected, embedded_uri, tsv_uri
from tasks.artifacts import ImageRef
from vzero_core.errors import InputError

WIDTH, HEIGHT = 30, 20
# How the stored picture is turned and mirrored to be seen upright: the EXIF specification, 0th row and 0th column.
UPRIGHT = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels[::-1].transpose(1, 0, 2),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: pixels[:, ::-1].transpose(1, 0, 2),
}


@pytest.fixture
def reader(tmp_path: Path) -> ImageReader:
    return ImageReader(str(tmp_path), max_pixels=10_000)


def gradient(mode: str = "RGB") -> Image.Image:
    pixels = np.arange(WIDTH * HEIGHT * 3, dtype=np.uint8).reshape(HEIGHT, WIDTH, 3)
    return Image.fromarray(pixels).convert(mode)


def png_of(header: bytes, lines: bytes) -> bytes:
    """Put a PNG together by hand."""
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def inspect(reader: ImageReader, uri: str) -> Inspected:
    """Look at an image in both ways, which must agree."""
    whole, header = reader.inspect(uri, decode=True), reader.inspect(uri, decode=False)
    names = ("uri", "width", "height", "size_bytes")
    assert [getattr(whole.ref, name) for name in names] == [getattr(header.ref, name) for name in names]
    assert np.array_equal(np.asarray(reader.read(header.ref)), np.asarray(reader.read(whole.ref)))
    return whole


def pixels_of(reader: ImageReader, uri: str) -> np.ndarray:
    image = reader.read(inspect(reader, uri).ref)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


# --- kinds that are handled ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA", "CMYK", "YCbCr", "RGBX"])
def test_every_8_bit_mode_becomes_rgb(reader: ImageReader, tmp_path: Path, mode: str) -> None:
    gradient(mode).save(tmp_path / "a.tif", compression="jpeg" if mode == "YCbCr" else "raw", quality=100)
    difference = np.abs(pixels_of(reader, "a.tif") - np.asarray(gradient(mode).convert("RGB"), int))
    assert difference.max() <= (8 if mode == "YCbCr" else 1)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif", "a.bmp", "a.tif"])
def test_every_format_is_read_whatever_its_file_is_called(reader: ImageReader, tmp_path: Path, name: str) -> None:
    Image.new("RGB", (WIDTH, HEIGHT), (200, 40, 90)).save(tmp_path / name)
    (tmp_path / name).rename(tmp_path / "image")
    assert np.abs(pixels_of(reader, "image") - [200, 40, 90]).max() <= 6


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_every_exif_orientation_is_turned_upright(
    reader: ImageReader, tmp_path: Path, orientation: int, name: str
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    # Blocks of 8 pixels come through JPEG nearly unchanged.
    stored = np.kron(np.asarray(gradient().crop((0, 0, 4, 3))), np.ones((8, 8, 1), np.uint8))
    options = {"quality": 100, "subsampling": 0} if name == "a.jpg" else {"lossless": True} if "webp" in name else {}
    Image.fromarray(stored).save(tmp_path / name, exif=exif, **options)
    assert np.abs(pixels_of(reader, name) - UPRIGHT[orientation](stored).astype(int)).max() <= 4


def test_orientation_in_xmp_is_seen_too(reader: ImageReader, tmp_path: Path) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    gradient().save(tmp_path / "a.jpg", xmp=xmp)
    assert inspect(reader, "a.jpg").ref.width == HEIGHT


def test_a_picture_with_broken_exif_is_shown_as_it_is_stored(reader: ImageReader, tmp_path: Path) -> None:
    gradient().save(tmp_path / "a.jpg", exif=b"Exif\0\0this is no TIFF header")
    assert inspect(reader, "a.jpg").ref.width == WIDTH


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "1"])
def test_transparent_pixels_are_white(reader: ImageReader, tmp_path: Path, mode: str) -> None:
    """Left half black and opaque, right half transparent, by an alpha channel or by a transparent colour."""
    image = Image.new("RGBA", (8, 4), (0, 0, 0, 255))
    image.paste((255, 0, 0, 0), (4, 0, 8, 4))
    if mode in ("RGBA", "LA"):
        image.convert(mode).save(tmp_path / "a.png")
    else:
        # Red is grey 76, index 1 of the palette, and set in black and white.
        plain = Image.new(mode, (8, 4), 0)
        value = {"P": 1, "L": 76, "RGB": (255, 0, 0), "1": 1}[mode]
        plain.paste(value, (4, 0, 8, 4))
        if mode == "P":
            plain.putpalette([0, 0, 0, 255, 0, 0])
        plain.save(tmp_path / "a.png", transparency=value)
    assert pixels_of(reader, "a.png")[0, :, 1].tolist() == [0] * 4 + [255] * 4


def test_half_transparent_pixels_are_mixed_with_white(reader: ImageReader, tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 255, 51)).save(tmp_path / "a.png")
    # alpha 51 / 255 = 1/5: a fifth of blue, four fifths of white.
    assert pixels_of(reader, "a.png")[0, 0].tolist() == [204, 204, 255]


def test_cmyk_jpeg_is_read_as_adobe_stores_it(reader: ImageReader, tmp_path: Path) -> None:
    """Adobe stores 255 for no ink, and marks the file; what is read must be the ink that was meant."""
    inks = Image.new("CMYK", (16, 16), (0, 0, 0, 0))
    inks.paste((255, 0, 0, 0), (8, 0, 16, 16))
    inks.save(tmp_path / "a.jpg", quality=100)
    content = (tmp_path / "a.jpg").read_bytes()
    assert b"Adobe" in content
    found = pixels_of(reader, "a.jpg")
    assert np.abs(found[:, :8] - 255).max() <= 2
    assert np.abs(found[:, 8:] - [0, 255, 255]).max() <= 2


@pytest.mark.parametrize(
    ("value", "grey"),
    # 65535 levels in 255 steps of 257: 128 is half a step and rounds to 0, 129 to 1; a clip would give 255 from 255 on.
    [(0, 0), (128, 0), (129, 1), (255, 1), (257, 1), (32_768, 128), (65_406, 254), (65_407, 255), (65_535, 255)],
)
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_grey_is_scaled_not_clipped(
    reader: ImageReader, tmp_path: Path, name: str, value: int, grey: int
) -> None:
    Image.fromarray(np.full((4, 4), value, dtype=np.uint16)).save(tmp_path / name)
    assert (pixels_of(reader, name) == grey).all()


def test_16_bit_grey_in_big_endian_order(reader: ImageReader, tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0x8001, dtype=">u2")).save(tmp_path / "a.tif")
    assert (pixels_of(reader, "a.tif") == 128).all()


def test_16_bit_grey_that_is_transparent_is_white(reader: ImageReader, tmp_path: Path) -> None:
    values = np.full((4, 4), 300, dtype=np.uint16)
    values[0] = 1000
    Image.fromarray(values).save(tmp_path / "a.png", transparency=1000)
    found = pixels_of(reader, "a.png")
    assert (found[0] == 255).all()
    assert (found[1:] == 1).all()


def test_16_bit_rgb_keeps_its_high_byte(reader: ImageReader, tmp_path: Path) -> None:
    line = b"\0" + struct.pack(">HHH", 0xC800, 0x2800, 0x5A00)
    save(tmp_path / "a.png", png_of(struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0), line))
    assert pixels_of(reader, "a.png")[0, 0].tolist() == [0xC8, 0x28, 0x5A]


def test_of_a_phones_several_pictures_the_first_is_read(reader: ImageReader, tmp_path: Path) -> None:
    depth = Image.new("RGB", (WIDTH, HEIGHT), "black")
    Image.new("RGB", (WIDTH, HEIGHT), "white").save(
        tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[depth]
    )
    with Image.open(tmp_path / "a.jpg") as image:
        assert (image.format, image.n_frames) == ("MPO", 2)
    assert (pixels_of(reader, "a.jpg") == 255).all()


def test_8k_images_are_read(tmp_path: Path) -> None:
    Image.new("RGB", (7680, 4320), (10, 20, 30)).save(tmp_path / "a.jpg")
    reader = ImageReader(str(tmp_path), max_pixels=100_000_000)
    ref = reader.inspect("a.jpg", decode=True).ref
    assert (ref.width, ref.height) == (7680, 4320)
    assert np.abs(np.asarray(reader.read(ref).getpixel((7679, 4319))) - [10, 20, 30]).max() <= 1


# --- kinds that are refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "name"), [("I", "a.tif"), ("F", "a.tif"), ("LAB", "a.tif")])
@pytest.mark.parametrize("decode", [True, False])
def test_other_modes_are_refused(reader: ImageReader, tmp_path: Path, mode: str, name: str, decode: bool) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / name)
    with pytest.raises(InputError, match=rf"a\.tif must have 8 or 16 bits per channel, got mode {mode}"):
        reader.inspect(name, decode=decode)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
@pytest.mark.parametrize("decode", [True, False])
def test_moving_pictures_and_several_pages_are_refused(
    reader: ImageReader, tmp_path: Path, name: str, decode: bool
) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match="must be a still picture, got 3 frames"):
        reader.inspect(name, decode=decode)


def test_frames_behind_a_large_first_one_are_seen_without_decoding(tmp_path: Path) -> None:
    """The second frame begins behind the first 64 KiB, which are what is read of other formats."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 300, 300), dtype=np.uint8)
    first, second = (Image.fromarray(frame) for frame in noise)
    first.save(tmp_path / "a.gif")
    assert (tmp_path / "a.gif").stat().st_size > 1 << 16
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    with pytest.raises(InputError, match="must be a still picture, got 2 frames"):
        ImageReader(str(tmp_path), max_pixels=100_000).inspect("a.gif", decode=False)


@pytest.mark.parametrize(
    "content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"%PDF-1.4\n", b"P6 1 1 255 abc"]
)
def test_formats_that_are_not_named_are_not_opened(
    reader: ImageReader, tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EPS would start Ghostscript."""
    started: list[object] = []
    monkeypatch.setattr("subprocess.Popen", lambda *args, **kwargs: started.append(args))
    save(tmp_path / "a.png", content)
    with pytest.raises(InputError, match=r"a\.png must be an image, of JPEG, PNG, WEBP, GIF, BMP, TIFF"):
        reader.inspect("a.png", decode=True)
    assert not started


@pytest.mark.parametrize("decode", [True, False])
def test_size_is_limited_before_decoding(reader: ImageReader, tmp_path: Path, decode: bool) -> None:
    whole = png((101, 100))
    save(tmp_path / "a.png", whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"^image a\.png must have at most 10000 pixels, got 10100"):
        reader.inspect("a.png", decode=decode)


@pytest.mark.parametrize("decode", [True, False])
def test_the_limit_is_the_readers_own_and_not_pillows(tmp_path: Path, decode: bool) -> None:
    """A header that promises 900 million pixels: more than Pillow opens by itself; none of them are there."""
    save(tmp_path / "a.png", png_of(struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0), b""))
    with pytest.raises(InputError, match="at most 100000000 pixels, got 900000000; make it smaller or raise"):
        ImageReader(str(tmp_path), max_pixels=100_000_000).inspect("a.png", decode=decode)
    ref = ImageReader(str(tmp_path), max_pixels=900_000_000).inspect("a.png", decode=False).ref
    assert (ref.width, ref.height) == (30_000, 30_000)


def damaged(kind: str) -> bytes:
    buffer = io.BytesIO()
    gradient().resize((90, 90)).save(buffer, format="PNG")
    whole = buffer.getvalue()
    return {"empty": b"", "text": b"hello", "cut": whole[: len(whole) // 2], "header": whole[:20]}[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "must not be empty"),
        ("text", "must be an image"),
        ("cut", "must be readable"),
        ("header", "must be readable"),
    ],
)
def test_what_is_no_image_is_refused(reader: ImageReader, tmp_path: Path, kind: str, message: str) -> None:
    save(tmp_path / "a.png", damaged(kind))
    with pytest.raises(InputError, match=f"image a.png {message}"):
        reader.inspect("a.png", decode=True)
    if kind != "cut":
        with pytest.raises(InputError, match=f"image a.png {message}"):
            reader.inspect("a.png", decode=False)


def what_it_says(reader: ImageReader, name: str, decode: bool) -> str:
    try:
        return reader.inspect(name, decode=decode).ref.uri
    except InputError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif", "a.bmp", "a.tif"])
def test_damage_anywhere_gives_an_image_or_a_named_error(reader: ImageReader, tmp_path: Path, name: str) -> None:
    gradient().save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    random = np.random.default_rng(0)
    for position in random.integers(0, len(whole), 150):
        broken = bytearray(whole)
        broken[position] ^= int(random.integers(1, 256))
        save(tmp_path / name, bytes(broken))
        for decode in (True, False):
            assert name in what_it_says(reader, name, decode)


@pytest.mark.parametrize("decode", [True, False])
def test_missing_files_and_folders_are_refused(reader: ImageReader, tmp_path: Path, decode: bool) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"image a\.png must exist"):
        reader.inspect("a.png", decode=decode)
    for uri in ("folder", "x" * 5000):
        with pytest.raises(InputError, match="must be a file"):
            reader.inspect(uri, decode=decode)


# --- where images are ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uri", ["../secret.png", "a/../../secret.png", "file://../secret.png"])
def test_a_relative_path_cannot_leave_the_folder(reader: ImageReader, uri: str) -> None:
    with pytest.raises(InputError, match="must stay inside"):
        reader.inspect(uri, decode=True)


@pytest.mark.parametrize("decode", [True, False])
def test_a_relative_path_cannot_leave_the_folder_through_a_link(tmp_path: Path, decode: bool) -> None:
    for name in ("data", "other"):
        save(tmp_path / name / "a.png", png((8, 8)))
    write_parquet(tmp_path / "other" / "t.parquet", [{"image": png((8, 8))}])
    (tmp_path / "data" / "folder").symlink_to(tmp_path / "other")
    (tmp_path / "data" / "out.png").symlink_to(tmp_path / "other" / "a.png")
    (tmp_path / "data" / "in.png").symlink_to(tmp_path / "data" / "a.png")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    for root in ("data", "link"):
        reader = ImageReader(str(tmp_path / root), 1000)
        assert reader.inspect("in.png", decode=decode).ref.width == 8
        for uri in ("out.png", "folder/a.png", embedded_uri("folder/t.parquet", 0, "image", 0)):
            with pytest.raises(InputError, match="must stay inside the dataset's folder, also through links, got"):
                reader.inspect(uri, decode=decode)
        assert reader.stamp("out.png") == []
    assert ImageReader("/", 1000).inspect(str(tmp_path / "data" / "out.png")[1:], decode=decode).ref.width == 8


@pytest.mark.parametrize(
    "uri",
    [
        "",
        " ",
        "file://",
        "a\0.png",
        "data:image/png;base64,iVBORw0KGgo=",
        "foo://x/y.png",
        "gs://bucket/a.png",
        "S3://bucket/a.png",
        "local:///etc/passwd",
        "simplecache::file:///a.png",
        "zip://a.png::file:///a.zip",
        "s3://bucket/a.png::memory://x",
        "a::b.png",
        embedded_uri("foo://x/t.parquet", 0, "image", 0),
    ],
)
def test_what_is_no_path_or_known_url_is_refused(reader: ImageReader, uri: str) -> None:
    for decode in (True, False):
        with pytest.raises(
            InputError, match="must be a path or one of file, s3, lakefs, http, https, memory URLs, got '"
        ):
            reader.inspect(uri, decode=decode)
    assert reader.stamp(uri) == []


@pytest.mark.parametrize("number", ["9" * 5000, "9" * 13])
def test_a_number_too_long_for_a_row_is_part_of_a_name(reader: ImageReader, tmp_path: Path, number: str) -> None:
    write_parquet(tmp_path / "a.parquet", [{"image": png((8, 8))}])
    for uri in (f"a.parquet#row={number}&column=image&index=0", f"a.parquet#row=0&column=image&index={number}"):
        with pytest.raises(InputError, match=r"^image a\.parquet#row=.* must (exist|be a file)"):
            reader.inspect(uri, decode=True)
        assert reader.stamp(uri) == []


@pytest.mark.parametrize("uri", ["s3://BAD BUCKET/a.png", "s3:///a?b/a.png", "s3://a?b/a.png"])
def test_a_bucket_that_no_server_could_have_is_refused(
    reader: ImageReader, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    for decode in (True, False):
        with pytest.raises(InputError, match="must have a bucket and a path that S3 allows"):
            reader.inspect(uri, decode=decode)
    assert reader.stamp(uri) == []


def test_memory_urls_are_read(reader: ImageReader) -> None:
    fs, path = fsspec.core.url_to_fs("memory://images/a.png")
    fs.pipe_file(path, png((8, 8)))
    assert inspect(reader, "memory://images/a.png").ref.width == 8


def test_names_in_messages_are_printable_and_short(reader: ImageReader) -> None:
    for uri in ("no\x1b]0;pwn\x07.png", "x/" * 4000 + "end.png", "\x1b::" + "x" * 4000):
        with pytest.raises(InputError) as error:
            reader.inspect(uri, decode=True)
        message = str(error.value)
        assert message.isprintable()
        assert len(message) < 400
    with pytest.raises(InputError, match=r"^image no\\x1b\]0;pwn\\x07\.png must exist"):
        reader.inspect("no\x1b]0;pwn\x07.png", decode=True)


class _Web(BaseHTTPRequestHandler):
    """Gives an image without telling its size or an ETag, refuses everything else."""

    def do_GET(self) -> None:
        self.send_response({"/a.png": 200, "/missing.png": 404}.get(self.path, 500))
        self.end_headers()
        self.wfile.write(png((8, 6)))

    def log_message(self, *args: object) -> None:
        """Keep the tests' output clean."""


@pytest.fixture
def web() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Web) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("decode", [True, False])
def test_images_on_the_web_are_read_whole_and_pinned_by_content(reader: ImageReader, web: str, decode: bool) -> None:
    for found in (
        reader.inspect(f"{web}/a.png", decode=decode),
        ImageReader(web, 1000).inspect("a.png", decode=decode),
    ):
        assert (found.ref.width, found.ref.height, len(found.ref.sha256 or "")) == (8, 6, 64)
        assert (found.hash is not None) is decode
    assert reader.read(reader.inspect(f"{web}/a.png", decode=decode).ref).size == (8, 6)
    with pytest.raises(InputError, match=r"missing\.png must exist"):
        reader.inspect(f"{web}/missing.png", decode=decode)
    with pytest.raises(InputError, match=r"broken\.png must be reachable, but: 500"):
        reader.inspect(f"{web}/broken.png", decode=decode)


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("uri", ["http://127.0.0.1:1/x.png", "https://127.0.0.1:1/x.png", "http://", "http://[::1/x"])
def test_a_web_server_that_is_not_there_is_asked_once(
    reader: ImageReader, uri: str, decode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for patient in ("read_bytes", "open_file"):
        monkeypatch.setattr(module, patient, lambda url: pytest.fail("waits"))
    with pytest.raises(InputError, match=r"^image http.* must be reachable|^image must be a path or one of"):
        reader.inspect(uri, decode=decode)
    assert reader.stamp(uri) == []


def test_once_validated_a_web_image_is_waited_for(
    reader: ImageReader, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row is known to be good, so it is not the row's fault."""

    def lost(url: str) -> bytes:
        raise StoreUnavailableError("gone")

    ref = reader.inspect(f"{web}/a.png", decode=True).ref
    monkeypatch.setattr(module, "read_bytes", lost)
    with pytest.raises(StoreUnavailableError):
        reader.read(ref)


def test_paths_may_be_absolute_or_file_urls(tmp_path: Path) -> None:
    reader = ImageReader("/nowhere", max_pixels=10_000)
    gradient().save(tmp_path / "a#1.png")
    for uri in (f"{tmp_path}/a#1.png", f"file://{tmp_path}/a#1.png"):
        assert inspect(reader, uri).ref.uri == uri
        assert reader.inspect(uri, decode=False).ref.sha256 is None
    assert ImageReader(str(tmp_path), 10_000).inspect("file://a#1.png", decode=True).ref.width == WIDTH


# --- what pins an image -------------------------------------------------------------------------------------------


def test_decoding_pins_the_content_and_hashes_the_upright_picture(reader: ImageReader, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    gradient().save(tmp_path / "turned.png", exif=exif)
    gradient().transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    turned, upright = (reader.inspect(f"{name}.png", decode=True) for name in ("turned", "upright"))
    assert turned.hash == upright.hash == str(imagehash.phash(reader.read(upright.ref)))
    assert turned.hash is not None
    assert len(turned.hash) == 16
    assert upright.ref.etag is None
    assert len(upright.ref.sha256 or "") == 64
    assert reader.inspect("upright.png", decode=False).hash is None


@pytest.mark.parametrize("decode", [True, False])
def test_a_changed_image_is_refused(reader: ImageReader, tmp_path: Path, decode: bool) -> None:
    """Also where its size is the same: BMP does not compress."""
    path = tmp_path / "a.bmp"
    gradient().save(path)
    ref, stamp, before = reader.inspect("a.bmp", decode=decode).ref, reader.stamp("a.bmp"), path.stat()
    assert reader.read(ref).size == (WIDTH, HEIGHT)
    gradient().transpose(Image.Transpose.ROTATE_180).save(path)
    # The clock of a file system may not have moved in between.
    os.utime(path, ns=(before.st_mtime_ns + 10**9, before.st_mtime_ns + 10**9))
    assert path.stat().st_size == before.st_size
    with pytest.raises(InputError, match=r"a\.bmp must be the one that was validated"):
        reader.read(ref)
    assert reader.stamp("a.bmp") != stamp
    assert reader.stamp("missing.png") == reader.stamp("../a.bmp") == []


def test_reading_the_header_leaves_the_pixels_alone(
    reader: ImageReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a JPEG, PNG or BMP that goes on for megabytes, only the first 64 KiB are asked for."""

    class Counted(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            asked.append(size)
            return super().read(size)

    asked: list[int] = []
    monkeypatch.setattr(module, "open_file", lambda url: Counted(url))
    monkeypatch.setattr(module, "read_bytes", lambda url: pytest.fail("read whole"))
    for name in ("a.jpg", "a.png", "a.bmp"):
        gradient().save(tmp_path / name)
        with (tmp_path / name).open("ab") as file:
            file.write(bytes(3_000_000))
        ref = reader.inspect(name, decode=False).ref
        assert (ref.width, ref.height, ref.sha256) == (WIDTH, HEIGHT, None)
        assert ref.size_bytes > 3_000_000
    assert asked == [1 << 16] * 3


def test_a_header_longer_than_the_first_read_is_read_on(reader: ImageReader, tmp_path: Path) -> None:
    gradient().save(tmp_path / "a.jpg", icc_profile=bytes(200_000))
    assert inspect(reader, "a.jpg").ref.width == WIDTH


def test_a_header_that_does_not_tell_the_orientation_is_found_out(reader: ImageReader, tmp_path: Path) -> None:
    """PNG allows EXIF behind the pixels, where a look at the header does not go."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    gradient().save(buffer, format="PNG", exif=exif)
    whole = buffer.getvalue()
    start = whole.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(whole[start : start + 4], "big")
    behind = whole[:start] + whole[end:-12] + whole[start:end] + whole[-12:]
    save(tmp_path / "a.png", behind)
    assert reader.inspect("a.png", decode=True).ref.width == HEIGHT
    with pytest.raises(InputError, match=r'must be 30x20 as its header says, got 20x30; set data.images = "decode"'):
        reader.read(reader.inspect("a.png", decode=False).ref)


# --- embedded in Parquet ------------------------------------------------------------------------------------------

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def shade(number: int) -> bytes:
    return png((8, 8), f"#{number:02x}{number:02x}{number:02x}")


def shade_of(reader: ImageReader, uri: str) -> int:
    return int(pixels_of(reader, uri)[0, 0, 0])


@pytest.mark.parametrize(
    ("kind", "wrap"),
    [
        (pa.binary(), lambda content: content),
        (STRUCT, lambda content: {"bytes": content, "path": "x.png"}),
        (pa.list_(STRUCT), lambda content: [{"bytes": shade(0), "path": None}, {"bytes": content, "path": None}]),
        (pa.list_(pa.binary()), lambda content: [shade(0), content]),
    ],
    ids=["bytes", "struct", "list of structs", "list of bytes"],
)
def test_an_embedded_image_is_read_in_its_place(
    reader: ImageReader, tmp_path: Path, kind: pa.DataType, wrap: object
) -> None:
    assert callable(wrap)
    rows = [{"id": number, "image": wrap(shade(number))} for number in range(10)]
    schema = pa.schema([("id", pa.int64()), ("image", kind)])
    write_parquet(tmp_path / "a.parquet", rows, schema, row_group_size=4)
    index = 1 if pa.types.is_list(kind) else 0
    # In order, back, again, and far ahead: across the borders of row groups 0..3, 4..7, 8..9.
    for row in (0, 1, 2, 3, 4, 5, 9, 8, 8, 0, 7):
        assert shade_of(reader, embedded_uri("a.parquet", row, "image", index)) == row


def test_an_embedded_image_is_pinned_by_its_content(reader: ImageReader, tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"image": shade(1)}])
    uri = embedded_uri("a.parquet", 0, "image", 0)
    stamp = reader.stamp(uri)
    refs = [reader.inspect(uri, decode=decode).ref for decode in (True, False)]
    assert refs[0] == refs[1]
    assert refs[0].sha256 is not None
    write_parquet(tmp_path / "a.parquet", [{"image": shade(2)}, {"image": shade(2)}])
    assert reader.stamp(uri) != stamp
    with pytest.raises(InputError, match="must be the one that was validated"):
        ImageReader(str(tmp_path), 10_000).read(refs[0])


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (embedded_uri("a.parquet", 5, "image", 0), "must have a row 5, got 1 rows"),
        (embedded_uri("a.parquet", 0, "images", 0), "must have a column images"),
        (embedded_uri("a.parquet", 0, "image", 3), "must hold image 3 in column image"),
        (embedded_uri("a.parquet", 0, "empty", 0), "must hold image 0 in column empty"),
        (embedded_uri("a.parquet", 0, "null", 0), "must hold image 0 in column null"),
        (embedded_uri("b.parquet", 0, "image", 0), "must be a whole Parquet file"),
        (embedded_uri("c.parquet", 0, "image", 0), "must exist"),
        (embedded_uri("../a.parquet", 0, "image", 0), "must stay inside"),
    ],
)
def test_a_wrong_place_is_refused(reader: ImageReader, tmp_path: Path, uri: str, message: str) -> None:
    schema = pa.schema([("image", pa.list_(STRUCT)), ("empty", pa.list_(STRUCT)), ("null", STRUCT)])
    row = {"image": [{"bytes": shade(1), "path": None}], "empty": [], "null": None}
    write_parquet(tmp_path / "a.parquet", [row], schema)
    save(tmp_path / "b.parquet", b"PAR1 is how it begins")
    with pytest.raises(InputError, match=message):
        reader.inspect(uri, decode=True)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each pass over a row group."""
    passes: list[int] = []
    original = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda self, **kwargs: passes.append(1) or original(self, **kwargs)
    )
    return passes


def test_embedded_images_are_read_in_one_pass_that_holds_few_of_them(
    tmp_path: Path, opened: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 images of 1 MB in one row group, two columns in turn: two passes, and a few MB at a time."""
    picture = io.BytesIO()
    Image.new("RGB", (600, 600)).save(picture, format="BMP")
    pictures = [picture.getvalue() + bytes([number]) for number in range(40)]
    rows = [{"a": content, "b": content} for content in pictures]
    options = {"compression": "none", "use_dictionary": False, "write_batch_size": 1}
    write_parquet(tmp_path / "a.parquet", rows, None, **options)
    del rows, pictures
    monkeypatch.setattr(module, "_KEPT_BYTES", 3_000_000)
    reader = ImageReader(str(tmp_path), max_pixels=1_000_000)
    arrow, peak = pa.total_allocated_bytes(), 0
    tracemalloc.start()
    try:
        for row in range(40):
            for column in ("a", "b"):
                reader.inspect(embedded_uri("a.parquet", row, column, 0), decode=False)
                peak = max(peak, pa.total_allocated_bytes() - arrow)
        assert peak + tracemalloc.get_traced_memory()[1] < 25_000_000
    finally:
        tracemalloc.stop()
    assert len(opened) == 2


def test_threads_that_run_ahead_of_one_another_cost_no_second_pass(
    reader: ImageReader, tmp_path: Path, opened: list[int]
) -> None:
    write_parquet(tmp_path / "a.parquet", [{"image": shade(row)} for row in range(64)])
    order = [start + step for start in range(0, 64, 8) for step in (3, 0, 7, 1, 6, 2, 5, 4)]
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(lambda row: reader.inspect(embedded_uri("a.parquet", row, "image", 0), decode=True), order)
        )
    refs = dict(zip(order, found, strict=True))
    assert len(opened) == 1
    assert all(np.asarray(reader.read(refs[row].ref))[0, 0, 0] == row for row in range(64))


def test_refs_of_both_ways_are_records_that_can_be_stored(reader: ImageReader, tmp_path: Path) -> None:
    gradient().save(tmp_path / "a.png")
    for decode in (True, False):
        ref = reader.inspect("a.png", decode=decode).ref
        assert ImageRef.model_validate_json(ref.model_dump_json()) == ref


# --- images embedded in TSV ---------------------------------------------------------------------------------------


def write_tsv_rows(path: Path, *rows: list[str]) -> list[tuple[int, int]]:
    """Write rows, with quotes around every cell that needs them; give where each begins and ends."""
    ends = [0]
    with path.open("w", newline="", encoding="utf-8") as file:
        for row in rows:
            csv.writer(file, delimiter="\t", lineterminator="\r\n").writerow(row)
            ends.append(file.tell())
    return list(pairwise(ends))


def in_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


@pytest.mark.parametrize("before", ["what?", 'a "quoted" word', "two\nlines", "ä\ttab", "\u2028"])
def test_a_cell_of_a_tsv_file_is_an_image(reader: ImageReader, tmp_path: Path, before: str) -> None:
    places = write_tsv_rows(tmp_path / "a.tsv", ["q", "image"], [before, in_base64(png((8, 6)))], [before, "x"])
    uri = tsv_uri("a.tsv", *places[1], 1)
    found = inspect(reader, uri)
    assert (found.ref.uri, found.ref.width, found.ref.height) == (uri, 8, 6)
    assert found.ref.size_bytes == len(png((8, 6)))
    assert reader.stamp(uri) == reader.stamp("a.tsv") != []


def test_base64_may_have_line_breaks(reader: ImageReader, tmp_path: Path) -> None:
    places = write_tsv_rows(tmp_path / "a.tsv", [base64.encodebytes(png((8, 6)) + bytes(200)).decode()])
    assert inspect(reader, tsv_uri("a.tsv", *places[0], 0)).ref.width == 8


def test_of_a_tsv_file_the_row_alone_is_read(
    reader: ImageReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = write_tsv_rows(tmp_path / "a.tsv", *[["x" * 1000, in_base64(shade(number))] for number in range(50)])
    fs, path = fsspec.core.url_to_fs("memory://tsv/a.tsv")
    fs.pipe_file(path, (tmp_path / "a.tsv").read_bytes())
    asked: list[tuple[int, int]] = []
    original = type(fs).cat_file

    def cat_file(self: Any, path: str, start: int, end: int, **options: Any) -> Any:
        asked.append((start, end))
        return original(self, path, start, end, **options)

    monkeypatch.setattr(type(fs), "cat_file", cat_file)
    for number in (31, 7, 49):
        ref = reader.inspect(tsv_uri("memory://tsv/a.tsv", *places[number], 1), decode=True).ref
        assert np.asarray(reader.read(ref))[0, 0, 0] == number
    assert asked == [places[number] for number in (31, 31, 7, 7, 49, 49)]


def test_the_size_of_an_image_in_a_tsv_file_is_limited_before_decoding(reader: ImageReader, tmp_path: Path) -> None:
    whole = png((101, 100))
    places = write_tsv_rows(tmp_path / "a.tsv", [in_base64(whole[: len(whole) // 2])])
    with pytest.raises(InputError, match="must have at most 10000 pixels, got 10100"):
        reader.inspect(tsv_uri("a.tsv", *places[0], 0), decode=True)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("a.tsv#bytes=0-400&column=1", "must be in a row with as many cells, got 1"),
        ("a.tsv#bytes=9-9&column=0", "must be in a row of at most 268435456 bytes, got 0"),
        ("a.tsv#bytes=9-8&column=0", "must be in a row of at most 268435456 bytes, got -1"),
        ("a.tsv#bytes=0-268435457&column=0", "must be in a row of at most 268435456 bytes, got 268435457"),
        ("a.tsv#bytes=1-400&column=0", "must be an image in base64"),
        ("a.tsv#bytes=90000-90001&column=0", "must be in a row with as many cells, got 0"),
        ("a.tsv#bytes=-5-9&column=0", "must exist"),
        ("b.tsv#bytes=0-9&column=0", "must exist"),
        ("../a.tsv#bytes=0-9&column=0", "must stay inside"),
        ("quote.tsv#bytes=0-9&column=0", "must be an image in base64"),
        ("return.tsv#bytes=0-9&column=0", "must be in a row of a TSV file"),
        ("empty.tsv#bytes=0-3&column=0", "must not be empty"),
    ],
)
def test_a_cell_that_is_no_image_is_refused(reader: ImageReader, tmp_path: Path, uri: str, message: str) -> None:
    write_tsv_rows(tmp_path / "a.tsv", [in_base64(png((8, 6)))])
    save(tmp_path / "quote.tsv", b'"AAAA\nBB#B')
    save(tmp_path / "return.tsv", b"AA\rBB\tCC\n")
    save(tmp_path / "empty.tsv", b"\t\t\n")
    save(tmp_path.parent / "a.tsv", b"AAAA")
    for decode in (True, False):
        with pytest.raises(InputError, match=message):
            reader.inspect(uri, decode=decode)


def test_an_image_in_a_tsv_file_that_has_changed_is_refused(reader: ImageReader, tmp_path: Path) -> None:
    places = write_tsv_rows(tmp_path / "a.tsv", [in_base64(png((8, 6)))])
    ref = reader.inspect(tsv_uri("a.tsv", *places[0], 0), decode=True).ref
    write_tsv_rows(tmp_path / "a.tsv", [in_base64(png((8, 6), "black"))])
    with pytest.raises(InputError, match="must be the one that was validated"):
        reader.read(ref)


def test_a_text_of_a_parquet_column_is_base64(reader: ImageReader, tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"image": in_base64(shade(row))} for row in range(3)])
    for row in (1, 0, 2):
        assert pixels_of(reader, embedded_uri("a.parquet", row, "image", 0))[0, 0, 0] == row
