"""Stage: the accuracy of a model on held-out questions, with its interval."""

import math
import re
import time
from pathlib import Path
from typing import ClassVar

from PIL import Image
from pydantic import Field

from tasks.adapters.dataset import cut
from tasks.adapters.store import Outcome
from tasks.adapters.tables import write_rows
from tasks.artifacts import ArtifactRef, EvaluationSample, Job, Prediction, Role
from tasks.config import EngineFingerprint, PromptConfig
from tasks.ports import SamplingRequest
from tasks.stage import RunContext, stage
from vzero_core.config import ViewConfig
from vzero_core.errors import InputError
from vzero_core.views import Size, positive_crop, scale_box

PREDICTIONS = "predictions.parquet"
Z_95 = 1.959963984540054


class EvaluateJob(Job):
    """Measure a model."""

    stage: ClassVar[str] = "evaluate"

    role: Role
    policy: ArtifactRef
    data: ArtifactRef
    crop: ViewConfig | None = Field(description="How the region's crop is cut; none: the full image alone.")
    prompt: PromptConfig
    answer_pattern: str
    max_new_tokens: int
    engine: EngineFingerprint

    @property
    def title(self) -> str:
        """How the run is called on the dashboard."""
        return f"evaluate {self.role}" + (", with crop" if self.crop else "")


@stage(EvaluateJob)
def evaluate(job: EvaluateJob, context: RunContext, folder: Path) -> Outcome:
    """Answer every question greedily and compare with the answer by exact match."""
    samples = context.evaluation.evaluation(job.data)
    engine = context.engines.student(job.policy) if job.role == "student" else context.engines.teacher(job.policy)
    requests = [
        SamplingRequest(
            prompt=context.engines.renderer.prompt(sample.question, _images(sample, job, context), job.prompt),
            seeds=(0,),
        )
        for sample in samples
    ]
    started = time.perf_counter()
    with context.progress(job.title, len(requests)) as advance:
        responses = engine.sample(requests, temperature=0.0, max_new_tokens=job.max_new_tokens, advance=advance)
    seconds = time.perf_counter() - started
    pattern = re.compile(job.answer_pattern, re.DOTALL)
    rows = []
    for sample, (response,) in zip(samples, responses, strict=True):
        extracted = extract_answer(response.text, pattern)
        rows.append(
            Prediction(
                sample_id=sample.id,
                response=response.text,
                extracted=extracted,
                answer=sample.answer,
                correct=extracted is not None and normalise(extracted) == normalise(sample.answer),
                truncated=response.truncated,
            )
        )
    write_rows(folder / PREDICTIONS, rows, Prediction)
    num_correct = sum(row.correct for row in rows)
    low, high = wilson_interval(num_correct, len(rows))
    return Outcome(
        summary={
            "accuracy": num_correct / len(rows),
            "low": low,
            "high": high,
            "num_questions": len(rows),
            "truncated_share": sum(row.truncated for row in rows) / len(rows),
        },
        measured={"questions_per_second": len(rows) / seconds},
    )


def _images(sample: EvaluationSample, job: EvaluateJob, context: RunContext) -> list[Image.Image]:
    full = context.evaluation.image(sample)
    if job.crop is None:
        return [full]
    if sample.region is None:
        raise InputError(f"evaluation row {sample.id} must have a region to be shown with its crop; add one")
    detail = context.evaluation.detail(sample)
    box = scale_box(sample.region, Size(*full.size), Size(*detail.size))
    crop = positive_crop(box, detail.width, detail.height, job.crop.positive)
    return [full, cut(detail, crop.frame_size, crop.box, crop.size, job.crop.resample)]


def extract_answer(text: str, pattern: re.Pattern[str]) -> str | None:
    """Give the pattern's first group in its last match; None where it does not match."""
    matches = list(pattern.finditer(text))
    return matches[-1].group(1) if matches else None


def normalise(answer: str) -> str:
    """Fold what no reader would call a difference: case, outer space, a final full stop."""
    return answer.strip().rstrip(".").strip().casefold()


def wilson_interval(num_correct: int, total: int) -> tuple[float, float]:
    """Give the 95% Wilson score interval of a proportion.

        (p + z^2/2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2/n),  z = 1.96

    Source: E. B. Wilson, Journal of the American Statistical Association 22 (1927).
    """
    share, square = num_correct / total, Z_95**2
    centre = share + square / (2 * total)
    half = Z_95 * math.sqrt(share * (1 - share) / total + square / (4 * total**2))
    scale = 1 + square / total
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
