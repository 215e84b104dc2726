"""The compose file: valid, healthy before it is used, pinned, without a secret, and nobody's root."""

import copy
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.config import PROJECT, load_config
from tasks.adapters.vllm_command import server_environment
from tasks.config import ServersConfig

FOLDER = PROJECT / "docker"
TEXT = (FOLDER / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, Any] = COMPOSE["services"]
EXAMPLE = (FOLDER / ".env.example").read_text()
REQUIRED = re.findall(r"^(\w+)=", EXAMPLE, re.MULTILINE)

# Users that an image sets by itself, by a name without a promised number.
OWN_USER = {"lakefs": "the image ends with USER lakefs"}
SECRET = re.compile(r"PASSWORD|SECRET|KEY|TOKEN|CONNECTION_STRING")


def faults(services: dict[str, Any]) -> Iterator[str]:
    """Say what is not as it must be."""
    for name, service in services.items():
        if not service.get("healthcheck", {}).get("test"):
            yield f"{name} has no health check"
        if not re.fullmatch(r"[\w./-]+:v?\d+\.\d+(\.\d+)?[\w.-]*|vzero-worker:(cpu|cuda)", service["image"]):
            yield f"{name} has an image without a version"
        if name not in OWN_USER and not re.fullmatch(r"[1-9]\d*:[1-9]\d*", service.get("user", "")):
            yield f"{name} runs as root"
        if service.get("cap_drop") != ["ALL"] or "no-new-privileges:true" not in service.get("security_opt", []):
            yield f"{name} keeps privileges"
        if service.get("read_only") is not True or service.get("privileged"):
            yield f"{name} may write into its image"
        if any(not port.startswith("127.0.0.1:") for port in service.get("ports", [])):
            yield f"{name} is open to other machines"
        if any(condition != {"condition": "service_healthy"} for condition in service.get("depends_on", {}).values()):
            yield f"{name} does not wait until others are well"
        for variable, value in service.get("environment", {}).items():
            if SECRET.search(variable) and not re.search(r"\$\{\w+:[?-]", value):
                yield f"{name} holds a secret in {variable}"


def test_it_is_as_it_must_be() -> None:
    assert list(faults(SERVICES)) == []


def _set(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda services: services[name].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda services: services["s3"].pop("healthcheck"), "s3 has no health check"),
        (_set("postgres", "image", "postgres"), "postgres has an image without a version"),
        (_set("s3", "image", "chrislusf/seaweedfs:latest"), "s3 has an image without a version"),
        (_set("prefect", "user", "0:0"), "prefect runs as root"),
        (lambda services: services["postgres"].pop("user"), "postgres runs as root"),
        (_set("worker-gpu", "cap_drop", []), "worker-gpu keeps privileges"),
        (_set("teacher", "read_only", False), "teacher may write into its image"),
        (_set("prefect", "ports", ["4200:4200"]), "prefect is open to other machines"),
        (
            _set("worker-light", "depends_on", {"prefect": {"condition": "service_started"}}),
            "worker-light does not wait until others are well",
        ),
        (
            lambda services: services["s3"]["environment"].update(AWS_SECRET_ACCESS_KEY="geheim"),
            "s3 holds a secret in AWS_SECRET_ACCESS_KEY",
        ),
    ],
)
def test_what_is_not_as_it_must_be_is_found(change: Callable[[dict[str, Any]], None], fault: str) -> None:
    services = copy.deepcopy(SERVICES)
    change(services)
    assert list(faults(services)) == [fault]


def test_the_example_names_all_variables_and_holds_no_value() -> None:
    assert not re.search(r"^#?\w+=.", EXAMPLE, re.MULTILINE)
    assert set(REQUIRED) == set(re.findall(r"\$\{(\w+):\?", TEXT))
    optional = set(re.findall(r"^#(\w+)=", EXAMPLE, re.MULTILINE))
    assert optional == set(re.findall(r"\$\{(\w+):-", TEXT)) | {"COMPOSE_PROJECT_NAME"}


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_each_pool_has_one_worker(profile: str) -> None:
    work_pools = yaml.safe_load((PROJECT / "deployments" / "work-pools.yaml").read_text())["work_pools"]
    started = [each for each in SERVICES.values() if profile in each.get("profiles", [profile])]
    workers = [each["environment"] for each in started if "VZERO_POOL" in each["environment"]]
    assert sorted(each["VZERO_POOL"] for each in workers) == sorted(pool["name"] for pool in work_pools)
    assert [each.get("VZERO_DEPLOY") for each in workers].count("true") == 1


def test_gpus_are_asked_for_where_they_are_used() -> None:
    asking = {name for name, service in SERVICES.items() if "deploy" in service}
    assert asking == {"worker-gpu", "teacher", "student"}
    for name in asking:
        assert SERVICES[name]["profiles"] == ["gpu" if name == "worker-gpu" else "vllm"]
        (device,) = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


def test_servers_see_models_and_weights_under_the_workers_paths() -> None:
    mounts = {name: {each.rsplit(":", 2)[1] for each in SERVICES[name]["volumes"]} for name in ("teacher", "student")}
    assert mounts == {"teacher": {"/models"}, "student": {"/models", "/app/.vzero"}}
    assert all(mount.endswith(":ro") for name in mounts for mount in SERVICES[name]["volumes"])
    work = SERVICES["worker-gpu"]["volumes"]
    assert "work:/app/.vzero" in work
    assert "${VZERO_MODELS:-models}:/models:ro" in work
    # Only the student's weights are exchanged, over routes that ask for no key.
    by_run = server_environment(ServersConfig(), 0, 1, "key")
    assert SERVICES["student"]["environment"]["VLLM_SERVER_DEV_MODE"] == by_run["VLLM_SERVER_DEV_MODE"]
    assert "VLLM_SERVER_DEV_MODE" not in SERVICES["teacher"]["environment"]
    reach = {name for name, service in SERVICES.items() if "models" in service["networks"]}
    assert reach == {"worker-light", "worker-cpu", "worker-gpu", "teacher", "student"}


def test_the_configuration_that_is_deployed_lies_in_the_s3_server() -> None:
    config = load_config(FOLDER / "small-world.toml")
    (buckets,) = [each.partition("=")[2] for each in SERVICES["s3"]["command"] if each.startswith("-bucket=")]
    for url in (config.store.url, config.publish.url):
        assert url is not None
        assert re.match(r"s3://(\w+)/", url)[1] in buckets.split(",")  # type: ignore[index]
    assert config.placement.work_dir.startswith("/app/.vzero/")


def test_the_pages_examples_are_valid_and_fit_the_services(tmp_path: Path) -> None:
    page = (PROJECT / "docs" / "CONTAINERS.md").read_text()
    plain, on_vllm = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "plain.toml").write_text(plain)
    config = load_config(tmp_path / "plain.toml")
    assert (config.store.url, config.placement.work_dir) == ("s3://vzero/store", "/app/.vzero/work")
    (tmp_path / "vllm.toml").write_text(on_vllm)
    config = load_config(tmp_path / "vllm.toml")
    placed = {"student": config.placement.student_servers, "teacher": config.placement.teacher_servers}
    for name, servers in placed.items():
        assert servers.urls == (f"http://{name}:8000",)
        assert servers.served_name == SERVICES[name]["environment"]["VZERO_SERVED_NAME"]
        assert servers.api_key_variable in SERVICES["worker-gpu"]["environment"]
        engine = getattr(config, name).engine
        assert f":{engine.version}" in SERVICES[name]["image"]
    # A request holds the prompt, the longest response, and the token that a replay generates.
    assert config.data.max_prompt_tokens == 25_000 <= 27_136 - 2048 - 1


# --- the tool itself ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tool() -> str:
    found = shutil.which("docker-compose")
    if found is None:
        # CI must install it: a check that is passed over there is none.
        assert os.environ.get("CI") != "true", "docker-compose must be installed in CI; apt-get install docker-compose"
        pytest.skip("docker-compose is not there; apt-get install docker-compose")
    return found


def _config(tool: str, values: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "env").write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    command = [tool, "--project-directory", str(FOLDER), "--env-file", str(folder / "env"), "-f"]
    command += [str(FOLDER / "compose.yaml"), "config"]
    environment = {name: value for name, value in os.environ.items() if name not in values}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=60)


def test_docker_compose_takes_it(tool: str, tmp_path: Path) -> None:
    values = {name: f"value{number}" for number, name in enumerate(REQUIRED)}
    found = _config(tool, values, tmp_path)
    assert found.returncode == 0, found.stderr
    resolved = yaml.safe_load(found.stdout)
    assert set(resolved["services"]) == set(SERVICES)
    # Every value is used, and nothing is left to be filled in.
    assert all(value in found.stdout for value in values.values())
    assert "${" not in found.stdout
    assert (
        resolved["services"]["prefect"]["environment"]["PREFECT_SERVER_DATABASE_PASSWORD"]
        == (values["POSTGRES_PASSWORD"])
    )


@pytest.mark.parametrize("missing", REQUIRED)
def test_docker_compose_names_a_variable_that_is_missing(tool: str, tmp_path: Path, missing: str) -> None:
    values = {name: "value" for name in REQUIRED if name != missing}
    found = _config(tool, values, tmp_path)
    assert found.returncode != 0
    assert f"${{{missing}:?must be a " in found.stderr
    assert "of your own; set it in docker/.env" in found.stderr
