"""The flow as a user runs it, on a real Prefect server: resumable, re-using, and the same every time."""

import json
import time
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterName
from prefect.client.schemas.sorting import FlowRunSort
from support.runs import small_config, start

from flows.full_pipeline import vzero
from flows.summary import RunResult
from tasks.adapters.store import Store
from tasks.artifacts import Manifest

pytestmark = pytest.mark.e2e
DATA_STAGES = {"import_data", "fingerprints", "validate", "data_docs", "evaluation_data", "view_shard", "views"}
CANDIDATE = ("rollouts", "replay", "criteria")
STAGES = {*DATA_STAGES, "training_set", "model", "check_models", "rollouts", "replay", "gate", "train"}


def manifests(folder: Path) -> dict[tuple[str, str], Manifest]:
    """All committed artefacts of a store, by stage and key."""
    found = [Manifest.model_validate_json(path.read_text()) for path in (folder / "store").glob("*/*/manifest.json")]
    return {(manifest.stage, manifest.key): manifest for manifest in found}


@pytest.fixture(scope="module")
def first(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    folder = tmp_path_factory.mktemp("first")
    return folder, vzero(small_config(folder))


def test_it_ends_with_scores_a_model_and_a_report(first: tuple[Path, RunResult]) -> None:
    _, result = first
    labels = [score.label for score in result.scores]
    last = {
        2: ["student, after 3 rounds", "student, round 2, chosen"],
        3: ["student, round 2", "student, after 3 rounds"],
    }
    assert labels == ["student, before", "teacher, full image", "teacher, with crop", *last[result.chosen_round]]
    [change] = result.changes
    assert change.difference == pytest.approx(result.scores[-1].accuracy - result.scores[0].accuracy)
    assert change.low <= change.difference <= change.high
    assert all(score.low <= score.accuracy <= score.high and score.num_questions == 40 for score in result.scores)
    assert {stage.stage for stage in result.stages} == {*STAGES, "predict", "evaluate", "criteria", "select", "report"}
    assert (Path(result.checkpoint) / "model.safetensors").is_file()
    assert Path(result.report).read_text().startswith("<!doctype html>")


def test_the_checkpoint_is_a_plain_model_folder(first: tuple[Path, RunResult]) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    folder = first[1].checkpoint
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert AutoImageProcessor.from_pretrained(folder).patch_size == 8


def test_nothing_stored_can_run_code(first: tuple[Path, RunResult]) -> None:
    suffixes = {path.suffix for path in (first[0] / "store").rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".parquet", ".safetensors", ".html", ".jinja", ".csv", ""}
    assert {path.name for path in (first[0] / "store").rglob("*") if path.is_file() and not path.suffix} == {"keep"}


def test_a_second_run_finds_everything_done(first: tuple[Path, RunResult]) -> None:
    folder, result = first
    before = manifests(folder)
    again = vzero(small_config(folder))
    assert manifests(folder) == before
    assert again.scores == result.scores
    assert (again.policy, again.checkpoint, again.report) == (result.policy, result.checkpoint, result.report)
    assert all(stage.num_reused == stage.num_artifacts for stage in again.stages)


def test_a_store_that_was_deleted_is_not_remembered(prefect_api: str, tmp_path: Path) -> None:
    import shutil

    config = small_config(tmp_path, rounds={"num_rounds": 1})
    result = vzero(config)
    shutil.rmtree(tmp_path / "store")
    again = vzero(config)
    assert all(stage.num_reused == 0 for stage in again.stages)
    assert again.policy == result.policy


def test_two_runs_from_scratch_give_the_same_checkpoint(first: tuple[Path, RunResult], tmp_path: Path) -> None:
    result = vzero(small_config(tmp_path))
    assert result.policy == first[1].policy
    ours, theirs = (Store(str(folder / "store"), folder) for folder in (tmp_path, first[0]))
    last = [
        next(
            m for m in manifests(folder).values() if m.stage == "checkpoint" and m.job["train_key"] == result.policy.key
        )
        for folder in (tmp_path, first[0])
    ]
    assert last[0].digest == last[1].digest
    assert ours.read(last[0].ref, "model/model.safetensors") == theirs.read(last[1].ref, "model/model.safetensors")


def test_another_seed_gives_another_checkpoint(first: tuple[Path, RunResult], tmp_path: Path) -> None:
    assert vzero(small_config(tmp_path, seed=1)).policy.digest != first[1].policy.digest


def test_the_result_does_not_depend_on_checkpoint_frequency(first: tuple[Path, RunResult], tmp_path: Path) -> None:
    assert vzero(small_config(tmp_path, checkpoint={"every": 10})).policy == first[1].policy
    states = [manifest for (stage, _), manifest in manifests(tmp_path).items() if stage == "checkpoint"]
    assert len(states) == 1


def test_old_training_states_are_pruned_to_tombstones(first: tuple[Path, RunResult]) -> None:
    states = sorted(
        (m for (stage, _), m in manifests(first[0]).items() if stage == "checkpoint"), key=lambda m: m.created_at
    )
    assert [state.pruned for state in states] == [True, False, False]


def test_another_alpha_reuses_the_first_rounds_rollouts_and_replay(
    first: tuple[Path, RunResult], prefect_api: str
) -> None:
    folder, _ = first
    before = set(manifests(folder))
    vzero(small_config(folder, gate={"alpha": 0.5}))
    new = [stage for stage, _ in set(manifests(folder)) - before]
    # Round 1's gate and training are new; from round 2 on the student is another one, and so is all it does.
    assert sorted(new) == sorted(
        ["gate", "train", "checkpoint"] * 3
        + ["rollouts", "replay"] * 2
        + [*CANDIDATE, "predict", "evaluate"] * 2
        + ["select", "report"]
    )


def test_more_rounds_extend_the_run(first: tuple[Path, RunResult], prefect_api: str) -> None:
    folder, result = first
    before = set(manifests(folder))
    longer = vzero(small_config(folder, rounds={"num_rounds": 5}))
    new = [stage for stage, _ in set(manifests(folder)) - before]
    assert sorted(new) == sorted(
        ["rollouts", "replay", "gate", "train", "checkpoint"] * 2
        + [*CANDIDATE, "predict", "evaluate"] * 2
        + ["select", "report"]
    )
    assert longer.chosen_round >= result.chosen_round
    # The end of the shorter run stays, whatever is pruned behind the longer one.
    assert (Path(result.checkpoint) / "model.safetensors").is_file()


def test_a_state_that_is_no_longer_the_choice_is_made_again_only_where_it_is_chosen(
    prefect_api: str, tmp_path: Path
) -> None:
    config = small_config(tmp_path, rounds={"num_rounds": 4}, selection={"every": 1})
    assert vzero(config).chosen_round > 1
    before = manifests(tmp_path)
    key = next(key for (stage, key), made in before.items() if stage == "train" and made.job["round"] == 1)
    (state,) = [name for name, made in before.items() if name[0] == "checkpoint" and made.job["train_key"] == key]
    assert before[state].pruned
    vzero(config)
    assert manifests(tmp_path) == before
    shorter = vzero(config.model_copy(update={"rounds": config.rounds.model_copy(update={"num_rounds": 1})}))
    assert (Path(shorter.checkpoint) / "model.safetensors").is_file()
    assert manifests(tmp_path)[state].digest == before[state].digest


def test_shards_are_artefacts_of_their_own(prefect_api: str, tmp_path: Path) -> None:
    result = vzero(small_config(tmp_path, rounds={"num_rounds": 1, "num_shards": 2}))
    counts = {stage.stage: stage.num_artifacts for stage in result.stages}
    # Two each of the round, and of the two candidates.
    assert (counts["rollouts"], counts["replay"], counts["gate"], counts["criteria"]) == (4, 4, 1, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"gate": {"kind": "prefix_trust", "floor": 0.1}},
        {"gate": {"kind": "off"}, "replay": {"target": "none"}},
        {"preset": "release"},
        {"loss": {"kind": "sampled", "estimator": "k2"}},
        {"checkpoint": {"every": 2}, "optimizer": {"epochs": 2, "frozen": ["model.visual.*"]}},
        {"student": {"dtype": "bfloat16"}, "optimizer": {"lora": {"rank": 4}}},
    ],
    ids=["prefix trust", "no crop", "release", "k2", "frozen", "adapters in bfloat16"],
)
def test_the_variants_run(prefect_api: str, tmp_path: Path, change: dict[str, object]) -> None:
    result = vzero(small_config(tmp_path, rounds={"num_rounds": 2}, **change))
    assert (Path(result.checkpoint) / "model.safetensors").is_file()


def figures(train: Manifest) -> dict[str, float]:
    return {name: value for name, value in train.summary.items() if value is not None}


def test_several_processes_train_under_the_same_names(
    first: tuple[Path, RunResult], prefect_api: str, tmp_path: Path
) -> None:
    trainer = {"num_processes": 2, "sharding": "fsdp2", "gradient_checkpointing": True}
    work_dir = str(tmp_path / "work")
    result = vzero(small_config(tmp_path, placement={"work_dir": work_dir, "threads": 1, "trainer": trainer}))
    there, here = (
        {key: figures(one) for (stage, key), one in manifests(folder).items() if stage == "train"}
        for folder in (first[0], tmp_path)
    )
    # Of the first round; later ones follow from its weights, which may differ in their last bits.
    (same,) = [key for key, summary in here.items() if summary["num_updates"] == 2]
    assert here[same] == pytest.approx(there[same], rel=1e-4, abs=1e-6)
    assert (Path(result.checkpoint) / "model.safetensors").is_file()
    assert not list((tmp_path / "work" / "servers").glob("*.json")), "what was started is stopped"


def test_the_dashboard_shows_stages_rounds_and_tables(first: tuple[Path, RunResult]) -> None:
    named = FlowRunFilter(name=FlowRunFilterName(any_=["small, seed 0"]))
    with get_client(sync_client=True) as client:
        run = client.read_flow_runs(flow_run_filter=named, sort=FlowRunSort.START_TIME_ASC)[0]
        mine = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
        tasks = {task.name for task in client.read_task_runs(flow_run_filter=mine)}
        artifacts = {artifact.key: artifact for artifact in client.read_artifacts(flow_run_filter=mine)}
    assert {"validate", "views", "rollouts, round 1", "replay, round 2", "gate, round 3", "train, round 3"} <= tasks
    assert {"run", "rounds", "gate", "result", "cost", "report", "data-validation"} <= artifacts.keys()
    assert [row["round"] for row in json.loads(str(artifacts["rounds"].data))] == [3, 2, 1]


MOMENTS = {
    "views are cut": ("views", 1),
    "round 1 is sampled": ("rollouts", 1),
    "round 1 is weighed, training has begun": ("gate", 1),
    "round 2's state is stored, the round not yet": ("checkpoint", 2),
    "round 3 is trained": ("train", 3),
}


def test_a_run_killed_at_five_moments_ends_as_if_it_never_was(
    first: tuple[Path, RunResult], prefect_api: str, tmp_path: Path
) -> None:
    config = small_config(tmp_path)
    finished: dict[tuple[str, str], Manifest] = {}
    for moment, (stage, count) in MOMENTS.items():
        process = start(config, prefect_api, tmp_path)
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "store").glob(f"{stage}/*/manifest.json"))) < count:
            assert process.poll() is None, f"{moment}: ended too early: {process.stdout and process.stdout.read()}"
            assert time.monotonic() < deadline, moment
            time.sleep(0.002)
        process.kill()
        process.wait()
        seen = manifests(tmp_path)
        # What was finished before stands as it was: no finished stage is computed twice.
        assert {name: seen[name].attempt for name in finished} == {name: m.attempt for name, m in finished.items()}
        finished = seen
    process = start(config, prefect_api, tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    result = RunResult.model_validate_json(output.split("RESULT")[1])
    last = manifests(tmp_path)
    assert {name: last[name].attempt for name in finished} == {name: m.attempt for name, m in finished.items()}
    assert result.policy == first[1].policy
    assert result.scores == first[1].scores
