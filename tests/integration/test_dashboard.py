"""Artifacts of a flow run on a real server: one of each key, brought up to date, and never what a run ends by."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import Artifact

from tasks.dashboard import Board, duration, flow_run_id, show_progress, telling

pytestmark = pytest.mark.e2e


class Clock:
    """A clock that a test sets; and a terminal that shows nothing."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    @contextmanager
    def track(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda count: None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("tasks.dashboard.time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def in_flow(body: Callable[[], Any]) -> Any:
    @flow
    def one() -> Any:
        return body()

    return one()


def artifacts() -> dict[str, Artifact]:
    """Those of the flow run that is running; each key once."""
    mine = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id()]))
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(flow_run_filter=mine)
    by_key = {str(artifact.key): artifact for artifact in found}
    assert len(by_key) == len(found)
    return by_key


def test_an_artifact_is_brought_up_to_date_by_whoever_comes_later(prefect_api: str) -> None:
    def body() -> None:
        assert Board("rounds").data("rounds") is None
        Board("rounds", "gate").put("table", "rounds", json.dumps([{"round": 1}]), "one")
        board = Board("rounds", "gate")
        assert json.loads(board.data("rounds")) == [{"round": 1}]
        board.put("table", "rounds", json.dumps([{"round": 2}]), "two")
        board.put("markdown", "gate", "healthy", "gate")
        found = artifacts()
        assert {key: artifact.description for key, artifact in found.items()} == {"rounds": "two", "gate": "gate"}
        assert json.loads(str(found["rounds"].data)) == [{"round": 2}]

    in_flow(body)


def test_another_run_has_an_artifact_of_its_own(prefect_api: str) -> None:
    def body() -> None:
        assert Board("run").data("run") is None
        Board("run").put("markdown", "run", "text", "line")

    in_flow(body)
    in_flow(body)


def test_one_that_somebody_deleted_is_made_again(prefect_api: str) -> None:
    def body() -> None:
        board = Board("run")
        board.put("markdown", "run", "first", "line")
        with get_client(sync_client=True) as client:
            client.delete_artifact(artifacts()["run"].id)
        board.put("markdown", "run", "second", "line")
        assert artifacts()["run"].data == "second"

    in_flow(body)


def test_a_server_that_is_away_ends_no_run(caplog: pytest.LogCaptureFixture) -> None:
    @telling()
    def show() -> None:
        httpx.get("http://127.0.0.1:9/api")

    show()
    assert "the dashboard could not be told; the run goes on" in caplog.text


def test_a_mistake_of_ours_is_not_passed_over() -> None:
    with pytest.raises(httpx.InvalidURL), telling():
        raise httpx.InvalidURL("not a matter of the server being away")


def test_progress_says_how_far_how_fast_and_how_long(prefect_api: str, clock: Clock) -> None:
    said = []

    @task(name="rollouts")
    def work() -> None:
        with show_progress(clock, "rollouts, round 3", 40) as advance:
            for seconds, count in ((1, 5), (2, 5), (5, 10)):
                clock.now += seconds
                advance(count)
                said.append(artifacts().get("progress-rollouts"))
            clock.now += 2
        said.append(artifacts()["progress-rollouts"])

    in_flow(work)
    assert said[0] is None, "what is over at once is not worth a request"
    assert [(made.description, made.data) for made in said[1:]] == [
        ("rollouts, round 3: 10 of 40, 3.33 per second, 9.0 s left", 25.0),
        ("rollouts, round 3: 20 of 40, 2 per second, 10 s left", 50.0),
        ("rollouts, round 3: done in 10 s, 2 per second", 100.0),
    ]


def test_rounds_of_one_stage_share_an_artifact(prefect_api: str, clock: Clock) -> None:
    @task(name="replay")
    def work(number: int) -> None:
        with show_progress(clock, f"replay, round {number}", 2) as advance:
            clock.now += 3
            advance(2)

    def body() -> None:
        work(1)
        work(2)
        with show_progress(clock, "rounds", 2) as advance:
            clock.now += 3
            advance(2)
        found = artifacts()
        assert found.keys() == {"progress-replay", "progress-rounds"}
        assert found["progress-replay"].description == "replay, round 2: done in 3.0 s, 1.5 s each"

    in_flow(body)


def test_rounds_that_were_done_already_do_not_count_as_fast(prefect_api: str, clock: Clock) -> None:
    def body() -> None:
        with show_progress(clock, "rounds", 100) as advance:
            for _ in range(50):
                advance(1)
            for _ in range(3):
                clock.now += 60
                advance(1)
            assert artifacts()["progress-rounds"].description == "rounds: 53 of 100, 1 min each, 47 min left"

    in_flow(body)


def test_outside_a_flow_nothing_is_asked_of_a_server(clock: Clock) -> None:
    with show_progress(clock, "bytes", 2) as advance:
        clock.now += 10
        advance(1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (200, "3 min 20 s"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
        (86400 * 3 + 4 * 3600 + 59, "3 d 4 h"),
    ],
)
def test_a_time_is_written_as_a_person_would(seconds: float, text: str) -> None:
    assert duration(seconds) == text
