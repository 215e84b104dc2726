"""The validated samples and their crops, read from the store once a process."""

import io
from collections.abc import Sequence

from PIL import Image
from pydantic import ConfigDict

from tasks.adapters.images import ImageReader
from tasks.adapters.store import Store
from tasks.adapters.tables import read_rows
from tasks.artifacts import ArtifactRef, EvaluationSample, Record, Sample
from vzero_core.views import PixelBox, Size

SAMPLES, QUARANTINE, MODELS = "samples.parquet", "quarantine.parquet", "models.json"
VIEWS_PER_FILE = 256


class SampleViews(Record):
    """Both crops of a sample, as PNG, and where they were cut."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    sample_id: str
    positive_png: bytes
    negative_png: bytes
    positive_box: tuple[int, ...]
    negative_box: tuple[int, ...]
    positive_frame: tuple[int, ...]
    negative_frame: tuple[int, ...]


def views_file(position: int) -> str:
    """Name the file that holds the views of the sample at a position of the samples table."""
    return f"views-{position // VIEWS_PER_FILE:05d}.parquet"


class Dataset:
    """Samples, images and crops by reference; keeps what it parsed."""

    def __init__(self, store: Store, images: ImageReader) -> None:
        """Set where tables and images are read from."""
        self._store = store
        self.images = images
        self._samples: dict[str, list[Sample]] = {}
        self._views: dict[tuple[str, str], dict[str, SampleViews]] = {}

    def samples(self, ref: ArtifactRef) -> list[Sample]:
        """Give all training samples, in the order of their table."""
        if ref.digest not in self._samples:
            self._samples[ref.digest] = read_rows(self._store.read(ref, SAMPLES), Sample)
        return self._samples[ref.digest]

    def evaluation(self, ref: ArtifactRef) -> list[EvaluationSample]:
        """Give all evaluation questions, in the order of their table."""
        return read_rows(self._store.read(ref, SAMPLES), EvaluationSample)

    def image(self, sample: Sample | EvaluationSample) -> Image.Image:
        """Give a sample's full image."""
        return self.images.read(sample.image)

    def detail(self, sample: Sample | EvaluationSample) -> Image.Image:
        """Give the image that crops are cut from."""
        return self.images.read(sample.detail_image or sample.image)

    def views(self, ref: ArtifactRef, sample_id: str, position: int) -> SampleViews:
        """Give a sample's crops; `position` is its place in the table that the views were made from."""
        name = views_file(position)
        key = (ref.digest, name)
        if key not in self._views:
            rows = read_rows(self._store.read(ref, name), SampleViews)
            self._views[key] = {row.sample_id: row for row in rows}
        return self._views[key][sample_id]


def open_png(content: bytes) -> Image.Image:
    """Decode a crop that this project wrote."""
    return Image.open(io.BytesIO(content)).convert("RGB")


def to_png(image: Image.Image) -> bytes:
    """Encode a crop without loss."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def cut(image: Image.Image, frame: Size, box: PixelBox, size: Size, resample: str) -> Image.Image:
    """Resize an image to a frame, cut a box out of it, resize the piece."""
    filters = {
        "bicubic": Image.Resampling.BICUBIC,
        "lanczos": Image.Resampling.LANCZOS,
        "bilinear": Image.Resampling.BILINEAR,
    }
    if image.size != tuple(frame):
        image = image.resize(frame, filters[resample])
    piece = image.crop(box)
    return piece if piece.size == tuple(size) else piece.resize(size, filters[resample])


def by_id(samples: Sequence[Sample]) -> dict[str, tuple[int, Sample]]:
    """Give each sample with its position in the table, by id."""
    return {sample.id: (position, sample) for position, sample in enumerate(samples)}
