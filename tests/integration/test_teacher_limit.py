"""Two runs with one teacher server: where it has a limit, one of them asks at a time."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from aiohttp import web
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.settings import get_current_settings
from support.runs import small_config, start
from support.vllm_stand_in import GENERATE, StandIn

from flows.config import PROJECT, RunConfig
from tasks.adapters.models import model_folder
from tasks.adapters.prompts import PromptProcessor
from tasks.serve import LEASE_SECONDS, teacher_limit

pytestmark = pytest.mark.e2e

RUNS = ("first", "second")
TIME_TO_ASK = 4.0
"""Seconds from a run's measuring its student to its asking the teacher; tenths on an idle machine."""


class Watched(StandIn):
    """Knows whose requests it is working on, by the key that they bring.

    Whoever asks first is answered when the other one has come to its first question too, and had time to ask it.
    """

    def __init__(self, folder: Path) -> None:
        image_id = PromptProcessor(model_folder("embedded:teacher")).image_id
        # 16 x 16 pixels a token.
        super().__init__(
            image_id=image_id, visual_tokens=lambda image: image.width // 16 * (image.height // 16), delay=0.02
        )
        self.folder = folder
        self.working: dict[str, int] = dict.fromkeys(RUNS, 0)
        self.asked_by: list[str] = []
        self.together = 0

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.path != GENERATE:
            return await super()._handle(request)
        who = request.headers["Authorization"].removeprefix("Bearer ")
        self.asked_by.append(who)
        self.working[who] += 1
        self.together += all(self.working.values())
        try:
            if who == self.asked_by[0] and len(set(self.asked_by)) == 1:
                # The student is measured before the teacher is asked.
                for other in set(RUNS) - {who}:
                    while not any((self.folder / other / "store" / "evaluate").glob("*/manifest.json")):
                        await asyncio.sleep(0.1)
                await asyncio.sleep(TIME_TO_ASK)
            return await super()._handle(request)
        finally:
            self.working[who] -= 1


@pytest.fixture
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    for name in RUNS:
        monkeypatch.setenv(f"VZERO_TEST_{name.upper()}", name)
    with Watched(tmp_path) as server:
        yield server


def config_of(folder: Path, teacher: Watched, name: str, seed: int) -> RunConfig:
    servers = {"urls": [teacher.url], "api_key_variable": f"VZERO_TEST_{name.upper()}"}
    config = small_config(
        folder / name,
        seed=seed,
        teacher={"path": "embedded:teacher", "engine": {"kind": "vllm", "version": teacher.version}},
        data={"source": {"kind": "small_world", "num_prompts": 16, "num_evaluation": 8}},
        rounds={"num_rounds": 1},
        selection={"num_prompts": 4, "every": 1},
        placement={"teacher_servers": servers},
        publish={"url": None},
    )
    return config


def run_both(folder: Path, teacher: Watched, api: str) -> None:
    configs = [config_of(folder, teacher, name, seed) for seed, name in enumerate(RUNS)]
    runs = [start(config, api, folder / "prefect") for config in configs]
    for run in runs:
        said, _ = run.communicate(timeout=240)
        assert run.returncode == 0, said


def test_two_runs_take_turns(prefect_api: str, tmp_path: Path, teacher: Watched) -> None:
    name = teacher_limit(teacher.url)
    with get_client(sync_client=True) as client:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
        run_both(tmp_path, teacher, prefect_api)
        assert teacher.together == 0
        # They did take turns, rather than run one after the other.
        turns = [who for who, before in zip(teacher.asked_by, [None, *teacher.asked_by], strict=False) if who != before]
        assert len(turns) > 2
        assert client.read_global_concurrency_limit_by_name(name).active_slots == 0


HOLDER = """
import sys, time
from contextlib import nullcontext
from pathlib import Path
from prefect import flow, task
from tasks.config import ModelConfig, PlacementConfig
from tasks.serve import Engines

model = ModelConfig(path="embedded:teacher", engine={"kind": "vllm", "version": "0.32.0"})
placement = PlacementConfig(teacher_servers={"urls": [sys.argv[1]]})
engines = Engines(None, None, student=model, teacher=model, placement=placement, training=None, work_dir=Path(),
    track=lambda *_: nullcontext())

@task
def ask():
    with engines.asking_teacher():
        print("asking", flush=True)
        time.sleep(600)

@flow
def run():
    ask()

run()
"""


def test_the_place_of_a_run_that_was_killed_comes_free(prefect_api: str, teacher: Watched) -> None:
    name = teacher_limit(teacher.url)
    environment = {**os.environ, "PREFECT_API_URL": prefect_api, "PREFECT_LOGGING_LEVEL": "ERROR"}
    with get_client(sync_client=True) as client:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, teacher.url], cwd=PROJECT, env=environment, stdout=subprocess.PIPE, text=True
        )
        assert holder.stdout is not None
        assert holder.stdout.readline() == "asking\n"
        holder.kill()
        holder.wait()
        assert client.read_global_concurrency_limit_by_name(name).active_slots == 1
        # A minute later; the server keeps leases in files, for they outlive it.
        folder = get_current_settings().home / "concurrency_leases"
        [lease] = [file for file in folder.glob("*.json") if "expiration" in file.read_text()]
        content = json.loads(lease.read_text())
        left = datetime.fromisoformat(content["expiration"]) - datetime.now(UTC)
        assert left <= timedelta(seconds=LEASE_SECONDS)
        content["expiration"] = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
        lease.write_text(json.dumps(content))
        index = folder / "expirations.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), content["id"]: content["expiration"]}))
        deadline = time.monotonic() + 60
        while client.read_global_concurrency_limit_by_name(name).active_slots > 0:
            assert time.monotonic() < deadline, "the server looks every few seconds"
            time.sleep(0.2)


def test_where_there_is_no_limit_nobody_waits(prefect_api: str, teacher: Watched) -> None:
    environment = {**os.environ, "PREFECT_API_URL": prefect_api, "PREFECT_LOGGING_LEVEL": "ERROR"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", HOLDER, teacher.url], cwd=PROJECT, env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for run in runs:
        assert run.stdout is not None
        assert run.stdout.readline() == "asking\n"
    for run in runs:
        run.kill()
        run.wait()
