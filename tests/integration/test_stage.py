"""A stage as a Prefect task: errors that can pass are tried again, a user's mistake is not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from prefect import flow

from tasks.adapters.files import StoreUnavailableError
from tasks.adapters.store import Outcome, Store
from tasks.artifacts import ArtifactRef, Job
from tasks.stage import RunContext, stage
from vzero_core.errors import InputError

pytestmark = pytest.mark.e2e


class CountJob(Job):
    stage: ClassVar[str] = "count"

    number: int


def context(folder: Path) -> Any:
    """The part of a RunContext that such a stage needs."""
    return SimpleNamespace(store=Store(str(folder / "store"), folder / "work"))


def counting_stage(errors: list[BaseException]) -> tuple[Any, list[int]]:
    """A stage that fails with the given errors, one a call, then succeeds; and the list of its calls."""
    calls: list[int] = []

    @stage(CountJob)
    def count(job: CountJob, context: RunContext, folder: Path) -> Outcome:
        calls.append(job.number)
        if len(calls) <= len(errors):
            raise errors[len(calls) - 1]
        (folder / "count.txt").write_text(str(job.number))
        return Outcome()

    return count.with_options(retry_delay_seconds=0.01), calls


def run(task: Any, folder: Path) -> ArtifactRef:
    @flow
    def one() -> ArtifactRef:
        result: ArtifactRef = task(CountJob(number=7), context(folder))
        return result

    return one()


@pytest.mark.parametrize("error", [ConnectionError("reset"), TimeoutError("slow"), OSError(28, "No space left")])
def test_what_can_pass_is_tried_again(prefect_api: str, tmp_path: Path, error: BaseException) -> None:
    task, calls = counting_stage([error])
    ref = run(task, tmp_path)
    assert len(calls) == 2
    assert context(tmp_path).store.read(ref, "count.txt") == b"7"


@pytest.mark.parametrize(
    "error",
    [InputError("bad row"), FileNotFoundError("gone"), ValueError("bug"), StoreUnavailableError("was waited for")],
)
def test_what_cannot_pass_is_not(prefect_api: str, tmp_path: Path, error: Exception) -> None:
    task, calls = counting_stage([error])
    with pytest.raises(type(error)):
        run(task, tmp_path)
    assert len(calls) == 1


def test_prefect_remembers_what_the_store_still_has(prefect_api: str, tmp_path: Path) -> None:
    task, calls = counting_stage([])
    first = run(task, tmp_path)
    assert run(task, tmp_path) == first
    assert len(calls) == 1
    other = tmp_path / "another store"
    assert run(task, other) == first
    assert len(calls) == 2
