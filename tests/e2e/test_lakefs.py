"""The pipeline with its data and its outputs in lakeFS: a stand-in's API, and a real S3 server as its gateway."""

import json
import os
import uuid
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import lakefs_stand_in
from support.formats import png, write_jsonl
from support.lakefs_gateway import LakeFSGateway
from support.lakefs_stand_in import Commit, LakeFSStandIn, Repository
from support.published import version_of, write_student
from support.runs import small_config
from support.seaweed import KEYS, SeaweedServer
from transformers import AutoModelForImageTextToText

from flows.add_samples import add_samples
from flows.config import RunConfig
from flows.full_pipeline import vzero
from flows.retrain import retrain
from flows.run import version_of_data
from flows.summary import RunResult
from flows.watch import watch
from tasks.adapters.files import StoreError, filesystem, read_bytes
from tasks.adapters.lakefs_repo import LakeFSRepo
from tasks.adapters.registry import Registry
from tasks.adapters.store import Store, code_version
from tasks.adapters.tables import read_rows
from tasks.artifacts import BadRow, Manifest, Sample
from tasks.config import DataConfig, FileData, OutputsConfig
from tasks.small_world.dataset import write_dataset
from vzero_core.errors import ConfigError, InputError

pytestmark = [pytest.mark.e2e, pytest.mark.s3]


@dataclass
class Lake:
    """A repository, and runs on what is in it."""

    name: str
    gateway: LakeFSGateway
    kept: Repository
    storage: SeaweedServer
    folder: Path

    def push(self, seed: int) -> str:
        """Commit a small world to `main`."""
        data = self.folder / f"data-{seed}"
        if not data.exists():
            write_dataset(data, num_prompts=16, num_eval=8, seed=seed)
        self.storage.client().put(f"{data}{os.sep}", f"{self.name}/main/data/", recursive=True)
        return LakeFSRepo(self.name).commit("main", f"small world {seed}", {})

    def config(self, **changes: Any) -> RunConfig:
        root = f"lakefs://{self.name}/main/data"
        files = {"path": f"{root}/train.jsonl", "evaluation_path": f"{root}/eval.jsonl", "image_root": root}
        data = {"source": {"kind": "jsonl", **files}, "compare_with": [f"{root}/eval.jsonl"]}
        values = {
            "data": data,
            "outputs": {"repository": self.name, "publish": True},
            "publish": {"url": self.published},
            "retrain": {"min_new": 8, "margin": 1.0},
            **changes,
        }
        return small_config(self.folder, rounds={"num_rounds": 1}, **values)

    def run(self, **changes: Any) -> RunResult:
        result: RunResult = vzero(self.config(**changes))
        return result

    @property
    def published(self) -> str:
        """Where students are published; each repository has its own champion."""
        return str(self.folder / "published" / self.name)

    @property
    def store(self) -> Store:
        return Store(str(self.folder / "store"), self.folder / "work")

    def commit(self, result: RunResult) -> Commit:
        assert result.published.commit is not None
        return self.kept.commits[result.published.commit]

    def manifest(self, result: RunResult) -> Manifest:
        """What the stage left that made a run's commit."""
        found = self.store.find("outputs", self.commit(result).metadata["key"])
        assert found is not None
        return found

    def sample_ids(self, result: RunResult) -> list[str]:
        """Which samples a run's commit holds."""
        return [row.id for row in read_rows(self.read(self.commit(result).id, "samples.parquet"), Sample)]

    def read(self, ref: str, name: str) -> bytes:
        """Read an output through the gateway."""
        return read_bytes(f"lakefs://{self.name}/{ref}/vzero/{name}")


@pytest.fixture(scope="module")
def gateway(seaweed: SeaweedServer) -> Iterator[tuple[LakeFSStandIn, LakeFSGateway]]:
    """Both servers behind one address, which the environment names with a key that both know."""
    with LakeFSStandIn() as stand_in, pytest.MonkeyPatch.context() as patch:
        patch.setattr(lakefs_stand_in, "KEY", "admin")
        patch.setattr(lakefs_stand_in, "SECRET", KEYS["admin"])
        front = LakeFSGateway(stand_in, seaweed)
        for name, value in {**stand_in.environment, "LAKECTL_SERVER_ENDPOINT_URL": front.endpoint}.items():
            patch.setenv(name, value)
        yield stand_in, front
        front.close()


@pytest.fixture(scope="module")
def make_lake(
    gateway: tuple[LakeFSStandIn, LakeFSGateway],
    seaweed: SeaweedServer,
    prefect_api: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[], Lake]:
    """Makes repositories; runs on them share a store, and what is in it already is not made again."""
    stand_in, front = gateway
    folder = tmp_path_factory.mktemp("lake")

    def make() -> Lake:
        name = f"lake-{uuid.uuid4().hex[:8]}"
        seaweed.client().mkdir(name)
        return Lake(name, front, stand_in.create(name), seaweed, folder)

    return make


@pytest.fixture
def lake(make_lake: Callable[[], Lake], gateway: tuple[LakeFSStandIn, LakeFSGateway]) -> Iterator[Lake]:
    made = make_lake()
    yield made
    # The front looks through all repositories at each change.
    del gateway[0].repositories[made.name]


@dataclass
class Published:
    """A published run, during which somebody else committed to `main`."""

    lake: Lake
    start: str
    moved: str
    result: RunResult
    requests: list[str]
    kept: Repository
    """The repository as it was then."""


@pytest.fixture(scope="module")
def published(make_lake: Callable[[], Lake]) -> Published:
    """The run, and the commits of `main` at its start and just after."""
    lake = make_lake()
    # Of an earlier run with another model.
    lake.storage.client().pipe_file(f"{lake.name}/main/vzero/model/model-00001-of-00002.safetensors", b"weights")
    mains = [lake.push(1)]

    def push_once(request: str) -> None:
        if request.endswith("/commits/main") and len(mains) == 1:
            mains.append("")
            mains[1] = lake.push(2)

    before = len(lake.gateway.requests)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lake.gateway, "before_answer", push_once)
        result = lake.run()
    return Published(lake, *mains, result, lake.gateway.requests[before:], deepcopy(lake.kept))


def test_a_run_reads_what_main_was_at_its_start(published: Published) -> None:
    root = f"GET /{published.lake.name}/"
    read = {request.removeprefix(root) for request in published.requests if request.startswith(root)}
    assert {path.split("/")[0] for path in read} == {published.start}
    images = {f"images/train/{number:05d}{detail}.png" for number in range(16) for detail in ("", "_detail")}
    assert {f"{published.start}/data/{name}" for name in ("train.jsonl", "eval.jsonl", *images)} <= read
    assert published.lake.sample_ids(published.result) == [f"train-1-{number:05d}" for number in range(16)]


def test_the_outputs_are_one_commit_of_the_run_s_branch(published: Published) -> None:
    lake, result, commit = published.lake, published.result, published.lake.commit(published.result)
    made = lake.manifest(result)
    inputs = made.inputs
    assert published.kept.branches.keys() == {"main", f"vzero-small-{made.key[:12]}"}
    assert published.kept.branches[f"vzero-small-{made.key[:12]}"] == commit.id
    assert (commit.parents, commit.message) == ((published.moved,), "V-Zero run small")
    assert commit.metadata == {
        "run": "small",
        "key": made.key,
        "samples": inputs["samples"].digest,
        "policy": inputs["selected"].digest,
        "report": inputs["report"].digest,
        "code": code_version(),
    }
    model = {f"model/{path.name}" for path in Path(result.checkpoint).iterdir()}
    outputs = {name.removeprefix("vzero/") for name, sha256 in commit.files.items() if sha256 and "vzero/" in name}
    assert outputs == {"report.html", "samples.parquet", "quarantine.parquet", *model}
    assert lake.read(commit.id, "report.html") == Path(result.report).read_bytes()
    for name in ("samples.parquet", "quarantine.parquet"):
        assert lake.read(commit.id, name) == lake.store.read(inputs["samples"], name)


def test_what_is_published_is_merged_and_the_champion(published: Published) -> None:
    kept, commit = published.kept, published.lake.commit(published.result)
    merge = kept.commits[kept.branches["main"]]
    assert (merge.parents, merge.message) == ((published.moved, commit.id), "Publish V-Zero run small")
    assert merge.files == commit.files
    name, policy = published.result.published.version, published.result.policy.digest
    assert merge.metadata == {"run": "small", "version": name, "policy": policy}
    assert kept.tags == {"champion": commit.id}
    # The repository's first commit, both small worlds, the outputs, the merge.
    assert len(kept.commits) == 5


def test_new_data_are_learned_and_only_a_better_student_is_champion(published: Published, tmp_path: Path) -> None:
    lake, first = published.lake, published.result
    heads = published.kept.branches["main"], lake.kept.branches["main"]
    # The second small world came to the place of the first, so nothing old can be learned again.
    config = lake.config(retrain={"min_new": 8, "margin": 1.0, "replay_share": 0.0})
    second = retrain(config)
    assert isinstance(second, RunResult)
    assert lake.sample_ids(second) == [f"train-2-{number:05d}" for number in range(16)]
    assert second.policy.digest != first.policy.digest
    assert lake.commit(second).parents == (heads[1],)
    assert len(lake.kept.branches) == 3
    better = second.published.champion == second.published.version
    main = lake.kept.commits[lake.kept.branches["main"]]
    if better:
        assert lake.kept.tags == {"champion": second.published.commit}
        assert main.parents == (*lake.commit(second).parents, second.published.commit)
        assert main.files == lake.commit(second).files
    else:
        assert lake.kept.tags == {"champion": first.published.commit}
        assert main.id == heads[1]
    # `main` may have moved on by the merge, yet the data are the same.
    commits = dict(lake.kept.commits)
    assert retrain(config, return_state=True).message.startswith("no new data")
    # A run from the beginning is committed, and takes nobody's place.
    other = lake.run(seed=1)
    assert other.published.champion == (second if better else first).published.version
    assert lake.kept.commits.keys() - commits.keys() == {other.published.commit}

    champion = second if better else first
    fs, path = filesystem(f"lakefs://{lake.name}/champion/vzero/model")
    fs.get(path, f"{tmp_path / 'model'}", recursive=True)
    checkpoint = Path(champion.checkpoint)
    assert contents(tmp_path / "model") == contents(checkpoint)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", local_files_only=True).state_dict()
    tensors = load_file(checkpoint / "model.safetensors")
    assert not [name for name, tensor in tensors.items() if not torch.equal(loaded[name], tensor)]


def test_the_same_data_give_no_further_commit(lake: Lake) -> None:
    lake.push(1)
    first = lake.run()
    commits = dict(lake.kept.commits)
    again = lake.run()
    assert again.published.commit == first.published.commit
    assert lake.kept.commits == commits
    assert not [stage.stage for stage in again.stages if stage.num_reused < stage.num_artifacts]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_without_publish_main_and_champion_stay(lake: Lake) -> None:
    data = lake.push(1)
    LakeFSRepo(lake.name).tag("champion", data)
    result = lake.run(outputs={"repository": lake.name, "publish": False})
    assert lake.commit(result).parents == (data,)
    (branch,) = lake.kept.branches.keys() - {"main"}
    assert lake.kept.branches == {"main": data, branch: result.published.commit}
    assert lake.kept.tags == {"champion": data}


def test_a_run_whose_merge_was_refused_goes_on_from_its_commit(lake: Lake) -> None:
    lake.push(1)
    lake.storage.client().pipe_file(f"{lake.name}/main/notes.txt", b"not committed")
    with pytest.raises(StoreError, match=r"400 \(main: uncommitted changes .*; .* commit what lies uncommitted there"):
        lake.run()
    (branch,) = lake.kept.branches.keys() - {"main"}
    head = lake.kept.branches[branch]
    assert not lake.kept.tags
    LakeFSRepo(lake.name).commit("main", "notes", {})
    result = lake.run()
    assert result.published.commit == head == lake.kept.branches[branch]
    assert lake.kept.tags == {"champion": head}
    main = lake.kept.commits[lake.kept.branches["main"]]
    assert {"notes.txt", "vzero/report.html"} <= main.files.keys()


def elsewhere(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"outputs": OutputsConfig(repository="nope")})


def another_base(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"outputs": config.outputs.model_copy(update={"base": "gone"})})


def other_data(config: RunConfig) -> RunConfig:
    source = FileData(kind="jsonl", path="lakefs://nope/main/train.jsonl")
    return config.model_copy(update={"data": DataConfig(source=source)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (elsewhere, r"ref 'main' in repository 'nope', got 404 \(repository not found\); create it in lakeFS"),
        (another_base, r"ref 'gone' in repository 'lake-.*', got 404 \(commit not found\); create it in lakeFS"),
        (other_data, r"ref 'main' in repository 'nope', got 404 \(repository not found\); create it in lakeFS"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_made(
    lake: Lake, tmp_path: Path, change: Callable[[RunConfig], RunConfig], message: str
) -> None:
    with pytest.raises(StoreError, match=message):
        vzero(change(lake.config(store={"url": str(tmp_path / "store")})))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("missing", ["LAKECTL_SERVER_ENDPOINT_URL", "LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY"])
@pytest.mark.parametrize("outputs", [{"repository": None}, {"repository": "lake"}])
def test_a_variable_that_is_missing_is_named(
    lake: Lake, missing: str, outputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = lake.config(outputs=outputs)
    monkeypatch.delenv(missing)
    with pytest.raises(ConfigError, match=f"got no {missing}; set it in the environment"):
        vzero(config)


def test_proposed_regions_are_committed_with_the_samples(lake: Lake) -> None:
    lake.push(1)
    client, path = lake.storage.client(), f"{lake.name}/main/data/train.jsonl"
    rows = [json.loads(line) for line in client.cat_file(path).splitlines()]
    client.pipe_file(path, "\n".join(json.dumps({**row, "region": None}) for row in rows).encode())
    LakeFSRepo(lake.name).commit("main", "no regions", {})
    result = lake.run(regions={"proposer": {"kind": "grid"}})
    commit = lake.commit(result)
    assert lake.manifest(result).inputs["samples"].stage == "regions"
    samples = read_rows(lake.read(commit.id, "samples.parquet"), Sample)
    assert samples
    assert all(sample.region is not None for sample in samples)
    assert len(samples) + len(read_rows(lake.read(commit.id, "quarantine.parquet"), BadRow)) == 16


def test_rows_added_to_a_branch_are_committed_and_found_by_the_poll(lake: Lake, tmp_path: Path) -> None:
    client, root = lake.storage.client(), f"lakefs://{lake.name}/main"
    row = {"id": "first", "image": "a.png", "question": "what?", "region": [1, 2, 3, 4]}
    client.pipe({f"{lake.name}/main/data/first.jsonl": json.dumps(row).encode(), f"{lake.name}/main/a.png": png()})
    before = LakeFSRepo(lake.name).commit("main", "first", {})
    source = {"kind": "jsonl", "path": f"{root}/data", "image_root": root}
    config = lake.config(data={"source": source}, outputs={})
    # Somebody is champion who was judged by the data as they are.
    student = write_student(tmp_path / "student")
    registry, version = Registry(lake.published), version_of(student, "small-1", data=version_of_data(config))
    registry.add(version, student)
    registry.move(None, kind="founded", champion="small-1", version="small-1", data=version.data, reason="first")
    assert watch(config, return_state=True).message.startswith("no new data since")
    write_jsonl(tmp_path / "new.jsonl", [row | {"id": "second"}])
    # Whoever writes to the branch has said nothing yet: a commit does.
    client.pipe_file(f"{lake.name}/main/data/other.jsonl", json.dumps(row | {"id": "third"}).encode())
    assert watch(config, return_state=True).message.startswith("no new data since")
    client.rm_file(f"{lake.name}/main/data/other.jsonl")

    added = add_samples(config, tmp_path / "new.jsonl")
    name = added.removeprefix(f"{root}/data/")
    head = lake.kept.commits[lake.kept.branches["main"]]
    assert (head.parents, head.message, head.metadata) == ((before,), f"Add samples {name}", {"file": name})
    assert read_bytes(f"lakefs://{lake.name}/{head.id}/data/{name}") == (tmp_path / "new.jsonl").read_bytes()
    assert watch(config, return_state=True).message == "new data: a retraining is asked for"
    # Once is enough, under any name.
    (tmp_path / "new.jsonl").rename(tmp_path / "copy.jsonl")
    assert add_samples(config, tmp_path / "copy.jsonl") == added
    assert lake.kept.branches["main"] == head.id
    write_jsonl(tmp_path / "early.jsonl", [row | {"image": "later.png"}])
    with pytest.raises(InputError, match=r"image later\.png must exist"):
        add_samples(config, tmp_path / "early.jsonl")
    assert lake.kept.branches["main"] == head.id
