"""The pipeline on vLLM servers that it starts and stops itself."""

import json
import signal
import time
from pathlib import Path

import pytest
from support.runs import small_config, start
from support.vllm_cpu_servers import cpu_servers, on_vllm, processes, shared_memory

from flows.config import RunConfig
from flows.full_pipeline import vzero
from tasks.adapters.tables import read_rows
from tasks.artifacts import Rollout

pytestmark = [pytest.mark.e2e, pytest.mark.vllm]

PARITY = 1e-4
"""Nats, in float32."""


def config_on_vllm(folder: Path) -> RunConfig:
    servers = cpu_servers().model_dump()
    return small_config(
        folder,
        student=on_vllm("embedded:student").model_dump(),
        teacher=on_vllm("embedded:teacher").model_dump(),
        rounds={"num_shards": 2},
        placement={"student_servers": servers, "teacher_servers": servers},
    )


def manifests(folder: Path, stage: str) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted((folder / "store" / stage).glob("*/manifest.json"))]


def test_a_run_on_vllm_survives_its_end_and_leaves_nothing_behind(
    tmp_path: Path, prefect_api: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = config_on_vllm(tmp_path)

    # Killed without a warning while its servers work: they end by themselves.
    process = start(config, prefect_api, tmp_path_factory.mktemp("home"))
    used: set[Path] = set()
    while not manifests(tmp_path, "train"):
        assert process.poll() is None, process.communicate()[0]
        used |= shared_memory()
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 60
    while processes() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes() == {}
    assert used
    assert not [path for path in used if path.exists()]

    # Started again, it goes on from there, to the end.
    before = {manifest["key"] for stage in ("rollouts", "replay", "train") for manifest in manifests(tmp_path, stage)}
    result = vzero(config)
    assert processes() == {}
    assert before <= {
        manifest["key"] for stage in ("rollouts", "replay", "train") for manifest in manifests(tmp_path, stage)
    }
    assert [score.num_questions for score in result.scores] == [40] * 5
    trained = manifests(tmp_path, "train")
    assert len(trained) == 3
    for manifest in trained:
        # What the servers said of their own tokens is what the trainer finds, also after an exchange of weights.
        assert manifest["summary"]["sampler_difference_max"] <= PARITY
        assert abs(manifest["summary"]["importance_ratio_mean"] - 1) <= PARITY
    policies = set()
    for manifest in manifests(tmp_path, "rollouts"):
        folder = tmp_path / "store" / "rollouts" / manifest["key"] / manifest["attempt"]
        rows = read_rows((folder / "rollouts.parquet").read_bytes(), Rollout)
        assert {row.policy for row in rows} == {manifest["job"]["policy"]["digest"]}
        policies |= {row.policy for row in rows}
    # Before each of three rounds, and the candidate after the last.
    assert len(policies) == 4

    # All of it is there: no server is started.
    logs = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "servers").glob("*.log")}
    assert len(logs) == 2
    assert vzero(config).policy == result.policy
    assert {path: path.stat().st_mtime_ns for path in logs} == logs
