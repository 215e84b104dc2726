"""What starts the processes that train: command and environment, which no GPU here could test."""

import sys
from contextlib import nullcontext
from pathlib import Path

import fsspec
import pytest

from tasks.adapters.trainer_process import KEY_VARIABLE, TrainerProcesses, TrainerSettings, launch_command
from tasks.config import TrainerConfig

GPUS = TrainerConfig(num_processes=2, devices=("4", "5"), sharding="fsdp2")
MACHINES = TrainerConfig(num_processes=8, num_machines=3, address="10.0.0.7:29500")


def environment(placement: TrainerConfig, tmp_path: Path) -> dict[str, str]:
    settings = TrainerSettings(
        store="s3://bucket/prefix",
        cache_bytes=1,
        images="images",
        max_image_pixels=1,
        student="student",
        work_dir=tmp_path,
        max_batch_tokens=1,
        threads=3,
        placement=placement,
        trackers=(),
        run_name="test",
    )
    return TrainerProcesses(settings, track=lambda *_: nullcontext(lambda _: None))._environment()


def test_the_command_on_one_machine() -> None:
    assert launch_command(GPUS, 4321) == [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_machines", "1", "--machine_rank", "0", "--num_processes", "2"),
        *("--main_process_ip", "127.0.0.1", "--main_process_port", "0"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--gpu_ids", "all"),
        *("-m", "tasks.adapters.trainer_worker", "4321"),
    ]


def test_the_command_on_the_first_of_several_machines() -> None:
    command = launch_command(MACHINES, 4321)
    for flag, value in {"--num_machines": "3", "--num_processes": "24", "--machine_rank": "0"}.items():
        assert command[command.index(flag) + 1] == value
    assert command[command.index("--main_process_ip") + 1] == "10.0.0.7"
    assert command[command.index("--main_process_port") + 1] == "29500"


def test_the_environment_of_gpus(tmp_path: Path) -> None:
    found = environment(GPUS, tmp_path)
    assert len(found.pop(KEY_VARIABLE)) == 32
    assert found == {
        "OMP_NUM_THREADS": "3",
        "CUDA_VISIBLE_DEVICES": "4,5",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }


def test_the_environment_of_machines_without_gpus(tmp_path: Path) -> None:
    found = environment(MACHINES, tmp_path)
    del found[KEY_VARIABLE]
    assert found == {"OMP_NUM_THREADS": "3", "ACCELERATE_USE_CPU": "true"}


def test_a_buckets_settings_reach_the_processes_unwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", {"key": "me", "secret": "hunter2"})
    found = environment(GPUS, tmp_path)
    # As fsspec reads the environment when it is imported.
    conf: dict[str, dict[str, object]] = {}
    fsspec.config.set_conf_env(conf, envdict=found)
    assert conf == {"s3": {"key": "me", "secret": "hunter2"}}
    assert not list(tmp_path.rglob("*"))
