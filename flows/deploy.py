"""Registers the project with a Prefect server: `python -m flows.deploy [--config my.toml]`.

What `deployments/` says is made where it is missing. Again, it renews what follows from the code and leaves alone what
an operator set: limits, schedules, job variables, and what is switched off.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import yaml
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import (
    DeploymentScheduleCreate,
    DeploymentUpdate,
    GlobalConcurrencyLimitCreate,
    WorkPoolCreate,
)
from prefect.client.schemas.objects import ConcurrencyOptions
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.events import AutomationCore, DeploymentEventTrigger
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.flows import load_flow_from_entrypoint
from prefect.settings import get_current_settings
from prefect.workers.base import BaseWorker
from pydantic import ValidationError

from flows.config import LAPTOP, PROJECT, RunConfig, explain, load_config, resolve_paths
from flows.server import ServerError
from tasks.serve import teacher_limit
from vzero_core.errors import VZeroError

FOLDER = PROJECT / "deployments"


def deploy(config: RunConfig | None, say: Callable[[str], None]) -> None:
    """Make what is missing on the configured server, and renew what follows from the code.

    Args:
        config: default of all deployments, its paths absolute; None: they keep theirs, new ones have the laptop's.
        say: is told a line about each thing.

    Raises:
        ServerError: no server is configured, or it does not do what is asked.
    """
    url = get_current_settings().api.url
    if not url:
        raise ServerError(
            "a Prefect server must be configured, got none; set PREFECT_API_URL=http://HOST:4200/api, or start one "
            "here: make serve"
        )
    try:
        with get_client(sync_client=True) as client:
            pools = _read("work-pools.yaml")
            for pool in pools["work_pools"]:
                say(_make_pool(client, pool))
            for server in config.placement.teacher_servers.urls if config else ():
                say(_make_limit(client, teacher_limit(server), pools["stages_per_teacher_server"]))
            for deployment in _read("prefect.yaml")["deployments"]:
                for line in _make_deployment(client, deployment, config):
                    say(line)
            for automation in _read("automations.yaml")["automations"]:
                say(_make_automation(client, AutomationCore.model_validate(automation)))
    except httpx.TransportError as error:
        what = f"Prefect's server must answer at {url}, got {error!r}; start it, or correct PREFECT_API_URL"
        raise ServerError(what) from error
    except PrefectHTTPStatusError as error:
        raise ServerError(f"Prefect's server at {url} must take what is registered, got {error}") from error


def _read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def _make_pool(client: SyncPrefectClient, pool: dict[str, Any]) -> str:
    name = pool["name"]
    try:
        found = client.read_work_pool(name)
    except ObjectNotFound:
        worker = BaseWorker.get_worker_class_from_type(pool["type"])
        assert worker is not None, "the types in the file are those of Prefect itself"
        template = worker.get_default_base_job_template()
        found = client.create_work_pool(WorkPoolCreate(**pool, base_job_template=template))
        return f"work pool {name}: made, at most {found.concurrency_limit} at a time"
    return f"work pool {name}: there, at most {found.concurrency_limit} at a time"


def _make_limit(client: SyncPrefectClient, name: str, limit: int) -> str:
    try:
        found = client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=limit))
        return f"limit {name}: made, {limit} at a time"
    return f"limit {name}: there, {found.limit} at a time"


def _make_deployment(client: SyncPrefectClient, given: dict[str, Any], config: RunConfig | None) -> Iterator[str]:
    path, _, function = given["entrypoint"].partition(":")
    flow: Flow[..., Any] = load_flow_from_entrypoint(f"{PROJECT / path}:{function}", use_placeholder_flow=False)
    # The worker runs flows in the folder that they were deployed from.
    where = {"prefect.deployments.steps.set_working_directory": {"directory": str(PROJECT)}}
    renewed: dict[str, Any] = {
        "description": given["description"],
        "tags": given["tags"],
        "entrypoint": given["entrypoint"],
        "pull_steps": [where],
        "parameter_openapi_schema": flow.parameters.model_dump(exclude_unset=True),
    }
    if config is not None:
        renewed["parameters"] = {"config": config.model_dump(mode="json")}
    name = f"{flow.name}/{given['name']}"
    try:
        found = client.read_deployment_by_name(name)
    except ObjectNotFound:
        limit = given.get("concurrency_limit")
        deployment_id = client.create_deployment(
            client.create_flow_from_name(flow.name),
            given["name"],
            work_pool_name=given["work_pool"]["name"],
            job_variables=given["work_pool"]["job_variables"],
            schedules=[
                DeploymentScheduleCreate(
                    slug=each["slug"], schedule=IntervalSchedule(interval=timedelta(seconds=each["interval"]))
                )
                for each in given.get("schedules", ())
            ],
            concurrency_limit=limit and limit["limit"],
            concurrency_options=limit and ConcurrencyOptions(collision_strategy=limit["collision_strategy"]),
            enforce_parameter_schema=True,
            **renewed,
        )
        yield f"deployment {name}: made"
    else:
        deployment_id = found.id
        if config is None:
            _require_valid(name, found.parameters)
        changed = [field for field, value in renewed.items() if getattr(found, field) != value]
        if changed:
            client.update_deployment(deployment_id, DeploymentUpdate(**renewed))
        yield f"deployment {name}: {'renewed: ' + ', '.join(changed) if changed else 'there'}"
    for trigger in given.get("triggers", ()):
        event = DeploymentEventTrigger.model_validate(trigger)
        event.set_deployment_id(deployment_id)
        yield _make_automation(client, event.as_automation())


def _require_valid(name: str, parameters: dict[str, Any]) -> None:
    """Make sure that a deployment's own configuration, of an earlier release perhaps, still is one.

    Raises:
        ServerError: it is not.
    """
    try:
        RunConfig.model_validate(parameters.get("config", {}))
    except ValidationError as error:
        raise ServerError(
            f"the configuration of deployment {name} must be of this release; deploy with --config again:\n"
            f"{explain(error)}"
        ) from error


def _make_automation(client: SyncPrefectClient, wanted: AutomationCore) -> str:
    # One that starts a deployment belongs to it: the server does not tell whose one found by name is.
    owner = wanted.owner_resource
    there = client.read_resource_related_automations(owner) if owner else client.read_automations_by_name(wanted.name)
    for found in there:
        if found.name == wanted.name:
            if _content(found) == _content(wanted):
                return f"automation {wanted.name!r}: there{'' if found.enabled else ', switched off'}"
            # Whose it is cannot be changed, nor sent.
            content = wanted.model_dump(exclude={"owner_resource"}) | {"enabled": found.enabled}
            client.update_automation(found.id, AutomationCore.model_validate(content))
            return f"automation {wanted.name!r}: renewed"
    client.create_automation(wanted)
    return f"automation {wanted.name!r}: made"


def _content(automation: AutomationCore) -> dict[str, Any]:
    return automation.model_dump(mode="json", include={"description", "trigger", "actions"})


def main(arguments: list[str] | None = None) -> int:
    """Register from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.deploy", description="Register work pools, deployments and automations with Prefect."
    )
    parser.add_argument("--config", type=Path, help="TOML configuration that all deployments have as their default")
    parser.add_argument("--web-url", help="store.web_url, in place of the configuration's")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config) if options.config else None
        if options.web_url:
            config = config or resolve_paths(LAPTOP, PROJECT)
            store = config.store.model_copy(update={"web_url": options.web_url})
            config = config.model_copy(update={"store": store})
        deploy(config, print)
    except VZeroError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
