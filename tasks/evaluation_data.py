"""Stage: the questions that accuracy is measured on, with their answers. Nothing that trains reads this table."""

import json
from pathlib import Path
from typing import ClassVar

from tasks.adapters.dataset import MODELS, SAMPLES
from tasks.adapters.importers import count_rows, import_evaluation
from tasks.adapters.store import Outcome
from tasks.adapters.tables import write_rows
from tasks.artifacts import ArtifactRef, EvaluationSample, Job
from tasks.config import FileData
from tasks.stage import RunContext, stage


class EvaluationDataJob(Job):
    """Validate an evaluation dataset."""

    stage: ClassVar[str] = "evaluation_data"
    version: ClassVar[int] = 2

    source: str
    models: ArtifactRef
    max_image_pixels: int


@stage(EvaluationDataJob)
def evaluation_data(job: EvaluationDataJob, context: RunContext, folder: Path) -> Outcome:
    """Decode every image and check every row; a bad row stops the run, since it would change the measure."""
    path = context.data.evaluation_path
    assert path is not None, "the flow runs this stage only where there is evaluation data"
    reserved = json.loads(context.store.read(job.models, MODELS))["special_tokens"]
    with context.progress("evaluation data", count_rows(FileData(kind="jsonl", path=path))) as advance:
        samples = import_evaluation(path, context.evaluation.images, reserved=reserved, advance=advance)
    write_rows(folder / SAMPLES, samples, EvaluationSample)
    num_regions = sum(sample.region is not None for sample in samples)
    return Outcome(summary={"num_samples": len(samples), "num_regions": num_regions})
