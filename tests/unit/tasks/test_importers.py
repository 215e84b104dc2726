"""Rows become samples, or stand aside with the reason; no answer comes through."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tasks.adapters.images import ImageReader
from tasks.adapters.importers import EVALUATION, TRAINING, Imported, import_samples, locate, source_digest
from tasks.config import SmallWorldData
from vzero_core.errors import InputError
from vzero_core.views import Box

GOOD = {"id": "a", "image": "a.png", "question": "what?", "region": [1, 2, 3, 4]}


@pytest.fixture(autouse=True)
def image(tmp_path: Path) -> None:
    Image.new("RGB", (10, 8)).save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no image")


def load(folder: Path, rows: list[Any], form: Any = TRAINING, share: float = 1.0) -> Imported[Any]:
    return load_file(write(folder, rows), form, share)


def write(folder: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "d.jsonl").write_text("\n".join(lines))
    return folder / "d.jsonl"


def load_file(path: Path, form: Any, share: float) -> Imported[Any]:
    reader = ImageReader(str(path.parent), 1000)
    return import_samples(
        str(path), form, reader, reserved=("<image>",), max_bad_share=share, advance=lambda count: None
    )


def test_a_good_row_becomes_a_sample(tmp_path: Path) -> None:
    found = load(tmp_path, [{**GOOD, "source": "s", "license": "CC0", "detail_image": "a.png"}])
    (sample,) = found.samples
    assert (sample.id, sample.question, sample.region) == ("a", "what?", Box(1, 2, 3, 4))
    assert (sample.image.width, sample.image.height) == (10, 8)
    assert (sample.source, sample.license, sample.group) == ("s", "CC0", None)
    assert sample.detail_image == sample.image
    assert found.bad == []


def test_answers_and_other_fields_are_dropped_and_named(tmp_path: Path) -> None:
    found = load(tmp_path, [{**GOOD, "answer": "secret", "solution": "secret"}])
    assert "secret" not in found.samples[0].model_dump_json()
    assert found.summary()["dropped_fields"] == ["answer", "solution"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image": "missing.png"}, "image missing.png must exist"),
        ({"image": "text.png"}, "image text.png must be an image"),
        ({"image": 7}, "image must be a text"),
        ({"question": "  "}, "question must be a text that is not empty"),
        ({"question": "what <image>?"}, "must not hold special tokens of the models, got '<image>'"),
        ({"region": None}, "row must have id, image, question, region; region missing"),
        ({"region": [1, 2, 3]}, r"region must be \[x1, y1, x2, y2\]"),
        ({"region": "1,2,3,4"}, r"region must be \[x1, y1, x2, y2\]"),
        ({"region": [1, 2, True, 4]}, r"region must be \[x1, y1, x2, y2\]"),
        ({"region": [1, 2, 1, 4]}, "."),
        ({"region": [3, 2, 1, 4]}, "."),
        ({"region": [20, 20, 30, 30]}, "."),
    ],
)
def test_a_bad_row_stands_aside_with_its_number_and_reason(tmp_path: Path, change: Any, reason: str) -> None:
    found = load(tmp_path, [GOOD, {**GOOD, "id": "b", **change}, {**GOOD, "id": "c"}])
    assert [sample.id for sample in found.samples] == ["a", "c"]
    (bad,) = found.bad
    assert bad.row == 2
    assert re.search(reason, bad.reason)


@pytest.mark.parametrize("line", ["{broken", "[1, 2]", '"text"', "NaN"])
def test_a_line_that_is_no_object_stands_aside(tmp_path: Path, line: str) -> None:
    found = load(tmp_path, [GOOD, line])
    assert [bad.row for bad in found.bad] == [2]
    assert "row must be a JSON object" in found.bad[0].reason


def test_an_infinite_box_stands_aside(tmp_path: Path) -> None:
    found = load(tmp_path, [GOOD, json.dumps({**GOOD, "id": "b"}).replace("4]", "Infinity]")])
    assert "finite" in found.bad[0].reason


def test_a_second_row_with_an_id_stands_aside(tmp_path: Path) -> None:
    found = load(tmp_path, [GOOD, GOOD])
    assert len(found.samples) == 1
    assert "row 1 has it too" in found.bad[0].reason


def test_a_box_that_sticks_out_is_clipped_and_counted(tmp_path: Path) -> None:
    found = load(tmp_path, [{**GOOD, "region": [5, 5, 50, 50]}])
    assert found.samples[0].region == Box(5, 5, 10, 8)
    assert found.num_clipped == 1


def test_too_many_bad_rows_stop_naming_them(tmp_path: Path) -> None:
    rows = [GOOD, {**GOOD, "id": "b", "image": "missing.png"}]
    assert len(load(tmp_path, rows, share=0.5).samples) == 1
    with pytest.raises(InputError, match=r"(?s)at most 49.0% .* got 1 of 2.*row 2 \(b\): image missing.png must exist"):
        load(tmp_path, rows, share=0.49)
    with pytest.raises(InputError, match="got 1 of 1"):
        load(tmp_path, rows[1:], share=1.0)


def test_an_empty_or_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="file is empty"):
        load(tmp_path, ["  "])
    with pytest.raises(InputError, match="no such file"):
        load_file(tmp_path / "no", TRAINING, 0)


def test_evaluation_rows_have_answers_and_may_have_regions(tmp_path: Path) -> None:
    row = {"id": 1, "image": "a.png", "question": "what?", "answer": 7}
    found = load(tmp_path, [row, {**row, "id": 2, "region": [0, 0, 2, 2]}], EVALUATION)
    assert [(sample.id, sample.answer, sample.region) for sample in found.samples] == [
        ("1", "7", None),
        ("2", "7", Box(0, 0, 2, 2)),
    ]


def test_source_digest_sees_the_file_and_every_image(tmp_path: Path) -> None:
    load(tmp_path, [GOOD])
    reader, path = ImageReader(str(tmp_path), 1000), str(tmp_path / "d.jsonl")
    first = source_digest(path, "data", reader)
    assert source_digest(path, "data", reader) == first
    Image.new("RGB", (11, 8)).save(tmp_path / "a.png")
    second = source_digest(path, "data", reader)
    load(tmp_path, [GOOD, "{broken"])
    assert len({first, second, source_digest(path, "data", reader)}) == 3


def test_the_small_world_is_drawn_once(tmp_path: Path) -> None:
    source = SmallWorldData(num_prompts=3, num_evaluation=2)
    files = locate(source, tmp_path)
    rows = [json.loads(line) for line in Path(files.train).read_text().splitlines()]
    assert len(rows) == 3
    assert all("answer" not in row for row in rows)
    stamp = Path(files.train).stat().st_mtime_ns
    assert locate(source, tmp_path) == files
    assert Path(files.train).stat().st_mtime_ns == stamp
    assert locate(SmallWorldData(num_prompts=3, num_evaluation=2, seed=1), tmp_path) != files
