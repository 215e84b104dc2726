"""Stage: one self-contained HTML page on a run, built from its artefacts alone."""

from pathlib import Path

from tasks.adapters.report_page import build_page
from tasks.adapters.run_job import Evaluation as Evaluation
from tasks.adapters.run_job import ReportJob as ReportJob
from tasks.adapters.run_job import RoundRefs as RoundRefs
from tasks.adapters.store import Outcome
from tasks.stage import RunContext, stage

PAGE = "report.html"


@stage(ReportJob)
def report(job: ReportJob, context: RunContext, folder: Path) -> Outcome:
    """Write the page."""
    benchmarks = {name: benchmark.data for name, benchmark in context.benchmarks.items()}
    (folder / PAGE).write_text(build_page(job, context.store, context.dataset, benchmarks), encoding="utf-8")
    return Outcome()
