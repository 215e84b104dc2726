"""Stage: pictures and questions of evaluation data, without any answer, so that training can be kept clear of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from tasks.adapters.benchmarks import BenchmarkRow, benchmark_root, num_rows, read_benchmark
from tasks.adapters.dataset import FINGERPRINTS
from tasks.adapters.images import ImageReader
from tasks.adapters.importers import SourceRow, count_rows, image_root, name_bad_rows, read_source
from tasks.adapters.parallel import in_order
from tasks.adapters.row_facts import Fingerprint
from tasks.adapters.store import Outcome
from tasks.adapters.tables import write_rows
from tasks.artifacts import BadRow, Job
from tasks.evaluation_config import BenchmarkConfig
from tasks.stage import RunContext, stage
from vzero_core.errors import InputError


class FingerprintsJob(Job):
    """Fingerprint one benchmark, or one file of evaluation data."""

    stage: ClassVar[str] = "fingerprints"

    source: str
    max_image_pixels: int


@stage(FingerprintsJob)
def fingerprints(job: FingerprintsJob, context: RunContext, folder: Path) -> Outcome:
    """Hash every picture; a row that cannot be read stops the run, since training could not be kept clear of it."""
    source = context.compared[job.source]
    found: Iterator[SourceRow | BenchmarkRow | BadRow]
    if isinstance(source, BenchmarkConfig):
        name, root, total, found = source.name, benchmark_root(source), num_rows(source), read_benchmark(source)
    else:
        name, root, total = source.path.rsplit("/", 1)[-1], image_root(source), count_rows(source)
        found = read_source(source)
    images = ImageReader(root, job.max_image_pixels)

    def look(row: SourceRow | BenchmarkRow | BadRow) -> Fingerprint | BadRow:
        if isinstance(row, BadRow):
            return row
        try:
            image_hash = images.inspect(row.image, decode=True).hash
        except InputError as error:
            return BadRow(row=row.row, id=row.id, reason=str(error))
        assert image_hash is not None, "every image is decoded"
        return Fingerprint(row=row.row, image_hash=image_hash, question=row.question)

    rows: list[Fingerprint] = []
    bad: list[BadRow] = []
    with context.progress(f"fingerprints of {name}", total) as advance:
        for row in in_order(look, found, context.image_threads):
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
