"""Benchmarks are read in the layouts that they are published in, a row at a time, whatever is wrong with them."""

import base64
import csv
import json
import os
import shutil
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import fsspec
import pytest
from support.benchmarks import (
    HR_HEADER,
    MMSTAR_HINT,
    OPTIONS,
    WRITERS,
    hr_rows,
    picture,
    text_of_picture,
    write_hr_bench_parquet,
    write_hr_bench_tsv,
    write_own,
    write_tsv,
    write_vstar_jsonl,
    write_vstar_tsv,
    write_zoombench_json,
)
from support.formats import save, write_jsonl, write_parquet
from support.tiny_models import save_tiny_model

from tasks.adapters import row_files
from tasks.adapters.benchmarks import (
    BenchmarkRow,
    benchmark_digest,
    benchmark_root,
    benchmark_sample,
    doubts,
    num_rows,
    question_text,
    read_benchmark,
)
from tasks.adapters.dataset import FINGERPRINTS, MODELS, SAMPLES, Dataset
from tasks.adapters.images import ImageReader
from tasks.adapters.options import letter_of, split_options
from tasks.adapters.row_facts import Fingerprint
from tasks.adapters.store import Outcome, Store
from tasks.adapters.tables import read_rows
from tasks.artifacts import BadRow, EvaluationSample, ImageRef, Job
from tasks.config import FileData, PromptConfig
from tasks.evaluation_config import HELD_OUT, BenchmarkConfig
from tasks.evaluation_data import EvaluationDataJob, evaluation_data
from tasks.fingerprints import FingerprintsJob, fingerprints
from tasks.stage import Benchmark
from vzero_core.errors import InputError
from vzero_core.views import Box

V_STAR_HEADER = ("index", "image", "question", "A", "B", "C", "D", "answer", "category")
LABELS = ("math", "geometry")


def reader_of(config: BenchmarkConfig) -> ImageReader:
    return ImageReader(benchmark_root(config), 1_000_000)


def good(config: BenchmarkConfig) -> list[BenchmarkRow]:
    rows = list(read_benchmark(config))
    assert not [row for row in rows if isinstance(row, BadRow)]
    return sorted((row for row in rows if isinstance(row, BenchmarkRow)), key=lambda row: row.row)


def samples_of(config: BenchmarkConfig, reserved: tuple[str, ...] = ()) -> list[EvaluationSample]:
    return [benchmark_sample(row, reader_of(config), reserved) for row in good(config)]


def reasons(config: BenchmarkConfig) -> dict[int, str]:
    """Give what is wrong with which row, images included."""
    found = {}
    for row in read_benchmark(config):
        try:
            if isinstance(row, BadRow):
                raise InputError(row.reason)
            benchmark_sample(row, reader_of(config), ())
        except InputError as error:
            found[row.row] = str(error)
    return found


def vstar(folder: Path, rows: list[Any], header: tuple[str, ...] = V_STAR_HEADER, **options: Any) -> BenchmarkConfig:
    write_tsv(folder / "VStarBench.tsv", header, rows, **options)
    return BenchmarkConfig(name="vstar", kind="vstar", path=str(folder / "VStarBench.tsv"))


def vstar_row(**changes: Any) -> list[Any]:
    values = [0, text_of_picture(0), "Which color?", "red", "green", "blue", "", "B", "color"]
    return [changes.get(name, value) for name, value in zip(V_STAR_HEADER, values, strict=True)]


def own(folder: Path, *rows: Any) -> BenchmarkConfig:
    save(folder / "a.png", picture(0))
    write_jsonl(folder / "questions.jsonl", list(rows))
    return BenchmarkConfig(name="own", kind="jsonl", path=str(folder / "questions.jsonl"))


# --- the published layouts ----------------------------------------------------------------------------------------

COLOR = ("What is the color of the glove?", OPTIONS, "B")
SIDE = ("Is the cat left of the dog?", ("left", "right"), "A")
HR = [("What color is it?", OPTIONS[cycle:] + OPTIONS[:cycle], "BADC"[cycle]) for cycle in range(4)] * 2
MME = ("10", "12", "15", "20", "The image does not feature the number.")
BOOK = ("The case is on the book.", "Beneath")
FIND = MMSTAR_HINT.removesuffix("\nChoices:\n")
# id, (question, options, answer), height of the picture, category, subcategory. Written by hand from the fixtures.
GOLDEN: dict[str, list[tuple[Any, ...]]] = {
    "vstar.tsv": [("0", COLOR, 16, "direct_attributes", None), ("1", SIDE, 17, "relative_position", None)],
    "vstar.parquet": [
        ("direct_attributes/0", COLOR, 16, "direct_attributes", None),
        ("relative_position/0", SIDE, 17, "relative_position", None),
    ],
    "hr_bench.tsv": [(str(n), HR[n], 16 + n // 4, ("single", "cross")[n // 4], None) for n in range(8)],
    "zoombench.parquet": [
        ("z0", ("Which color?", ("red", "green"), "B"), 16, "mcq", None),
        ("z1", ("How many birds are there?", None, "3"), 16, "open", None),
    ],
    "zoombench.json": [
        ("1", ("How many lamps are in the image?", ("0", "2", "1"), "C"), 16, None, None),
        ("2", ("What does the sign say?", None, "Stop"), 16, None, None),
    ],
    "mme_realworld.tsv": [("0", ('What does "Σ\tsum" say?\nLook.', MME, "C"), 16, "Perception/OCR", "License")],
    "mme_realworld_lite.tsv": [("0", ("How many?", MME, "E"), 16, "Reasoning/Monitoring", "count")],
    "mme_realworld.parquet": [
        (str(n), ("How many?", MME, "A"), 16 + n, "Perception/Remote Sensing", "count") for n in range(2)
    ],
    "mme_realworld.json": [
        ("perception/ocr_cc/1", ("How many?", MME, "B"), 16, "Perception/OCR with Complex Context", "license")
    ],
    "mmstar.tsv": [
        ("0", ("Which is right?", BOOK, "B"), 16, "coarse perception", "image emotion"),
        ("1", (FIND, ("1", "2", "3"), "C"), 16, *LABELS),
        ("2", (FIND, ("7", "8"), "A"), 19, *LABELS),
        ("3", (FIND, ("1", "2"), "A"), 19, *LABELS),
    ],
    "mmstar.parquet": [("0", ("Which is right?", BOOK, "A"), 16, "coarse perception", "image emotion")],
    "own.jsonl": [
        ("1", ("How many?", None, "3"), 16, None, None),
        ("b", ("Which?", ("red", "blue"), "B"), 16, "color", "bright"),
    ],
}
GOLDEN["vstar.jsonl"] = GOLDEN["vstar.parquet"]
GOLDEN["hr_bench.parquet"] = GOLDEN["hr_bench.tsv"]


@pytest.mark.parametrize("layout", list(WRITERS))
def test_every_layout_gives_its_questions_answers_and_pictures(tmp_path: Path, layout: str) -> None:
    config = WRITERS[layout](tmp_path)
    samples = samples_of(config)
    found = [
        (each.id, (each.question, each.options, each.answer), each.image.height, each.category, each.subcategory)
        for each in samples
    ]
    assert found == GOLDEN[layout]
    # The pictures can be read again from where they lie, by what is stored of them.
    images = ImageReader(benchmark_root(config), 1_000_000)
    assert [images.read(each.image).size for each in reversed(samples)] == [
        (24, height) for _, _, height, _, _ in reversed(GOLDEN[layout])
    ]


@pytest.mark.parametrize("layout", ["hr_bench.tsv", "hr_bench.parquet"])
def test_the_rotations_of_a_question_share_a_group(tmp_path: Path, layout: str) -> None:
    """Both questions have the same words, so that only their pictures tell them apart."""
    samples = samples_of(WRITERS[layout](tmp_path))
    groups = [each.group for each in samples]
    assert groups[:4] == groups[:1] * 4
    assert groups[4:] == groups[4:5] * 4
    assert len({None, *groups}) == 3
    assert [each.cycle for each in samples] == ["0", "1", "2", "3"] * 2


def test_other_benchmarks_ask_each_question_once(tmp_path: Path) -> None:
    for layout in ("vstar.tsv", "mmstar.tsv", "zoombench.json"):
        assert {each.group for each in samples_of(WRITERS[layout](tmp_path / layout))} == {None}


@pytest.mark.parametrize("layout", list(WRITERS))
def test_a_benchmark_is_read_from_an_object_store(tmp_path: Path, layout: str) -> None:
    config = WRITERS[layout](tmp_path)
    memory = fsspec.filesystem("memory")
    url = f"memory://{layout}"
    try:
        for file in tmp_path.rglob("*"):
            if file.is_file():
                memory.pipe_file(f"/{layout}/{file.relative_to(tmp_path)}", file.read_bytes())
        there = config.model_copy(update={"path": config.path.replace(str(tmp_path), url)})
        assert [each.model_dump() for each in samples_of(there)] == [each.model_dump() for each in samples_of(config)]
        digest = benchmark_digest(there, reader_of(there))
        assert benchmark_digest(there, reader_of(there)) == digest
    finally:
        memory.rm(f"/{layout}", recursive=True)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_tsv_file_may_end_its_lines_so_and_begin_with_a_mark(tmp_path: Path, end: str, mark: bytes) -> None:
    config = vstar(tmp_path, [vstar_row(question="Which\tcolor\nis it?"), vstar_row(index=1)], end=end)
    save(Path(config.path), mark + Path(config.path).read_bytes())
    first, second = samples_of(config)
    assert (first.question, first.options, second.id) == ("Which\tcolor\nis it?", ("red", "green", "blue"), "1")


def test_images_of_a_tsv_file_are_named_by_their_bytes(tmp_path: Path) -> None:
    """What is named is exactly the row, so that a range read of it alone gives the cell."""
    config = vstar(tmp_path, [vstar_row(question='a "quoted"\ncell'), vstar_row(index=1, image=text_of_picture(1))])
    content = Path(config.path).read_bytes()
    for row, number in zip(good(config), range(2), strict=True):
        assert row.image.startswith("VStarBench.tsv#bytes=")
        start, end = (int(part) for part in row.image.split("=")[1].removesuffix("&column").split("-"))
        (cells,) = csv.reader(content[start:end].decode().splitlines(keepends=True), delimiter="\t")
        assert base64.b64decode(cells[1]) == picture(number)


def test_a_localised_tsv_file_names_paths(tmp_path: Path) -> None:
    """VLMEvalKit writes large files again as *_local.tsv, with the images beside them."""
    save(tmp_path / "1.jpg", picture(3))
    config = vstar(tmp_path, [vstar_row(image="1.jpg")], ("index", "image_path", *V_STAR_HEADER[2:]))
    assert samples_of(config)[0].image.height == 19


def test_missing_options_may_be_written_as_pandas_writes_them(tmp_path: Path) -> None:
    """But `None` is an answer that a question may have."""
    rows = [dict(zip(HR_HEADER, row, strict=True)) | {"C": None, "D": "nan"} for row in hr_rows()[:1]]
    write_parquet(tmp_path / "hr_bench_8k.parquet", rows)
    (sample,) = samples_of(BenchmarkConfig(name="x", kind="hr_bench_8k", path=str(tmp_path)))
    assert sample.options == ("red", "green")
    assert samples_of(vstar(tmp_path, [vstar_row(C="None")]))[0].options == ("red", "green", "None")


# --- options in a question's text ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "question", "options"),
    [
        ("Q?\n(A) a\n(B) b c\nAnswer with the option's letter.", "Q?", ("a", "b c")),
        ("Q? (A) a (B) b (C) c", "Q?", ("a", "b", "c")),
        ("Q?\nOptions: A: a., B: b, c, C: d;, D: nan", "Q?", ("a.", "b, c", "d")),
        ("Q?\nA. a\nB. b\n\nPlease select one.", "Q?", ("a", "b")),
        ("Q?\nA) a\nB) two\nlines", "Q?", ("a", "two\nlines")),
        ("Q? A. a, B. b", "Q?", ("a,", "b")),
        ("Q? Select from the following choices.\n(A) 0\n(B) 2", "Q?", ("0", "2")),
        (
            "Is (A) left of (B)?\nChoices:\n(A) yes\n(B) no (A) is above",
            "Is (A) left of (B)?",
            ("yes", "no (A) is above"),
        ),
        ("Q? e.g., A, B, C.\nA: 1:2\nB: 2:3", "Q? e.g., A, B, C.", ("1:2", "2:3")),
    ],
)
def test_options_are_taken_out_of_a_text(text: str, question: str, options: tuple[str, ...]) -> None:
    assert split_options(text) == (question, options)


@pytest.mark.parametrize(
    "text", ["What is it?", "", "(A) alone", "Q? (B) b (C) c", "(A) a (B) b", "Q? (A) (B) b", "Q? A: a, B: nan"]
)
def test_a_text_without_options_stays_whole(text: str) -> None:
    assert split_options(text) is None


def test_options_that_stand_in_columns_and_in_the_text_are_asked_once(tmp_path: Path) -> None:
    texts = ["Which?\n(A) red\n(B) green\n(C) blue", "Which?\n(A) red\n(B) other"]
    first, second = samples_of(vstar(tmp_path, [vstar_row(index=n, question=text) for n, text in enumerate(texts)]))
    assert (first.question, second.question) == ("Which?", texts[1])
    assert first.options == second.options == ("red", "green", "blue")


def test_an_open_question_with_marks_in_it_is_asked_as_it_stands(tmp_path: Path) -> None:
    config = write_zoombench_json(tmp_path)
    rows = [
        {
            "images": ["images/image_0.png"],
            "query": "What is between (A) the tree and (B) the car?",
            "response": "a dog",
        },
        {"images": ["images/image_0.png"], "query": "Which one? one / two", "response": "B"},
    ]
    save(tmp_path / "zoombench.json", json.dumps(rows).encode())
    first, second = samples_of(config)
    assert (first.question, first.options, first.answer) == (rows[0]["query"], None, "a dog")
    assert (second.options, second.answer) == (None, "B")
    assert doubts("zoombench", [first, second])[-1].startswith("1 questions are answered by a letter, but no options")


@pytest.mark.parametrize(
    ("answer", "letter"), [("B", "B"), ("(C)", "C"), ("B.", "B"), ("blue", "C"), (" red ", "A"), ("A ", "A")]
)
def test_an_answer_is_a_letter_or_an_options_text(answer: str, letter: str) -> None:
    assert letter_of(answer, ("red", "green", "blue")) == letter


@pytest.mark.parametrize(
    ("answer", "options", "problem"),
    [
        ("D", ("red", "green", "blue"), "from A to C or exactly one option's text, but it means none of them"),
        ("b", ("red", "green"), "means none of them"),
        ("re", ("red", "green"), "means none of them"),
        ("red", ("red", "red"), "means several options"),
        ("A", ("B", "A"), "means several options"),
    ],
)
def test_an_answer_that_means_no_one_option_is_refused(answer: str, options: tuple[str, ...], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        letter_of(answer, options)


def test_a_published_answer_is_a_letter_first(tmp_path: Path) -> None:
    """Points of a drawing are called A, B, too."""
    config = vstar(tmp_path, [vstar_row(A="B", B="A", C="C")])
    assert samples_of(config)[0].answer == "B"


def sample(question: str, options: tuple[str, ...] | None) -> EvaluationSample:
    image = ImageRef(uri="a.png", width=1, height=1, size_bytes=1)
    return EvaluationSample(id="a", image=image, question=question, answer="A", options=options)


def test_a_question_is_asked_with_its_options() -> None:
    assert question_text(sample("How {options}?", None), "{question}|{options}") == "How {options}?"
    text = question_text(sample("Which {options}?", ("{question}", "b")), "Q: {question}\n{options}\nSay.")
    assert text == "Q: Which {options}?\nA. {question}\nB. b\nSay."


# --- what is wrong with a row -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answer": "D"}, "answer must be a letter from A to C"),
        ({"answer": ""}, "row must have answer"),
        ({"answer": "nan"}, "row must have answer"),
        ({"question": " "}, "row must have question"),
        ({"question": "<image>"}, "question must not be empty"),
        ({"B": ""}, "options must have no gap, but B is empty and C is not"),
        ({"A": "NaN"}, "options must have no gap, but A is empty"),
        ({"B": "", "C": ""}, "options must be two at least"),
        ({"image": ""}, "image must be base64, or the index of a row with an image, got ''"),
        ({"image": "77"}, "or the index of a row with an image, got '77'"),
        ({"image": "1"}, "or the index of a row with an image, got '1'"),
        ({"image": "1\x1b[2J"}, r"got '1\x1b[2J'"),
        ({"image": "x" * 65}, "must be an image in base64"),
        ({"image": text_of_picture(0)[:-3] + "?"}, "must be an image in base64"),
        ({"image": text_of_picture(0) + "ä"}, "must be an image in base64"),
        ({"image": base64.b64encode(b"no image" * 20).decode()}, "must be an image, of JPEG"),
        ({"image": base64.b64encode(picture(0)[:60]).decode()}, "must be readable"),
        ({"question": "\udcff"}, "must be valid Unicode"),
    ],
)
def test_a_bad_row_of_a_tsv_file_is_named(tmp_path: Path, changes: Any, reason: str) -> None:
    rows = [vstar_row(index=number) for number in range(3)]
    rows[1] = vstar_row(index=1, **changes)
    path = tmp_path / "VStarBench.tsv"
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([V_STAR_HEADER, *rows])
    found = reasons(BenchmarkConfig(name="vstar", kind="vstar", path=str(path)))
    assert list(found) == [2]
    assert reason in found[2]
    assert len(found[2]) < 300


def test_a_row_of_another_number_of_cells_is_bad_and_the_next_is_read(tmp_path: Path) -> None:
    config = vstar(tmp_path, [vstar_row()[:-1], vstar_row(index=1), [*vstar_row(), "more"], vstar_row(index=3)])
    found = reasons(config)
    assert list(found) == [1, 3]
    assert found[1] == "row must have 9 cells, as the header, got 8"


def test_a_row_with_a_stray_carriage_return_is_bad_and_the_next_is_read(tmp_path: Path) -> None:
    config = vstar(tmp_path, [vstar_row(question="Which@color?"), vstar_row(index=1)])
    content = Path(config.path).read_bytes()
    save(Path(config.path), content.replace(b"@", b"\r"))
    assert list(reasons(config)) == [1]
    assert len(list(read_benchmark(config))) == 2


def test_blank_lines_of_a_tsv_file_are_no_rows(tmp_path: Path) -> None:
    config = vstar(tmp_path, [vstar_row(), vstar_row(index=1)])
    content = Path(config.path).read_bytes()
    save(Path(config.path), content.replace(b"\n", b"\n\n"))
    assert [row.row for row in good(config)] == [1, 2]
    assert not reasons(config)


@pytest.mark.parametrize("header", [("a", "b"), ("question,answer,image",)])
def test_a_tsv_file_without_an_image_column_is_refused(tmp_path: Path, header: tuple[str, ...]) -> None:
    config = vstar(tmp_path, [["x"] * len(header)], header)
    with pytest.raises(InputError, match=r"VStarBench\.tsv must be a TSV file whose header names an image column"):
        list(read_benchmark(config))


def test_columns_that_are_missing_are_named(tmp_path: Path) -> None:
    config = vstar(tmp_path, [[0, text_of_picture(0), "what?"]], ("index", "image", "question"))
    assert "row must have answer, or what other layouts call it (response, label, Ground truth)" in reasons(config)[1]


def test_a_quote_that_is_not_closed_does_not_fill_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "MAX_TSV_ROW", 5000)
    config = vstar(tmp_path, [vstar_row(index=number) for number in range(100)])
    content = Path(config.path).read_bytes()
    save(Path(config.path), content.replace(b"Which", b'"Which', 1))
    with pytest.raises(InputError, match=r"rows of at most 5000 bytes, but the one at byte 4\d is longer; is a quote"):
        list(read_benchmark(config))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"images": ["../secret.png"]}, "must stay inside the dataset's folder"),
        ({"images": ["/no/such.png"]}, "must exist"),
        ({"images": ["foo://x.png"]}, "must be a path or one of"),
        ({"images": []}, "row must have image"),
        ({"images": ["a.png", "b.png"]}, "images must hold one image, got 2"),
        ({"images": [7]}, "images must be the path of an image"),
        ({"images": ["x" * 5000]}, "image must be a path; images in base64 are read from TSV and Parquet"),
        ({"response": None}, "row must have answer"),
        ({"response": ["B"]}, "answer must be a text or a finite number, got list"),
        ({"query": 7}, "query must be a text, got int"),
        ({"multi-choice options": "['a'"}, "multi-choice options must be a list of texts, but it cannot be read"),
        ({"multi-choice options": "no options"}, "must be a list of 2 to 26 texts"),
        ({"multi-choice options": ["a", {}]}, "each option must be a text or a finite number, got dict"),
        ({"multi-choice options": "__import__('os').abort()"}, "must be a list of 2 to 26 texts"),
        ({"multi-choice options": "[__import__('os').abort()]"}, "cannot be read"),
    ],
)
def test_a_bad_row_of_a_json_file_is_named(tmp_path: Path, changes: Any, reason: str) -> None:
    config = write_zoombench_json(tmp_path)
    row = {"images": ["images/image_0.png"], "query": "What?", "response": "it"}
    save(tmp_path / "zoombench.json", json.dumps([row, row | changes, 7]).encode())
    found = reasons(config)
    assert list(found) == [2, 3]
    assert reason in found[2]


def test_options_of_a_list_lose_their_letters_only_where_all_have_theirs(tmp_path: Path) -> None:
    config = write_zoombench_json(tmp_path)
    row = {"images": ["images/image_0.png"], "query": "Who?", "response": "B"}
    lists = [["A. Smith", "C. Jones"], ["A. Smith", "B. Jones"], "(A) x\n(B) U.S. flag"]
    save(tmp_path / "zoombench.json", json.dumps([row | {"multi-choice options": each} for each in lists]).encode())
    assert [each.options for each in samples_of(config)] == [
        ("A. Smith", "C. Jones"),
        ("Smith", "Jones"),
        ("x", "U.S. flag"),
    ]


def test_base64_of_a_parquet_file_that_is_none_is_a_bad_row_alone(tmp_path: Path) -> None:
    rows = [dict(zip(HR_HEADER, row, strict=True)) for row in hr_rows()]
    rows[2]["image"] = "no base64!"
    write_parquet(tmp_path / "hr_bench_8k.parquet", rows)
    found = reasons(BenchmarkConfig(name="x", kind="hr_bench_8k", path=str(tmp_path)))
    assert list(found) == [3]
    assert "row 2 of" in found[3]
    assert "must be an image in base64" in found[3]


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vstar", "hr_bench_4k", "hr_bench_8k", "zoombench", "mme_realworld", "mmstar"])
@pytest.mark.parametrize("place", [".", "no", "no/file.tsv"])
def test_a_missing_benchmark_says_what_to_download_and_where_to_put_it(tmp_path: Path, kind: Any, place: str) -> None:
    save(tmp_path / "README.md", b"")
    config = BenchmarkConfig(name="mine", kind=kind, path=str(tmp_path / place))
    images = ImageReader(str(tmp_path), 1)
    calls = (num_rows, lambda config: next(read_benchmark(config)), lambda config: benchmark_digest(config, images))
    for call in calls:
        with pytest.raises(
            InputError, match=r"^benchmark mine must have its file at .*; download .*, and put it"
        ) as error:
            call(config)
        assert "https://huggingface.co/datasets/" in str(error.value)
        assert str(tmp_path) in str(error.value)


def test_of_several_files_the_first_of_the_published_names_is_read(tmp_path: Path) -> None:
    config = write_vstar_jsonl(tmp_path)
    assert good(config)[0].id == "direct_attributes/0"
    write_vstar_tsv(tmp_path)
    assert good(config)[0].id == "0"


def test_a_published_tsv_file_that_is_called_jsonl_is_refused_unread(tmp_path: Path) -> None:
    path = write_vstar_tsv(tmp_path).path
    with pytest.raises(InputError, match=r"benchmark mine of kind jsonl must be rows of JSON, got .*tsv; set kind"):
        num_rows(BenchmarkConfig(name="mine", kind="jsonl", path=path))


def test_a_benchmark_without_rows_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "VStarBench.tsv", b"")
    for config in (
        BenchmarkConfig(name="x", kind="vstar", path=str(tmp_path)),
        vstar(tmp_path / "2", []),
        own(tmp_path, " "),
    ):
        with pytest.raises(InputError, match=r"^benchmark \w+ must have rows, but .* is empty"):
            list(read_benchmark(config))


def test_rows_are_numbered_through_all_files_and_those_that_wait_for_an_image_come_last(tmp_path: Path) -> None:
    parts = BenchmarkConfig(name="x", kind="mme_realworld", path=str(tmp_path / "parts"))
    rows = [{"question": "q", "Answer choices": ["a", "b"], "answer": "A", "bytes": text_of_picture(0)}] * 3
    for number in range(3):
        write_parquet(tmp_path / "parts" / "data" / f"train-{number}.parquet", rows[number:])
    assert [row.row for row in read_benchmark(parts)] == [1, 2, 3, 4, 5, 6]
    assert [row.id for row in good(parts)] == ["1", "2", "3", "4", "5", "6"]
    assert [row.row for row in read_benchmark(WRITERS["mmstar.tsv"](tmp_path))] == [1, 2, 4, 3]


def test_images_count_from_the_image_root(tmp_path: Path) -> None:
    config = write_vstar_jsonl(tmp_path / "a")
    shutil.move(tmp_path / "a" / "direct_attributes", tmp_path / "b" / "direct_attributes")
    shutil.move(tmp_path / "a" / "relative_position", tmp_path / "b" / "relative_position")
    assert list(reasons(config)) == [1, 2]
    assert not reasons(config.model_copy(update={"image_root": str(tmp_path / "b")}))
    # A file that holds its images is found all the same.
    tsv = write_hr_bench_tsv(tmp_path / "c").model_copy(update={"image_root": str(tmp_path / "b")})
    assert not reasons(tsv)


def touch(path: Path, content: bytes) -> None:
    """Change a file and, whatever the clock's grain, its time."""
    before = path.stat().st_mtime_ns
    save(path, content)
    os.utime(path, ns=(before + 10**9, before + 10**9))


@pytest.mark.parametrize("layout", list(WRITERS))
def test_the_digest_sees_a_change_of_any_file(tmp_path: Path, layout: str) -> None:
    config = WRITERS[layout](tmp_path)
    digests = [benchmark_digest(config, reader_of(config))]
    assert benchmark_digest(config, reader_of(config)) == digests[0]
    for path in sorted(each for each in tmp_path.rglob("*") if each.is_file()):
        touch(path, path.read_bytes() + (b"\n" if path.suffix == ".jsonl" else b""))
        if path.suffix != ".json":
            digests.append(benchmark_digest(config, reader_of(config)))
    assert len(set(digests)) == len(digests) >= 1
    other = config.model_copy(update={"kind": "mmstar" if config.kind != "mmstar" else "mme_realworld"})
    if Path(config.path).is_file() and layout != "own.jsonl":
        assert benchmark_digest(other, reader_of(other)) != digests[-1]


def test_the_digest_of_a_tsv_file_does_not_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_hr_bench_tsv(tmp_path)
    monkeypatch.setattr(row_files, "open_file", None)
    assert len(benchmark_digest(config, reader_of(config))) == 32


def test_a_large_tsv_file_is_read_in_the_memory_of_a_few_rows(tmp_path: Path) -> None:
    """100 MB in 25 rows of 4 MB, of which a few copies exist at a time: bytes, text, cells, the image."""
    cell = base64.b64encode(picture(0) + b"\0" * 3_000_000).decode()
    path = tmp_path / "hr_bench_8k.tsv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(HR_HEADER)
        for number in range(25):
            writer.writerow([number, "what?", "A", "single", *OPTIONS, number % 4, cell])
    assert path.stat().st_size > 100_000_000
    config = BenchmarkConfig(name="hr8k", kind="hr_bench_8k", path=str(path))
    images = reader_of(config)
    del cell
    tracemalloc.start()
    try:
        count = 0
        for row in read_benchmark(config):
            assert isinstance(row, BenchmarkRow)
            count += images.inspect(row.image, decode=True).ref.height == 16
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 25
    assert peak < 24_000_000


# --- the project's own format -------------------------------------------------------------------------------------

QUESTION = {"id": 1, "image": "a.png", "question": "what?", "answer": 7}


def test_own_rows_may_have_regions_options_and_labels(tmp_path: Path) -> None:
    first, second = samples_of(write_own(tmp_path))
    assert (first.id, first.answer, first.options, first.region, first.detail_image) == ("1", "3", None, None, None)
    assert (first.category, first.subcategory, first.group, first.cycle) == (None, None, None, None)
    assert (second.category, second.subcategory, second.group, second.cycle) == ("color", "bright", "g", "1")
    assert (second.region, second.detail_image) == (Box(1, 2, 9, 9), second.image)
    assert second.image.sha256 is not None


def test_own_regions_are_clipped_to_the_image(tmp_path: Path) -> None:
    (found,) = samples_of(own(tmp_path, QUESTION | {"region": "[5, 5, 50, 50]"}))
    assert found.region == Box(5, 5, 24, 16)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id": None}, "row must have id, image, question and answer; id missing"),
        ({"answer": None}, "answer missing"),
        ({"answer": " "}, "answer must not be empty"),
        ({"answer": ""}, "answer must not be empty"),
        ({"answer": True}, "answer must be a text or a finite number, got bool"),
        ({"answer": float("nan")}, "answer must be a text or a finite number, got float"),
        ({"answer": float("-inf")}, "answer must be a text or a finite number, got float"),
        ({"answer": ["x"]}, "answer must be a text or a finite number, got list"),
        ({"answer": {"a": 1}}, "answer must be a text or a finite number, got dict"),
        ({"id": " "}, "id must not be blank"),
        ({"region": [0, 0, float("inf"), 1]}, "region must be finite numbers"),
        ({"answer": "\ud800"}, "must be valid Unicode"),
        ({"category": "\ud800"}, "must be valid Unicode"),
        ({"question": " "}, "question must not be empty"),
        ({"image": "missing.png"}, "image missing.png must exist"),
        ({"image": "../a.png"}, "must stay inside"),
        ({"detail_image": "missing.png"}, "image missing.png must exist"),
        ({"region": [1, 2]}, "region must be four numbers"),
        ({"region": [30, 30, 40, 40]}, "box must meet the 24x16 image"),
        ({"options": "red, blue"}, "options must be a list of 2 to 26 texts"),
        ({"options": ["red"]}, "options must be a list of 2 to 26 texts"),
        ({"options": ["x"] * 27}, "options must be a list of 2 to 26 texts"),
        ({"options": ["red", None]}, "each option must be a text or a finite number, got NoneType"),
        ({"options": ["red", " "]}, "each option must not be empty"),
        ({"options": ["red", "blue"]}, "answer must be a letter from A to B"),
        ({"options": ["B", "A"], "answer": "A"}, "it means several options"),
    ],
)
def test_a_bad_own_row_is_named(tmp_path: Path, changes: Any, reason: str) -> None:
    found = reasons(own(tmp_path, QUESTION, QUESTION | {"id": 2} | changes))
    assert list(found) == [2]
    assert reason in found[2]


@pytest.mark.parametrize(
    ("answer", "text"), [("7", "7"), (" a b ", " a b "), (-7, "-7"), (7.5, "7.5"), (10**400, None)]
)
def test_texts_and_finite_numbers_are_answers(tmp_path: Path, answer: Any, text: str | None) -> None:
    (found,) = samples_of(own(tmp_path, QUESTION | {"answer": answer}))
    assert found.answer == (text or str(answer))


def test_special_tokens_are_refused_in_questions_and_options(tmp_path: Path) -> None:
    for changes in ({"question": "what <|x|>?"}, {"options": ["<|x|>", "b"], "answer": "B"}):
        with pytest.raises(InputError, match=r"must not hold special tokens of the models, got '<\|x\|>'"):
            samples_of(own(tmp_path, QUESTION | changes), ("<|x|>",))


# --- stages -------------------------------------------------------------------------------------------------------


class ModelsJob(Job):
    stage: ClassVar[str] = "models"


class World:
    """What the stages need: a store, a model, a benchmark."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        config: BenchmarkConfig,
        context_tokens: int = 10_000,
        teacher_tokens: int | None = None,
    ) -> None:
        self.store = Store(str(folder / "store"), folder / "work")

        def make(target: Path) -> Outcome:
            tokens = {"student": context_tokens, "teacher": teacher_tokens}
            content = {"special_tokens": ["<|x|>"], "context_tokens": tokens}
            (target / MODELS).write_text(json.dumps(content))
            return Outcome()

        self.models = self.store.produce(ModelsJob(), make)
        self.config, self.images = config, reader_of(config)
        self.advanced = 0
        self.context: Any = SimpleNamespace(
            store=self.store,
            benchmarks={config.name: Benchmark(config, Dataset(self.store, self.images), "digest")},
            compared={"digest": config},
            engines=SimpleNamespace(student_path=str(model), teacher_path=str(model)),
            image_threads=2,
            progress=self.progress,
        )

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Any]:
        def advance(count: int) -> None:
            self.advanced += count

        yield advance

    def data(self, **changes: Any) -> tuple[list[EvaluationSample], dict[str, Any]]:
        values: dict[str, Any] = {
            "benchmark": self.config.name,
            "kind": self.config.kind,
            "source": "digest",
            "models": self.models,
            "max_image_pixels": 10**6,
            "prompt": PromptConfig(),
            "choice_template": self.config.choice_template,
            "max_new_tokens": 8,
        }
        ref = evaluation_data.fn(EvaluationDataJob(**(values | changes)), self.context)
        return read_rows(self.store.read(ref, SAMPLES), EvaluationSample), self.store.manifest(ref).summary


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("qwen3_vl", tmp_path_factory.mktemp("model") / "model")


@pytest.mark.parametrize("layout", list(WRITERS))
def test_the_stage_stores_every_question_in_the_order_of_the_file(tmp_path: Path, model: Path, layout: str) -> None:
    world = World(tmp_path, model, WRITERS[layout](tmp_path / "data"))
    samples, summary = world.data()
    assert samples == samples_of(world.config)
    assert world.advanced == summary["num_samples"] == len(samples)
    assert summary["num_choice"] + summary["num_open"] == len(samples)


def test_the_summary_tells_what_a_benchmark_is(tmp_path: Path, model: Path) -> None:
    _, summary = World(tmp_path, model, write_hr_bench_tsv(tmp_path / "data")).data()
    assert summary == {
        "num_samples": 8,
        "num_regions": 0,
        "num_choice": 8,
        "num_open": 0,
        "num_groups": 2,
        "categories": {"cross": 4, "single": 4},
        "smallest_image": [24, 16],
        "largest_image": [24, 17],
        "warnings": ["expected 800 rows, got 8"],
    }
    _, summary = World(tmp_path / "own", model, write_own(tmp_path / "own" / "data")).data()
    assert (summary["num_regions"], summary["num_open"], summary["num_groups"]) == (1, 1, 2)
    assert summary["categories"] == {"color": 1}
    assert summary["warnings"] == []
    _, summary = World(tmp_path / "vstar", model, write_vstar_tsv(tmp_path / "vstar" / "data")).data()
    assert summary["num_groups"] == 2


def test_a_missing_rotation_is_doubted(tmp_path: Path) -> None:
    samples = samples_of(write_hr_bench_parquet(tmp_path))
    odd = "expected 4 rotations of each question, got 2 questions with others"
    assert doubts("hr_bench_8k", samples * 100) == [odd]
    whole = [each.model_copy(update={"group": f"{each.group}{n}"}) for n in range(100) for each in samples]
    assert doubts("hr_bench_8k", whole) == []
    assert doubts("hr_bench_8k", [*whole[:-1], whole[0]]) == [odd]


def test_one_bad_row_stops_the_stage(tmp_path: Path, model: Path) -> None:
    rows = [vstar_row(), vstar_row(index=1, answer="D"), vstar_row(index=0), vstar_row(index=3, image="x" * 70)]
    world = World(tmp_path, model, vstar(tmp_path / "data", rows))
    with pytest.raises(InputError, match=r"^evaluation data, vstar: no row may be bad, got 3 of 4; mend") as error:
        world.data()
    assert "row 2 (1): answer must be a letter" in str(error.value)
    assert "row 3 (0): id must be unique, but an earlier row has it too" in str(error.value)
    assert "row 4 (3): cell 1 of bytes" in str(error.value)


def test_a_question_and_its_options_must_fit_the_models(tmp_path: Path, model: Path) -> None:
    """The template and the options count: the question alone would fit."""
    config = vstar(tmp_path / "data", [vstar_row(A="digit " * 500)])
    world = World(tmp_path, model, config, context_tokens=300)
    with pytest.raises(InputError, match=r"vstar: 0: the prompt must have at most 292 tokens for the student"):
        world.data()
    assert len(World(tmp_path / "2", model, config, context_tokens=2000).data()[0]) == 1
    with pytest.raises(InputError, match="at most 1992 tokens"):
        World(tmp_path / "3", model, config, context_tokens=2000).data(
            choice_template="digit " * 2000 + "{question}{options}"
        )


def test_only_questions_that_the_teacher_is_asked_must_fit_it(tmp_path: Path, model: Path) -> None:
    config = vstar(tmp_path / "data", [vstar_row()])
    world = World(tmp_path, model, config, teacher_tokens=9)
    assert len(world.data()[0]) == 1
    held_out = World(tmp_path / "2", model, config.model_copy(update={"name": HELD_OUT}), teacher_tokens=9)
    with pytest.raises(InputError, match=r"at most 1 tokens for the teacher, .* \(its context of 9 less .* 8\), got"):
        held_out.data()


@pytest.mark.parametrize("layout", ["vstar.parquet", "mmstar.tsv", "own.jsonl"])
def test_fingerprints_hold_pictures_and_questions_but_no_answer(tmp_path: Path, model: Path, layout: str) -> None:
    world = World(tmp_path, model, WRITERS[layout](tmp_path / "data"))
    ref = fingerprints.fn(FingerprintsJob(source="digest", max_image_pixels=10**6), world.context)
    found = read_rows(world.store.read(ref, FINGERPRINTS), Fingerprint)
    assert {row.row: row.question for row in found} == {row.row: row.question for row in good(world.config)}
    hashes = {row.row: world.images.inspect(row.image, decode=True).hash for row in good(world.config)}
    assert {row.row: row.image_hash for row in found} == hashes
    assert set(Fingerprint.model_fields) == {"row", "image_hash", "question"}


def test_fingerprints_of_a_file_that_is_named_are_as_before(tmp_path: Path, model: Path) -> None:
    world = World(tmp_path, model, own(tmp_path / "data", QUESTION, QUESTION | {"image": "no.png"}))
    world.context.compared["file"] = FileData(kind="jsonl", path=world.config.path)
    for source in ("file", "digest"):
        with pytest.raises(
            InputError, match=r"got 1 bad rows of 2; mend or remove them:\n  row 2 .*no\.png must exist"
        ):
            fingerprints.fn(FingerprintsJob(source=source, max_image_pixels=10**6), world.context)
    write_jsonl(tmp_path / "data" / "questions.jsonl", [QUESTION])
    for source in ("file", "digest"):
        ref = fingerprints.fn(FingerprintsJob(source=source, max_image_pixels=10**6 + 1), world.context)
        assert len(read_rows(world.store.read(ref, FINGERPRINTS), Fingerprint)) == 1
