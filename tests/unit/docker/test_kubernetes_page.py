"""The templates in docs/KUBERNETES.md fit what Prefect ships and what Docker's SDK takes."""

import json
import re
from pathlib import Path
from typing import Any

import prefect.server.api
import yaml
from docker.constants import DEFAULT_DOCKER_API_VERSION
from docker.types import HostConfig

from flows.config import PROJECT

TEXT = (PROJECT / "docs" / "KUBERNETES.md").read_text()
JOB, DOCKER = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL))
TYPES = Path(prefect.server.api.__file__).parent / "collections_data" / "views" / "aggregate-worker-metadata.json"


def _shipped(package: str, kind: str) -> dict[str, Any]:
    template: dict[str, Any] = json.loads(TYPES.read_text())[package][kind]["default_base_job_configuration"]
    return template


def _lacks(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """Give what one template has and the other one has not."""
    if isinstance(theirs, dict):
        return [
            lack
            for name, value in theirs.items()
            for lack in (_lacks(ours[name], value, f"{where}.{name}") if name in ours else [f"{where}.{name}"])
        ]
    if isinstance(theirs, list):
        return [lack for mine, other in zip(ours, theirs, strict=True) for lack in _lacks(mine, other, where)]
    return [] if ours == theirs else [where]


def test_the_job_is_prefects_with_additions() -> None:
    shipped = _shipped("prefect-kubernetes", "kubernetes")
    assert _lacks(JOB, shipped["job_configuration"]["job_manifest"]) == []
    # Every placeholder is a variable that the template has, and every variable that the page names.
    variables = shipped["variables"]["properties"]
    assert set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(JOB))) <= set(variables)
    section = TEXT[TEXT.index("- **Job variables**") : TEXT.index("- **Work folder.**")]
    assert set(re.findall(r"`(\w+)`", section)) <= set(variables)
    assert variables["pod_watch_timeout_seconds"]["default"] == 60


def test_what_is_left_out_of_a_template_is_found() -> None:
    shipped = _shipped("prefect-kubernetes", "kubernetes")["job_configuration"]["job_manifest"]
    assert _lacks(JOB | {"spec": {}}, shipped)[0] == ".spec.backoffLimit"


def test_the_job_is_the_images() -> None:
    pod = JOB["spec"]["template"]["spec"]
    compose = yaml.safe_load((PROJECT / "docker" / "compose.yaml").read_text())["services"]["worker-gpu"]
    assert compose["user"] == f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert "/app/.vzero" in {mount["mountPath"] for mount in container["volumeMounts"]}
    assert DOCKER["container_create_kwargs"]["user"] == compose["user"]


def test_dockers_sdk_takes_the_variables() -> None:
    known = _shipped("prefect-docker", "docker")["variables"]["properties"]
    assert set(DOCKER) - {"container_create_kwargs"} <= set(known)
    given = DOCKER["container_create_kwargs"]
    config = HostConfig(
        version=DEFAULT_DOCKER_API_VERSION,
        device_requests=given["device_requests"],
        shm_size=given["shm_size"],
    )
    assert config["DeviceRequests"] == [
        {"Driver": "nvidia", "Count": -1, "DeviceIDs": [], "Capabilities": [["gpu"]], "Options": {}}
    ]
    assert config["ShmSize"] == 16 * 2**30
