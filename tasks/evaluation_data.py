"""Stage: the questions that accuracy is measured on, with their answers. Nothing that trains reads this table."""

import json
from pathlib import Path
from typing import ClassVar

from tasks.adapters.dataset import MODELS, SAMPLES
from tasks.adapters.importers import count_rows, import_evaluation
from tasks.adapters.models import model_folder
from tasks.adapters.prompts import PromptProcessor
from tasks.adapters.store import Outcome
from tasks.adapters.tables import write_rows
from tasks.artifacts import ArtifactRef, EvaluationSample, Job
from tasks.config import FileData, PromptConfig
from tasks.stage import RunContext, stage
from vzero_core.errors import InputError
from vzero_core.views import Size


class EvaluationDataJob(Job):
    """Validate an evaluation dataset."""

    stage: ClassVar[str] = "evaluation_data"
    version: ClassVar[int] = 2

    source: str
    models: ArtifactRef
    max_image_pixels: int
    prompt: PromptConfig
    max_new_tokens: int


@stage(EvaluationDataJob)
def evaluation_data(job: EvaluationDataJob, context: RunContext, folder: Path) -> Outcome:
    """Decode every image and check every row; a bad row stops the run, since it would change the measure."""
    path = context.data.evaluation_path
    assert path is not None, "the flow runs this stage only where there is evaluation data"
    models = json.loads(context.store.read(job.models, MODELS))
    reserved = models["special_tokens"]
    with context.progress("evaluation data", count_rows(FileData(kind="jsonl", path=path))) as advance:
        samples = import_evaluation(path, context.evaluation.images, reserved=reserved, advance=advance)
    for role, path in (("student", context.engines.student_path), ("teacher", context.engines.teacher_path)):
        processor = PromptProcessor(model_folder(path))
        _require_fit(samples, processor, models["context_tokens"][role], job, f"the {role}, {path}")
    write_rows(folder / SAMPLES, samples, EvaluationSample)
    num_regions = sum(sample.region is not None for sample in samples)
    return Outcome(summary={"num_samples": len(samples), "num_regions": num_regions})


def _require_fit(
    samples: list[EvaluationSample],
    processor: PromptProcessor,
    context_tokens: int | None,
    job: EvaluationDataJob,
    who: str,
) -> None:
    """Refuse questions that a model cannot be asked: an image of a shape it does not take, or too many tokens."""
    sizes = [Size(sample.image.width, sample.image.height) for sample in samples]
    for sample, size in zip(samples, sizes, strict=True):
        refusal = processor.refusal(size)
        if refusal is not None:
            raise InputError(
                f"evaluation data: {sample.id}: image {sample.image.uri} of {size.width}x{size.height} is refused by "
                f"the processor of {who}: {refusal}; remove the row, or change the image"
            )
    lengths = processor.lengths([sample.question for sample in samples], [[size] for size in sizes], job.prompt)
    if context_tokens is None or lengths is None:
        return
    limit = context_tokens - job.max_new_tokens
    for sample, length in zip(samples, lengths, strict=True):
        if length > limit:
            raise InputError(
                f"evaluation data: {sample.id}: the prompt must have at most {limit} tokens for {who}, got {length}; "
                "shorten the question, or make the image smaller"
            )
