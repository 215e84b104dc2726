"""Stages: both crops of every sample, the relevant one and an irrelevant one of equal size; shard by shard."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from PIL import Image

from tasks.adapters.dataset import (
    QUARANTINE,
    SAMPLES,
    VIEW_SHARDS,
    VIEWS_PER_FILE,
    SampleViews,
    ViewShard,
    cut,
    to_png,
    views_file,
)
from tasks.adapters.parallel import in_order
from tasks.adapters.store import Outcome, write_json
from tasks.adapters.tables import read_rows, write_rows
from tasks.artifacts import ArtifactRef, BadRow, ImageRef, Job, Sample
from tasks.stage import RunContext, stage
from vzero_core.config import ViewConfig
from vzero_core.errors import InputError, NoDisjointCropError
from vzero_core.views import Size, negative_crop, positive_crop, scale_box

SAMPLES_PER_SHARD = 1024
"""What is lost at most when a run is killed while it cuts: two minutes with 4K images on two cores."""


class ViewShardJob(Job):
    """Cut the crops of some of a dataset's samples."""

    stage: ClassVar[str] = "view_shard"

    samples: ArtifactRef
    views: ViewConfig
    seed: int
    shard: int
    num_shards: int

    @property
    def title(self) -> str:
        """How the run is called on the dashboard."""
        return "views" + (f", shard {self.shard} of {self.num_shards}" if self.num_shards > 1 else "")


class ViewsJob(Job):
    """Join the shards."""

    stage: ClassVar[str] = "views"
    version: ClassVar[int] = 2

    shards: tuple[ArtifactRef, ...]
    max_bad_share: float


def num_view_shards(num_samples: int) -> int:
    """Give how many shards a dataset is cut in."""
    return -(-num_samples // SAMPLES_PER_SHARD)


@stage(ViewShardJob)
def build_view_shard(job: ViewShardJob, context: RunContext, folder: Path) -> Outcome:
    """Cut both crops of every sample; a sample without a place for an irrelevant crop is set aside."""
    start = job.shard * SAMPLES_PER_SHARD
    samples = context.dataset.samples(job.samples)[start : start + SAMPLES_PER_SHARD]
    found: dict[str, SampleViews | BadRow] = {}
    with context.progress(job.title, len(samples)) as advance:
        for rows in in_order(lambda group: _cut_group(group, job, context), _by_image(samples), context.image_threads):
            found |= rows
            advance(len(rows))
    views = [row for sample in samples if isinstance(row := found[sample.id], SampleViews)]
    kept = [sample for sample in samples if isinstance(found[sample.id], SampleViews)]
    bad = [
        BadRow(row=start + number, id=row.id, reason=row.reason)
        for number, sample in enumerate(samples, start=1)
        if isinstance(row := found[sample.id], BadRow)
    ]
    for first in range(0, len(kept), VIEWS_PER_FILE):
        write_rows(folder / views_file(first), views[first : first + VIEWS_PER_FILE], SampleViews)
    write_rows(folder / SAMPLES, kept, Sample)
    write_rows(folder / QUARANTINE, bad, BadRow)
    return Outcome(summary={"num_samples": len(kept), "num_bad": len(bad)})


@stage(ViewsJob)
def build_views(job: ViewsJob, context: RunContext, folder: Path) -> Outcome:
    """Join the shards' tables; the crops stay where they are."""
    kept: list[Sample] = []
    bad: list[BadRow] = []
    shards = []
    for ref in job.shards:
        rows = read_rows(context.store.read(ref, SAMPLES), Sample)
        kept += rows
        bad += read_rows(context.store.read(ref, QUARANTINE), BadRow)
        shards.append(ViewShard(ref=ref, num_samples=len(rows)))
    if len(bad) > job.max_bad_share * (len(kept) + len(bad)) or not kept:
        raise InputError(
            f"views: at most {job.max_bad_share:.1%} of the samples may lack an irrelevant crop (data.max_bad_share), "
            f"got {len(bad)} of {len(kept) + len(bad)}; the first is {bad[0].id}: {bad[0].reason}"
        )
    write_rows(folder / SAMPLES, kept, Sample)
    write_rows(folder / QUARANTINE, bad, BadRow)
    write_json(folder / VIEW_SHARDS, [shard.model_dump() for shard in shards])
    return Outcome(summary={"num_samples": len(kept), "num_bad": len(bad)})


def _by_image(samples: list[Sample]) -> Iterator[list[Sample]]:
    """Group samples that are cut from one image, so that it is decoded once."""
    groups: dict[ImageRef, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.detail_image or sample.image, []).append(sample)
    yield from groups.values()


def _cut_group(samples: list[Sample], job: ViewShardJob, context: RunContext) -> dict[str, SampleViews | BadRow]:
    """Give the crops of samples of one image."""
    image = None if all(sample.positive_image for sample in samples) else context.dataset.detail(samples[0])
    found: dict[str, SampleViews | BadRow] = {}
    for sample in samples:
        try:
            found[sample.id] = _given(sample, context) or _cut(sample, image, job)
        except NoDisjointCropError as error:
            found[sample.id] = BadRow(row=0, id=sample.id, reason=str(error))
    return found


def _given(sample: Sample, context: RunContext) -> SampleViews | None:
    if sample.positive_image is None or sample.negative_image is None:
        return None
    positive, negative = (
        context.dataset.images.read(given) for given in (sample.positive_image, sample.negative_image)
    )
    return SampleViews(
        sample_id=sample.id,
        positive_png=to_png(positive),
        negative_png=to_png(negative),
        positive_box=None,
        negative_box=None,
        positive_frame=positive.size,
        negative_frame=negative.size,
    )


def _cut(sample: Sample, image: Image.Image | None, job: ViewShardJob) -> SampleViews:
    assert image is not None, "the image is read where a crop is not given"
    assert sample.region is not None, "validation sets rows aside that have neither a region nor crops"
    box = scale_box(sample.region, Size(sample.image.width, sample.image.height), Size(*image.size))
    positive = positive_crop(box, image.width, image.height, job.views.positive)
    negative = negative_crop(positive, job.views.negative, seed=job.seed, sample_id=sample.id)
    pictures = [cut(image, crop.frame_size, crop.box, crop.size, job.views.resample) for crop in (positive, negative)]
    return SampleViews(
        sample_id=sample.id,
        positive_png=to_png(pictures[0]),
        negative_png=to_png(pictures[1]),
        positive_box=positive.box,
        negative_box=negative.box,
        positive_frame=positive.frame_size,
        negative_frame=negative.frame_size,
    )
