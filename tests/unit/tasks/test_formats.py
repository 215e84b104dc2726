"""Every format becomes our rows, as its makers write it, and no answer comes through."""

import dataclasses
import io
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.formats import QUESTION, REGION, SECRET, SIZE, WRITERS, png, save, write_jsonl, write_parquet

from tasks.adapters.formats import FORMATS, enclose, parse_boxes, shown, to_pixels
from tasks.adapters.images import ImageReader
from tasks.adapters.importers import SourceRow, count_rows, image_root, import_row, read_source
from tasks.artifacts import BadRow, ImportedRow
from tasks.config import FileData
from vzero_core.errors import InputError
from vzero_core.views import Box

KINDS = list(WRITERS)
OPTIONS = "\n\nA. a cat\nB. a dog\n\nAnswer with the option's letter from the given choices."


def good_rows(source: FileData) -> list[SourceRow]:
    rows = list(read_source(source))
    assert [row for row in rows if isinstance(row, BadRow)] == []
    return [row for row in rows if isinstance(row, SourceRow)]


def only_bad_row(source: FileData) -> BadRow:
    (row,) = read_source(source)
    assert isinstance(row, BadRow), row
    return row


def imported(source: FileData, *, decode: bool = True) -> list[ImportedRow]:
    reader = ImageReader(image_root(source), 10**6)
    return [import_row(row, reader, decode=decode) for row in good_rows(source)]


def test_every_kind_of_the_configuration_has_a_format() -> None:
    kinds = FileData.model_fields["kind"].annotation
    assert set(kinds.__args__) == set(FORMATS) == set(KINDS)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decode", [True, False])
def test_a_published_layout_becomes_two_whole_rows(tmp_path: Path, kind: str, decode: bool) -> None:
    source = WRITERS[kind](tmp_path)
    rows = imported(source, decode=decode)
    assert count_rows(source) == len(rows) == 2
    assert [row.problem for row in rows] == [None, None]
    for row in rows:
        assert row.question == (f"{QUESTION}{OPTIONS}" if kind == "zwz_rl_vqa" else QUESTION)
        assert row.image is not None
        assert (row.image.width, row.image.height) == SIZE
        assert (row.image_hash is not None) is decode
    expected = [None, None] if kind == "vzero_release" else [Box(*REGION), Box(*REGION)]
    if kind in ("jsonl", "parquet"):
        expected[1] = None
    assert [row.region for row in rows] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_no_answer_comes_through(tmp_path: Path, kind: str) -> None:
    source = WRITERS[kind](tmp_path)
    raw = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert SECRET.encode() in raw
    for row in good_rows(source):
        assert SECRET not in repr(dataclasses.asdict(row))
    assert SECRET not in "".join(row.model_dump_json() for row in imported(source))


DROPPED = {
    "jsonl": {"answer"},
    "parquet": {"answer"},
    "zwz_rl_vqa": {"answer", "status"},
    "visual_cot": {"answer", "height", "split", "width"},
    "viscot_363k": {"question_id", "split"},
    "treevgr_rl_37k": {"answer"},
    "vstar_seal": {"answer", "search"},
    "vzero_release": {"extra_info", "reward_model", "teacher_raw_prompt", "teacher_neg_raw_prompt"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_out_is_named(tmp_path: Path, kind: str) -> None:
    assert {name for row in good_rows(WRITERS[kind](tmp_path)) for name in row.dropped} == DROPPED[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_unique_and_do_not_change(tmp_path: Path, kind: str) -> None:
    first, again = ([row.id for row in good_rows(WRITERS[kind](tmp_path / name))] for name in ("x", "y"))
    assert first == again
    assert len(set(first)) == 2


SOURCES = {
    "zwz_rl_vqa": "ZwZ-RL-VQA",
    "visual_cot": "Visual-CoT/flickr30k",
    "viscot_363k": "Visual-CoT/gqa",
    "treevgr_rl_37k": "TreeVGR-RL-37K",
    "vstar_seal": "V*-SEAL",
    "vzero_release": "zwz_37k",
}


@pytest.mark.parametrize("kind", list(SOURCES))
def test_the_datasets_name_and_the_configured_licence_are_kept(tmp_path: Path, kind: str) -> None:
    source = WRITERS[kind](tmp_path).model_copy(update={"license": "CC-BY-4.0"})
    row = good_rows(source)[0]
    assert (row.source, row.license) == (SOURCES[kind], "CC-BY-4.0")


# --- our own format -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_all_fields_of_our_own_format_are_kept(tmp_path: Path, kind: str) -> None:
    source = WRITERS[kind](tmp_path).model_copy(update={"license": "CC-BY-4.0"})
    first, second = imported(source)
    assert (first.id, first.source, first.license, first.group) == ("a", "signs", "CC0-1.0", None)
    assert first.detail_image is not None
    assert first.detail_image.uri == "images/a_detail.png"
    assert (second.id, second.source, second.license, second.group) == ("b", None, "CC-BY-4.0", "g")
    assert second.positive_image is not None
    assert second.negative_image is not None
    assert (second.positive_image.uri, second.negative_image.uri) == ("crops/b+.png", "crops/b-.png")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image": None}, "row must have image and question; image missing"),
        ({"image": None, "question": None}, "image, question missing"),
        ({"id": True}, "id must be a text or a whole number, got bool"),
        ({"id": 1.5}, "id must be a text or a whole number, got float"),
        ({"id": float("nan")}, "id must be a text or a whole number, got float"),
        ({"id": ""}, "id must not be blank"),
        ({"id": " "}, "id must not be blank"),
        ({"id": [1]}, "id must be a text or a whole number"),
        ({"question": 7}, "question must be a text, got int"),
        ({"image": 7}, "image must be the path of an image, got int"),
        ({"image": ["a.png", "b.png"]}, "image must hold one image, got 2"),
        ({"image": []}, "image must hold one image, got 0"),
        ({"image": {"bytes": "iVBOR"}}, "image must be the path of an image, got NoneType"),
        ({"detail_image": 7}, "detail_image must be the path of an image"),
        ({"source": [1]}, "source must be a text"),
        ({"question": "\ud800"}, "must be valid Unicode"),
        ({"id": "\ud800"}, "must be valid Unicode"),
        ({"group": "\ud800"}, "must be valid Unicode"),
    ],
)
def test_a_row_of_a_wrong_form_is_set_aside_with_the_reason(tmp_path: Path, change: Any, reason: str) -> None:
    good = {"id": "a", "image": "a.png", "question": "what?", "region": [1, 2, 3, 4]}
    write_jsonl(tmp_path / "d.jsonl", [good | change])
    bad = only_bad_row(FileData(kind="jsonl", path=str(tmp_path / "d.jsonl")))
    assert reason in bad.reason
    assert type(bad).model_validate_json(bad.model_dump_json()) == bad


def test_a_whole_number_may_be_written_as_a_float(tmp_path: Path) -> None:
    """So pandas holds whole numbers of a column with gaps."""
    row = {"image": "a.png", "question": "what?"}
    write_parquet(tmp_path / "d.parquet", [row | {"id": number} for number in (0.0, None, 12.0)])
    found = good_rows(FileData(kind="parquet", path=str(tmp_path / "d.parquet")))
    assert [row.id for row in found] == ["0", "d:2", "12"]


@pytest.mark.parametrize("answer", [["SECRET"] * 2, {"a": "SECRET"}, [["SECRET"]], [{"bbox": "SECRET"}, "SECRET"]])
@pytest.mark.parametrize("kind", KINDS)
def test_no_reason_tells_a_value_that_should_not_be_there(tmp_path: Path, kind: Any, answer: Any) -> None:
    """Every field but the boxes is put in the place of every other one, and the row in the place of the object."""
    form = FORMATS[kind]
    good = {"question": "?", "problem": "?", "dataset": "d", "prompt": [{"role": "user", "content": "?"}]}
    good |= {"image": "a.png", "images": ["images/a.png"], "conversations": [{"from": "human", "value": "?"}]}
    good |= {"teacher_images": ["images/a.png"], "teacher_neg_images": ["images/a.png"]}
    rows = [good | {name: answer} for name in form.fields if name not in ("region", "bbox", "bboxs")]
    rows += [answer, "SECRET", good | {"problem": "What SECRET is in the red bounding box?"}]
    write_jsonl(tmp_path / "d.jsonl", [json.dumps(row) for row in rows])
    found = read_source(FileData(kind=kind, path=str(tmp_path / "d.jsonl")))
    bad = [row for row in found if isinstance(row, BadRow)]
    assert len(bad) >= 3
    assert "SECRET" not in "".join(row.model_dump_json() for row in bad)


def test_a_row_without_an_id_is_named_after_its_file_and_number(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "d.jsonl",
        ["", {"image": "a.png", "question": "what?"}, {"id": None, "image": "b.png", "question": "?"}],
    )
    assert [row.id for row in good_rows(FileData(kind="jsonl", path=str(tmp_path / "d.jsonl")))] == ["d:2", "d:3"]


@pytest.mark.parametrize(
    "image", ["a.png", ["a.png"], {"path": "a.png"}, [{"image": "a.png"}], {"path": "a.png", "bytes": None}]
)
def test_an_image_may_be_named_in_several_ways(tmp_path: Path, image: Any) -> None:
    write_jsonl(tmp_path / "d.jsonl", [{"id": 7, "image": image, "question": "what?"}])
    (row,) = good_rows(FileData(kind="jsonl", path=str(tmp_path / "d.jsonl")))
    assert (row.id, row.image, row.region) == ("7", "a.png", None)


# --- what is particular to a format -------------------------------------------------------------------------------


def zwz_row(**changes: Any) -> dict[str, Any]:
    row = {
        "images": ["images/0.png"],
        "problem": "Which?",
        "answer": "A",
        "bbox": [1.0, 2.0, 3.0, 4.0],
        "status": "valid vqa",
    }
    return row | changes


@pytest.mark.parametrize(
    ("named", "clean"),
    [
        ("images/0.png", "original_images/0.png"),
        ("/data/images/sub/0.png", "/data/original_images/sub/0.png"),
        ("images/zwz/images/0.png", "images/zwz/original_images/0.png"),
        ("original_images/0.png", "original_images/0.png"),
    ],
)
def test_zwz_the_clean_picture_is_taken(tmp_path: Path, named: str, clean: str) -> None:
    write_parquet(tmp_path / "t.parquet", [zwz_row(images=[named])])
    assert good_rows(FileData(kind="zwz_rl_vqa", path=str(tmp_path / "t.parquet")))[0].image == clean


def test_zwz_a_column_of_clean_pictures_is_preferred(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "t.jsonl", [zwz_row(original_images=["clean/9.png"])])
    assert good_rows(FileData(kind="zwz_rl_vqa", path=str(tmp_path / "t.jsonl")))[0].image == "clean/9.png"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"images": ["bbox_images/0.png"]}, "images must lie below images/ or original_images/"),
        ({"problem": "What is in the red bounding box?"}, "must not need the red bounding box"),
        ({"problem": None}, "problem must be a text"),
    ],
)
def test_zwz_what_would_show_or_need_the_red_box_is_set_aside(tmp_path: Path, changes: Any, reason: str) -> None:
    write_jsonl(tmp_path / "t.jsonl", [zwz_row(**changes)])
    assert reason in only_bad_row(FileData(kind="zwz_rl_vqa", path=str(tmp_path / "t.jsonl"))).reason


def test_zwz_a_picture_with_the_box_inside_the_file_is_set_aside(tmp_path: Path) -> None:
    row = zwz_row(images=[{"bytes": png(), "path": "images/0.png"}])
    write_parquet(tmp_path / "t.parquet", [row])
    assert "a box may be drawn in" in only_bad_row(FileData(kind="zwz_rl_vqa", path=str(tmp_path / "t.parquet"))).reason


def viscot_row(**changes: Any) -> dict[str, Any]:
    question = "<image>\nWho? Please think step by step and provide the bounding box coordinate of the region."
    row = {"image": ["a.jpg", "a.jpg###[1, 2, 3, 4]"], "conversations": [{"from": "human", "value": question}]}
    return row | changes


def write_array(path: Path, rows: list[Any]) -> str:
    save(path, json.dumps(rows).encode())
    return str(path)


@pytest.mark.parametrize(
    ("image", "region"),
    [
        (["a.jpg", "a.jpg###[1, 2, 3, 4]"], Box(1, 2, 3, 4)),
        (["a.jpg", "a.jpg###[1.5,2,3,4]", "a.jpg###[0,5,2,9]"], Box(0, 2, 3, 9)),
        (["a.jpg"], None),
        ("a.jpg", None),
    ],
)
def test_viscot_the_box_stands_behind_the_path(tmp_path: Path, image: Any, region: Box | None) -> None:
    path = write_array(tmp_path / "v.json", [viscot_row(image=image)])
    (row,) = good_rows(FileData(kind="viscot_363k", path=path))
    assert (row.image, row.region, row.question) == ("a.jpg", region, "Who?")


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("viscot_363k", {"image": []}, "image must be a path"),
        ("viscot_363k", {"image": None}, "image must be a path"),
        ("viscot_363k", {"conversations": []}, "conversations must begin with a turn of the human"),
        ("viscot_363k", {"conversations": [{"from": "gpt", "value": SECRET}]}, "must begin with a turn of the human"),
        ("vstar_seal", {"image": "a.jpg", "target_instances": ["x"]}, "target_instances must be a list of objects"),
        ("vstar_seal", {"image": None}, "image must be the path of an image"),
    ],
)
def test_a_broken_conversation_row_is_set_aside(tmp_path: Path, kind: str, changes: Any, reason: str) -> None:
    path = write_array(tmp_path / "v.json", [viscot_row(**changes)])
    bad = only_bad_row(FileData(kind=kind, path=path))  # type: ignore[arg-type]
    assert reason in bad.reason
    assert SECRET not in bad.reason


PROMPTS = {
    "text": [{"role": "user", "content": "<image>What?"}],
    "parts": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
    "system first": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>\n<crop>What?"}],
}


@pytest.mark.parametrize("prompt", list(PROMPTS))
@pytest.mark.parametrize("image", ["a.png", {"path": "a.png"}, {"image": "a.png"}], ids=["path", "path of", "image of"])
def test_vzero_prompts_and_paths_are_read_in_the_forms_of_verl(tmp_path: Path, prompt: str, image: Any) -> None:
    for name in ("images", "teacher_images", "teacher_neg_images"):
        save(tmp_path / name / "a.png", png())
    row = {name: [image] for name in ("images", "teacher_images", "teacher_neg_images")} | {"prompt": PROMPTS[prompt]}
    write_parquet(tmp_path / "t.parquet", [row])
    (found,) = good_rows(FileData(kind="vzero_release", path=str(tmp_path / "t.parquet")))
    assert (found.question, found.source) == ("What?", "V-Zero")
    assert found.images == ("a.png", "a.png", "a.png")


def test_vzero_a_row_without_a_question_or_a_crop_is_set_aside(tmp_path: Path) -> None:
    row = {name: ["a.png"] for name in ("images", "teacher_images", "teacher_neg_images")}
    write_jsonl(tmp_path / "t.jsonl", [row, row | {"prompt": PROMPTS["text"], "teacher_images": []}])
    first, second = read_source(FileData(kind="vzero_release", path=str(tmp_path / "t.jsonl")))
    assert isinstance(first, BadRow)
    assert isinstance(second, BadRow)
    assert "prompt must hold one message of the user" in first.reason
    assert "teacher_images must hold one image, got 0" in second.reason


def test_embedded_images_of_a_column_that_holds_paths_as_well(tmp_path: Path) -> None:
    """Hugging Face writes {bytes, path}: the bytes where a row group has some, else the path."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("id", pa.string()), ("question", pa.string()), ("image", image), ("answer", pa.string())])
    buffer = io.BytesIO(png())
    save(tmp_path / "images" / "b.png", png())
    rows = [
        {"id": "a", "question": "?", "image": {"bytes": buffer.getvalue(), "path": "gone.png"}, "answer": SECRET},
        {"id": "b", "question": "?", "image": {"bytes": None, "path": "images/b.png"}, "answer": SECRET},
        {"id": "c", "question": "?", "image": None, "answer": SECRET},
    ]
    write_parquet(tmp_path / "t.parquet", rows, schema, row_group_size=1)
    first, second, third = read_source(FileData(kind="parquet", path=str(tmp_path / "t.parquet")))
    assert isinstance(first, SourceRow)
    assert isinstance(second, SourceRow)
    assert isinstance(third, BadRow)
    assert (first.image, second.image) == ("t.parquet#row=0&column=image&index=0", "images/b.png")
    assert "image missing" in third.reason


# --- boxes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        [1, 2, 3.5, 4],
        "[1, 2, 3.5, 4]",
        "1,2,3.5,4",
        "(1, 2, 3.5, 4)",
        " 1 2 3.5 4 ",
        "[1e0, +2., 35e-1, 4]",
        [[1, 2, 3.5, 4]],
        ["[1, 2, 3.5, 4]"],
        "[[1, 2, 3.5, 4]]",
    ],
)
def test_a_box_is_read_as_a_list_or_a_text(value: Any) -> None:
    assert parse_boxes(value) == [(1, 2, 3.5, 4)]


def test_several_boxes_are_read_as_lists_or_texts() -> None:
    several = [(1, 2, 3, 4), (5, 6, 7, 8)]
    for value in ([[1, 2, 3, 4], [5, 6, 7, 8]], "[[1, 2, 3, 4], [5, 6, 7, 8]]", ["1,2,3,4", [5, 6, 7, 8]]):
        assert parse_boxes(value) == several
    assert parse_boxes(None) == parse_boxes([]) == parse_boxes("") == []


@pytest.mark.parametrize(
    "value",
    [
        [1, 2, 3],
        [1, 2, 3, 4, 5],
        [1, 2, True, 4],
        [1, 2, None, 4],
        "1,2,3",
        "1,2,3,4,5",
        "x1=1, x2=2, 3, 4",
        "[nan, 1, 2, 3]",
        "no box",
        "around 1, 2, 3, 4",
        7,
        {"x1": 1},
        [1, 2, float("inf"), 4],
        "1e999,2,3,4",
        [10**400, 2, 3, 4],
        [[1, 2], [3, 4]],
        ["1", "2", "3", "4"],
    ],
)
def test_what_is_no_box_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="region must be"):
        parse_boxes(value)


@pytest.mark.parametrize(("value", "shown"), [("NaN,1,2,3", "got NaN,1,2,3"), ([[1, 2]], r"got \[1, 2\]")])
def test_what_is_no_box_is_named(value: Any, shown: str) -> None:
    with pytest.raises(InputError, match=f"{shown}$"):
        parse_boxes(value)


@pytest.mark.parametrize("value", [[0.1] * 100_000, "here " * 1000, {"x" * 1000: 1}, "\x1b[31m" * 1000])
def test_of_a_long_value_only_its_ends_are_named(value: Any) -> None:
    with pytest.raises(InputError) as error:
        parse_boxes(value)
    message = str(error.value)
    assert len(message) < 200
    assert "..." in message
    assert message.isprintable()


def test_lists_in_lists_without_end_are_no_box(tmp_path: Path) -> None:
    depth = 600
    row = '{"id": "a", "image": "a.png", "question": "?", "region": ' + "[" * depth + "]" * depth + "}"
    write_jsonl(tmp_path / "d.jsonl", [row])
    (found,) = read_source(FileData(kind="jsonl", path=str(tmp_path / "d.jsonl")))
    assert isinstance(found, SourceRow)
    assert "region must be four numbers" in (found.problem or "")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain ä 語", "plain ä 語"),
        ("\x1b[31m\x07\n", r"\x1b[31m\x07\n"),
        ("\u202eright to left", r"\u202eright to left"),
        ("\ud800", r"\ud800"),
        ("a" * 80, "a" * 80),
        ("a" * 40 + "b" * 41, "a" * 37 + "..." + "b" * 40),
        (7, "7"),
    ],
)
def test_a_value_is_shown_printable_and_short(value: object, text: str) -> None:
    assert shown(value) == text


def test_an_unreadable_box_is_a_problem_of_its_row(tmp_path: Path) -> None:
    save(tmp_path / "a.png", png())
    write_jsonl(tmp_path / "d.jsonl", [{"id": "a", "image": "a.png", "question": "?", "region": "here"}])
    (row,) = imported(FileData(kind="jsonl", path=str(tmp_path / "d.jsonl")))
    assert row.region is None
    assert row.image is not None
    assert "region must be four numbers" in (row.problem or "")


def test_of_several_boxes_the_smallest_that_contains_them_is_taken() -> None:
    assert enclose([(5, 6, 7, 8), (1, 7, 6, 20)], "xyxy") == Box(1, 6, 7, 20)
    assert enclose([(5, 6, 7, 8), (1, 7, 6, 20)], "xywh") == Box(1, 6, 12, 27)
    assert enclose([], "xyxy") is None


def test_a_box_beyond_all_floats_is_refused() -> None:
    """1.7e308 is a float, its sum with itself and its multiples are none."""
    with pytest.raises(InputError, match=r"region must be finite numbers, got \[1.7e\+308, 0, inf, 1\]"):
        enclose([(1.7e308, 0, 1.7e308, 1)], "xywh")
    for unit in ("fraction", "per_mille"):
        with pytest.raises(InputError, match=r"region must be finite numbers, got .*inf"):
            to_pixels(Box(0, 0, 1.7e308, 1), unit, 64, 48)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", [{"box_unit": "fraction"}, {"box_unit": "per_mille"}, {"box_format": "xywh"}])
@pytest.mark.parametrize("decode", [True, False])
def test_a_box_beyond_all_floats_is_a_problem_of_its_row(tmp_path: Path, form: Any, decode: bool) -> None:
    save(tmp_path / "a.png", png())
    huge = [1.7e308, 0, 1.7e308, 1]
    write_jsonl(tmp_path / "d.jsonl", [{"id": "a", "image": "a.png", "question": "?", "region": huge}])
    (row,) = imported(FileData(kind="jsonl", path=str(tmp_path / "d.jsonl"), **form), decode=decode)
    assert row.region is None
    assert row.image is not None
    assert "region must be finite numbers" in (row.problem or "")


numbers = st.floats(-1e4, 1e4, allow_nan=False)
boxes = st.tuples(numbers, numbers, numbers, numbers)


@given(st.lists(boxes, min_size=1, max_size=5), st.sampled_from(["xyxy", "xywh"]), st.randoms())
def test_the_enclosing_box_contains_each_touches_some_and_knows_no_order(found: Any, form: Any, random: Any) -> None:
    whole = enclose(found, form)
    each = [enclose([box], form) for box in found]
    assert whole is not None
    for side, low in enumerate((True, True, False, False)):
        values = [box[side] for box in each if box is not None]
        assert whole[side] == (min(values) if low else max(values))
    shuffled = list(found)
    random.shuffle(shuffled)
    assert enclose(shuffled, form) == whole


sides = st.integers(1, 9000)


@given(
    boxes,
    sides,
    sides,
    st.sampled_from(["xyxy", "xywh"]),
    st.sampled_from(["pixels", "fraction", "per_mille"]),
    st.booleans(),
)
def test_every_convention_says_the_same_box(
    box: tuple[float, float, float, float], width: int, height: int, form: Any, unit: Any, as_text: bool
) -> None:
    """Pixels, written in a convention and read back, are the pixels again."""
    x1, y1, x2, y2 = box
    parts = {"pixels": None, "fraction": 1, "per_mille": 1000}[unit]
    scale_x, scale_y = (1.0, 1.0) if parts is None else (parts / width, parts / height)
    written: Any = [x1 * scale_x, y1 * scale_y, x2 * scale_x, y2 * scale_y]
    if form == "xywh":
        written = [written[0], written[1], written[2] - written[0], written[3] - written[1]]
    found = enclose(parse_boxes(str(written) if as_text else written), form)
    assert found is not None
    assert to_pixels(found, unit, width, height) == pytest.approx(box, rel=1e-9, abs=1e-6)


@pytest.mark.parametrize(
    ("form", "unit", "written"),
    [
        ("xyxy", "pixels", [8, 6, 24, 30]),
        ("xywh", "pixels", [8, 6, 16, 24]),
        ("xyxy", "fraction", [0.125, 0.125, 0.375, 0.625]),  # of 64x48
        ("xywh", "per_mille", "[125, 125, 250, 500]"),
    ],
)
@pytest.mark.parametrize("decode", [True, False])
def test_the_configured_convention_is_used(tmp_path: Path, form: Any, unit: Any, written: Any, decode: bool) -> None:
    save(tmp_path / "a.png", png())
    write_jsonl(tmp_path / "d.jsonl", [{"id": "a", "image": "a.png", "question": "?", "region": written}])
    source = FileData(kind="jsonl", path=str(tmp_path / "d.jsonl"), box_format=form, box_unit=unit)
    assert [row.region for row in imported(source, decode=decode)] == [Box(*REGION)]


def test_the_configured_convention_overrides_the_formats(tmp_path: Path) -> None:
    source = WRITERS["vstar_seal"](tmp_path).model_copy(update={"box_format": "xyxy"})
    x1, y1, x2, y2 = REGION
    assert imported(source)[0].region == Box(x1, y1, x2 - x1, y2 - y1)


def test_a_relative_box_counts_on_the_upright_picture(tmp_path: Path) -> None:
    from PIL import ExifTags, Image

    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (64, 48)).save(tmp_path / "a.jpg", exif=exif)
    write_jsonl(tmp_path / "d.jsonl", [{"id": "a", "image": "a.jpg", "question": "?", "region": [0, 0, 1, 0.5]}])
    source = FileData(kind="jsonl", path=str(tmp_path / "d.jsonl"), box_unit="fraction")
    for decode in (True, False):
        assert [row.region for row in imported(source, decode=decode)] == [Box(0, 0, 48, 32)]


def test_a_relative_box_of_an_unreadable_picture_stays_unknown(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", [{"id": "a", "image": "a.jpg", "question": "?", "region": [0, 0, 1, 0.5]}])
    path = str(tmp_path / "d.jsonl")
    (row,) = imported(FileData(kind="jsonl", path=path, box_unit="fraction"))
    assert (row.image, row.region) == (None, None)
    assert "a.jpg must exist" in (row.problem or "")
    (row,) = imported(FileData(kind="jsonl", path=path))
    assert row.region == Box(0, 0, 1, 0.5)


# --- the documentation --------------------------------------------------------------------------------------------


def snippets() -> list[dict[str, Any]]:
    text = (Path(__file__).parents[3] / "docs" / "DATA.md").read_text()
    return [tomllib.loads(block.split("```")[0])["data"]["source"] for block in text.split("```toml\n")[1:]]


def test_every_format_is_documented_with_a_snippet_that_is_a_configuration() -> None:
    sources = [FileData.model_validate(snippet) for snippet in snippets()]
    assert {source.kind for source in sources} | {"parquet"} == set(KINDS)


def test_every_field_of_our_own_format_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs" / "DATA.md").read_text()
    table = text.split("| field | | |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table.replace("`license` in", ""))) == set(FORMATS["jsonl"].fields)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("jsonl", "parquet")])
def test_the_documented_fields_of_a_format_are_those_that_are_read(kind: str) -> None:
    text = (Path(__file__).parents[3] / "docs" / "DATA.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith(f"| `{kind}` |")]
    fields = set(re.findall(r"`(\w+)`", line.split("|")[3]))
    inner = {"target_instances": {"bbox"}}
    expected = set(FORMATS[kind].fields)
    for name in expected & set(inner):
        expected |= inner[name]
    if kind == "vstar_seal":
        expected -= {"conversations"}
    assert fields == expected
