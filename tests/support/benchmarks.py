"""Writes small benchmarks in the true layouts that they are published in; docs/BENCHMARKS.md names the sources."""

import base64
import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from support.formats import png, save, write_jsonl, write_parquet

from tasks.evaluation_config import BenchmarkConfig

LETTERS = "ABCDE"
OPTIONS = ("red", "green", "blue", "yellow")
V_STAR_REQUEST = "Answer with the option's letter from the given choices directly."
IMAGE_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""How Hugging Face's datasets hold an image in Parquet."""


def picture(number: int) -> bytes:
    """Give a small picture, another one for each number: its height tells."""
    return png((24, 16 + number))


def text_of_picture(number: int) -> str:
    """Give a picture in base64."""
    return base64.b64encode(picture(number)).decode()


def write_tsv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]], end: str = "\n") -> None:
    """Write a TSV file as pandas does: quotes only where a cell needs them, nothing for a missing value."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter="\t", lineterminator=end).writerows([header, *rows])
    save(path, buffer.getvalue().encode())


def write_vstar_tsv(folder: Path) -> BenchmarkConfig:
    """V* for VLMEvalKit: the second row has two options, so C and D are empty."""
    header = ("index", "image", "question", "A", "B", "C", "D", "answer", "category")
    rows = [
        (0, text_of_picture(0), "What is the color of the glove?", *OPTIONS, "B", "direct_attributes"),
        (1, text_of_picture(1), "Is the cat left of the dog?", "left", "right", "", "", "A", "relative_position"),
    ]
    write_tsv(folder / "VStarBench.tsv", header, rows)
    return BenchmarkConfig(name="vstar", kind="vstar", path=str(folder / "VStarBench.tsv"))


def vstar_text(question: str, options: Sequence[str]) -> str:
    """Give a question as V*'s own files have it: options and a request inside."""
    lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, V_STAR_REQUEST])


def vstar_rows() -> list[dict[str, Any]]:
    """Give the rows of V*'s own files, without images; the number begins anew in the second category."""
    first = {"text": vstar_text("What is the color of the glove?", OPTIONS), "label": "B"}
    second = {"text": vstar_text("Is the cat left of the dog?", ("left", "right")), "label": "A"}
    return [
        first | {"category": "direct_attributes", "question_id": 0},
        second | {"category": "relative_position", "question_id": 0},
    ]


def write_vstar_parquet(folder: Path) -> BenchmarkConfig:
    """V* of lmms-lab, a folder."""
    rows = [row | {"image": {"bytes": picture(number), "path": None}} for number, row in enumerate(vstar_rows())]
    texts = [(name, pa.string()) for name in ("text", "label", "category")]
    schema = pa.schema([("image", IMAGE_STRUCT), ("question_id", pa.int64()), *texts])
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", rows, schema)
    return BenchmarkConfig(name="vstar", kind="vstar", path=str(folder))


def write_vstar_jsonl(folder: Path) -> BenchmarkConfig:
    """V* of its authors: images in folders beside the questions."""
    rows = []
    for number, row in enumerate(vstar_rows()):
        image = f"{row['category']}/sa_{number}.jpg"
        save(folder / image, picture(number))
        rows.append(row | {"image": image})
    write_jsonl(folder / "test_questions.jsonl", rows)
    return BenchmarkConfig(name="vstar", kind="vstar", path=str(folder))


HR_HEADER = ("index", "question", "answer", "category", "A", "B", "C", "D", "cycle_category", "image")


def hr_rows() -> list[tuple[Any, ...]]:
    """Give two questions in four rotations each: the same words, about two pictures."""
    rows = []
    for number, category in enumerate(("single", "cross")):
        for cycle in range(4):
            options = OPTIONS[cycle:] + OPTIONS[:cycle]
            answer = LETTERS[options.index("green")]
            row = (len(rows), "What color is it?", answer, category, *options, str(cycle), text_of_picture(number))
            rows.append(row)
    return rows


def write_hr_bench_tsv(folder: Path) -> BenchmarkConfig:
    """HR-Bench 4K as TSV, in a folder."""
    write_tsv(folder / "hr_bench_4k.tsv", HR_HEADER, hr_rows())
    return BenchmarkConfig(name="hr4k", kind="hr_bench_4k", path=str(folder))


def write_hr_bench_parquet(folder: Path) -> BenchmarkConfig:
    """HR-Bench 8K as Parquet: the image is a text, in base64."""
    rows = [dict(zip(HR_HEADER, row, strict=True)) for row in hr_rows()]
    write_parquet(folder / "hr_bench_8k.parquet", rows)
    return BenchmarkConfig(name="hr8k", kind="hr_bench_8k", path=str(folder / "hr_bench_8k.parquet"))


def write_zoombench_parquet(folder: Path) -> BenchmarkConfig:
    """ZoomBench: one question with options, one without; the crop is not used."""
    first = {"id": "z0", "query": "Which color?\nA. red\nB. green", "response": "B", "question_type": "mcq"}
    second = {"id": "z1", "query": "How many birds are there?", "response": "3", "question_type": "open"}
    image = {"image": {"bytes": picture(0), "path": "0.jpg"}, "crop_image": {"bytes": picture(9), "path": "c.jpg"}}
    texts = [(name, pa.string()) for name in ("id", "query", "response", "question_type")]
    schema = pa.schema([*texts, ("image", IMAGE_STRUCT), ("crop_image", IMAGE_STRUCT)])
    write_parquet(folder / "data" / "test.parquet", [first | image, second | image], schema)
    return BenchmarkConfig(name="zoom", kind="zoombench", path=str(folder))


def write_zoombench_json(folder: Path) -> BenchmarkConfig:
    """ZoomBench as ZwZ's own evaluation reads it: one JSON array."""
    save(folder / "images" / "image_0.png", picture(0))
    row = {"images": ["images/image_0.png"], "crop_images": []}
    query = "<image>How many lamps are in the image? Select from the following choices.\n(A) 0\n(B) 2\n(C) 1"
    rows = [row | {"query": query, "response": "C"}, row | {"query": "What does the sign say?", "response": "Stop"}]
    save(folder / "zoombench.json", json.dumps(rows, indent=2).encode())
    return BenchmarkConfig(name="zoom", kind="zoombench", path=str(folder))


MME_CHOICES = ["(A) 10", "(B) 12", "(C) 15", "(D) 20", "(E) The image does not feature the number."]


def write_mme_realworld_tsv(folder: Path) -> BenchmarkConfig:
    """MME-RealWorld as VLMEvalKit puts it together: options in columns, and again in one quoted cell of many lines."""
    header = ("index", "image", "question", "multi-choice options", *LETTERS, "answer", "category", "l2-category")
    options = "The choices are listed below:\n" + "\n".join(MME_CHOICES)
    texts = [choice[4:] for choice in MME_CHOICES]
    row = (0, text_of_picture(0), 'What does "Σ\tsum" say?\nLook.', options, *texts, "C", "Perception/OCR", "License")
    write_tsv(folder / "MME-RealWorld.tsv", header, [row])
    return BenchmarkConfig(name="mme", kind="mme_realworld", path=str(folder))


def write_mme_realworld_lite(folder: Path) -> BenchmarkConfig:
    """MME-RealWorld-Lite: the options are a Python list in one cell."""
    header = ("index", "image", "question", "multi-choice options", "answer", "category", "l2-category")
    row = (0, text_of_picture(0), "How many?", str(MME_CHOICES), "E", "Reasoning/Monitoring", "count")
    write_tsv(folder / "mme_realworld_lite.tsv", header, [row])
    return BenchmarkConfig(name="mme", kind="mme_realworld", path=str(folder))


def write_mme_realworld_parquet(folder: Path) -> BenchmarkConfig:
    """MME-RealWorld for lmms-eval: two files; the column `bytes` is a text, in base64."""
    row = {"question": "How many?", "multi-choice options": MME_CHOICES, "answer": "A"}
    for number in range(2):
        labels = {"index": number, "category": "Perception/Remote Sensing", "l2-category": "count"}
        rows = [row | labels | {"bytes": text_of_picture(number)}]
        write_parquet(folder / "data" / f"train-0000{number}-of-00002.parquet", rows)
    return BenchmarkConfig(name="mme", kind="mme_realworld", path=str(folder))


def write_mme_realworld_json(folder: Path) -> BenchmarkConfig:
    """MME-RealWorld of its authors: one JSON array, images beside it."""
    save(folder / "ocr_cc" / "1.jpg", picture(0))
    row = {"Question_id": "perception/ocr_cc/1", "Image": "ocr_cc/1.jpg", "Text": "How many?", "Ground truth": "B"}
    labels = {"Task": "Perception", "Subtask": "OCR with Complex Context", "Category": "license"}
    more = {"Question Type": "Multiple Choice", "Answer choices": MME_CHOICES}
    save(folder / "MME_RealWorld.json", json.dumps([row | more | labels]).encode())
    return BenchmarkConfig(name="mme", kind="mme_realworld", path=str(folder))


MMSTAR_QUESTION = "Which is right?\nOptions: A: The case is on the book., B: Beneath, C: nan, D: nan"
MMSTAR_HINT = (
    "Hint: Please provide the correct option letter, e.g., A, B, C, D, at the end.\nQuestion: Find x.\nChoices:\n"
)


def write_mmstar_tsv(folder: Path) -> BenchmarkConfig:
    """MMStar as TSV; the third row refers to the image of the fourth, the second to that of the first."""
    header = ("index", "question", "image", "answer", "category", "l2_category")
    labels = ("math", "geometry")
    rows = [
        (0, MMSTAR_QUESTION, text_of_picture(0), "B", "coarse perception", "image emotion"),
        (1, MMSTAR_HINT + "(A) 1\n(B) 2\n(C) 3", "0", "C", *labels),
        (2, MMSTAR_HINT + "(A) 7\n(B) 8", "3", "A", *labels),
        (3, MMSTAR_HINT + "(A) 1\n(B) 2", text_of_picture(3), "A", *labels),
    ]
    write_tsv(folder / "MMStar.tsv", header, rows)
    return BenchmarkConfig(name="mmstar", kind="mmstar", path=str(folder / "MMStar.tsv"))


def write_mmstar_parquet(folder: Path) -> BenchmarkConfig:
    """MMStar as Parquet: the image is bytes."""
    row = {"index": 0, "question": MMSTAR_QUESTION, "image": picture(0), "answer": "A"}
    labels = {"category": "coarse perception", "l2_category": "image emotion", "meta_info": {"source": "MMBench"}}
    write_parquet(folder / "mmstar.parquet", [row | labels])
    return BenchmarkConfig(name="mmstar", kind="mmstar", path=str(folder))


def write_own(folder: Path) -> BenchmarkConfig:
    """The project's own format: an open question, and one with options and everything else."""
    save(folder / "a.png", picture(0))
    first = {"id": 1, "image": "a.png", "question": "How many?", "answer": 3}
    second = {"id": "b", "image": "a.png", "question": "Which?", "options": ["red", "blue"], "answer": "blue"}
    more = {"category": "color", "subcategory": "bright", "group": "g", "cycle": 1, "region": [1, 2, 9, 9]}
    write_jsonl(folder / "questions.jsonl", [first, second | more | {"detail_image": "a.png"}])
    return BenchmarkConfig(name="own", kind="jsonl", path=str(folder / "questions.jsonl"))


WRITERS: dict[str, Callable[[Path], BenchmarkConfig]] = {
    "vstar.tsv": write_vstar_tsv,
    "vstar.parquet": write_vstar_parquet,
    "vstar.jsonl": write_vstar_jsonl,
    "hr_bench.tsv": write_hr_bench_tsv,
    "hr_bench.parquet": write_hr_bench_parquet,
    "zoombench.parquet": write_zoombench_parquet,
    "zoombench.json": write_zoombench_json,
    "mme_realworld.tsv": write_mme_realworld_tsv,
    "mme_realworld_lite.tsv": write_mme_realworld_lite,
    "mme_realworld.parquet": write_mme_realworld_parquet,
    "mme_realworld.json": write_mme_realworld_json,
    "mmstar.tsv": write_mmstar_tsv,
    "mmstar.parquet": write_mmstar_parquet,
    "own.jsonl": write_own,
}
"""Writes a benchmark into a folder, by its layout; gives what reads it."""
