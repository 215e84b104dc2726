"""Stage: the rows of the training data as they are, each image looked at; nothing is judged yet."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from tasks.adapters.dataset import QUARANTINE, ROWS, SEEN, SeenRow
from tasks.adapters.importers import SourceRow, UnreadRow, count_rows, import_row, read_source, row_digest
from tasks.adapters.parallel import in_order
from tasks.adapters.store import Outcome
from tasks.adapters.tables import write_rows
from tasks.artifacts import ArtifactRef, BadRow, ImportedRow, Job
from tasks.stage import RunContext, stage


class ImportDataJob(Job):
    """Import a training dataset."""

    stage: ClassVar[str] = "import_data"
    version: ClassVar[int] = 3

    source: str
    images: Literal["decode", "header"]
    max_image_pixels: int
    known: ArtifactRef | None = None
    """Training set whose rows are passed over, because they were looked at before; None: all rows are new."""

    @property
    def title(self) -> str:
        """How the run is called on the dashboard."""
        return "import data"


@stage(ImportDataJob)
def import_data(job: ImportDataJob, context: RunContext, folder: Path) -> Outcome:
    """Read every new row and look at its images; what is no row at all is set aside.

    A row that stands in the data again, say in a copy of its file, is looked at once and then counts as known.
    """
    known = context.dataset.seen(job.known) if job.known is not None else set()
    seen: dict[str, None] = {}
    num_known = 0

    def new_rows() -> Iterator[SourceRow | UnreadRow]:
        nonlocal num_known
        for row in read_source(source):
            digest = row_digest(row)
            # Who mends a file wants to know of each bad row.
            if digest in known or (digest in seen and not isinstance(row, BadRow)):
                num_known += 1
                advance(1)
            else:
                seen[digest] = None
                yield row

    def look(row: SourceRow | UnreadRow) -> tuple[ImportedRow | BadRow, tuple[str, ...]]:
        if isinstance(row, BadRow):
            return row, ()
        return import_row(row, context.dataset.images, decode=job.images == "decode"), row.dropped

    source = context.data
    rows: list[ImportedRow] = []
    bad: list[BadRow] = []
    dropped: set[str] = set()
    with context.progress(job.title, count_rows(source)) as advance:
        for row, names in in_order(look, new_rows(), context.image_threads):
            if isinstance(row, BadRow):
                bad.append(row)
            else:
                rows.append(row)
            dropped.update(names)
            advance(1)
    write_rows(folder / ROWS, rows, ImportedRow)
    write_rows(folder / QUARANTINE, bad, BadRow)
    write_rows(folder / SEEN, [SeenRow(digest=digest) for digest in seen], SeenRow)
    return Outcome(
        summary={
            "num_rows": len(rows),
            "num_bad": len(bad),
            "num_known": num_known,
            "images": job.images,
            "dropped_fields": sorted(dropped),
        }
    )
