"""Retraining on new data: found, learned from the champion on, judged, and one at a time."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.states import Cancelled
from support.runs import small_config

from flows import publication
from flows.config import PROJECT, RunConfig
from flows.evaluate import evaluate
from flows.events import SAMPLES_ADDED
from flows.full_pipeline import vzero
from flows.pipeline import described
from flows.retrain import retrain
from flows.summary import RunResult
from flows.watch import watch
from tasks.adapters.registry import Registry, RegistryError, Version
from tasks.adapters.store import Store
from tasks.artifacts import Manifest
from tasks.small_world.dataset import write_dataset
from vzero_core.errors import ConfigError, InputError

pytestmark = pytest.mark.e2e


def config_of(folder: Path, **changes: Any) -> RunConfig:
    """A run on a folder of files, the first of which has 64 rows."""
    data = folder / "data"
    if not data.exists():
        write_dataset(folder / "drawn", num_prompts=160, num_eval=40, seed=0)
        data.mkdir()
        add(folder, "first", 0, 64)
    source = {
        "kind": "jsonl",
        "path": str(data),
        "image_root": str(folder / "drawn"),
        "evaluation_path": str(folder / "drawn" / "eval.jsonl"),
    }
    # 40 questions cannot tell a loss of less than some 20 points.
    retrain = {"margin": 0.9, "min_new": 16, **changes.pop("retrain", {})}
    return small_config(folder, data={"source": source}, retrain=retrain, **changes)


def add(folder: Path, name: str, first: int, last: int) -> None:
    """Put rows of the small world into the data's folder."""
    lines = (folder / "drawn" / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "data" / f"{name}.jsonl").write_text("".join(lines[first:last]))


def kinds(registry: Registry) -> list[str]:
    return [move.kind for move in registry.history()]


def stages(folder: Path, stage: str) -> list[Manifest]:
    found = [
        Manifest.model_validate_json(path.read_text()) for path in (folder / "store").glob(f"{stage}/*/manifest.json")
    ]
    return sorted(found, key=lambda manifest: manifest.created_at)


@pytest.fixture(scope="module")
def founded(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    folder = tmp_path_factory.mktemp("founded")
    return folder, vzero(config_of(folder))


@pytest.fixture
def champion(founded: tuple[Path, RunResult], tmp_path: Path) -> Path:
    """A copy of the first run's folder, whose store has a name of its own."""
    shutil.copytree(founded[0], tmp_path / "copy", ignore=shutil.ignore_patterns("store.json", "work"))
    return tmp_path / "copy"


def test_the_first_student_is_champion(founded: tuple[Path, RunResult]) -> None:
    folder, result = founded
    registry = Registry(str(folder / "published"))
    version = registry.champion()
    assert version is not None
    assert result.published.version == result.published.champion == version.name
    assert kinds(registry) == ["founded"]
    again = vzero(config_of(folder))
    assert (again.published.version, again.published.champion) == (version.name, version.name)
    assert kinds(registry) == ["founded"]


def test_another_run_does_not_take_its_place_by_itself(champion: Path) -> None:
    registry = Registry(str(champion / "published"))
    before = registry.champion()
    assert before is not None
    result = vzero(config_of(champion, seed=1))
    assert result.published.champion == before.name
    assert result.published.version != before.name
    assert result.published.reason == (
        f"{before.name} stays champion: new data challenge it by flows.retrain, you by flows.champion promote "
        f"{result.published.version}"
    )
    assert kinds(registry) == ["founded"]


def test_without_new_data_nothing_runs(champion: Path) -> None:
    before = {path for path in (champion / "store").rglob("*")}
    state = retrain(config_of(champion), return_state=True)
    assert state.is_completed()
    assert state.message is not None
    assert state.message.startswith("no new data")
    assert watch(config_of(champion), return_state=True).message.startswith("no new data since")
    assert {path for path in (champion / "store").rglob("*")} == before
    assert events("poll") == 0


def events(how: str) -> int:
    """So many events of new samples the server has."""
    with get_client(sync_client=True) as client:
        found = client.request("POST", "/events/filter", json={"filter": {"event": {"name": [SAMPLES_ADDED]}}}).json()
    return sum(event["payload"]["how"] == how for event in found["events"])


def test_new_data_are_noticed_and_too_few_of_them_wait(champion: Path) -> None:
    registry = Registry(str(champion / "published"))
    add(champion, "second", 64, 70)
    assert watch(config_of(champion), return_state=True).message == "new data: a retraining is asked for"
    state = retrain(config_of(champion), return_state=True)
    assert state.message == "6 new samples; a retraining takes 16 (retrain.min_new)"
    assert kinds(registry) == ["founded", "seen"]
    assert registry.champion() == registry.version(registry.history()[0].champion or "")
    # Noticed once, not at every poll; with more of them they count.
    assert watch(config_of(champion), return_state=True).message.startswith("no new data since")
    add(champion, "third", 70, 80)
    assert watch(config_of(champion), return_state=True).message == "new data: a retraining is asked for"
    retrain(config_of(champion))
    assert stages(champion, "import_data")[-1].summary["num_rows"] == 16
    assert kinds(registry)[2] in ("promoted", "kept")


def test_a_touched_file_is_no_new_data(champion: Path) -> None:
    (champion / "data" / "first.jsonl").touch()
    state = retrain(config_of(champion), return_state=True)
    assert state.message == "no new samples; a retraining takes 16 (retrain.min_new)"


def test_the_champion_learns_new_samples_and_some_old_ones(champion: Path) -> None:
    registry = Registry(str(champion / "published"))
    parent = registry.champion()
    assert parent is not None
    add(champion, "second", 64, 112)
    result = retrain(config_of(champion))
    assert isinstance(result, RunResult)
    # The old rows were not looked at again, nor validated.
    imported, validated = stages(champion, "import_data")[-1].summary, stages(champion, "validate")[-1].summary
    assert (imported["num_rows"], imported["num_known"], validated["num_samples"]) == (48, 64, 48)
    # Eight are asked, half of them new: 44 new ones are learned, and as many old ones.
    made = stages(champion, "training_set")[-1]
    assert made.summary == {"num_samples": 96, "num_new": 44, "num_replayed": 44, "num_held_out": 8, "num_parts": 2}
    assert made.job["previous"]["digest"] == parent.training_set.digest
    # It starts from the champion's weights, and from no other.
    first = min(stages(champion, "train")[-3:], key=lambda manifest: manifest.job["round"])
    student = next(m for m in stages(champion, "model") if m.ref == first.inputs["policy"])
    published = Path(registry.model_url(parent.name)) / "model.safetensors"
    local = champion / "work" / "published" / parent.name / "model.safetensors"
    assert local.read_bytes() == published.read_bytes()
    assert student.summary["role"] == "student"
    version = registry.version(result.published.version or "")
    assert version.parent == parent.name
    assert result.published.champion in (parent.name, version.name)
    promoted = stages(champion, "promotion")[-1].summary
    assert kinds(registry)[-1] == ("promoted" if promoted["promoted"] else "kept")
    assert (result.published.champion == version.name) == promoted["promoted"]
    assert [guard["benchmark"] for guard in promoted["guards"]] == ["held-out"]
    # The same data are not learned again, nor are they new under another date.
    assert retrain(config_of(champion), return_state=True).message.startswith("no new data")
    (champion / "data" / "second.jsonl").touch()
    assert watch(config_of(champion), return_state=True).message == "new data: a retraining is asked for"
    assert retrain(config_of(champion), return_state=True).message.startswith("no new samples; a retraining takes 16")
    assert watch(config_of(champion), return_state=True).message.startswith("no new data since")
    assert kinds(registry)[1:] == ["promoted" if promoted["promoted"] else "kept", "seen"]
    # What was set aside once is never trained on, here nor before.
    store = Store(str(champion / "store"), champion / "work")
    sets = [json.loads(store.read(m.ref, "held_out.json")) for m in stages(champion, "training_set")]
    asked = {name for names in sets for name in names}
    trained = {
        row["sample_id"] for m in stages(champion, "rollouts") if not m.job["held_out"] for row in rows_of(store, m)
    }
    assert trained
    assert not trained & asked


def rows_of(store: Store, manifest: Manifest) -> list[dict[str, Any]]:
    import io

    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(store.read(manifest.ref, "rollouts.parquet"))).to_pylist()
    return rows


def test_a_rollback_is_not_undone_by_the_same_data(champion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(str(champion / "published"))
    first = registry.champion()
    assert first is not None
    add(champion, "second", 64, 112)
    result = retrain(config_of(champion))
    assert isinstance(result, RunResult)
    if result.published.champion == first.name:
        registry.move(
            registry.last(), kind="by hand", champion=result.published.version, version=None, data="d", reason="by hand"
        )
    assert registry.rollback().champion == first.name
    (champion / "data" / "second.jsonl").touch()
    state = retrain(config_of(champion), return_state=True)
    assert state.message.startswith("no new samples")
    assert registry.champion() == first


def test_what_is_wrong_with_new_data_is_said_once_and_not_at_every_poll(champion: Path) -> None:
    registry = Registry(str(champion / "published"))
    lines = (champion / "drawn" / "train.jsonl").read_text().splitlines()[64:90]
    rows = [{**json.loads(line), "image": "gone.png"} for line in lines]
    (champion / "data" / "second.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(InputError, match="26 of 26"):
        retrain(config_of(champion))
    assert kinds(registry) == ["founded", "seen"]
    assert "26 of 26" in registry.history()[1].reason
    assert watch(config_of(champion), return_state=True).message.startswith("no new data since")
    # By hand it is tried again, with other settings perhaps; nothing is written twice.
    with pytest.raises(InputError, match="26 of 26"):
        retrain(config_of(champion))
    assert kinds(registry) == ["founded", "seen"]


def test_what_a_lost_run_left_undone_is_made_up_for(champion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what follows a move, here the upload."""
    uploaded: list[str] = []

    def upload(version: Version, url: str, repository: str) -> None:
        uploaded.append(f"{version.name} {repository}")

    monkeypatch.setattr(publication, "upload", upload)
    monkeypatch.setenv("HF_TOKEN", "token")
    registry = Registry(str(champion / "published"))
    version = registry.champion()
    assert version is not None
    publish = {"url": str(champion / "published"), "hub": "team/student"}
    state = retrain(config_of(champion, publish=publish), return_state=True)
    assert state.message.startswith("no new data")
    assert uploaded == [f"{version.name} team/student"]


def test_no_poll_asks_for_what_is_going_on(champion: Path) -> None:
    add(champion, "second", 64, 112)
    config = config_of(champion)
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(retrain, parameters={"config": config})
        assert watch(config, return_state=True).message.startswith("new data; a retraining is going on or waits")
        client.set_flow_run_state(run.id, Cancelled(), force=True)
    assert watch(config, return_state=True).message == "new data: a retraining is asked for"


def test_questions_of_ones_own_decide(champion: Path) -> None:
    promotion = {
        "name": "mine",
        "kind": "jsonl",
        "path": str(champion / "drawn" / "eval.jsonl"),
        "protocol": {"kind": "exact", "answer_pattern": r"answer (\S+)"},
        "generation": {"max_new_tokens": 8},
    }
    add(champion, "second", 64, 112)
    config = config_of(champion, retrain={"promotion": promotion}, selection={"num_prompts": 0})
    result = retrain(config)
    assert isinstance(result, RunResult)
    decided = stages(champion, "promotion")[-1]
    assert decided.job["split"]["benchmark"] == "mine"
    assert decided.summary["reason"].startswith("mine: ")
    assert [guard["benchmark"] for guard in decided.summary["guards"]] == ["held-out"]
    assert result.published.reason == decided.summary["reason"]


def test_a_published_student_is_measured_alone(champion: Path) -> None:
    registry = Registry(str(champion / "published"))
    version = registry.champion()
    assert version is not None
    teacher = {"path": str(champion / "gone")}
    state: State[Any] = evaluate(config_of(champion, teacher=teacher), return_state=True)
    [score] = state.result()
    final = founded_score(champion)
    assert (score.label, score.accuracy) == (version.name, final)
    assert state.message == f"{version.name}: held-out {final:.1%}"
    with pytest.raises(RegistryError, match="version 'other' must be in"):
        evaluate(config_of(champion), version="other")
    with pytest.raises(RegistryError, match="a version's name must be of letters"):
        evaluate(config_of(champion), version="../drawn")


def founded_score(folder: Path) -> float:
    [report] = stages(folder, "report")
    last = report.job["evaluations"][-1]["ref"]
    [found] = [m for m in stages(folder, "evaluate") if m.key == last["key"]]
    return float(found.summary["accuracy"])


def test_two_retrainings_at_once_are_one_after_the_other(champion: Path) -> None:
    add(champion, "second", 64, 112)
    config = config_of(champion)
    code = (
        "import sys; from flows.retrain import retrain; from flows.config import RunConfig; "
        "print(retrain(RunConfig.model_validate_json(sys.argv[1]), return_state=True).message)"
    )
    command = [sys.executable, "-c", code, config.model_dump_json()]
    runs = [
        subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in "ab"
    ]
    said = [run.communicate(timeout=240)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    registry = Registry(str(champion / "published"))
    assert len(registry.history()) == 2
    assert sum("no new data: the champion" in text for text in said) == 1


def test_who_comes_late_does_not_move_the_champion(champion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from another Prefect server, whose limit does not hold here."""
    registry = Registry(str(champion / "published"))
    last = registry.last()
    assert last is not None
    add(champion, "second", 64, 112)
    done = threading.Event()
    move = Registry.move

    def late(self: Registry, *arguments: Any, **fields: Any) -> Any:
        if not done.is_set():
            done.set()
            move(self, last, kind="by hand", champion=last.champion, version=None, data=last.data, reason="other")
        return move(self, *arguments, **fields)

    monkeypatch.setattr(Registry, "move", late)
    with pytest.raises(RegistryError, match="somebody else moved since"):
        retrain(config_of(champion))
    assert kinds(registry) == ["founded", "by hand"]


def test_a_run_that_was_lost_before_the_move_goes_on(champion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its version is there, and in no entry."""
    add(champion, "second", 64, 112)
    registry, move = Registry(str(champion / "published")), Registry.move

    def lost(self: Registry, *arguments: Any, **fields: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Registry, "move", lost)
    with pytest.raises(KeyboardInterrupt):
        retrain(config_of(champion))
    assert len(registry.versions()) == 2
    assert kinds(registry) == ["founded"]
    monkeypatch.setattr(Registry, "move", move)
    result = retrain(config_of(champion))
    assert isinstance(result, RunResult)
    assert len(registry.versions()) == 2
    assert kinds(registry)[1:] in (["kept"], ["promoted"])


def test_what_retraining_needs_is_said_first(champion: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"publish\.url must name where the champion is"):
        retrain(config_of(champion, publish={"url": None}))
    with pytest.raises(ConfigError, match=r"selection\.num_prompts must be more than 0, or retrain\.promotion given"):
        retrain(config_of(champion, selection={"num_prompts": 0}))
    add(champion, "second", 64, 112)
    with pytest.raises(ConfigError, match=r"store\.url must be the store that the champion small-\w+ was made in, "):
        retrain(config_of(champion, store={"url": str(tmp_path / "other")}))
    state = retrain(config_of(champion, publish={"url": str(tmp_path / "empty")}), return_state=True)
    assert state.message == "there is no champion to train on; run vzero/full-pipeline first"


def test_where_things_lie_is_in_no_description() -> None:
    config = small_config(Path("somewhere"))
    assert "somewhere" not in json.dumps(described(config, "parent"))
    assert described(config, "parent")["student"]["path"] == "published version parent"
