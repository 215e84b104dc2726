"""What `python -m flows.deploy` leaves on a real Prefect server, and what that server then does by itself."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolUpdate
from prefect.client.schemas.objects import FlowRun, State
from prefect.events import AutomationCore, emit_event
from prefect.events.schemas.automations import Automation
from prefect.events.worker import EventsWorker
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import AwaitingRetry, Cancelled, Cancelling, Completed, Crashed, Pending, Running

from flows import deploy
from flows.config import LAPTOP, RunConfig
from flows.events import announce_samples
from flows.server import ServerError, own_server
from tasks.serve import teacher_limit

pytestmark = pytest.mark.e2e

NAMES = ["vzero/full-pipeline", "vzero-retrain/retrain", "vzero-evaluate/evaluate", "vzero-watch/new-data"]
TEACHERS = ["http://teacher-1:8000", "http://teacher-2:8000"]
PATIENCE = 60.0
"""Seconds for what the server does by itself; it takes one or two on an idle machine."""

T = TypeVar("T")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncPrefectClient]:
    """A server of its own, where no other test has runs, with all registered."""
    home = tmp_path_factory.mktemp("prefect")
    with own_server(home), get_client(sync_client=True) as client:
        assert deploy.main([]) == 0
        yield client


def until(found: Callable[[], T | None]) -> T:
    """Wait for what the server does by itself."""
    deadline = time.monotonic() + PATIENCE
    while (it := found()) is None:
        assert time.monotonic() < deadline, "it does so in seconds"
        time.sleep(0.2)
    return it


def everything(client: SyncPrefectClient) -> dict[str, Any]:
    """All that was registered, with times of change and ids."""
    deployments = [client.read_deployment_by_name(name) for name in NAMES]
    return {
        "pools": [client.read_work_pool(name).model_dump() for name in ("vzero-gpu", "vzero-cpu")],
        "deployments": [found.model_dump(exclude={"status", "last_polled"}) for found in deployments],
        "automations": sorted((found.model_dump() for found in client.read_automations()), key=lambda one: one["name"]),
        "limits": [limit.model_dump() for limit in client.read_global_concurrency_limits()],
    }


def attached(name: str = "attached", **changes: Any) -> RunConfig:
    values = {
        "name": name,
        "teacher": {"path": "embedded:teacher", "engine": {"kind": "vllm", "version": "0.32.0"}},
        "placement": {"teacher_servers": {"urls": TEACHERS}},
    }
    return RunConfig.model_validate({**values, **changes})


def started(client: SyncPrefectClient, name: str) -> FlowRun:
    return client.create_flow_run_from_deployment(client.read_deployment_by_name(name).id)


def move(client: SyncPrefectClient, run: FlowRun, *states: State[Any]) -> None:
    """Do to a run's state what a worker and a run do."""
    for state in states:
        client.set_flow_run_state(run.id, state)


def change(client: SyncPrefectClient, automation: Automation, **changes: Any) -> None:
    content = {**automation.model_dump(exclude={"id", "owner_resource"}), **changes}
    client.update_automation(automation.id, AutomationCore.model_validate(content))


def state_of(client: SyncPrefectClient, run: FlowRun) -> State[Any]:
    state = client.read_flow_run(run.id).state
    assert state is not None
    return state


def in_state(client: SyncPrefectClient, run: FlowRun, name: str) -> State[Any]:
    """Wait until a run is in a state."""
    return until(lambda: state if (state := state_of(client, run)).name == name else None)


def test_pools_deployments_and_schedule_are_there(client: SyncPrefectClient) -> None:
    assert client.read_work_pool("vzero-gpu").concurrency_limit == 1
    # The worker's settings show in the form, before any worker was there.
    assert "working_dir" in client.read_work_pool("vzero-cpu").base_job_template["variables"]["properties"]
    for name in NAMES:
        deployment = client.read_deployment_by_name(name)
        assert deployment.tags == ["vzero"]
        assert deployment.description
        assert deployment.enforce_parameter_schema
        assert deployment.job_variables["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    [poll] = client.read_deployment_by_name("vzero-watch/new-data").schedules
    assert poll.schedule.interval.total_seconds() == 600
    assert poll.active


def test_a_second_time_changes_nothing(client: SyncPrefectClient, capsys: pytest.CaptureFixture[str]) -> None:
    deploy.deploy(attached(), print)
    before = everything(client)
    capsys.readouterr()
    deploy.deploy(attached(), print)
    assert everything(client) == before
    assert "made" not in capsys.readouterr().out
    # Without a configuration the deployments keep theirs.
    assert deploy.main([]) == 0
    assert everything(client) == before
    assert len(before["automations"]) == 4


def test_a_configuration_becomes_the_default(client: SyncPrefectClient, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text('name = "mine"\n[store]\nurl = "artefacts"\n')
    assert deploy.main(["--config", str(tmp_path / "my.toml"), "--web-url", "http://127.0.0.1:4201"]) == 0
    for name in NAMES:
        given = client.read_deployment_by_name(name).parameters["config"]
        assert given["name"] == "mine"
        assert given["store"]["url"] == str(tmp_path / "artefacts")
        assert given["store"]["web_url"] == "http://127.0.0.1:4201"
        assert RunConfig.model_validate(given).rounds == LAPTOP.rounds


def test_the_form_refuses_what_the_configuration_would(client: SyncPrefectClient) -> None:
    deployment = client.read_deployment_by_name("vzero/full-pipeline")
    wrong = {"config": {"rounds": {"num_rounds": 0}}}
    with pytest.raises(PrefectHTTPStatusError, match="409"):
        client.create_flow_run_from_deployment(deployment.id, parameters=wrong)


def test_what_an_operator_set_stays(client: SyncPrefectClient) -> None:
    deploy.deploy(attached(), lambda _: None)
    limit = teacher_limit(TEACHERS[0])
    assert client.read_global_concurrency_limit_by_name(limit).limit == 1
    client.upsert_global_concurrency_limit_by_name(limit, 3)
    client.update_work_pool("vzero-gpu", WorkPoolUpdate(concurrency_limit=2))
    watch = client.read_deployment_by_name("vzero-watch/new-data")
    client.update_deployment_schedule(watch.id, watch.schedules[0].id, active=False)
    own = {"env": {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30", "CUDA_VISIBLE_DEVICES": "1"}}
    pipeline = client.read_deployment_by_name("vzero/full-pipeline")
    client.update_deployment(pipeline.id, DeploymentUpdate(job_variables=own, tags=["vzero"], paused=True))
    [again] = client.read_automations_by_name("vzero: crashed, starts again")
    client.pause_automation(again.id)
    try:
        # Renewed: the configuration is another one.
        deploy.deploy(attached("other"), lambda _: None)
        assert client.read_global_concurrency_limit_by_name(limit).limit == 3
        assert client.read_work_pool("vzero-gpu").concurrency_limit == 2
        [poll] = client.read_deployment_by_name("vzero-watch/new-data").schedules
        assert not poll.active
        found = client.read_deployment_by_name("vzero/full-pipeline")
        assert found.job_variables == own
        assert found.paused
        assert found.parameters["config"]["name"] == "other"
        [found_again] = client.read_automations_by_name("vzero: crashed, starts again")
        assert not found_again.enabled
    finally:
        client.resume_automation(again.id)
        client.update_work_pool("vzero-gpu", WorkPoolUpdate(concurrency_limit=1))
        client.update_deployment_schedule(watch.id, watch.schedules[0].id, active=True)
        client.update_deployment(pipeline.id, DeploymentUpdate(paused=False, tags=["vzero"]))


@pytest.mark.parametrize("name", ["vzero: no heartbeat", "vzero: new samples start a retraining"])
def test_what_follows_from_the_files_is_renewed(client: SyncPrefectClient, name: str) -> None:
    [found] = client.read_automations_by_name(name)
    change(client, found, description="of an older version")
    client.pause_automation(found.id)
    said: list[str] = []
    deploy.deploy(None, said.append)
    assert f"automation {name!r}: renewed" in said
    [renewed] = client.read_automations_by_name(name)
    # What is switched off stays so.
    assert renewed == found.model_copy(update={"enabled": False})
    client.resume_automation(found.id)


def test_new_samples_start_a_retraining_and_a_second_one_waits(client: SyncPrefectClient) -> None:
    retrain = client.read_deployment_by_name("vzero-retrain/retrain")

    def runs() -> list[FlowRun]:
        return [run for run in client.read_flow_runs() if run.deployment_id == retrain.id]

    assert runs() == []
    announce_samples(LAPTOP, "version 1", "add_samples")
    EventsWorker.drain_all()
    [first] = until(lambda: runs() or None)
    move(client, first, Pending(), Running())
    announce_samples(LAPTOP, "version 2", "poll")
    EventsWorker.drain_all()
    [second] = until(lambda: [run for run in runs() if run.id != first.id] or None)
    client.set_flow_run_state(second.id, Pending())
    assert state_of(client, second).name == "AwaitingConcurrencySlot"
    move(client, first, Completed())
    client.set_flow_run_state(second.id, Pending())
    assert state_of(client, second).name == "Pending"
    move(client, second, Running(), Completed())


@pytest.fixture
def short_wait(client: SyncPrefectClient) -> Iterator[None]:
    """Start crashed runs again after the least that Prefect takes."""
    hasten(client, "vzero: crashed, starts again")
    yield
    deploy.deploy(None, lambda _: None)
    [renewed] = client.read_automations_by_name("vzero: crashed, starts again")
    assert renewed.trigger.within.total_seconds() == 60


def hasten(client: SyncPrefectClient, name: str) -> None:
    """Have an automation wait 10 seconds only."""
    [found] = client.read_automations_by_name(name)
    change(client, found, trigger={**found.trigger.model_dump(), "within": 10})
    # It is loaded by then: it answers.
    time.sleep(1)


def names(client: SyncPrefectClient, run: FlowRun) -> list[str]:
    return [state.name or "" for state in client.read_flow_run_states(run.id)]


@pytest.mark.usefixtures("short_wait")
def test_a_crashed_run_starts_again_once(client: SyncPrefectClient) -> None:
    run = started(client, "vzero/full-pipeline")
    move(client, run, Pending(), Running(), Crashed(message="SIGKILL"))
    # Its worker says it again, which must find it as it is.
    time.sleep(2)
    move(client, run, Crashed(message="exited with non-zero status code -9"))
    assert "starts again, once" in (in_state(client, run, "AwaitingRetry").message or "")
    assert names(client, run)[-3:] == ["Running", "Crashed", "AwaitingRetry"]
    move(client, run, Pending(), Running())
    # It is the same run: what it had stored, it finds again.
    assert client.read_flow_run(run.id).run_count == 2
    # What happened later was answered, so what was said twice was answered once.
    other = started(client, "vzero/full-pipeline")
    move(client, other, Pending(), Running(), Crashed())
    in_state(client, other, "AwaitingRetry")
    assert state_of(client, run).name == "Running"
    move(client, other, Cancelled())

    move(client, run, Crashed(message="SIGKILL"))
    last = in_state(client, run, "Crashed again")
    assert last.is_crashed()
    assert "does not start by itself any more" in (last.message or "")
    move(client, run, Crashed(message="exited with non-zero status code -9"))
    # Who has mended what was broken starts it by hand, as the dashboard's Retry does.
    move(client, run, AwaitingRetry(), Pending(), Running(), Completed())
    assert names(client, run)[-6:] == ["Crashed", "Crashed again", "AwaitingRetry", "Pending", "Running", "Completed"]


@pytest.mark.usefixtures("short_wait")
def test_a_crashed_run_that_somebody_saw_to_is_left_alone_and_so_are_other_peoples(client: SyncPrefectClient) -> None:
    deployment = client.read_deployment_by_name("vzero/full-pipeline")
    client.update_deployment(deployment.id, DeploymentUpdate(tags=["theirs"]))
    theirs = started(client, "vzero/full-pipeline")
    client.update_deployment(deployment.id, DeploymentUpdate(tags=["vzero"]))
    retried, cancelled, ours = (started(client, "vzero/full-pipeline") for _ in range(3))
    for each in (theirs, retried, cancelled, ours):
        move(client, each, Pending(), Running(), Crashed())
        time.sleep(0.5)
    for state in (AwaitingRetry(), Pending(), Running()):
        # SQLite loses some of what comes at once.
        time.sleep(1)
        move(client, retried, state)
    client.set_flow_run_state(cancelled.id, Cancelled(), force=True)
    in_state(client, ours, "AwaitingRetry")
    assert state_of(client, theirs).name == "Crashed"
    assert state_of(client, retried).name == "Running"
    assert state_of(client, cancelled).name == "Cancelled"
    for each in (retried, ours):
        move(client, each, Cancelled())


def heartbeat(run: FlowRun) -> None:
    emit_event(
        event="prefect.flow-run.heartbeat",
        resource={"prefect.resource.id": f"prefect.flow-run.{run.id}", "prefect.resource.name": run.name},
        related=[{"prefect.resource.id": "prefect.tag.vzero", "prefect.resource.role": "tag"}],
    )


def test_a_run_without_heartbeats_counts_as_crashed_but_not_one_that_is_stopped(client: SyncPrefectClient) -> None:
    hasten(client, "vzero: no heartbeat")
    lost, stopped, done = (started(client, "vzero-evaluate/evaluate") for _ in range(3))
    for run in (lost, stopped, done):
        move(client, run, Pending(), Running())
    for run in (lost, stopped, done):
        heartbeat(run)
    EventsWorker.drain_all()
    move(client, stopped, Cancelling())
    move(client, done, Completed())
    crashed = in_state(client, lost, "Crashed")
    assert "No heartbeat for 90 seconds" in (crashed.message or "")
    assert state_of(client, stopped).name == "Cancelling"
    assert state_of(client, done).name == "Completed"
    deploy.deploy(None, lambda _: None)
    [renewed] = client.read_automations_by_name("vzero: no heartbeat")
    assert renewed.trigger.within.total_seconds() == 90
    move(client, lost, Cancelled())


def test_a_configuration_of_an_earlier_release_is_named(client: SyncPrefectClient) -> None:
    name = "vzero-evaluate/evaluate"
    found = client.read_deployment_by_name(name)
    old = {"config": {"rounds": {"num_rounds": 3, "gone": 1}}}
    client.update_deployment(found.id, DeploymentUpdate(parameters=old, enforce_parameter_schema=False))
    with pytest.raises(ServerError, match=r"of deployment vzero-evaluate/evaluate must be of this release; .*\n.*gone"):
        deploy.deploy(None, lambda _: None)
    deploy.deploy(attached(), lambda _: None)
    deploy.deploy(None, lambda _: None)
