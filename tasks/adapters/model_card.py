"""The model card of a published student: what it is, what it was made of, how well it does, in the hub's format."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tasks.adapters.dataset import SAMPLES
from tasks.adapters.origins import origins
from tasks.adapters.run_job import Evaluation, ReportJob, selected_round
from tasks.adapters.scoreboard import Scoreboard, scoreboards
from tasks.adapters.store import Store
from tasks.adapters.tables import read_rows
from tasks.artifacts import ArtifactRef, Job, Record, digest_json

_TEMPLATES = Path(__file__).parents[1] / "templates"
_TASK = "image-text-to-text"
_TAGS = ["v-zero", "knowledge-distillation", "visual-question-answering"]
_PLACES = frozenset({"path", "image_root", "evaluation_path", "compare_with"})
"""Settings that say where something lies."""
_LOCAL = re.compile(r"(file://)?[/~][^\s{}]*")
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*@")
_MEANING = re.compile(r"([\\`*_\[\]#|~$])")
"""What has a meaning in Markdown within a line."""


class PublishJob(Job):
    """Publish a chosen student."""

    stage: ClassVar[str] = "publish"

    run: str
    policy: ArtifactRef
    selected: ArtifactRef
    report: ArtifactRef
    training_set: ArtifactRef
    samples: ArtifactRef
    """What the run validated, licences included."""
    evaluations: tuple[Evaluation, ...]
    data: str
    """Version of the data."""
    parent: str | None
    """Version that the student was trained on from."""
    config: dict[str, Any]
    license: str | None
    """Of the weights."""

    @property
    def name(self) -> str:
        """Name of the version: of what it is and how it was measured, not of when and where it was made."""
        measured = [(found.benchmark, found.label, found.ref.digest) for found in self.evaluations]
        settings = _without_places(self.config)
        made = [self.policy.digest, self.training_set.digest, measured, self.parent, settings, self.license]
        return f"{self.run}-{digest_json(made)[:12]}"

    @property
    def title(self) -> str:
        """How the run is called on the dashboard."""
        return f"publish {self.name}"


def _without_places(value: Any) -> Any:
    """Leave out of a configuration where things lie: data and weights have names of their own."""
    if isinstance(value, dict):
        return {name: _without_places(part) for name, part in value.items() if name not in _PLACES}
    return [_without_places(part) for part in value] if isinstance(value, list | tuple) else value


class _LicensedRow(Record):
    """Of a sample, what others allow to be done with it."""

    license: str | None


def build_card(job: PublishJob, store: Store, commit: str | None) -> str:
    """Give the card, README.md, of a version; the same artefacts give the same bytes.

    Secrets and paths of the machine are left out, and text of the data is escaped: it adds neither metadata nor HTML.

    Args:
        job: what is published.
        store: where its artefacts lie.
        commit: lakeFS commit of the run's outputs.
    """
    report = ReportJob.model_validate(store.manifest(job.report).job)
    boards = scoreboards(report.model_copy(update={"evaluations": job.evaluations}), store)
    licenses = Counter(row.license for row in read_rows(store.read(job.samples, SAMPLES), _LicensedRow, ["license"]))
    # Whatever is filled in is text, unless it says otherwise: autoescape knows HTML, not Markdown.
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, finalize=_escape, trim_blocks=True
    )
    environment.filters["points"] = lambda value: f"{100 * value:+.1f}"
    return environment.get_template("model_card.md.j2").render(
        metadata=Markup(_metadata(job, boards)),
        job=job,
        commit=commit,
        data=_without_secrets(job.data, is_place=True),
        chosen=selected_round(report, store),
        boards=boards,
        licenses=sorted(licenses.items(), key=lambda item: (-item[1], item[0] or "")),
        origins=origins(report, store),
        learned=store.manifest(job.training_set).summary,
        # Escaped for JSON, which it stays: in a block of code there is no other way.
        config=Markup(json.dumps(_without_secrets(job.config), indent=1, ensure_ascii=False).replace("<", "\\u003c")),
    )


def _metadata(job: PublishJob, boards: Sequence[Scoreboard]) -> str:
    results = [
        EvalResult(
            task_type=_TASK,
            dataset_type=board.after.found.made.job.kind,
            dataset_name=board.name,
            metric_type="accuracy",
            metric_name="accuracy, 95% interval {:.1%} to {:.1%}".format(*board.after.found.interval),
            metric_value=round(board.after.found.accuracy, 4),
        )
        for board in boards
        if board.after is not None
    ]
    return ModelCardData(
        # The hub's identifiers are in lower case.
        license=job.license.lower() if job.license is not None else None,
        library_name="transformers",
        pipeline_tag=_TASK,
        tags=_TAGS,
        model_name=job.name,
        eval_results=results or None,
    ).to_yaml()


def _without_secrets(value: Any, *, is_place: bool = False) -> Any:
    """Leave out of a configuration where on this machine things lie, and what stands in URLs beside the address."""
    if isinstance(value, dict):
        return {name: _without_secrets(inner, is_place=name in _PLACES) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_secrets(inner, is_place=is_place) for inner in value]
    if not isinstance(value, str):
        return value
    if _LOCAL.fullmatch(value) or (is_place and "://" not in value):
        return PurePosixPath(value).name
    address = _CREDENTIALS.sub("", value)
    return re.split(r"[?#]", address)[0] if is_place else address


def _escape(value: Any) -> Any:
    """Make a line of text of a value that has no meaning in Markdown or HTML."""
    if isinstance(value, Markup):
        return value
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MEANING.sub(r"\\\1", text)
