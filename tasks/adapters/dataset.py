"""The validated samples and their crops, read from the store once a process."""

import io
import json
import threading
from collections.abc import Sequence

from PIL import Image
from pydantic import ConfigDict, Field

from tasks.adapters.images import ImageReader
from tasks.adapters.store import Store
from tasks.adapters.tables import read_rows
from tasks.artifacts import ArtifactRef, EvaluationSample, ImageRef, Record, Sample
from vzero_core.views import Box, PixelBox, Size, scale_box

SAMPLES, QUARANTINE, MODELS = "samples.parquet", "quarantine.parquet", "models.json"
ROWS, FACTS, FINDINGS, LIMITS = "rows.parquet", "facts.parquet", "findings.parquet", "limits.json"
FINGERPRINTS = "fingerprints.parquet"
VIEW_SHARDS = "shards.json"
HELD_OUT_IDS = "held_out.json"
SEEN = "seen.parquet"
VIEWS_PER_FILE = 32
"""A round reads those of its prompts only, so files are small."""
VIEW_FILES_KEPT = 64
"""Files of crops kept in memory; what was read first goes first."""
IMAGE_BYTES_KEPT = 1 << 28
"""Of decoded images kept in memory; what was asked for longest ago goes first."""
_CHANNELS = 3


class SampleViews(Record):
    """Both crops of a sample, as PNG, and where they were cut."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    sample_id: str
    positive_png: bytes
    negative_png: bytes
    positive_box: tuple[int, ...] | None = Field(description="None where the crop was given.")
    negative_box: tuple[int, ...] | None = Field(description="None where the crop was given.")
    positive_frame: tuple[int, ...]
    negative_frame: tuple[int, ...]


class ViewShard(Record):
    """One of the artefacts that a dataset's views lie in."""

    ref: ArtifactRef
    num_samples: int
    positions: tuple[int, ...] | None = Field(default=None, description="Rows of it that are meant; None: all.")


class SeenRow(Record):
    """A row of the data that was looked at, good or bad."""

    digest: str


def views_file(position: int) -> str:
    """Name the file that holds the views of the sample at a position of a shard's samples table."""
    return f"views-{position // VIEWS_PER_FILE:05d}.parquet"


class Dataset:
    """Samples, images and crops by reference; keeps what it parsed."""

    def __init__(self, store: Store, images: ImageReader) -> None:
        """Set where tables and images are read from."""
        self._store = store
        self.images = images
        self._samples: dict[str, list[Sample]] = {}
        self._views: dict[tuple[str, str], dict[str, SampleViews]] = {}
        self._shards: dict[str, list[ViewShard]] = {}
        # By sample, not by image alone: who groups prompts by the image that they hold gets the same groups whatever
        # is kept here.
        self._images: dict[tuple[str, ImageRef], Image.Image] = {}
        self._image_bytes = 0
        # A shard is replayed in a thread of its own.
        self._lock = threading.Lock()

    def samples(self, ref: ArtifactRef) -> list[Sample]:
        """Give all training samples, in the order of their table."""
        if ref.digest not in self._samples:
            self._samples[ref.digest] = read_rows(self._store.read(ref, SAMPLES), Sample)
        return self._samples[ref.digest]

    def seen(self, ref: ArtifactRef) -> set[str]:
        """Give the digests of the rows that were looked at, by an import or for a training set."""
        return {row.digest for row in read_rows(self._store.read(ref, SEEN), SeenRow)}

    def split(self, ref: ArtifactRef) -> tuple[list[str], list[str]]:
        """Give the ids of a training set's samples that are trained on, and of those that checkpoints are asked."""
        held_out: list[str] = json.loads(self._store.read(ref, HELD_OUT_IDS))
        aside = set(held_out)
        return [sample.id for sample in self.samples(ref) if sample.id not in aside], held_out

    def evaluation(self, ref: ArtifactRef) -> list[EvaluationSample]:
        """Give all evaluation questions, in the order of their table."""
        return read_rows(self._store.read(ref, SAMPLES), EvaluationSample)

    def image(self, sample: Sample | EvaluationSample) -> Image.Image:
        """Give a sample's full image, which is not to be changed; those of a round are read from disk once.

        Raises:
            InputError: it is not the image that was validated.
        """
        key = (sample.id, sample.image)
        with self._lock:
            image = self._images.pop(key, None)
            if image is not None:
                self._images[key] = image
                return image
        image = self.images.read(sample.image)
        with self._lock:
            if key not in self._images:
                self._image_bytes += _num_bytes(image)
            self._images[key] = image
            while self._image_bytes > IMAGE_BYTES_KEPT:
                self._image_bytes -= _num_bytes(self._images.pop(next(iter(self._images))))
        return image

    def detail(self, sample: Sample | EvaluationSample) -> Image.Image:
        """Give the image that crops are cut from."""
        return self.images.read(sample.detail_image or sample.image)

    def views(self, ref: ArtifactRef, sample_id: str, position: int) -> SampleViews:
        """Give a sample's crops; `position` is its place in the samples table of the views."""
        if ref.digest not in self._shards:
            rows = json.loads(self._store.read(ref, VIEW_SHARDS))
            self._shards[ref.digest] = [ViewShard.model_validate(row) for row in rows]
        for shard in self._shards[ref.digest]:
            if position < shard.num_samples:
                break
            position -= shard.num_samples
        if shard.positions is not None:
            position = shard.positions[position]
        name = views_file(position)
        key = (shard.ref.digest, name)
        if key not in self._views:
            found = read_rows(self._store.read(shard.ref, name), SampleViews)
            self._views[key] = {row.sample_id: row for row in found}
            if len(self._views) > VIEW_FILES_KEPT:
                self._views.pop(next(iter(self._views)))
        return self._views[key][sample_id]


def _num_bytes(image: Image.Image) -> int:
    return image.width * image.height * _CHANNELS


def open_png(content: bytes) -> Image.Image:
    """Decode a crop that this project wrote."""
    return Image.open(io.BytesIO(content)).convert("RGB")


def to_png(image: Image.Image) -> bytes:
    """Encode a crop without loss."""
    buffer = io.BytesIO()
    # Filtered but not deflated: the Parquet file around it is compressed, to the same size in half the time.
    image.save(buffer, format="PNG", compress_level=0)
    return buffer.getvalue()


def cut(image: Image.Image, frame: Size, box: PixelBox, size: Size, resample: str) -> Image.Image:
    """Resize an image to a frame, cut a box out of it, resize the piece; only what the box needs is computed."""
    filters = {
        "bicubic": Image.Resampling.BICUBIC,
        "lanczos": Image.Resampling.LANCZOS,
        "bilinear": Image.Resampling.BILINEAR,
    }
    if image.size == tuple(frame):
        piece = image.crop(box)
    else:
        # Pillow takes the pixels around the box into account, so this is what a cut of the whole frame would give.
        region = scale_box(Box(*box), frame, Size(*image.size))
        piece = image.resize(box.size, filters[resample], box=region)
    return piece if piece.size == tuple(size) else piece.resize(size, filters[resample])


def by_id(samples: Sequence[Sample]) -> dict[str, tuple[int, Sample]]:
    """Give each sample with its position in the table, by id."""
    return {sample.id: (position, sample) for position, sample in enumerate(samples)}
