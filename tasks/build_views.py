"""Stage: both crops of every sample, the relevant one and an irrelevant one of equal size."""

from pathlib import Path
from typing import ClassVar

from tasks.adapters.dataset import QUARANTINE, SAMPLES, VIEWS_PER_FILE, SampleViews, cut, to_png, views_file
from tasks.adapters.store import Outcome
from tasks.adapters.tables import write_rows
from tasks.artifacts import ArtifactRef, BadRow, Job, Sample
from tasks.stage import RunContext, stage
from vzero_core.config import ViewConfig
from vzero_core.errors import InputError, NoDisjointCropError
from vzero_core.views import Size, negative_crop, positive_crop, scale_box


class ViewsJob(Job):
    """Cut the crops of a dataset."""

    stage: ClassVar[str] = "views"

    samples: ArtifactRef
    views: ViewConfig
    max_bad_share: float
    seed: int


@stage(ViewsJob)
def build_views(job: ViewsJob, context: RunContext, folder: Path) -> Outcome:
    """Cut both crops of every sample; a sample without a place for an irrelevant crop is set aside."""
    samples = context.dataset.samples(job.samples)
    views: list[SampleViews] = []
    kept: list[Sample] = []
    bad: list[BadRow] = []
    with context.progress("views", len(samples)) as advance:
        for number, sample in enumerate(samples, start=1):
            try:
                views.append(_cut_views(sample, job, context))
                kept.append(sample)
            except NoDisjointCropError as error:
                bad.append(BadRow(row=number, id=sample.id, reason=str(error)))
            advance(1)
    if len(bad) > job.max_bad_share * len(samples) or not kept:
        raise InputError(
            f"views: at most {job.max_bad_share:.1%} of the samples may lack an irrelevant crop (data.max_bad_share), "
            f"got {len(bad)} of {len(samples)}; the first is {bad[0].id}: {bad[0].reason}"
        )
    for start in range(0, len(kept), VIEWS_PER_FILE):
        write_rows(folder / views_file(start), views[start : start + VIEWS_PER_FILE], SampleViews)
    write_rows(folder / SAMPLES, kept, Sample)
    write_rows(folder / QUARANTINE, bad, BadRow)
    return Outcome(summary={"num_samples": len(kept), "num_bad": len(bad)})


def _cut_views(sample: Sample, job: ViewsJob, context: RunContext) -> SampleViews:
    detail = context.dataset.detail(sample)
    full = Size(sample.image.width, sample.image.height)
    box = scale_box(sample.region, full, Size(*detail.size))
    positive = positive_crop(box, detail.width, detail.height, job.views.positive)
    negative = negative_crop(positive, job.views.negative, seed=job.seed, sample_id=sample.id)
    pictures = [cut(detail, crop.frame_size, crop.box, crop.size, job.views.resample) for crop in (positive, negative)]
    return SampleViews(
        sample_id=sample.id,
        positive_png=to_png(pictures[0]),
        negative_png=to_png(pictures[1]),
        positive_box=positive.box,
        negative_box=negative.box,
        positive_frame=positive.frame_size,
        negative_frame=negative.frame_size,
    )
