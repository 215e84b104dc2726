"""Stage: a model's answers to one shard of a benchmark's questions; scoring them is another stage."""

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

from PIL import Image

from tasks.adapters.benchmarks import question_text
from tasks.adapters.dataset import Dataset, cut
from tasks.adapters.evaluation import PREDICTIONS, PredictJob
from tasks.adapters.store import Outcome
from tasks.adapters.tables import write_rows
from tasks.artifacts import EvaluationSample, Prediction, digest_json
from tasks.ports import SamplingRequest
from tasks.stage import RunContext, stage
from vzero_core.config import ViewConfig
from vzero_core.errors import InputError
from vzero_core.views import Size, positive_crop, scale_box

MAX_SHARD_QUESTIONS = 512
"""What is lost at most when a run is killed while it asks."""
MAX_SHARD_PIXELS = 1 << 28
"""The images of a shard are in memory together: 0.8 GB."""


@stage(PredictJob)
def predict(job: PredictJob, context: RunContext, folder: Path) -> Outcome:
    """Ask every question of the shard once for each seed."""
    data = context.benchmarks[job.benchmark].data
    samples = data.evaluation(job.data)[job.first : job.last]
    requests = [
        SamplingRequest(
            prompt=context.engines.renderer.prompt(
                question_text(sample, job.choice_template), _images(sample, data, job.crop), job.prompt
            ),
            seeds=tuple(int(digest_json([seed, sample.id, "answer"]), 16) for seed in job.generation.seeds),
        )
        for sample in samples
    ]
    ask = context.engines.asking_teacher() if job.role == "teacher" else nullcontext()
    with ask, context.progress(job.title, len(requests)) as advance:
        engine = context.engines.student(job.policy) if job.role == "student" else context.engines.teacher(job.policy)
        started = time.perf_counter()
        responses = engine.sample(
            requests,
            temperature=job.generation.temperature,
            top_p=job.generation.top_p,
            top_k=job.generation.top_k,
            presence_penalty=job.generation.presence_penalty,
            max_new_tokens=job.generation.max_new_tokens,
            advance=advance,
        )
        seconds = time.perf_counter() - started
    rows = [
        Prediction(
            sample_id=sample.id,
            seed=seed,
            response=response.text,
            num_tokens=len(response.token_ids),
            truncated=response.truncated,
        )
        for sample, answers in zip(samples, responses, strict=True)
        for seed, response in zip(job.generation.seeds, answers, strict=True)
    ]
    write_rows(folder / PREDICTIONS, rows, Prediction)
    return Outcome(
        summary={
            "num_questions": len(samples),
            "num_tokens": sum(row.num_tokens for row in rows),
            "truncated_share": sum(row.truncated for row in rows) / len(rows),
        },
        measured={
            "questions_per_second": len(samples) / seconds,
            **context.engines.gpu_seconds(job.role, seconds),
        },
    )


def shards(samples: Sequence[EvaluationSample]) -> Iterator[tuple[int, int]]:
    """Cut a benchmark into shards, by the number of questions and the size of their images.

    Returns:
        For each shard its first row and the row after its last.
    """
    first, pixels = 0, 0
    for row, sample in enumerate(samples):
        size = sample.image.width * sample.image.height
        if row > first and (row - first == MAX_SHARD_QUESTIONS or pixels + size > MAX_SHARD_PIXELS):
            yield first, row
            first, pixels = row, 0
        pixels += size
    yield first, len(samples)


def _images(sample: EvaluationSample, data: Dataset, crop: ViewConfig | None) -> list[Image.Image]:
    full = data.image(sample)
    if crop is None:
        return [full]
    if sample.region is None:
        raise InputError(f"evaluation row {sample.id} must have a region to be shown with its crop; add one")
    detail = data.detail(sample)
    box = scale_box(sample.region, Size(*full.size), Size(*detail.size))
    view = positive_crop(box, detail.width, detail.height, crop.positive)
    return [full, cut(detail, view.frame_size, view.box, view.size, crop.resample)]
