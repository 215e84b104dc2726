"""Publishing as a Prefect task, what a user does with a version, and the registry on a real S3 server that fails."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import fsspec
import pytest
import torch
from huggingface_hub import ModelCard
from prefect import flow
from support.hub_stand_in import TOKEN, HubStandIn
from support.published import files_below, publish_job, version_of, write_student
from support.run_artifacts import Run
from support.seaweed import Line, SeaweedServer
from support.tiny_models import picture
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from tasks.adapters import files
from tasks.adapters.files import StoreUnavailableError, configure_s3
from tasks.adapters.registry import Registry, RegistryError
from tasks.adapters.store import Outcome
from tasks.artifacts import Job
from tasks.publish import PublishJob, publish, upload
from tasks.stage import RunContext

MIB = 1 << 20


class StateJob(Job):
    stage: ClassVar[str] = "checkpoint"

    train_key: str


@pytest.fixture
def run(tmp_path: Path, folders: dict[str, Path]) -> Run:
    """A run whose checkpoint holds a tiny model, and the state that is nobody's business."""
    made = Run(tmp_path / "run", num_rounds=1)

    def state(folder: Path) -> Outcome:
        shutil.copytree(folders["qwen3_vl"], folder / "model")
        (folder / "state").mkdir()
        (folder / "state" / "optimizer.safetensors").write_bytes(b"moments")
        return Outcome(summary={"weights": "w" * 32, "num_updates": 2})

    made.selected = made.store.produce(StateJob(train_key="tiny"), state)
    return made


def context_of(run: Run) -> RunContext:
    """The part of a RunContext that publishing needs."""
    context: Any = SimpleNamespace(store=run.store)
    return context


def job_of(run: Run) -> PublishJob:
    return publish_job(run, selected=run.selected)


# --- the tasks ------------------------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_a_run_that_is_repeated_publishes_once(prefect_api: str, run: Run, tmp_path: Path) -> None:
    url = str(tmp_path / "published")
    job = job_of(run)

    @flow
    def twice() -> list[str]:
        return [publish(job, context_of(run), url, "c0ffee").model_dump_json() for _ in range(2)]

    first, second = twice()
    version = Registry(url).version(job.name)
    assert first == second == version.model_dump_json()
    assert (version.run, version.data, version.commit, version.store) == (job.run, job.data, "c0ffee", run.store.url)
    assert [found.name for found in Registry(url).versions()] == [job.name]
    assert not (tmp_path / "published" / "versions" / job.name / "state").exists()
    assert "c0ffee" in Registry(url).card(job.name).decode()


def test_a_version_that_is_there_stays_also_where_its_card_would_be_another(run: Run, tmp_path: Path) -> None:
    url = str(tmp_path / "published")
    job = job_of(run)
    first = publish.fn(job, context_of(run), url, None)
    # The commit stands on the card, and is no part of the name.
    assert publish.fn(job, context_of(run), url, "c0ffee") == first
    assert "c0ffee" not in Registry(url).card(job.name).decode()


@pytest.mark.parametrize("place", ["local", pytest.param("s3", marks=pytest.mark.s3)])
def test_a_version_is_a_plain_hugging_face_folder(
    request: pytest.FixtureRequest, run: Run, folders: dict[str, Path], tmp_path: Path, place: str
) -> None:
    url = str(tmp_path / "published") if place == "local" else request.getfixturevalue("s3_url")
    version = publish.fn(job_of(run), context_of(run), url, None)
    registry = Registry(url)
    if place == "local":
        folder = tmp_path / "published" / "versions" / version.name / "model"
        assert registry.model_url(version.name) == str(folder)
    else:
        folder = tmp_path / "fetched"
        registry.fetch(version.name, folder)
    assert files_below(folder) == files_below(folders["qwen3_vl"])
    model = AutoModelForImageTextToText.from_pretrained(folder)
    before = AutoModelForImageTextToText.from_pretrained(folders["qwen3_vl"])
    for (name, found), (_, expected) in zip(model.state_dict().items(), before.state_dict().items(), strict=True):
        assert torch.equal(found, expected), name
    tokens = AutoTokenizer.from_pretrained(folder)("w1 w2", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**tokens).logits, before(**tokens).logits)
    # The whole processor needs torchvision, for videos.
    assert AutoImageProcessor.from_pretrained(folder)(images=[picture(32, 32, seed=0)])["pixel_values"] is not None
    card = ModelCard(registry.card(version.name).decode())
    assert card.data.model_name == version.name


def test_no_path_of_this_machine_is_published(run: Run, tmp_path: Path) -> None:
    config = {
        "student": {"path": str(run.folder / "student")},
        "data": {"source": {"path": str(run.folder / "x.jsonl")}},
    }
    job = publish_job(run, selected=run.selected, config=config)
    version = publish.fn(job, context_of(run), str(tmp_path / "published"), None)
    folder = tmp_path / "published" / "versions" / version.name
    found = {path for path, content in files_below(folder).items() if str(tmp_path.parent).encode() in content}
    # Our own record names the store, and is not uploaded.
    assert found == {"version.json"}


@pytest.mark.e2e
def test_the_champion_is_uploaded(
    prefect_api: str, run: Run, tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    url = str(tmp_path / "published")
    with HubStandIn() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)

        @flow
        def both() -> str:
            version = publish(job_of(run), context_of(run), url, None)
            address: str = upload(version, url, "team/student")
            return address

        name = job_of(run).name
        assert both() == f"{hub.url}/team/student/tree/{name}"
        found = hub.repositories["team/student"].at(name)
    expected = {**files_below(folders["qwen3_vl"]), "README.md": Registry(url).card(name)}
    assert {path: content for path, content in found.items() if path != ".gitattributes"} == expected


# --- S3 -------------------------------------------------------------------------------------------------------------


class Once:
    """Loses the answer to the first request that an expression matches; the server has done what it was asked."""

    def __init__(self, expression: str) -> None:
        self.expression = re.compile(expression)
        self.requests: list[str] = []

    def __call__(self, request: str) -> Literal["pass", "lose"]:
        if self.requests or not self.expression.search(request):
            return "pass"
        self.requests.append(request)
        return "lose"


@pytest.fixture
def line(seaweed: SeaweedServer, s3_url: str) -> Iterator[Line]:
    """File systems reach the server over this line."""
    made = Line(seaweed)
    configure_s3({**seaweed.options(), "endpoint_url": made.endpoint})
    yield made
    made.close()


def write_large_student(folder: Path) -> Path:
    """With a file that is sent in parts."""
    write_student(folder)
    (folder / "model" / "large.safetensors").write_bytes(os.urandom(MIB) * 110)
    return folder


@pytest.mark.s3
@pytest.mark.parametrize(
    "moment", [r"PUT .*/version\.json$", r"PUT .*/config\.json", r"PUT .*partNumber=2", r"POST .*uploadId"]
)
def test_a_version_whose_answer_was_lost_is_ones_own(s3_url: str, line: Line, tmp_path: Path, moment: str) -> None:
    student = (write_student if "json" in moment else write_large_student)(tmp_path / "student")
    line.fault = lost = Once(moment)
    registry = Registry(s3_url)
    version = version_of(student, "run-1")
    registry.add(version, student)
    assert len(lost.requests) == 1
    assert Registry(s3_url).versions() == [version]
    registry.fetch("run-1", tmp_path / "model")
    assert files_below(tmp_path / "model") == files_below(student / "model")


@pytest.mark.s3
def test_a_move_whose_answer_was_lost_is_ones_own(s3_url: str, line: Line, tmp_path: Path) -> None:
    registry = Registry(s3_url)
    folder = write_student(tmp_path / "student")
    registry.add(version_of(folder, "run-1"), folder)
    line.fault = lost = Once(r"PUT .*/champion/000001\.json$")
    move = registry.move(None, kind="founded", champion="run-1", version="run-1", data="d", reason="the first one")
    assert line.requests.count(lost.requests[0]) > 1
    assert Registry(s3_url).history() == [move]
    # Another's entry is still another's.
    with pytest.raises(RegistryError, match="somebody else moved since"):
        registry.move(None, kind="founded", champion="run-1", version="run-1", data="d", reason="the first one")


@pytest.mark.s3
def test_a_large_file_of_others_is_not_overwritten(seaweed: SeaweedServer, s3_url: str, tmp_path: Path) -> None:
    student = write_large_student(tmp_path / "student")
    theirs = os.urandom(MIB) * 110
    path = f"{s3_url}/versions/run-1/model/large.safetensors"
    seaweed.client().pipe_file(path, theirs)
    with pytest.raises(RegistryError, match=r"but model/large\.safetensors differs from its checksum; delete"):
        Registry(s3_url).add(version_of(student, "run-1"), student)
    assert seaweed.client().cat_file(path) == theirs
    assert Registry(s3_url).versions() == []


@pytest.mark.s3
def test_a_server_that_is_away_is_one_clear_error_and_changes_nothing(
    seaweed: SeaweedServer, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PATIENCE", 1.0)
    registry = Registry(s3_url)
    folder = write_student(tmp_path / "student")
    registry.add(version_of(folder, "run-1"), folder)
    move = registry.move(None, kind="founded", champion="run-1", version="run-1", data=None, reason="")
    configure_s3({**seaweed.options(), "endpoint_url": "http://127.0.0.1:1"})
    away = Registry(s3_url)
    for use in (away.champion, away.history, away.versions, away.rollback, lambda: away.fetch("run-1", tmp_path / "m")):
        with pytest.raises(StoreUnavailableError, match=r"http://127.0.0.1:1 must answer"):
            use()
    assert registry.history() == [move]
    assert not (tmp_path / "m").exists()


@pytest.mark.s3
def test_a_key_that_may_only_read_cannot_move_the_champion(seaweed: SeaweedServer, s3_url: str, tmp_path: Path) -> None:
    folder = write_student(tmp_path / "student")
    Registry(s3_url).add(version_of(folder, "run-1"), folder)
    configure_s3(seaweed.options("reader"))
    reader = Registry(s3_url)
    assert reader.version("run-1").name == "run-1"
    with pytest.raises(files.StoreError, match=r"champion/000001\.json was refused .*AccessDenied"):
        reader.move(None, kind="founded", champion="run-1", version="run-1", data=None, reason="")
    fs, path = fsspec.core.url_to_fs(s3_url)
    assert not fs.exists(f"{path}/champion/000001.json")
