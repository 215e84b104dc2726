"""Stage: the rows of the training data as they are, each image looked at; nothing is judged yet."""

from pathlib import Path
from typing import ClassVar, Literal

from tasks.adapters.dataset import QUARANTINE, ROWS
from tasks.adapters.importers import SourceRow, count_rows, import_row, read_source
from tasks.adapters.parallel import in_order
from tasks.adapters.store import Outcome
from tasks.adapters.tables import write_rows
from tasks.artifacts import BadRow, ImportedRow, Job
from tasks.stage import RunContext, stage


class ImportDataJob(Job):
    """Import a training dataset."""

    stage: ClassVar[str] = "import_data"

    source: str
    images: Literal["decode", "header"]
    max_image_pixels: int

    @property
    def title(self) -> str:
        """How the run is called on the dashboard."""
        return "import data"


@stage(ImportDataJob)
def import_data(job: ImportDataJob, context: RunContext, folder: Path) -> Outcome:
    """Read every row and look at every image; what is no row at all is set aside."""

    def look(row: SourceRow | BadRow) -> tuple[ImportedRow | BadRow, tuple[str, ...]]:
        if isinstance(row, BadRow):
            return row, ()
        return import_row(row, context.dataset.images, decode=job.images == "decode"), row.dropped

    source = context.data
    rows: list[ImportedRow] = []
    bad: list[BadRow] = []
    dropped: set[str] = set()
    with context.progress(job.title, count_rows(source)) as advance:
        for row, names in in_order(look, read_source(source), context.image_threads):
            if isinstance(row, BadRow):
                bad.append(row)
            else:
                rows.append(row)
            dropped.update(names)
            advance(1)
    write_rows(folder / ROWS, rows, ImportedRow)
    write_rows(folder / QUARANTINE, bad, BadRow)
    summary = {"num_rows": len(rows), "num_bad": len(bad), "images": job.images, "dropped_fields": sorted(dropped)}
    return Outcome(summary=summary)
