"""The store tool shows what is there, finds what is damaged, and collects what is no longer needed, nothing else."""

import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from prefect.filesystems import LocalFileSystem
from prefect.results import ResultStore
from prefect.settings import PREFECT_API_URL, PREFECT_LOCAL_STORAGE_PATH, temporary_settings
from support.seaweed import SeaweedServer

from flows.store import main
from tasks.adapters.store import Outcome, Store
from tasks.artifacts import ArtifactRef, Job


class PolicyJob(Job):
    stage: ClassVar[str] = "model"

    weights: str = "weights"


class RoundJob(Job):
    """As a round of training is stored, as far as the tool looks."""

    stage: ClassVar[str] = "train"

    policy: ArtifactRef
    seed: int = 0


class StateJob(Job):
    stage: ClassVar[str] = "checkpoint"

    train_key: str


class ScoreJob(Job):
    stage: ClassVar[str] = "evaluate"

    policy: ArtifactRef


class RunJob(Job):
    stage: ClassVar[str] = "report"

    name: str
    rounds: tuple[ArtifactRef, ...]
    evaluations: tuple[dict[str, Any], ...]


class World:
    """Two runs that part after the second of five rounds; every round has its state."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.policy = self.make(PolicyJob())
        self.trunk = self.rounds(self.policy, 2, seed=0)
        self.left = self.rounds(self.trunk[-1], 3, seed=1)
        self.right = self.rounds(self.trunk[-1], 1, seed=2)

    def make(self, job: Job, **summary: float) -> ArtifactRef:
        def write(folder: Path) -> Outcome:
            (folder / "content.bin").write_bytes(job.key.encode() * 10)
            return Outcome(summary=summary)

        return self.store.produce(job, write)

    def rounds(self, policy: ArtifactRef, count: int, seed: int) -> list[ArtifactRef]:
        made = []
        for _ in range(count):
            policy = self.make(RoundJob(policy=policy, seed=seed))
            self.make(StateJob(train_key=policy.key))
            made.append(policy)
        return made

    def state(self, train: ArtifactRef) -> ArtifactRef:
        job = StateJob(train_key=train.key)
        manifest = self.store.find(job.stage, job.key)
        assert manifest is not None
        return manifest.ref

    def present(self) -> set[str]:
        """Keys of the rounds whose states have files."""
        manifests = self.store.manifests(self.store.files())
        return {found.job["train_key"] for found in manifests if found.stage == "checkpoint" and not found.pruned}


@pytest.fixture(autouse=True)
def prefect_records(tmp_path: Path) -> Iterator[Path]:
    settings = {PREFECT_API_URL: "http://127.0.0.1:1/api", PREFECT_LOCAL_STORAGE_PATH: tmp_path / "records"}
    with temporary_settings(settings):
        yield tmp_path / "records"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "store")


def run(capsys: pytest.CaptureFixture[str], url: str, *arguments: str) -> tuple[int, str]:
    code = main([*arguments, "--store", url])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_ls_shows_runs_and_stages(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(Store(url, tmp_path / "work"))
    before = world.make(ScoreJob(policy=world.policy), accuracy=0.4171)
    after = world.make(ScoreJob(policy=world.left[-1]), accuracy=0.7034)
    labels = {"student, before": before, "teacher, full image": before, "student, after 5 rounds": after}
    evaluations = tuple({"label": label, "ref": ref.model_dump()} for label, ref in labels.items())
    report = world.make(RunJob(name="my-run", rounds=(*world.trunk, *world.left), evaluations=evaluations))
    world.store.prune(world.state(world.trunk[0]))
    code, text = run(capsys, url, "ls")
    assert code == 0
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    [row] = [row for row in cells if row[0] == "my-run"]
    assert (row[1], row[2], row[4]) == ("5", "41.7% -> 70.3%", report.key[:12])
    stages = {row[0]: row[1:5] for row in cells if len(row) == 6}
    # A file of 320 bytes each: 32 digits, ten times.
    assert stages["checkpoint"] == ["6", "1", "5", "1.6 kB"]
    assert stages["train"] == ["6", "0", "6", "1.9 kB"]
    assert set(stages) == {"model", "train", "checkpoint", "evaluate", "report"}


def test_show_gives_files_and_where_it_comes_from(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(Store(url, tmp_path / "work"))
    world.store.keep(world.state(world.left[-1]))
    code, text = run(capsys, url, "show", world.state(world.left[-1]).key[:8], "--depth", "2")
    assert code == 0
    assert "kept for good" in text
    assert "content.bin" in text
    assert f"round: train/{world.left[2].key[:12]}" in text
    assert f"policy: train/{world.left[1].key[:12]}" in text
    assert world.left[0].key[:12] not in text
    # The first round after the parting, two before it, and the model.
    assert "... 4 more artefacts" in text
    code, text = run(capsys, url, "show", world.left[-1].key, "--depth", "9")
    assert "more artefacts" not in text
    assert f"policy: model/{world.policy.key[:12]}" in text


def test_show_asks_for_one_artefact(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    World(Store(url, tmp_path / "work"))
    code, text = run(capsys, url, "show", "")
    assert code == 1
    assert "13 do" in text
    assert "give more digits" in text
    code, text = run(capsys, url, "show", "xyz")
    assert code == 1
    assert "none does" in text
    assert "Traceback" not in text


def test_verify_finds_every_kind_of_damage(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(url, tmp_path / "work")
    world = World(store)
    store.prune(world.state(world.trunk[0]))
    code, text = run(capsys, url, "verify")
    assert code == 0
    assert "12 files, 3.8 kB: 0 damaged or missing" in text
    Path(store.path_of(world.left[0], "content.bin")).write_bytes(b"x" * 320)
    Path(store.path_of(world.left[1], "content.bin")).write_bytes(b"")
    Path(store.path_of(world.left[2], "content.bin")).unlink()
    (Path(url) / "train" / world.right[0].key / "manifest.json").write_text("{")
    code, text = run(capsys, url, "verify")
    assert code == 1
    for ref, what in zip(
        world.left, ("differs from its checksum", "differs from its checksum", "is gone"), strict=True
    ):
        assert f"content.bin of artefact train/{ref.key} {what}" in text
    assert f"{world.right[0].key}/manifest.json must be whole" in text
    assert "11 files, 3.5 kB: 4 damaged or missing" in text


def test_gc_keeps_the_last_two_states_of_every_chain_and_what_is_kept(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(Store(url, tmp_path / "work"))
    everything = world.present()
    code, text = run(capsys, url, "gc")
    # The left chain ends with rounds 5 and 4, the right one with 3 and, before the parting, 2: 1 and the left 3 can go.
    assert code == 0
    assert "2 to delete, 640 bytes; --delete does it" in text
    assert world.present() == everything
    world.store.keep(world.state(world.trunk[0]))
    code, text = run(capsys, url, "gc", "--delete")
    assert "1 deleted, 320 bytes" in text
    assert world.present() == everything - {world.left[0].key}
    assert world.store.manifest(world.state(world.left[0])).pruned
    code, text = run(capsys, url, "gc", "--delete")
    assert "0 deleted" in text
    assert run(capsys, url, "verify")[0] == 0


def test_gc_passes_over_rounds_without_a_state_and_spares_a_state_whose_round_is_not_there_yet(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(Store(url, tmp_path / "work"))
    shutil.rmtree(Path(url) / "checkpoint" / world.state(world.left[1]).key)
    shutil.rmtree(Path(url) / "train" / world.right[0].key)
    everything = world.present()
    run(capsys, url, "gc", "--delete")
    # Left: 5 and 3, for 4 has none. The state of the right round 3 was stored before its round.
    assert world.present() == everything - {world.trunk[0].key, world.trunk[1].key}
    assert world.right[0].key in world.present()


def test_gc_forgets_prefects_record_of_what_it_collects(
    url: str, tmp_path: Path, prefect_records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(Store(url, tmp_path / "work"))
    records = ResultStore(result_storage=LocalFileSystem(basepath=str(prefect_records)))
    names = {
        train.key: f"vzero-checkpoint-{world.state(train).key}-{world.store.identity}"
        for train in (world.left[0], world.left[2])
    }
    for name in names.values():
        records.write({"digest": "x"}, key=name)
        assert records.exists(name)
    run(capsys, url, "gc", "--delete")
    assert not ResultStore(result_storage=records.result_storage).exists(names[world.left[0].key])
    assert ResultStore(result_storage=records.result_storage).exists(names[world.left[2].key])


def test_gc_collects_old_attempts_that_nothing_names(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(Store(url, tmp_path / "work"))
    root = Path(url)
    run(capsys, url, "gc", "--delete")
    unfinished = root / "train" / ("f" * 32) / ("a" * 32) / "deep" / "content.bin"
    loser = root / "train" / world.left[0].key / ("b" * 32) / "content.bin"
    pruned = root / "checkpoint" / world.state(world.left[0]).key / ("c" * 32) / "content.bin"
    partial = root / "train" / world.left[0].key / f"manifest.json.{'d' * 32}.partial"
    young = root / "train" / ("e" * 32) / ("a" * 32) / "content.bin"
    for path in (unfinished, loser, pruned, partial, young):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"0123456789")
        if path is not young:
            old = time.time() - 25 * 3600
            os.utime(path, (old, old))
    before = {path for path in root.rglob("*") if path.is_file()}
    code, text = run(capsys, url, "gc")
    assert code == 0
    assert "4 to delete, 40 bytes" in text
    assert {path for path in root.rglob("*") if path.is_file()} == before
    assert "0 to delete" in run(capsys, url, "gc", "--older-than", "26")[1]
    run(capsys, url, "gc", "--delete")
    assert {path for path in root.rglob("*") if path.is_file()} == before - {unfinished, loser, pruned, partial}
    assert "1 deleted" in run(capsys, url, "gc", "--delete", "--older-than", "0")[1]
    assert not young.exists()
    assert run(capsys, url, "verify")[0] == 0


def test_a_manifest_that_is_not_whole_is_named_and_its_artefact_left_alone(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Each call of the tool adds a handler, which writes to what was standard error then.
    monkeypatch.setattr(logging.getLogger("vzero"), "handlers", [])
    world = World(Store(url, tmp_path / "work"))
    run(capsys, url, "gc", "--delete")
    damaged = [world.right[0], world.state(world.left[2])]
    broken = [Path(url) / ref.stage / ref.key / "manifest.json" for ref in damaged]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    before = {path for path in Path(url).rglob("*") if path.is_file()}
    old = time.time() - 25 * 3600
    for path in before:
        os.utime(path, (old, old))
    for command in (["ls"], ["show", world.left[2].key], ["gc", "--delete"]):
        logging.getLogger("vzero").handlers.clear()
        assert main([*command, "--store", url]) == 0
        printed = capsys.readouterr()
        assert set(printed.err.splitlines()) == {
            f"WARNING: {path} must be whole, but is not; delete {path.parent} and run again" for path in broken
        }
    assert "0 deleted" in printed.out
    assert {path for path in Path(url).rglob("*") if path.is_file()} == before


@pytest.mark.s3
def test_all_commands_work_on_a_bucket(
    seaweed: SeaweedServer, s3_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(Store(s3_url, tmp_path / "work"))
    assert run(capsys, s3_url, "ls")[0] == 0
    assert run(capsys, s3_url, "show", world.left[2].key[:10])[0] == 0
    path = world.store.path_of(world.left[2], "content.bin")
    seaweed.client().pipe_file(f"{s3_url}/train/{'f' * 32}/{'a' * 32}/content.bin", b"0123456789")
    assert "3 deleted, 650 bytes" in run(capsys, s3_url, "gc", "--delete", "--older-than", "0")[1]
    assert not any("f" * 32 in file.path for file in world.store.files())
    assert run(capsys, s3_url, "verify") == (0, "11 files, 3.5 kB: 0 damaged or missing\n")
    seaweed.client().pipe_file(path, b"damage")
    code, text = run(capsys, s3_url, "verify")
    assert code == 1
    assert f"content.bin of artefact train/{world.left[2].key} differs" in text


@pytest.mark.parametrize("command", [["ls"], ["show", "ab"], ["verify"], ["gc"]])
def test_a_store_that_is_not_there_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    code, text = run(capsys, str(tmp_path / "nothing"), *command)
    assert code == 1
    assert text == f"error: {tmp_path}/nothing must be a store, but nothing is there; check --config and --store\n"
    assert not (tmp_path / "nothing").exists()


def test_the_store_comes_from_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    World(Store(str(tmp_path / "mine"), tmp_path / "work"))
    (tmp_path / "my.toml").write_text('[store]\nurl = "mine"\n')
    assert main(["ls", "--config", str(tmp_path / "my.toml")]) == 0
    assert "checkpoint" in capsys.readouterr().out
