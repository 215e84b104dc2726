"""Answers planted in the source data reach no artefact of the training side."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.runs import small_config

from flows.full_pipeline import vzero
from tasks.small_world.dataset import write_dataset

pytestmark = pytest.mark.e2e

SECRET = "xylophone-secret"
# The only stages that may know answers: nothing that trains has either among its inputs.
EVALUATION_STAGES = {"evaluation_data", "evaluate"}


def contents(path: Path) -> str:
    """All a file says, Parquet unpacked."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        return str(table.schema) + str(table.to_pylist())
    return path.read_bytes().decode("latin-1")


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """The small world with an answer in every field that a dataset might keep it in."""
    write_dataset(tmp_path / "data", num_prompts=32, num_eval=20, seed=3)
    path = tmp_path / "data" / "train.jsonl"
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row |= {"answer": SECRET, "solution": SECRET, "reward_model": {"ground_truth": SECRET}, "extra_info": [SECRET]}
    path.write_text("\n".join(json.dumps(row) for row in rows))
    evaluation = tmp_path / "data" / "eval.jsonl"
    rows = [json.loads(line) | {"answer": f"{SECRET}-eval"} for line in evaluation.read_text().splitlines()]
    evaluation.write_text("\n".join(json.dumps(row) for row in rows))
    rows = [row | {"answer": "A", "options": [f"{SECRET}-option", "other"]} for row in rows]
    (tmp_path / "data" / "choices.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def test_no_planted_answer_reaches_the_training_side(planted: Path, prefect_api: str) -> None:
    source = {
        "kind": "jsonl",
        "path": str(planted / "data" / "train.jsonl"),
        "evaluation_path": str(planted / "data" / "eval.jsonl"),
    }
    benchmark = {"name": "choices", "kind": "jsonl", "path": str(planted / "data" / "choices.jsonl")}
    benchmark |= {"generation": {"max_new_tokens": 8}}
    rounds = {"num_rounds": 2}
    result = vzero(
        small_config(planted, name="planted", data={"source": source}, rounds=rounds, benchmarks=[benchmark])
    )
    found: dict[str, set[str]] = {}
    for path in (planted / "store").rglob("*"):
        if path.is_file():
            stage = path.relative_to(planted / "store").parts[0]
            found.setdefault(stage, set()).update(word for word in (SECRET,) if word in contents(path))
    assert {"validate", "views", "rollouts", "replay", "gate", "train", "checkpoint", "report"} <= set(found)
    assert {stage for stage, words in found.items() if words} == EVALUATION_STAGES
    # The search itself works: it finds the evaluation's answers where they belong.
    assert result.scores[0].accuracy == 0.0
