"""Stage: the training rows that can be used, and the others with the reason. There is no field for an answer."""

import json
from pathlib import Path
from typing import ClassVar

from tasks.adapters.dataset import MODELS, QUARANTINE, SAMPLES
from tasks.adapters.importers import TRAINING, count_rows, import_samples
from tasks.adapters.store import Outcome
from tasks.adapters.tables import write_rows
from tasks.artifacts import ArtifactRef, BadRow, Job, Sample
from tasks.stage import RunContext, stage


class ValidateJob(Job):
    """Validate a training dataset."""

    stage: ClassVar[str] = "validate"

    source: str
    models: ArtifactRef
    max_bad_share: float
    max_image_pixels: int


@stage(ValidateJob)
def validate(job: ValidateJob, context: RunContext, folder: Path) -> Outcome:
    """Decode every image, check every row, set bad ones aside; stop where their share is above the limit."""
    reserved = json.loads(context.store.read(job.models, MODELS))["special_tokens"]
    with context.progress("validate", count_rows(context.data.train, TRAINING)) as advance:
        found = import_samples(
            context.data.train,
            TRAINING,
            context.dataset.images,
            reserved=reserved,
            max_bad_share=job.max_bad_share,
            advance=advance,
        )
    write_rows(folder / SAMPLES, found.samples, Sample)
    write_rows(folder / QUARANTINE, found.bad, BadRow)
    return Outcome(summary=found.summary())
