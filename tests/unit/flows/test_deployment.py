"""The files in deployments/ say what Prefect understands, and fit the flows and one another."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import Flow
from prefect.events import AutomationCore, DeploymentEventTrigger
from prefect.flow_engine import MINIMUM_HEARTBEAT_INTERVAL
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import deploy
from flows.config import LAPTOP, PROJECT
from flows.events import SAMPLES_ADDED


def read(name: str) -> Any:
    return yaml.safe_load((PROJECT / "deployments" / name).read_text())


DEPLOYMENTS = {deployment["name"]: deployment for deployment in read("prefect.yaml")["deployments"]}
AUTOMATIONS = {automation["name"]: automation for automation in read("automations.yaml")["automations"]}


def flow_of(deployment: dict[str, Any]) -> Flow[..., Any]:
    path, _, name = deployment["entrypoint"].partition(":")
    spec = importlib.util.spec_from_file_location("entrypoint", PROJECT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Pydantic looks up where a generic class is made.
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    flow = getattr(module, name)
    assert isinstance(flow, Flow)
    return flow


@pytest.mark.parametrize(
    ("name", "flow", "parameters", "pool"),
    [
        ("full-pipeline", "vzero", ["config"], "vzero-gpu"),
        ("retrain", "vzero-retrain", ["config"], "vzero-gpu"),
        ("evaluate", "vzero-evaluate", ["config", "version"], "vzero-gpu"),
        ("new-data", "vzero-watch", ["config"], "vzero-cpu"),
    ],
)
def test_a_deployment_names_a_flow(name: str, flow: str, parameters: list[str], pool: str) -> None:
    deployment = DEPLOYMENTS[name]
    found = flow_of(deployment)
    assert found.name == flow
    assert list(found.parameters.properties) == parameters
    assert deployment["work_pool"]["name"] == pool
    assert pool in [each["name"] for each in read("work-pools.yaml")["work_pools"]]


def test_there_are_no_others() -> None:
    assert len(DEPLOYMENTS) == 4


def test_heartbeats_come_often_enough() -> None:
    within = AUTOMATIONS["vzero: no heartbeat"]["trigger"]["within"]
    for deployment in DEPLOYMENTS.values():
        # The automations are about runs with this tag.
        assert deployment["tags"] == ["vzero"]
        frequency = int(deployment["work_pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
        # What is shorter, Prefect makes longer; two may be late or lost.
        assert MINIMUM_HEARTBEAT_INTERVAL <= frequency <= within / 3


@pytest.mark.parametrize("automation", AUTOMATIONS.values(), ids=list(AUTOMATIONS))
def test_prefect_knows_every_word_of_an_automation(automation: dict[str, Any]) -> None:
    understood = AutomationCore.model_validate(automation)
    assert automation.keys() <= AutomationCore.model_fields.keys()
    assert automation["trigger"].keys() <= type(understood.trigger).model_fields.keys()
    [action] = understood.actions
    assert automation["actions"][0].keys() <= type(action).model_fields.keys()


def test_new_samples_start_a_retraining() -> None:
    [given] = DEPLOYMENTS["retrain"]["triggers"]
    trigger = DeploymentEventTrigger.model_validate(given)
    assert given.keys() <= DeploymentEventTrigger.model_fields.keys()
    assert trigger.expect == {SAMPLES_ADDED}
    assert trigger.match["prefect.resource.id"] == ["vzero.samples.*"]


def test_the_poll_comes_every_ten_minutes() -> None:
    assert DEPLOYMENTS["new-data"]["schedules"] == [{"slug": "poll", "interval": 600}]


def test_without_a_server_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert deploy.main([]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: a Prefect server must be configured, got none; set PREFECT_API_URL")
    assert "make serve" in message


def test_a_server_that_is_away_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert deploy.main([]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: Prefect's server must answer at http://127.0.0.1:9/api")
    assert "Traceback" not in message


def test_a_wrong_configuration_registers_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my.toml").write_text("[rounds]\nnum_round = 3\n")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert deploy.main(["--config", str(tmp_path / "my.toml")]) == 1
    assert "rounds.num_round is no setting" in capsys.readouterr().err


def test_the_default_of_a_deployment_is_the_laptops() -> None:
    for deployment in DEPLOYMENTS.values():
        assert flow_of(deployment).parameters.properties["config"]["default"] == LAPTOP.model_dump(mode="json")
