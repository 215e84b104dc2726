"""New rows: added by our own command, which starts a retraining, or by somebody else, and found by the poll."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import nullcontext
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from support.formats import png, save, write_jsonl
from support.runs import small_config
from support.seaweed import SeaweedServer

from flows.add_samples import add_samples, main
from flows.config import LAPTOP, RunConfig
from flows.deploy import deploy
from flows.run import version_of_data
from flows.watch import watch
from tasks.adapters.dataset import QUARANTINE, ROWS, SEEN, Dataset, SeenRow
from tasks.adapters.images import ImageReader
from tasks.adapters.importers import read_source, row_digest
from tasks.adapters.registry import Registry, Version, list_files
from tasks.adapters.store import Store
from tasks.adapters.tables import read_rows
from tasks.artifacts import ArtifactRef, BadRow, ImportedRow
from tasks.config import FileData
from tasks.import_data import ImportDataJob, import_data
from vzero_core.errors import ConfigError, InputError

REF = ArtifactRef(stage="train", key="k" * 32, digest="d" * 32)


def row(name: str) -> dict[str, Any]:
    return {"id": name, "image": "a.png", "question": "what?", "region": [1, 2, 3, 4]}


def config_of(folder: Path, data: str, **changes: Any) -> RunConfig:
    source = {"kind": "jsonl", "path": data, "image_root": str(folder)}
    return small_config(folder, data={"source": source}, **changes)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Data with one row."""
    save(tmp_path / "a.png", png())
    write_jsonl(tmp_path / "data" / "first.jsonl", [row("first")])
    return config_of(tmp_path, str(tmp_path / "data"))


@pytest.fixture
def no_server() -> Iterator[None]:
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        yield


def ids(config: RunConfig) -> list[str | None]:
    assert isinstance(config.data.source, FileData)
    return [found.id for found in read_source(config.data.source)]


def found_champion(config: RunConfig) -> None:
    """Let somebody be champion who was judged by the data as they are."""
    assert config.publish.url is not None
    registry = Registry(config.publish.url)
    folder = Path(config.placement.work_dir) / "made"
    save(folder / "README.md", b"card")
    save(folder / "model" / "config.json", b"{}")
    version = Version.model_validate(
        {
            **dict.fromkeys(("policy", "selected", "report", "training_set"), REF),
            "name": "small-1",
            "run": "small",
            "created_at": "2026-01-01T00:00:00Z",
            "parent": None,
            "data": version_of_data(config),
            "store": "store",
            "commit": None,
            "files": list_files(folder),
        }
    )
    registry.add(version, folder)
    registry.move(None, kind="founded", champion="small-1", version="small-1", data=version.data, reason="first")


def test_rows_are_added_as_a_file_of_their_own(config: RunConfig, tmp_path: Path) -> None:
    before = version_of_data(config)
    write_jsonl(tmp_path / "new.jsonl", [row("second"), row("third")])
    place = add_samples(config, tmp_path / "new.jsonl")
    assert Path(place).parent == tmp_path / "data"
    assert Path(place).read_bytes() == (tmp_path / "new.jsonl").read_bytes()
    assert ids(config) == ["first", "second", "third"]
    assert version_of_data(config) != before


def test_the_same_rows_are_added_once(config: RunConfig, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "new.jsonl", [row("second")])
    first = add_samples(config, tmp_path / "new.jsonl")
    version = version_of_data(config)
    assert add_samples(config, tmp_path / "new.jsonl") == first
    assert version_of_data(config) == version
    assert ids(config) == ["first", "second"]
    # The same rows under another name are the same rows.
    write_jsonl(tmp_path / "copy.jsonl", [row("second")])
    assert add_samples(config, tmp_path / "copy.jsonl") == first
    assert version_of_data(config) == version
    write_jsonl(tmp_path / "new.jsonl", [row("third")])
    add_samples(config, tmp_path / "new.jsonl")
    assert sorted(map(str, ids(config))) == ["first", "second", "third"]


def test_what_cannot_be_added_is_said_and_nothing_changes(config: RunConfig, tmp_path: Path) -> None:
    before = version_of_data(config)
    write_jsonl(tmp_path / "bad.jsonl", [row("second"), {"id": "no question", "image": "a.png"}])
    with pytest.raises(InputError, match=r"1 have not:\n  row 2 \(no question\): row must have image and question"):
        add_samples(config, tmp_path / "bad.jsonl")
    write_jsonl(tmp_path / "early.jsonl", [row("second"), row("third") | {"detail_image": "later.png"}])
    with pytest.raises(InputError, match=r"1 have not:\n  row 2 \(third\): image later\.png must exist"):
        add_samples(config, tmp_path / "early.jsonl")
    with pytest.raises(InputError, match=r"rows of kind jsonl must be a \.jsonl file, got .*rows\.csv; convert it"):
        add_samples(config, tmp_path / "rows.csv")
    with pytest.raises(InputError, match="there is no such file"):
        add_samples(config, tmp_path / "gone.jsonl")
    assert version_of_data(config) == before
    for other in (LAPTOP, config_of(tmp_path, str(tmp_path / "data" / "first.jsonl"))):
        with pytest.raises(ConfigError, match=r"data\.source\.path must be a folder, which files of rows can be added"):
            add_samples(other, tmp_path / "bad.jsonl")


def write_toml(config: RunConfig, path: Path) -> None:
    source, published = config.data.source, config.publish.url
    assert isinstance(source, FileData)
    path.write_text(
        f'name = "{config.name}"\n[data.source]\nkind = "jsonl"\npath = "{source.path}"\n'
        f'image_root = "{source.image_root}"\n[publish]\nurl = "{published}"\n'
        f'[store]\nurl = "{config.store.url}"\n[placement]\nwork_dir = "{config.placement.work_dir}"\n'
    )


@pytest.mark.usefixtures("no_server")
def test_without_a_server_the_poll_is_named(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_toml(config, tmp_path / "my.toml")
    write_jsonl(tmp_path / "new.jsonl", [row("second")])
    assert main([str(tmp_path / "new.jsonl"), "--config", str(tmp_path / "my.toml")]) == 0
    assert "no Prefect server is configured (PREFECT_API_URL): a retraining starts at the next poll" in (
        capsys.readouterr().out
    )
    assert main([str(tmp_path / "gone.jsonl"), "--config", str(tmp_path / "my.toml")]) == 1
    assert "there is no such file" in capsys.readouterr().err


def test_a_server_that_does_not_answer_is_named(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_toml(config, tmp_path / "my.toml")
    write_jsonl(tmp_path / "new.jsonl", [row("second")])
    with socket.socket() as nobody:
        # Taken, so that nobody listens there.
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/api"
        with temporary_settings({PREFECT_API_URL: url}):
            assert main([str(tmp_path / "new.jsonl"), "--config", str(tmp_path / "my.toml")]) == 0
    said = capsys.readouterr().out
    assert f"added, but no Prefect server answers at {url}: a retraining starts at the next poll" in said
    assert "was told" not in said
    assert ids(config) == ["first", "second"]


def test_a_server_that_does_not_listen_is_named(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_toml(config, tmp_path / "my.toml")
    write_jsonl(tmp_path / "new.jsonl", [row("second")])
    # Something else that speaks HTTP: it has no POST.
    with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as other:
        Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}/api"
        with temporary_settings({PREFECT_API_URL: url}):
            assert main([str(tmp_path / "new.jsonl"), "--config", str(tmp_path / "my.toml")]) == 0
        other.shutdown()
    assert f"added, but Prefect's server at {url} does not listen: a retraining starts at" in capsys.readouterr().out


def test_a_row_that_stands_there_twice_is_looked_at_once(config: RunConfig, tmp_path: Path) -> None:
    no_question = {"id": "bad", "image": "a.png"}
    write_jsonl(tmp_path / "data" / "second.jsonl", [row("second"), row("first"), no_question, no_question])
    # Of the same id, but another row: what that means is judged later.
    write_jsonl(tmp_path / "data" / "third.jsonl", [row("second"), row("second") | {"question": "who?"}, no_question])
    store = Store(config.store.url, tmp_path / "work")
    assert isinstance(config.data.source, FileData)
    context: Any = SimpleNamespace(
        store=store,
        data=config.data.source,
        dataset=Dataset(store, ImageReader(str(tmp_path), 10**6)),
        image_threads=2,
        progress=lambda *_: nullcontext(advanced.append),
    )

    def imported(**changes: Any) -> tuple[ArtifactRef, list[tuple[str, int]], list[int], Any]:
        ref = import_data.fn(ImportDataJob(source="s", images="header", max_image_pixels=10**6, **changes), context)
        rows = [(found.id, found.row) for found in read_rows(store.read(ref, ROWS), ImportedRow)]
        bad = [found.row for found in read_rows(store.read(ref, QUARANTINE), BadRow)]
        return ref, rows, bad, store.manifest(ref).summary["num_known"]

    advanced: list[int] = []
    ref, *found = imported()
    assert found == [[("first", 1), ("second", 2), ("second", 7)], [4, 5, 8], 2]
    assert sum(advanced) == 8
    # All that was looked at, once each.
    digests = [each.digest for each in read_rows(store.read(ref, SEEN), SeenRow)]
    assert digests == list(dict.fromkeys(row_digest(each) for each in read_source(config.data.source)))
    assert len(digests) == 4
    # What was known before is passed over, bad rows, too.
    assert imported(known=ref)[1:] == ([], [], 8)


def retrainings() -> list[FlowRun]:
    """Runs of the deployment, which nobody works on here."""
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("vzero-retrain/retrain")
        return [run for run in client.read_flow_runs(limit=200) if run.deployment_id == deployment.id]


def new_runs(before: list[FlowRun], number: int) -> list[FlowRun]:
    """Wait for as many new runs."""
    known = {run.id for run in before}
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = [run for run in retrainings() if run.id not in known]
        if len(found) >= number:
            return found
        time.sleep(0.2)
    raise AssertionError(f"there must be {number} new runs of the deployment")


@pytest.mark.e2e
@pytest.mark.usefixtures("prefect_api")
def test_a_deployment_that_is_missing_is_named(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deploy(config, print)
    with get_client(sync_client=True) as client:
        client.delete_deployment(client.read_deployment_by_name("vzero-retrain/retrain").id)
    write_toml(config, tmp_path / "my.toml")
    write_jsonl(tmp_path / "new.jsonl", [row("second")])
    assert main([str(tmp_path / "new.jsonl"), "--config", str(tmp_path / "my.toml")]) == 0
    said = capsys.readouterr().out
    assert "added, but no deployment vzero-retrain/retrain is registered at http" in said
    assert "python -m flows.deploy" in said


@pytest.mark.e2e
@pytest.mark.usefixtures("prefect_api")
def test_rows_that_are_added_start_the_retraining(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deploy(config, print)
    before = retrainings()
    write_toml(config, tmp_path / "my.toml")
    write_jsonl(tmp_path / "new.jsonl", [row("second")])
    assert main([str(tmp_path / "new.jsonl"), "--config", str(tmp_path / "my.toml")]) == 0
    assert "its deployment vzero-retrain/retrain starts" in capsys.readouterr().out
    [run] = new_runs(before, 1)
    # With the configuration that it was deployed with.
    assert run.parameters == {"config": json.loads(config.model_dump_json())}


@pytest.mark.e2e
@pytest.mark.usefixtures("prefect_api")
def test_rows_that_somebody_else_added_are_found_by_the_poll(config: RunConfig, tmp_path: Path) -> None:
    deploy(config, print)
    assert watch(config, return_state=True).message == (
        "there is no champion yet that could learn; run vzero/full-pipeline"
    )
    found_champion(config)
    before = retrainings()
    assert watch(config, return_state=True).message.startswith("no new data since")
    write_jsonl(tmp_path / "data" / "second.jsonl", [row("second")])
    assert watch(config, return_state=True).message == "new data: a retraining is asked for"
    new_runs(before, 1)


@pytest.mark.s3
@pytest.mark.usefixtures("prefect_api")
def test_data_and_versions_may_lie_in_a_bucket(
    s3_url: str, seaweed: SeaweedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = seaweed.options()
    monkeypatch.setenv("AWS_ENDPOINT_URL", options["endpoint_url"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", options["secret"])
    client, root = seaweed.client(), s3_url.removeprefix("s3://")
    save(tmp_path / "a.png", png())
    client.pipe_file(f"{root}/data/first.jsonl", json.dumps(row("first")).encode())
    config = config_of(tmp_path, f"{s3_url}/data", publish={"url": f"{s3_url}/published"})
    found_champion(config)
    assert watch(config, return_state=True).message.startswith("no new data since")
    write_jsonl(tmp_path / "new.jsonl", [row("second")])
    assert add_samples(config, tmp_path / "new.jsonl").startswith(f"{s3_url}/data/new-")
    assert watch(config, return_state=True).message == "new data: a retraining is asked for"
    # Nothing of a file is read to see that it changed, but its entry in the listing.
    version = version_of_data(config)
    client.pipe_file(f"{root}/data/first.jsonl", json.dumps(row("third")).encode())
    assert version_of_data(config) != version
