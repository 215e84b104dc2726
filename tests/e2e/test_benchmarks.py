"""Benchmarks in the real flow: asked in shards that survive a kill, scored again at no cost."""

import base64
import csv
import json
from pathlib import Path
from typing import Any

import pytest
from support.runs import small_config

import tasks.predict
from flows.config import RunConfig
from flows.full_pipeline import vzero
from flows.summary import RunResult
from tasks.adapters.evaluation import RESULTS
from tasks.adapters.store import Store
from tasks.adapters.transformers_engine import TransformersEngine
from tasks.artifacts import Manifest
from tasks.small_world.dataset import write_dataset

pytestmark = pytest.mark.e2e
NUM_ROWS = 12
SEEDS = (1, 2, 3)
ANSWER = {"kind": "exact", "answer_pattern": r"answer (\S+)"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of the small world as V*'s TSV, and as rows of one's own."""
    folder = tmp_path_factory.mktemp("benchmarks") / "data"
    write_dataset(folder, num_prompts=1, num_eval=NUM_ROWS, seed=5)
    rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    with (folder / "VStarBench.tsv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["index", "image", "question", "A", "B", "C", "D", "answer", "category"])
        for number, row in enumerate(rows):
            options = [row["answer"], "red", "blue", "green"]
            image = base64.b64encode((folder / row["image"]).read_bytes()).decode()
            writer.writerow([number, image, row["question"], *options, "A", ["direct", "relative"][number % 2]])
    return folder


def config(folder: Path, data: Path, **changes: Any) -> RunConfig:
    benchmarks = [
        {
            "name": "vstar",
            "kind": "vstar",
            "path": str(data / "VStarBench.tsv"),
            "protocol": {"kind": "zwz"},
            "generation": {"max_new_tokens": 8},
            **changes,
        },
        {
            "name": "mine",
            "kind": "jsonl",
            "path": str(data / "eval.jsonl"),
            "protocol": ANSWER,
            "generation": {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seeds": SEEDS, "max_new_tokens": 8},
        },
    ]
    return small_config(folder, rounds={"num_rounds": 1}, benchmarks=benchmarks)


def manifests(folder: Path, stage: str) -> list[Manifest]:
    paths = (folder / "store").glob(f"{stage}/*/manifest.json")
    return [Manifest.model_validate_json(path.read_text()) for path in paths]


@pytest.fixture(scope="module")
def first(prefect_api: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    folder = tmp_path_factory.mktemp("run")
    return folder, vzero(config(folder, data))


def test_each_benchmark_is_measured_before_and_after(first: tuple[Path, RunResult]) -> None:
    _, result = first
    asked = [(score.benchmark, score.label, score.num_questions) for score in result.scores]
    for name, count in (("held-out", 40), ("vstar", NUM_ROWS), ("mine", NUM_ROWS)):
        assert [found for found in asked if found[0] == name and found[1].startswith("student")] == [
            (name, "student, before", count),
            (name, "student, after 1 round", count),
        ]
    assert [change.benchmark for change in result.changes] == ["held-out", "vstar", "mine"]
    # One round changes nothing that 40 questions could show.
    assert {change.verdict for change in result.changes} == {"inside the noise"}


def test_results_say_how_they_came_about(first: tuple[Path, RunResult], data: Path) -> None:
    folder, _ = first
    store = Store(str(folder / "store"), folder / "other-work")
    found = {
        manifest.job["benchmark"]: json.loads(store.read(manifest.ref, RESULTS))
        for manifest in manifests(folder, "evaluate")
    }
    own, vstar = found["mine"], found["vstar"]
    assert vstar["protocol"] == {"kind": "zwz"}
    assert (vstar["kind"], vstar["num_rows"], vstar["method"]) == ("vstar", NUM_ROWS, "wilson")
    assert set(vstar["by_category"]) == {"direct", "relative"}
    assert vstar["choice_template"] == "{question}\n{options}"
    assert own["generation"]["seeds"] == list(SEEDS)
    assert own["protocol"] == ANSWER
    # Three answers to each question: what varies is told, and questions are what is resampled.
    assert set(own["by_seed"]) == {str(seed) for seed in SEEDS}
    assert own["seed_spread"] is not None
    assert own["method"] == "bootstrap"
    assert own["accuracy"] == pytest.approx(sum(own["by_seed"].values()) / len(SEEDS))
    questions = {manifest.job["benchmark"]: manifest.summary for manifest in manifests(folder, "evaluation_data")}
    assert "191" in str(questions["vstar"])


def test_scoring_again_asks_no_model(
    first: tuple[Path, RunResult], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = first
    before = {(manifest.stage, manifest.key) for manifest in manifests(folder, "*")}

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was asked")

    monkeypatch.setattr(TransformersEngine, "sample", refuse)
    vzero(config(folder, data, protocol={"kind": "vlmevalkit"}))
    new = [manifest.stage for manifest in manifests(folder, "*") if (manifest.stage, manifest.key) not in before]
    assert sorted(new) == ["evaluate", "evaluate", "report"]


def test_one_file_under_two_names_is_asked_once(
    first: tuple[Path, RunResult], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = first
    settings = config(folder, data).model_dump()
    again = settings["benchmarks"][0] | {"name": "again", "protocol": {"kind": "vlmevalkit"}}
    settings["benchmarks"] = [*settings["benchmarks"], again]
    monkeypatch.setattr(TransformersEngine, "sample", None)
    result = vzero(RunConfig.model_validate(settings))
    assert [score.label for score in result.scores if score.benchmark == "again"] == [
        "student, before",
        "student, after 1 round",
    ]
    found = {manifest.job["benchmark"]: manifest for manifest in manifests(folder, "evaluate")}
    assert found["again"].job["protocol"] == {"kind": "vlmevalkit"}


def test_shards_that_were_asked_are_not_asked_again(
    prefect_api: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.predict, "MAX_SHARD_QUESTIONS", 5)
    run = config(tmp_path, data)
    asked: list[int] = []
    sample = TransformersEngine.sample

    def count(self: TransformersEngine, requests: Any, **settings: Any) -> Any:
        # The first three shards are those of the held-out questions that follow on one another.
        if len(asked) == 3:
            raise ValueError("stopped")
        asked.append(len(requests))
        return sample(self, requests, **settings)

    monkeypatch.setattr(TransformersEngine, "sample", count)
    with pytest.raises(ValueError, match="stopped"):
        vzero(run)
    assert asked == [5, 5, 5]
    assert len(manifests(tmp_path, "predict")) == 3
    monkeypatch.setattr(TransformersEngine, "sample", sample)
    made = {manifest.key for manifest in manifests(tmp_path, "predict")}
    result = vzero(run)
    assert made < {manifest.key for manifest in manifests(tmp_path, "predict")}
    [held_out] = [score for score in result.scores if score.label == "student, before" and score.num_questions == 40]
    shards = [manifest for manifest in manifests(tmp_path, "predict") if manifest.job["benchmark"] == "held-out"]
    assert {(manifest.job["first"], manifest.job["last"]) for manifest in shards} == {
        (first, first + 5) for first in range(0, 40, 5)
    }
    assert 0 <= held_out.low <= held_out.accuracy <= held_out.high


def test_what_a_protocol_cannot_score_is_refused_before_any_model_is_asked(
    prefect_api: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TransformersEngine, "sample", None)
    settings = config(tmp_path, data).model_dump()
    settings["benchmarks"][1]["protocol"] = {"kind": "vlmevalkit"}
    with pytest.raises(Exception, match="protocol must be exact or zwz where questions have no options"):
        vzero(RunConfig.model_validate(settings))
