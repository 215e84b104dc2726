"""Stage: the questions that accuracy is measured on, with their answers. Nothing that trains reads this table."""

import json
from pathlib import Path
from typing import ClassVar

from tasks.adapters.dataset import MODELS, SAMPLES
from tasks.adapters.importers import EVALUATION, count_rows, import_samples
from tasks.adapters.store import Outcome
from tasks.adapters.tables import write_rows
from tasks.artifacts import ArtifactRef, EvaluationSample, Job
from tasks.stage import RunContext, stage


class EvaluationDataJob(Job):
    """Validate an evaluation dataset."""

    stage: ClassVar[str] = "evaluation_data"

    source: str
    models: ArtifactRef
    max_image_pixels: int


@stage(EvaluationDataJob)
def evaluation_data(job: EvaluationDataJob, context: RunContext, folder: Path) -> Outcome:
    """Decode every image and check every row; a bad row stops the run, since it would change the measure."""
    path = context.data.evaluation
    assert path is not None, "the flow runs this stage only where there is evaluation data"
    reserved = json.loads(context.store.read(job.models, MODELS))["special_tokens"]
    with context.progress("evaluation data", count_rows(path, EVALUATION)) as advance:
        found = import_samples(
            path, EVALUATION, context.evaluation.images, reserved=reserved, max_bad_share=0.0, advance=advance
        )
    write_rows(folder / SAMPLES, found.samples, EvaluationSample)
    return Outcome(summary=found.summary())
