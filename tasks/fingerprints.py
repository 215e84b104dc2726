"""Stage: pictures and questions of evaluation data, without any answer, so that training can be kept clear of them."""

from pathlib import Path
from typing import ClassVar

from tasks.adapters.dataset import FINGERPRINTS
from tasks.adapters.images import ImageReader
from tasks.adapters.importers import SourceRow, count_rows, image_root, import_row, name_bad_rows, read_source
from tasks.adapters.parallel import in_order
from tasks.adapters.row_facts import Fingerprint
from tasks.adapters.store import Outcome
from tasks.adapters.tables import write_rows
from tasks.artifacts import BadRow, Job
from tasks.stage import RunContext, stage
from vzero_core.errors import InputError


class FingerprintsJob(Job):
    """Fingerprint one file of evaluation data."""

    stage: ClassVar[str] = "fingerprints"

    source: str
    max_image_pixels: int


@stage(FingerprintsJob)
def fingerprints(job: FingerprintsJob, context: RunContext, folder: Path) -> Outcome:
    """Hash every picture; a row that cannot be read stops the run, since training could not be kept clear of it."""
    source = context.compared[job.source]
    images = ImageReader(image_root(source), job.max_image_pixels)
    name = source.path.rsplit("/", 1)[-1]

    def look(row: SourceRow | BadRow) -> Fingerprint | BadRow:
        if isinstance(row, BadRow):
            return row
        found = import_row(row, images, decode=True)
        if found.image_hash is None:
            return BadRow(row=row.row, id=row.id, reason=found.problem or "image must be readable")
        return Fingerprint(row=row.row, image_hash=found.image_hash, question=row.question)

    rows: list[Fingerprint] = []
    bad: list[BadRow] = []
    with context.progress(f"fingerprints of {name}", count_rows(source)) as advance:
        for row in in_order(look, read_source(source), context.image_threads):
            if isinstance(row, BadRow):
                bad.append(row)
            else:
                rows.append(row)
            advance(1)
    if bad:
        raise InputError(
            f"every row of {source.path} must have an image and a question, or training could not be kept clear of it; "
            f"got {len(bad)} bad rows of {len(bad) + len(rows)}; mend or remove them:\n{name_bad_rows(bad)}"
        )
    write_rows(folder / FINGERPRINTS, rows, Fingerprint)
    return Outcome(summary={"num_rows": len(rows)})
