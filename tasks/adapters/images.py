"""Images where they lie: opened within limits, turned as EXIF says, and checked against what was validated."""

import hashlib
import io
import warnings

import fsspec
from PIL import Image, ImageOps, UnidentifiedImageError

from tasks.artifacts import ImageRef
from vzero_core.errors import InputError

# What the models see is three 8-bit channels; everything else is converted or refused here.
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})


class ImageReader:
    """Reads the images of one dataset."""

    def __init__(self, root: str, max_pixels: int) -> None:
        """Set where relative paths count from, and the largest image that is decoded.

        Args:
            root: folder of the dataset file, or its URL.
            max_pixels: pixels; larger images are refused before decoding.
        """
        self._root = root.rstrip("/")
        self._max_pixels = max_pixels

    def inspect(self, uri: str) -> ImageRef:
        """Decode an image and describe it.

        Raises:
            InputError: it is missing, empty, no image, too large or damaged.
        """
        content = self._fetch(uri)
        image = self._decode(uri, content)
        return ImageRef(
            uri=uri,
            width=image.width,
            height=image.height,
            size_bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
        )

    def read(self, ref: ImageRef) -> Image.Image:
        """Give an image as RGB, upright.

        Raises:
            InputError: it is not the image that was validated.
        """
        content = self._fetch(ref.uri)
        if len(content) != ref.size_bytes or hashlib.sha256(content).hexdigest() != ref.sha256:
            raise InputError(
                f"image {ref.uri} must be the one that was validated ({ref.size_bytes} bytes), but it has changed "
                f"({len(content)} bytes); restore it, or run the flow again so that it is validated anew"
            )
        return self._decode(ref.uri, content)

    def stamp(self, uri: str) -> list[str | int]:
        """Give what changes when an image changes, without reading it; empty where there is no such file."""
        fs, path = fsspec.core.url_to_fs(self.locate(uri))
        try:
            info = fs.info(path)
        except FileNotFoundError:
            return []
        return [int(info["size"]), str(info.get("ETag") or info.get("mtime") or info.get("LastModified") or "")]

    def locate(self, uri: str) -> str:
        """Give the full path or URL of an image.

        Raises:
            InputError: a relative path leaves the dataset's folder.
        """
        if "://" in uri or uri.startswith("/"):
            return uri
        if ".." in uri.split("/"):
            raise InputError(f"image path must stay inside the dataset's folder, got {uri!r}; use an absolute path")
        return f"{self._root}/{uri}"

    def _fetch(self, uri: str) -> bytes:
        try:
            with fsspec.open(self.locate(uri), "rb") as file:
                content: bytes = file.read()
        except FileNotFoundError as error:
            raise InputError(f"image {uri} must exist, but there is no such file below {self._root}") from error
        except IsADirectoryError as error:
            raise InputError(f"image {uri} must be a file, got a folder") from error
        if not content:
            raise InputError(f"image {uri} must not be empty, got a file of 0 bytes")
        return content

    def _decode(self, uri: str, content: bytes) -> Image.Image:
        try:
            with warnings.catch_warnings():
                # Pillow's own limit is a warning; ours, below, is an error with the figure.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(io.BytesIO(content))
                pixels = image.width * image.height
                if pixels > self._max_pixels:
                    raise InputError(
                        f"image {uri} must have at most {self._max_pixels} pixels, got {pixels}; "
                        "make it smaller or raise data.max_image_pixels"
                    )
                if image.mode not in _MODES:
                    raise InputError(f"image {uri} must have 8 bits per channel, got mode {image.mode}; convert it")
                image.load()
        except UnidentifiedImageError as error:
            raise InputError(f"image {uri} must be an image, but its format is not recognised") from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"image {uri} must be readable, but decoding failed: {error}") from error
        upright = ImageOps.exif_transpose(image)
        if "transparency" in upright.info or upright.mode in ("RGBA", "LA", "PA"):
            # Transparent pixels carry arbitrary colours; the models were trained on what a viewer shows on white.
            rgba = upright.convert("RGBA")
            ground = Image.new("RGBA", rgba.size, "white")
            return Image.alpha_composite(ground, rgba).convert("RGB")
        return upright.convert("RGB")
