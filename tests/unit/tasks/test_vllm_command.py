"""How a vLLM server is started: golden command lines and environments, and settings that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.adapters.models import model_folder
from tasks.adapters.vllm_command import server_command, server_environment
from tasks.config import ModelConfig, PlacementConfig, ServersConfig, VLLMEngine

FOLDER = model_folder("embedded:student")
SECRET = "sk-secret"
BOTH = [
    "--host", "127.0.0.1",
    "--port", "8123",
    "--served-model-name", "vzero",
    "--dtype", "float32",
    "--limit-mm-per-prompt", '{"image": 2, "video": 0}',
    "--max-logprobs", "-1",
    "--logprobs-mode", "raw_logprobs",
    "--generation-config", "vllm",
    "--uvicorn-log-level", "warning",
]  # fmt: skip


def model(**engine: Any) -> ModelConfig:
    return ModelConfig(path="embedded:student", engine=VLLMEngine(version="0.32.0", **engine))


def test_the_command_of_a_cpu_server() -> None:
    """The student's context of 256 tokens is less than the least budget of a step, 4096."""
    assert server_command(FOLDER, model(), ServersConfig(), 8123) == [
        "python3", "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(FOLDER),
        *BOTH,
        "--max-num-batched-tokens", "4096",
        "--block-size", "32",
        "--enable-scale-out", "--enable-prompt-tokens-details",
        "--enforce-eager", "--no-enable-chunked-prefill",
    ]  # fmt: skip


def test_the_command_of_a_replica_on_gpus() -> None:
    servers = ServersConfig(
        command=("vllm", "serve"),
        devices=("0", "1", "2", "3"),
        replicas=2,
        tensor_parallel=2,
        memory_share=0.5,
        max_model_len=8192,
        flags=("--dtype", "half", "--enable-expert-parallel"),
    )
    assert server_command(FOLDER, model(quantization="fp8"), servers, 8123) == [
        "vllm", "serve",
        "--model", str(FOLDER),
        *BOTH,
        "--quantization", "fp8",
        "--max-model-len", "8192",
        "--tensor-parallel-size", "2",
        "--data-parallel-size", "1",
        "--gpu-memory-utilization", "0.5",
        "--enable-scale-out", "--enable-prompt-tokens-details",
        # The user's come last, where they win over ours.
        "--dtype", "half", "--enable-expert-parallel",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "settings", "budget"),
    [
        ({"max_position_embeddings": 5000}, {}, "5000"),
        ({"text_config": {"max_position_embeddings": 32768}}, {}, "32768"),
        ({"text_config": {"max_position_embeddings": 32768}}, {"max_model_len": 6000}, "6000"),
        ({"text_config": {"max_position_embeddings": 32768}}, {"max_model_len": 300}, "4096"),
    ],
)
def test_a_whole_prompt_fits_into_one_step_on_cpu(
    config: dict[str, Any], settings: dict[str, Any], budget: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = server_command(tmp_path, model(), ServersConfig(**settings), 8123)
    assert command[command.index("--max-num-batched-tokens") + 1] == budget


def test_the_environment_of_a_cpu_server() -> None:
    assert server_environment(ServersConfig(environment={"A": "b"}), 0, 3, SECRET) == {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_API_KEY": SECRET,
        "OMP_NUM_THREADS": "3",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "A": "b",
    }


@pytest.mark.parametrize(
    ("parallel", "shares"),
    [
        ({"replicas": 2, "tensor_parallel": 2}, ["4,5", "6,7"]),
        ({"replicas": 2, "data_parallel": 2}, ["4,5", "6,7"]),
        ({"replicas": 1, "tensor_parallel": 2, "data_parallel": 2}, ["4,5,6,7"]),
        ({"replicas": 4}, ["4", "5", "6", "7"]),
    ],
)
def test_each_replica_has_devices_of_its_own(parallel: dict[str, int], shares: list[str]) -> None:
    servers = ServersConfig(devices=("4", "5", "6", "7"), **parallel)
    environments = [server_environment(servers, number, 1, SECRET) for number in range(servers.replicas)]
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in environments] == shares
    assert not any("OMP_NUM_THREADS" in environment for environment in environments)
    assert (
        server_environment(servers.model_copy(update={"environment": {"CUDA_VISIBLE_DEVICES": "9"}}), 0, 1, SECRET)[
            "CUDA_VISIBLE_DEVICES"
        ]
        == "9"
    )


def test_the_command_line_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is logged, and anybody on the machine can read it."""
    monkeypatch.setenv("VZERO_TEST_KEY", SECRET)
    servers = ServersConfig(api_key_variable="VZERO_TEST_KEY")
    assert not any(SECRET in part or "api-key" in part for part in server_command(FOLDER, model(), servers, 8123))


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"devices": ("0", "1", "2"), "replicas": 2, "tensor_parallel": 2},
            r"devices must be replicas x tensor_parallel x data_parallel = 4 of them, got 3; list as many",
        ),
        ({"devices": ("0", "0"), "replicas": 2}, r"devices must differ, got \('0', '0'\); name each once"),
        (
            {"devices": ("0",), "urls": ("http://host:8000",)},
            r"devices must be empty where urls are given, whose servers have theirs; remove one of both",
        ),
        ({"command": ()}, "at least 1 item"),
        ({"memory_share": 1.5}, "less than or equal to 1"),
        ({"start_timeout": 0}, "greater than 0"),
    ],
)
def test_servers_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ServersConfig(**settings)


def test_student_and_teacher_share_no_device() -> None:
    two = ServersConfig(devices=("0", "1"), replicas=2)
    with pytest.raises(
        ValidationError, match=r"student_servers and teacher_servers must be disjoint, both have \['1'\]"
    ):
        PlacementConfig(student_servers=two, teacher_servers=ServersConfig(devices=("1",)))
    PlacementConfig(student_servers=two, teacher_servers=ServersConfig(devices=("2",)))


def test_a_version_must_be_named() -> None:
    with pytest.raises(ValidationError, match=r"engine\.vllm\.version\s+Field required"):
        ModelConfig.model_validate({"path": "embedded:student", "engine": {"kind": "vllm"}})
