"""Stage: the questions that accuracy is measured on, with their answers. Nothing that trains reads this table."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from tasks.adapters.benchmarks import BenchmarkRow, benchmark_sample, doubts, num_rows, question_text, read_benchmark
from tasks.adapters.dataset import MODELS, SAMPLES
from tasks.adapters.importers import name_bad_rows
from tasks.adapters.models import model_folder
from tasks.adapters.parallel import in_order
from tasks.adapters.prompts import PromptProcessor
from tasks.adapters.store import Outcome
from tasks.adapters.tables import write_rows
from tasks.artifacts import ArtifactRef, BadRow, EvaluationSample, Job
from tasks.config import PromptConfig
from tasks.evaluation_config import HELD_OUT, BenchmarkKind
from tasks.stage import RunContext, stage
from vzero_core.errors import InputError
from vzero_core.views import Size


class EvaluationDataJob(Job):
    """Validate the questions of a benchmark."""

    stage: ClassVar[str] = "evaluation_data"
    version: ClassVar[int] = 3

    benchmark: str
    kind: BenchmarkKind
    source: str
    models: ArtifactRef
    max_image_pixels: int
    prompt: PromptConfig
    choice_template: str
    max_new_tokens: int

    @property
    def title(self) -> str:
        """How the run is called on the dashboard."""
        return f"data of {self.benchmark}"


@stage(EvaluationDataJob)
def evaluation_data(job: EvaluationDataJob, context: RunContext, folder: Path) -> Outcome:
    """Decode every image and check every row; a bad row stops the run, since it would change the measure."""
    models = json.loads(context.store.read(job.models, MODELS))
    samples = _read(job, context, models["special_tokens"])
    asked = {"student": context.engines.student_path}
    if job.benchmark == HELD_OUT:
        asked["teacher"] = context.engines.teacher_path
    for role, path in asked.items():
        processor = PromptProcessor(model_folder(path))
        _require_fit(samples, processor, models["context_tokens"][role], job, f"the {role}, {path}")
    write_rows(folder / SAMPLES, samples, EvaluationSample)
    return Outcome(summary=_summary(job, samples))


def _read(job: EvaluationDataJob, context: RunContext, reserved: list[str]) -> list[EvaluationSample]:
    benchmark = context.benchmarks[job.benchmark]

    def look(row: BenchmarkRow | BadRow) -> tuple[int, EvaluationSample | BadRow]:
        if isinstance(row, BadRow):
            return row.row, row
        try:
            return row.row, benchmark_sample(row, benchmark.data.images, reserved)
        except InputError as error:
            return row.row, BadRow(row=row.row, id=row.id, reason=str(error))

    found: dict[int, EvaluationSample | BadRow] = {}
    with context.progress(job.title, num_rows(benchmark.config)) as advance:
        for number, row in in_order(look, read_benchmark(benchmark.config), context.image_threads):
            found[number] = row
            advance(1)
    samples: dict[str, EvaluationSample] = {}
    bad: list[BadRow] = []
    for number, row in sorted(found.items()):
        if isinstance(row, BadRow):
            bad.append(row)
        elif row.id in samples:
            reason = "id must be unique, but an earlier row has it too; rename one of them"
            bad.append(BadRow(row=number, id=row.id, reason=reason))
        else:
            samples[row.id] = row
    if bad:
        raise InputError(
            f"evaluation data, {job.benchmark}: no row may be bad, got {len(bad)} of {len(found)}; mend or remove "
            f"them:\n{name_bad_rows(bad)}"
        )
    return list(samples.values())


def _summary(job: EvaluationDataJob, samples: list[EvaluationSample]) -> dict[str, Any]:
    num_choice = sum(sample.options is not None for sample in samples)
    by_size = sorted((sample.image for sample in samples), key=lambda image: image.width * image.height)
    return {
        "num_samples": len(samples),
        "num_regions": sum(sample.region is not None for sample in samples),
        "num_choice": num_choice,
        "num_open": len(samples) - num_choice,
        "num_groups": len({sample.group or f"id {sample.id}" for sample in samples}),
        "categories": dict(sorted(Counter(sample.category for sample in samples if sample.category).items())),
        "smallest_image": [by_size[0].width, by_size[0].height],
        "largest_image": [by_size[-1].width, by_size[-1].height],
        "warnings": doubts(job.kind, samples),
    }


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
                f"evaluation data, {job.benchmark}: {sample.id}: image {sample.image.uri} of {size.width}x"
                f"{size.height} is refused by the processor of {who}: {refusal}; remove the row, or change the image"
            )
    texts = [question_text(sample, job.choice_template) for sample in samples]
    lengths = processor.lengths(texts, [[size] for size in sizes], job.prompt)
    if context_tokens is None or lengths is None:
        return
    limit = context_tokens - job.max_new_tokens
    for sample, length in zip(samples, lengths, strict=True):
        if length > limit:
            raise InputError(
                f"evaluation data, {job.benchmark}: {sample.id}: the prompt must have at most {limit} tokens for "
                f"{who} (its context of {context_tokens} less generation.max_new_tokens {job.max_new_tokens}), got "
                f"{length}; lower max_new_tokens, shorten the question, or make the image smaller"
            )
