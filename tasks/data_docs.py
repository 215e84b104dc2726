"""Stage: what validation found, for people: Data Docs, a list of the rows set aside, a table on the dashboard."""

import csv
import html
from pathlib import Path
from typing import ClassVar

from prefect.artifacts import create_table_artifact
from prefect.context import FlowRunContext

from tasks.adapters.dataset import FACTS, FINDINGS, LIMITS, QUARANTINE
from tasks.adapters.formats import printable
from tasks.adapters.row_facts import Finding, Limits, RowFacts
from tasks.adapters.store import Outcome
from tasks.adapters.tables import read_rows
from tasks.artifacts import ArtifactRef, BadRow, Job
from tasks.stage import RunContext, stage

DATA_DOCS, BAD_ROWS = "data-docs.html", "rows-set-aside.csv"


class DataDocsJob(Job):
    """Show what validation found."""

    stage: ClassVar[str] = "data_docs"

    samples: ArtifactRef


@stage(DataDocsJob)
def data_docs(job: DataDocsJob, context: RunContext, folder: Path) -> Outcome:
    """Write the pages. They are no part of the samples' artefact: they hold dates, and its digest must not."""
    # Here, because its import takes seconds, and most runs find this stage done.
    from tasks.adapters.expectations import data_docs as render
    from tasks.adapters.expectations import judge

    store = context.store
    facts = read_rows(store.read(job.samples, FACTS), RowFacts)
    limits = Limits.model_validate_json(store.read(job.samples, LIMITS))
    (folder / DATA_DOCS).write_text(render(judge([_escaped(fact) for fact in facts], limits).result), encoding="utf-8")
    bad = read_rows(store.read(job.samples, QUARANTINE), BadRow)
    with (folder / BAD_ROWS).open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(BadRow.model_fields)
        table.writerows((row.row, _as_text(row.id or ""), _as_text(row.reason)) for row in bad)
    if FlowRunContext.get() is not None:
        _show(read_rows(store.read(job.samples, FINDINGS), Finding), store.manifest(job.samples).summary)
    return Outcome()


def _escaped(fact: RowFacts) -> RowFacts:
    """Escape what came with the data: great-expectations writes values into its pages as they are."""
    return fact.model_copy(
        update={name: html.escape(value) for name, value in fact.model_dump().items() if isinstance(value, str)}
    )


def _as_text(cell: str) -> str:
    """Keep terminals from obeying a cell, and spreadsheets from taking it for a formula."""
    cell = printable(cell)
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@")) else cell


def _show(findings: list[Finding], summary: dict[str, object]) -> None:
    table = [
        {
            "expectation": finding.name,
            "rows that fail": finding.num_rows,
            "what follows": "set aside" if finding.severity == "critical" else "counted",
        }
        for finding in findings
    ]
    unchecked = summary["unchecked"]
    assert isinstance(unchecked, list)
    table += [{"expectation": name, "rows that fail": "?", "what follows": "not checked"} for name in unchecked]
    create_table_artifact(
        key="data-validation",
        table=table,
        description=f"{summary['num_samples']} samples, {summary['num_bad']} rows set aside",
    )
