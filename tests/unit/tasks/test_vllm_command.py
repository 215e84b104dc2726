"""How a vLLM server is started: golden command lines and environments, and settings that are refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.adapters.models import model_folder
from tasks.adapters.vllm_command import server_command, server_environment
from tasks.config import FLAGS_OF_THE_RUN, ModelConfig, PlacementConfig, ServersConfig, VLLMEngine

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
TO_BE_CHANGED = {
    "--uvicorn-log-level",
    "--max-num-batched-tokens",
    "--block-size",
    "--enforce-eager",
    "--no-enable-chunked-prefill",
}
"""Set by the run, and by users who know better: no result depends on them."""


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
        flags=("--uvicorn-log-level", "info", "--enable-expert-parallel"),
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
        "--uvicorn-log-level", "info", "--enable-expert-parallel",
    ]  # fmt: skip


def test_flags_that_the_run_sets_are_refused_and_no_others() -> None:
    """Beside them: what the environment sets, short and second names, and a file that may hold them all."""
    on_gpus = ServersConfig(devices=("0",), max_model_len=8192)
    commands = [
        server_command(FOLDER, model(), ServersConfig(), 8123),
        server_command(FOLDER, model(quantization="fp8"), on_gpus, 8123),
    ]
    found = {part for command in commands for part in command if part.startswith("--")}
    others = {"--api-key", "--device-memory-utilization", "-q", "-tp", "-dp", "--config"}
    assert set(FLAGS_OF_THE_RUN) - others == found - TO_BE_CHANGED
    assert others < set(FLAGS_OF_THE_RUN)
    assert found > TO_BE_CHANGED
    for flag in TO_BE_CHANGED:
        ServersConfig(flags=(flag,))
    for flag in FLAGS_OF_THE_RUN:
        with pytest.raises(ValidationError, match=rf"flags must not set {flag}, got '{flag}'; \w+"):
            ServersConfig(flags=("--enable-expert-parallel", flag, "1"))


@pytest.mark.parametrize(
    ("flag", "given", "instead"),
    [
        ("--dtype", "--dtype=half", "set the model's dtype"),
        ("--dtype", "--dtyp", "set the model's dtype"),
        ("--tensor-parallel-size", "--tensor_parallel_size=2", "set tensor_parallel"),
        ("-tp", "-tp=2", "set tensor_parallel"),
        ("--limit-mm-per-prompt", "--limit-mm-per-prompt.image=5", "leave it out"),
        ("--limit-mm-per-prompt", "--limit_mm_per_prompt.video", "leave it out"),
        ("--enable-scale-out", "--no-enable-scale-out", "leave it out"),
        ("--enable-prompt-tokens-details", "--no_enable_prompt_tokens_details", "leave it out"),
    ],
)
def test_they_are_refused_in_every_form_that_vllm_takes(flag: str, given: str, instead: str) -> None:
    with pytest.raises(ValidationError, match=rf"flags must not set {flag}, got '{re.escape(given)}'; {instead}"):
        ServersConfig(flags=(given,))


def test_flags_that_only_look_alike_are_taken() -> None:
    """Other flags of vLLM, and values."""
    flags = ("--model-impl=auto", "--data-parallel-size-local", "2", "-dcp=2", "--hf-overrides.dtype", "q", ".5")
    assert ServersConfig(flags=flags).flags == flags


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
        "CUDA_VISIBLE_DEVICES": "",
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
            {"tensor_parallel": 2, "memory_share": 0.5},
            r"tensor_parallel, memory_share must be left out where no devices are given.*list the GPUs in devices",
        ),
        ({"data_parallel": 2}, r"data_parallel must be left out where no devices are given"),
        (
            {"api_key_variable": "KEY"},
            r"api_key_variable must be left out where no urls are given.*remove it",
        ),
        (
            {"urls": ("http://host:8000",), "replicas": 2, "command": ("vllm", "serve")},
            r"command, replicas must be left out where urls are given, whose servers run already; remove it",
        ),
        ({"command": ()}, "at least 1 item"),
        ({"memory_share": 1.5}, "less than or equal to 1"),
        ({"start_timeout": 0}, "greater than 0"),
    ],
)
def test_servers_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ServersConfig(**settings)


@pytest.mark.parametrize(
    "setting",
    [
        {"command": ("vllm", "serve")},
        {"flags": ("--enable-expert-parallel",)},
        {"environment": {"A": "b"}},
        {"devices": ("0",)},
        {"replicas": 2},
        {"tensor_parallel": 2},
        {"data_parallel": 2},
        {"memory_share": 0.5},
        {"max_model_len": 8192},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_of_servers_that_are_started_are_refused_beside_urls(setting: dict[str, Any]) -> None:
    (name,) = setting
    running = ServersConfig(urls=("http://host:8000",), api_key_variable="KEY", served_name="a", request_timeout=1.0)
    with pytest.raises(ValidationError, match=rf"error, {name} must be left out where urls are given"):
        ServersConfig.model_validate({**running.model_dump(), **setting})
    # Written out in full, as a deployment's parameters are, it is what it was.
    assert ServersConfig.model_validate_json(running.model_dump_json()) == running


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("http://10.0.0.7:8000", "http://10.0.0.7:8000"),
        ("https://vllm_1/", "https://vllm_1"),
        (" HTTP://Host:80 ", "http://host"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_addresses_have_one_form(given: str, address: str) -> None:
    assert ServersConfig(urls=(given,)).urls == (address,)
    with pytest.raises(ValidationError, match="urls must differ"):
        ServersConfig(urls=(given, address))


@pytest.mark.parametrize(
    "url",
    [
        "host:8000",
        "ftp://host",
        "http://",
        "http://:8000",
        "http://host:99999",
        "http://host:8000/v1",
        "http://host:8000?a=1",
        "http://host:8000#a",
        "http://host:8000?",
        "http://[::1",
        "http://my host",
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match=rf"form http://HOST:PORT, got '{re.escape(url)}'; leave out what"):
        ServersConfig(urls=("http://host", url))


def test_student_and_teacher_share_no_device() -> None:
    two = ServersConfig(devices=("0", "1"), replicas=2)
    with pytest.raises(
        ValidationError, match=r"student_servers and teacher_servers must be disjoint, both have \['1'\]"
    ):
        PlacementConfig(student_servers=two, teacher_servers=ServersConfig(devices=("1",)))
    PlacementConfig(student_servers=two, teacher_servers=ServersConfig(devices=("2",)))


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(("device", "number"), [("cuda", "0"), ("cuda:0", "0"), ("cuda:3", "3")])
def test_servers_leave_the_trainers_device_alone(role: str, device: str, number: str) -> None:
    with pytest.raises(ValidationError, match=rf"{role}_servers.devices must not hold student_device.*got {device};"):
        PlacementConfig.model_validate({"student_device": device, f"{role}_servers": {"devices": [number]}})
    for other in ("cpu", "cuda:1"):
        PlacementConfig.model_validate({"student_device": other, f"{role}_servers": {"devices": [number]}})


def test_a_version_must_be_named() -> None:
    with pytest.raises(ValidationError, match=r"engine\.vllm\.version\s+Field required"):
        ModelConfig.model_validate({"path": "embedded:student", "engine": {"kind": "vllm"}})
