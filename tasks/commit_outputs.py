"""Stage: a run's outputs as a lakeFS commit: the model, the report and the samples, on a branch of the run's own."""

import re
from pathlib import Path, PurePosixPath
from typing import ClassVar

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.adapters.dataset import QUARANTINE, SAMPLES
from tasks.adapters.files import filesystem, patiently
from tasks.adapters.lakefs_repo import LakeFSRepo
from tasks.adapters.registry import Version
from tasks.adapters.store import Outcome, code_version, write_json
from tasks.artifacts import ArtifactRef, Job
from tasks.config import OutputsConfig
from tasks.ports import DatasetRepo
from tasks.stage import RunContext, retrying, stage

CHAMPION = "champion"
PREFIX = "vzero"
"""Folder of the outputs in the repository."""


class CommitOutputsJob(Job):
    """Commit the outputs of a run."""

    stage: ClassVar[str] = "outputs"
    version: ClassVar[int] = 2

    name: str
    repository: str
    base: str
    samples: ArtifactRef
    selected: ArtifactRef
    report: ArtifactRef

    @property
    def branch(self) -> str:
        """The run's branch: one for each of its results."""
        return f"vzero-{re.sub(r'[^A-Za-z0-9_-]', '-', self.name)}-{self.key[:12]}"


@stage(CommitOutputsJob)
def commit_outputs(job: CommitOutputsJob, context: RunContext, folder: Path) -> Outcome:
    """Write the outputs to the run's branch and commit them."""
    repository: DatasetRepo = LakeFSRepo(job.repository)
    store = context.store
    repository.branch(job.branch, job.base)
    outputs = folder.with_name("outputs")
    outputs.mkdir()
    store.fetch(job.selected, "model", outputs / "model")
    for ref, name in ((job.report, "report.html"), (job.samples, SAMPLES), (job.samples, QUARANTINE)):
        (outputs / name).write_bytes(store.read(ref, name))
    fs, path = filesystem(repository.url(job.branch, PREFIX))

    def put() -> None:
        # The branch starts as the base is: no shard of an earlier run's model may stay beside this one's.
        for name in fs.find(path):
            if not (outputs / PurePosixPath(name).relative_to(path)).exists():
                fs.rm_file(name)
        fs.put(f"{outputs}/", f"{path}/", recursive=True)

    patiently(put, repository.url(job.branch, PREFIX))
    metadata = {
        "run": job.name,
        "key": job.key,
        "samples": job.samples.digest,
        "policy": job.selected.digest,
        "report": job.report.digest,
        "code": code_version(),
    }
    commit = repository.commit(job.branch, f"V-Zero run {job.name}", metadata)
    done = {"repository": job.repository, "branch": job.branch, "commit": commit}
    write_json(folder / "commit.json", done)
    return Outcome(summary=done)


@task(name="publish outputs", task_run_name="publish outputs of {version.name}", cache_policy=NO_CACHE, **retrying)
def publish_outputs(version: Version, outputs: OutputsConfig) -> None:
    """Merge a champion's outputs into the base, and let the tag name them; what is done already stays.

    Args:
        version: the champion; nothing happens where its outputs were not committed.
        outputs: names the repository and the base.
    """
    assert outputs.repository is not None, "the flow asks for it only where there is a repository"
    if version.commit is None:
        return
    repository: DatasetRepo = LakeFSRepo(outputs.repository)
    metadata = {"run": version.run, "version": version.name, "policy": version.policy.digest}
    repository.merge(version.commit, outputs.base, f"Publish V-Zero run {version.run}", metadata)
    # The run's own commit: the base may have moved on since.
    repository.tag(CHAMPION, version.commit)
