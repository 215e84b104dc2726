"""Several processes under accelerate's launcher train as one does: same gradients, same checkpoints, same errors."""

import http.client
import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import save_tiny_model
from support.training import OPTIMIZER, TOP_K_LOSS, TrainingWorld

from tasks.adapters.process_guard import find_process, session_members
from tasks.adapters.trainer import Update
from tasks.adapters.trainer_process import TrainerProcesses, launch_command
from tasks.adapters.training_data import CheckpointJob, TrainJob, mini_batches, read_training_rows, share_of
from tasks.artifacts import ArtifactRef
from tasks.config import LoRAConfig, OptimizerConfig, TrainerConfig
from tasks.train import _write_state
from vzero_core.errors import InputError

Train = Callable[[TrainJob], Update]
SMALL_BATCH = 1
"""Tokens: a response is a forward batch of its own everywhere, for models compute partly in float32, which shows."""
DDP, FSDP2 = TrainerConfig(num_processes=2), TrainerConfig(num_processes=4, sharding="fsdp2")


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        family: save_tiny_model(family, tmp_path_factory.mktemp(family) / "model") for family in ("qwen3_vl", "qwen3_5")
    }


@pytest.fixture(scope="module")
def launched(
    students: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[int], TrainerProcesses]]:
    """Processes that all tests share, for they are slow to start; each job brings its own settings."""
    started: dict[int, TrainerProcesses] = {}

    def launch(count: int) -> TrainerProcesses:
        if count not in started:
            world = TrainingWorld(students["qwen3_vl"], tmp_path_factory.mktemp(f"launched-{count}"))
            settings = world.settings(world.root / "work", placement=TrainerConfig(num_processes=count))
            started[count] = TrainerProcesses(settings, track=lambda *_: nullcontext(lambda _: None))
        return started[count]

    yield launch
    for processes in started.values():
        processes.release()


@pytest.fixture
def trainer_on(launched: Callable[[int], TrainerProcesses]) -> Callable[[TrainingWorld, TrainerConfig], Train]:
    def make(world: TrainingWorld, placement: TrainerConfig) -> Train:
        processes = launched(placement.total_processes)

        def train(job: TrainJob) -> Update:
            work_dir = world.root / placement.sharding
            processes._settings = world.settings(work_dir, placement=placement, max_batch_tokens=SMALL_BATCH)
            processes._last = None
            update = processes.train(job)
            assert update.folder == work_dir / f"policy-{job.key}", "the job is the same one there"
            return update

        return train

    return make


def alone(world: TrainingWorld, name: str = "trainer") -> Train:
    return world.trainer(name, max_batch_tokens=SMALL_BATCH).train


def rounds(world: TrainingWorld, train: Train, last: int, optimizer: OptimizerConfig) -> list[Update]:
    updates: list[Update] = []
    policy = None
    for number in range(1, last + 1):
        job = world.job(round=number, policy=policy, loss=TOP_K_LOSS, weights="token", optimizer=optimizer)
        updates.append(train(job))
        policy = ref_of(job)
    return updates


def ref_of(job: TrainJob) -> ArtifactRef:
    return ArtifactRef(stage=TrainJob.stage, key=job.key, digest="any")


def state(update: Update, part: str = "state/optimizer.safetensors") -> dict[str, torch.Tensor]:
    return load_file(update.folder / part)


def assert_equal(found: Update, expected: Update, limit: float) -> None:
    for part in ("model/model.safetensors", "state/optimizer.safetensors"):
        left, right = state(found, part), state(expected, part)
        assert left.keys() == right.keys()
        for name, tensor in right.items():
            assert (left[name] - tensor).abs().max() <= limit, (part, name)
    assert found.policy["num_updates"] == expected.policy["num_updates"]
    left, right = (
        {key: math.nan if value is None else value for key, value in one.summary.items()} for one in (found, expected)
    )
    assert left == pytest.approx(right, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("placement", [DDP, TrainerConfig(num_processes=4), FSDP2], ids=["2 ddp", "4 ddp", "4 fsdp2"])
def test_gradients_are_those_of_one_process(
    placement: TrainerConfig,
    students: dict[str, Path],
    tmp_path: Path,
    trainer_on: Callable[[TrainingWorld, TrainerConfig], Train],
) -> None:
    """After one update, the first moment is the gradient times 1 - beta."""
    world = TrainingWorld(students["qwen3_vl"], tmp_path)
    optimizer = OPTIMIZER.model_copy(update={"mini_batches": 1, "max_grad_norm": 1e9})
    job = world.job(dtype="float32", loss=TOP_K_LOSS, weights="token", optimizer=optimizer)
    expected, found = (state(train(job)) for train in (alone(world), trainer_on(world, placement)))
    names = [name for name in expected if name.endswith(".exp_avg")]
    assert {name for name in found if name.endswith(".exp_avg")} == set(names)
    norm = torch.stack([expected[name].norm() for name in names]).norm()
    difference = torch.stack([(found[name] - expected[name]).norm() for name in names]).norm()
    assert difference <= 1e-5 * norm


@pytest.mark.parametrize(
    ("family", "placement", "changes"),
    [
        ("qwen3_vl", DDP, {}),
        ("qwen3_vl", FSDP2, {"epochs": 2}),
        ("qwen3_5", FSDP2, {}),
        ("qwen3_vl", FSDP2.model_copy(update={"gradient_checkpointing": True}), {"lora": LoRAConfig(rank=2)}),
        ("qwen3_vl", DDP.model_copy(update={"gradient_checkpointing": True}), {"frozen": ("model.visual.*",)}),
    ],
    ids=["2 ddp", "4 fsdp2, 2 epochs", "4 fsdp2, linear attention", "4 fsdp2, adapters", "2 ddp, frozen"],
)
def test_checkpoints_are_those_of_one_process(
    family: str,
    placement: TrainerConfig,
    changes: dict[str, Any],
    students: dict[str, Path],
    tmp_path: Path,
    trainer_on: Callable[[TrainingWorld, TrainerConfig], Train],
) -> None:
    """Float64, three rounds; four processes have two prompts an update, so that two of them have none."""
    world = TrainingWorld(students[family], tmp_path)
    optimizer = OPTIMIZER.model_copy(update=changes)
    expected = rounds(world, alone(world), 3, optimizer)
    found = rounds(world, trainer_on(world, placement), 3, optimizer)
    assert_equal(found[-1], expected[-1], 1e-9)


def test_bfloat16_keeps_weights_and_moments_in_float32(
    students: dict[str, Path], tmp_path: Path, trainer_on: Callable[[TrainingWorld, TrainerConfig], Train]
) -> None:
    world = TrainingWorld(students["qwen3_vl"], tmp_path)
    job = world.job(dtype="bfloat16", loss=TOP_K_LOSS, weights="token")
    found, expected, exact = (
        train(one)
        for train, one in (
            (trainer_on(world, FSDP2), job),
            (alone(world), job),
            (alone(world, "exact"), world.job(dtype="float32", loss=TOP_K_LOSS, weights="token")),
        )
    )
    tensors = [*state(found).values(), *state(found, "model/model.safetensors").values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert found.summary["loss"] == pytest.approx(expected.summary["loss"], rel=1e-3)
    assert found.summary["loss"] != pytest.approx(exact.summary["loss"], rel=1e-5)


def test_a_state_goes_on_with_another_number_of_processes(
    students: dict[str, Path], tmp_path: Path, trainer_on: Callable[[TrainingWorld, TrainerConfig], Train]
) -> None:
    world = TrainingWorld(students["qwen3_vl"], tmp_path)
    expected = rounds(world, alone(world), 3, OPTIMIZER)
    job = world.job(round=1, loss=TOP_K_LOSS, weights="token")
    update = trainer_on(world, DDP)(job)
    for number, train in ((2, trainer_on(world, FSDP2)), (3, alone(world, "elsewhere"))):
        checkpoint = CheckpointJob(train_key=job.key)
        world.store.produce(checkpoint, lambda folder, update=update: _write_state(update, folder))
        job = world.job(round=number, policy=ref_of(job), loss=TOP_K_LOSS, weights="token")
        update = train(job)
        assert_equal(update, expected[number - 1], 1e-9)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_processes_on_another_machine_join(students: dict[str, Path], tmp_path: Path) -> None:
    """The other machine's launcher is told nothing but where to meet."""
    world = TrainingWorld(students["qwen3_vl"], tmp_path)
    address = f"127.0.0.1:{free_port()}"
    placement = TrainerConfig(num_machines=2, address=address, sharding="fsdp2")
    command = launch_command(placement, 0)[:-1]
    command[command.index("--machine_rank") + 1] = "1"
    settings = world.settings(tmp_path / "work", placement=placement).model_copy(
        update={"max_batch_tokens": SMALL_BATCH}
    )
    processes = TrainerProcesses(settings, track=lambda *_: nullcontext(lambda _: None))
    other = subprocess.Popen(command, env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})
    try:
        job = world.job(loss=TOP_K_LOSS)
        assert_equal(processes.train(job), alone(world)(job), 1e-9)
    finally:
        processes.release()
        try:
            assert other.wait(timeout=60) != 0, "it ends with the main process"
        finally:
            other.kill()


def test_an_error_of_the_job_is_told_as_in_one_process(
    students: dict[str, Path], tmp_path: Path, trainer_on: Callable[[TrainingWorld, TrainerConfig], Train]
) -> None:
    world = TrainingWorld(students["qwen3_vl"], tmp_path)
    train = trainer_on(world, DDP)
    with pytest.raises(InputError, match=r"optimizer\.frozen must name parameters, but 'x' fits none"):
        train(world.job(optimizer=OPTIMIZER.model_copy(update={"frozen": ("x",)})))
    # Started anew, for nobody knows what was held.
    job = world.job(loss=TOP_K_LOSS)
    assert_equal(train(job), alone(world)(job), 1e-9)


def test_an_error_of_one_process_is_told_too(
    students: dict[str, Path], tmp_path: Path, trainer_on: Callable[[TrainingWorld, TrainerConfig], Train]
) -> None:
    """An image that the other process alone needs is gone."""
    world = TrainingWorld(students["qwen3_vl"], tmp_path)
    job = world.job(optimizer=OPTIMIZER.model_copy(update={"mini_batches": 1}))
    rows = read_training_rows(job, world.store, world.dataset, world.processor)
    (mini_batch,) = mini_batches(rows, job, 0)
    missing = rows[share_of(rows, mini_batch, 1, 2)[0]].sample_id
    (tmp_path / "images" / f"{missing}.png").unlink()
    with pytest.raises(InputError, match=f"image {missing}.png must exist"):
        trainer_on(world, DDP)(job)


def test_a_lost_process_costs_a_new_start_alone(
    launched: Callable[[int], TrainerProcesses],
    students: dict[str, Path],
    tmp_path: Path,
    trainer_on: Callable[[TrainingWorld, TrainerConfig], Train],
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = TrainingWorld(students["qwen3_vl"], tmp_path)
    train = trainer_on(world, DDP)
    first, second = (world.job(round=number, loss=TOP_K_LOSS, policy=None) for number in (1, 2))
    train(first)
    processes = launched(2)
    run = processes._server._run
    assert run is not None
    launcher, *workers = sorted(session_members(run.guard.pid), key=lambda process: process.started)
    assert len(workers) >= 2
    os.kill(workers[-1].pid, signal.SIGKILL)
    assert_equal(train(second), alone(world)(second), 1e-9)
    assert "it is started once more" in caplog.text
    assert find_process(launcher.pid) is None


def test_jobs_need_the_key_and_the_launchers_death_ends_all(launched: Callable[[int], TrainerProcesses]) -> None:
    """The launcher gives each process a session of its own, in which nobody would look for it afterwards."""
    processes = launched(2)
    if not processes._server.is_running():
        processes._server.start(lambda _: None)
    address = urlsplit(processes._server.url)
    # Who connects and says nothing keeps nobody waiting for long.
    with socket.create_connection((str(address.hostname), int(address.port or 0))):
        for headers in ({}, {"Authorization": "Bearer guessed"}):
            connection = http.client.HTTPConnection(str(address.hostname), address.port)
            connection.request("POST", "/train", b"{}", headers)
            assert connection.getresponse().status == 401
            connection.close()
    run = processes._server._run
    assert run is not None
    launcher, *workers = sorted(session_members(run.guard.pid), key=lambda process: process.started)
    assert len(workers) >= 2
    os.kill(launcher.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while (left := [one for one in workers if find_process(one.pid) == one]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
