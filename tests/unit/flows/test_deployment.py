"""The deployment file names a flow that is there."""

import importlib.util

import yaml
from prefect import Flow

from flows.config import PROJECT


def test_the_deployment_names_the_flow() -> None:
    (deployment,) = yaml.safe_load((PROJECT / "deployments" / "prefect.yaml").read_text())["deployments"]
    assert deployment["name"] == "full-pipeline"
    path, _, name = deployment["entrypoint"].partition(":")
    spec = importlib.util.spec_from_file_location("entrypoint", PROJECT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    flow = getattr(module, name)
    assert isinstance(flow, Flow)
    assert flow.name == "vzero"
    assert list(flow.parameters.properties) == ["config"]
