"""A user's mistake: one clear message that names the row or the key, before any training, and no traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flows.config import PROJECT
from flows.full_pipeline import main
from tasks.small_world.dataset import write_dataset

pytestmark = pytest.mark.e2e

Rows = list[dict[str, Any]]


def edit_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    path.write_text(json.dumps(tokenizer))


def change(row: int, **values: Any) -> Callable[[Path, Rows], None]:
    return lambda folder, rows: rows[row].update(values)


def empty_image(folder: Path, rows: Rows) -> None:
    (folder / "data" / "empty.png").write_bytes(b"")
    rows[2]["image"] = "empty.png"


def text_as_image(folder: Path, rows: Rows) -> None:
    (folder / "data" / "text.png").write_text("hello")
    rows[2]["image"] = "text.png"


def no_processor(folder: Path, rows: Rows) -> None:
    (folder / "teacher" / "preprocessor_config.json").unlink()


def other_tokenizer(folder: Path, rows: Rows) -> None:
    edit_tokenizer(folder / "teacher")


def no_weights(folder: Path, rows: Rows) -> None:
    (folder / "student" / "model.safetensors").unlink()


def same_id(folder: Path, rows: Rows) -> None:
    for row in rows[:2]:
        row["id"] = "twice"


def no_rows(folder: Path, rows: Rows) -> None:
    rows.clear()


def no_change(folder: Path, rows: Rows) -> None:
    pass


MISTAKES: dict[str, tuple[Callable[[Path, Rows], None], str, list[str]]] = {
    "missing image": (change(2, image="gone.png"), "", ["row 3", "image gone.png must exist"]),
    "box outside": (change(2, region=[500, 500, 600, 600]), "", ["row 3", "box must meet the 64x64 image"]),
    "zero-area box": (change(2, region=[5, 5, 5, 9]), "", ["row 3", "box"]),
    "duplicate ids": (same_id, "", ["row 2 (twice)", "id must be unique"]),
    "empty file": (no_rows, "", ["data must have rows", "empty"]),
    "empty image": (empty_image, "", ["row 3", "image empty.png must not be empty"]),
    "no image": (text_as_image, "", ["row 3", "image text.png must be an image"]),
    "no processor": (no_processor, "", ["teacher", "must have a processor"]),
    "other tokenizer": (other_tokenizer, "", ["same tokenizer", "'red'"]),
    "no weights": (no_weights, "", ["student", "safetensors"]),
    "unknown key": (no_change, "[gate]\nalpa = 1", ["gate.alpa is no setting", "did you mean alpha?"]),
    "too few samples": (no_change, "[rounds]\nprompts_per_round = 99", ["prompts_per_round", "at most the number"]),
    "too little memory": (
        no_change,
        "[placement.hardware]\nmemory_gib = 0.5",
        ["need", "on cpu, which has 0.5 (placement.hardware.memory_gib)"],
    ),
    "unknown tracker": (
        no_change,
        '[tracking]\ntrackers = ["wandb"]',
        ["tracking.trackers must be installed, got wandb"],
    ),
    "image token in a question": (change(2, question="<|image_pad|> ?"), "", ["row 3", "special tokens"]),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_a_mistake_is_named_before_any_training(
    name: str, tmp_path: Path, prefect_api: str, capfd: pytest.CaptureFixture[str]
) -> None:
    make, settings, words = MISTAKES[name]
    write_dataset(tmp_path / "data", num_prompts=16, num_eval=4, seed=0)
    for role in ("student", "teacher"):
        shutil.copytree(PROJECT / "tasks" / "small_world" / "models" / role, tmp_path / role)
    path = tmp_path / "data" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    make(tmp_path, rows)
    path.write_text("\n".join(json.dumps(row) for row in rows))
    rounds = "" if "[rounds]" in settings else "[rounds]\nprompts_per_round = 8\nnum_rounds = 1\n"
    (tmp_path / "my.toml").write_text(
        f'{rounds}{settings}\n[data.source]\nkind = "jsonl"\npath = "data/train.jsonl"\n'
        '[student]\npath = "student"\n[teacher]\npath = "teacher"\n[store]\nurl = "store"\n'
        '[placement]\nwork_dir = "work"\nthreads = 1\n'
    )
    assert main(["--config", str(tmp_path / "my.toml")]) == 1
    error = capfd.readouterr().err
    assert "Traceback" not in error
    for word in words:
        assert word in error, error
    assert not list((tmp_path / "store").glob("train/*"))
    assert not list((tmp_path / "store").glob("replay/*"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question": "digit " * 5000}, ["the prompt must have at most", "tokens for the student", "got 50"]),
        ({"image": "narrow.png"}, ["image narrow.png of 20000x1 is refused by the processor of the student"]),
    ],
)
def test_an_evaluation_question_that_no_model_can_be_asked_is_named(
    change: dict[str, Any], words: list[str], tmp_path: Path, prefect_api: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "data", num_prompts=16, num_eval=4, seed=0)
    Image.new("RGB", (20_000, 1)).save(tmp_path / "data" / "narrow.png")
    path = tmp_path / "data" / "eval.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[2] |= {"region": None, **change}
    path.write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "my.toml").write_text(
        '[data.source]\nkind = "jsonl"\npath = "data/train.jsonl"\nevaluation_path = "data/eval.jsonl"\n'
        '[store]\nurl = "store"\n[placement]\nwork_dir = "work"\n'
    )
    assert main(["--config", str(tmp_path / "my.toml")]) == 1
    error = capfd.readouterr().err
    assert "Traceback" not in error
    for word in ["evaluation data", rows[2]["id"], *words]:
        assert word in error, error
