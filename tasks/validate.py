"""Stage: the training rows that can be used, and the others with the reason. There is no field for an answer."""

import json
from pathlib import Path
from typing import Any, ClassVar

from tasks.adapters.dataset import FACTS, FINDINGS, FINGERPRINTS, LIMITS, MODELS, QUARANTINE, ROWS, SAMPLES
from tasks.adapters.importers import NUM_NAMED, name_bad_rows
from tasks.adapters.models import model_folder
from tasks.adapters.prompts import PromptProcessor
from tasks.adapters.row_facts import (
    NEEDS_NO_CLIPPING,
    Compared,
    Finding,
    Fingerprint,
    Limits,
    Prompts,
    RowFacts,
    clipped_region,
    gather_facts,
)
from tasks.adapters.store import Outcome, write_json
from tasks.adapters.tables import read_rows, write_rows
from tasks.artifacts import ArtifactRef, BadRow, ImportedRow, Job, Sample
from tasks.config import PromptConfig
from tasks.stage import RunContext, stage
from vzero_core.config import ViewConfig
from vzero_core.errors import InputError


class ValidateJob(Job):
    """Validate a training dataset."""

    stage: ClassVar[str] = "validate"
    version: ClassVar[int] = 2

    rows: ArtifactRef
    models: ArtifactRef
    compared: tuple[Compared, ...]
    prompt: PromptConfig
    views: ViewConfig
    region_required: bool
    max_region_share: float
    max_hash_distance: int
    max_prompt_tokens: int | None
    max_new_tokens: int


@stage(ValidateJob)
def validate(job: ValidateJob, context: RunContext, folder: Path) -> Outcome:
    """Judge every row by a great-expectations suite, and set bad ones aside with the reason."""
    # Here, because its import takes seconds, and most runs find this stage done.
    from tasks.adapters.expectations import judge

    store = context.store
    models = json.loads(store.read(job.models, MODELS))
    rows = read_rows(store.read(job.rows, ROWS), ImportedRow)
    limits = _limits(job, models["context_tokens"])
    facts = gather_facts(
        rows,
        reserved=models["special_tokens"],
        others=[
            (compared.name, row)
            for compared in job.compared
            for row in read_rows(store.read(compared.fingerprints, FINGERPRINTS), Fingerprint)
        ],
        max_distance=job.max_hash_distance,
        prompts=Prompts(
            student=PromptProcessor(model_folder(context.engines.student_path)),
            teacher=PromptProcessor(model_folder(context.engines.teacher_path)),
            config=job.prompt,
            views=job.views,
        ),
    )
    judgement = judge(facts, limits)
    bad = read_rows(store.read(job.rows, QUARANTINE), BadRow)
    bad += [
        BadRow(row=row.row, id=row.id, reason=judgement.reasons[row.row])
        for row in rows
        if row.row in judgement.reasons
    ]
    bad.sort(key=lambda row: row.row)
    samples = [_sample(row) for row in rows if row.row not in judgement.reasons]
    write_rows(folder / SAMPLES, samples, Sample)
    write_rows(folder / QUARANTINE, bad, BadRow)
    write_rows(folder / FACTS, facts, RowFacts)
    write_rows(folder / FINDINGS, judgement.findings, Finding)
    write_json(folder / LIMITS, limits.model_dump())
    imported = store.manifest(job.rows).summary
    clipped = next(finding for finding in judgement.findings if finding.name == NEEDS_NO_CLIPPING)
    return Outcome(
        summary={
            "num_samples": len(samples),
            "num_bad": len(bad),
            "num_clipped": clipped.num_rows,
            "dropped_fields": imported["dropped_fields"],
            "bad": [row.model_dump() for row in bad[:NUM_NAMED]],
            "unchecked": _unchecked(job, facts, imported["images"]),
        }
    )


def require_usable(summary: dict[str, Any], max_bad_share: float, where: str) -> None:
    """Stop where too many rows were set aside.

    Args:
        summary: of the validation.
        max_bad_share: share of bad rows, 0 to 1.
        where: the list of all bad rows, for the message.

    Raises:
        InputError: the share is above the limit, or no row is left.
    """
    num_bad, total = summary["num_bad"], summary["num_bad"] + summary["num_samples"]
    if num_bad > max_bad_share * total or not summary["num_samples"]:
        named = [BadRow.model_validate(row) for row in summary["bad"]]
        raise InputError(
            f"training data: at most {max_bad_share:.1%} of the rows may be bad (data.max_bad_share), got {num_bad} of "
            f"{total}; mend or remove them (all of them stand in {where}):\n{name_bad_rows(named)}"
        )


def _limits(job: ValidateJob, context_tokens: dict[str, int | None]) -> Limits:
    limits = {}
    for role, context in context_tokens.items():
        # A response is appended to the prompt in the student's sampling and in the teacher's replay alike.
        known = [limit for limit in (context and context - job.max_new_tokens, job.max_prompt_tokens) if limit]
        limits[role] = min(known, default=None)
    return Limits(
        region_required=job.region_required,
        max_region_share=job.max_region_share,
        max_student_tokens=limits["student"],
        max_teacher_tokens=limits["teacher"],
    )


def _sample(row: ImportedRow) -> Sample:
    assert row.image is not None, "a row without its image is set aside"
    return Sample(
        id=row.id,
        image=row.image,
        question=row.question,
        region=clipped_region(row),
        detail_image=row.detail_image,
        positive_image=row.positive_image,
        negative_image=row.negative_image,
        source=row.source,
        license=row.license,
        group=row.group,
    )


def _unchecked(job: ValidateJob, facts: list[RowFacts], images: str) -> list[str]:
    unchecked = []
    if images == "header":
        unchecked.append("that images can be decoded, near-duplicates, overlap with evaluation data (images: header)")
    elif not job.compared:
        unchecked.append("overlap with evaluation data (none is named)")
    if all(fact.student_tokens is None for fact in facts if not fact.problem):
        unchecked.append("length of prompts (this model's processor cannot tell it without pixels)")
    return unchecked
