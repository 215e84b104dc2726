"""Benchmarks: questions with their answers, in the layouts that they are published in, and in the project's own.

docs/BENCHMARKS.md shows each layout and says what to download. Nothing that trains reads any of this.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import PurePosixPath
from string import ascii_uppercase
from typing import Any, NamedTuple

from tasks.adapters.files import filesystem, patiently, stat
from tasks.adapters.formats import (
    Format,
    id_of,
    image_of,
    json_object,
    label_of,
    own,
    parse_region,
    plain_question,
    require_unicode,
    text_of,
)
from tasks.adapters.images import ImageReader
from tasks.adapters.importers import content_of, folder_of, stamped
from tasks.adapters.options import (
    OPTIONS,
    answer_of,
    first_given,
    letter_of,
    lettered_options,
    listed_options,
    published_letter,
    split_options,
)
from tasks.adapters.row_files import count_of, files_of, is_folder, rows_of, suffix_of
from tasks.artifacts import KEY_LENGTH, BadRow, EvaluationSample, digest_json
from tasks.config import FileData
from tasks.evaluation_config import BenchmarkConfig, BenchmarkKind
from vzero_core.errors import InputError
from vzero_core.views import Box, clip_box


class Published(NamedTuple):
    """How a published benchmark is found, and what it should hold.

    Attributes:
        num_rows: as its authors say.
        files: names or patterns below its folder, the first that is there is read.
        download: what to get, and from which page.
        rotations: times that each question comes, with its options in another order.
    """

    num_rows: int
    files: tuple[str, ...]
    download: str
    rotations: int = 1


_HUB = "https://huggingface.co/datasets"


def _hr_bench(size: str) -> Published:
    return Published(
        num_rows=800,
        files=(
            f"hr_bench_{size}.tsv",
            f"HRBench{size.upper()}.tsv",
            f"hr_bench_{size}.parquet",
            f"data/hrbench_{size}-*.parquet",
            f"hr_bench_{size}.json",
        ),
        download=f"hr_bench_{size}.tsv from {_HUB}/DreamMr/HR-Bench",
        rotations=4,
    )


PUBLISHED: dict[BenchmarkKind, Published] = {
    "vstar": Published(
        num_rows=191,
        files=("VStarBench.tsv", "test_questions.jsonl", "data/test-*.parquet", "test-*.parquet", "vstar.json"),
        download=f"VStarBench.tsv from {_HUB}/xjtupanda/VStar_Bench, all of {_HUB}/craigwu/vstar_bench, or data/ of "
        f"{_HUB}/lmms-lab/vstar-bench",
    ),
    "hr_bench_4k": _hr_bench("4k"),
    "hr_bench_8k": _hr_bench("8k"),
    "zoombench": Published(
        num_rows=845,
        files=("data/test.parquet", "data/test-*.parquet", "test.parquet", "zoombench.json"),
        download=f"data/test.parquet from {_HUB}/inclusionAI/ZoomBench",
    ),
    "mme_realworld": Published(
        num_rows=23_609,
        files=(
            "MME-RealWorld.tsv",
            "data/train-*.parquet",
            "train-*.parquet",
            "MME_RealWorld.json",
            "mme_realworld_lite.tsv",
        ),
        download=f"data/ of {_HUB}/yifanzhang114/MME-RealWorld-Lmms-eval, or MME_RealWorld.json and the unpacked "
        f"images of {_HUB}/yifanzhang114/MME-RealWorld",
    ),
    "mmstar": Published(
        num_rows=1500,
        files=("MMStar.tsv", "mmstar.parquet", "MMStar.json", "mmstar.json"),
        download=f"MMStar.tsv or mmstar.parquet from {_HUB}/Lin-Chen/MMStar",
    ),
}


@dataclass(frozen=True)
class BenchmarkRow:
    """A question with its answer as the file has it; no image was opened yet.

    Attributes:
        row: its number in the benchmark, from 1; in a folder, files follow one another by name.
        answer: the letter of the right option where there are options.
        options: texts of A, B, ...; None for an open question.
        group: rows that ask the same question share it; None where they are told by picture and text (`rotated`), or
            where each row is a question of its own.
        cycle: which rotation of the options.
        rotated: the question comes several times, with its options in another order.
        region: xyxy, pixels.
    """

    row: int
    id: str
    image: str
    question: str
    answer: str
    options: tuple[str, ...] | None
    category: str | None
    subcategory: str | None
    group: str | None
    cycle: str | None
    rotated: bool
    region: Box | None
    detail_image: str | None

    @property
    def images(self) -> tuple[str, ...]:
        """Every image that the row names."""
        return tuple(uri for uri in (self.image, self.detail_image) if uri is not None)


def benchmark_root(config: BenchmarkConfig) -> str:
    """Give the folder or URL that relative image paths count from."""
    if config.image_root is not None:
        return config.image_root
    return config.path.rstrip("/") if is_folder(config.path) else folder_of(config.path)


def read_benchmark(config: BenchmarkConfig) -> Iterator[BenchmarkRow | BadRow]:
    """Read the rows of a benchmark as they are asked for; a row of a wrong form comes as a BadRow with the reason.

    One row is held in memory, of Parquet a batch of its texts; images are named, not read. Rows of a TSV file that
    refer to the image of a later row come last.

    Raises:
        InputError: a file is missing, has no rows, or is broken so that its rows cannot be told apart.
    """
    form, root = _format(config), benchmark_root(config)
    before = 0
    for url in _files(config):
        last = 0
        for number, value in rows_of(url, form, root):
            last = max(last, number)
            row = before + number
            try:
                fields = json_object(value)
                found = form.read({name: fields.get(name) for name in form.fields})
                yield _row(found, row, config)
            except InputError as error:
                yield BadRow(row=row, id=id_of(value, *_IDS), reason=str(error))
        before += last
    if before == 0:
        raise InputError(f"benchmark {config.name} must have rows, but {config.path} is empty")


def num_rows(config: BenchmarkConfig) -> int:
    """Give the number of rows that are to be expected, without reading gigabytes; for progress."""
    form, files = _format(config), _files(config)
    if config.kind != "jsonl" and any(suffix_of(url, form) == ".tsv" for url in files):
        return PUBLISHED[config.kind].num_rows
    return sum(count_of(url, form) for url in files)


def benchmark_sample(row: BenchmarkRow, images: ImageReader, reserved: Sequence[str]) -> EvaluationSample:
    """Decode the images of a row.

    Args:
        row: from `read_benchmark`.
        images: reads the images.
        reserved: texts that no question may hold: the models' special tokens.

    Raises:
        InputError: an image is bad, or the question holds a special token.
    """
    if found := [token for token in reserved for text in (row.question, *(row.options or ())) if token in text]:
        raise InputError(
            f"question must not hold special tokens of the models, got {found[0]!r}; it would change the prompt's "
            "structure: remove it"
        )
    image = images.inspect(row.image, decode=True).ref
    group = row.group
    if group is None and row.rotated:
        group = digest_json([image.sha256, row.question, row.category])
    return EvaluationSample(
        id=row.id,
        image=image,
        question=row.question,
        answer=row.answer,
        options=row.options,
        category=row.category,
        subcategory=row.subcategory,
        group=group,
        cycle=row.cycle,
        region=clip_box(row.region, image.width, image.height)[0] if row.region is not None else None,
        detail_image=images.inspect(row.detail_image, decode=True).ref if row.detail_image is not None else None,
    )


def question_text(sample: EvaluationSample, choice_template: str) -> str:
    """Give the text that a model is asked.

    Args:
        sample: an open question is its own text.
        choice_template: of a question with options; {question} and {options} are replaced, the latter by lines such as
            `A. red`.
    """
    if sample.options is None:
        return sample.question
    lines = [f"{letter}. {text}" for letter, text in zip(ascii_uppercase, sample.options, strict=False)]
    parts = {"{question}": sample.question, "{options}": "\n".join(lines)}
    return re.sub(r"\{(?:question|options)\}", lambda found: parts[found[0]], choice_template)


def benchmark_digest(config: BenchmarkConfig, images: ImageReader) -> str:
    """Digest of a benchmark before it is validated.

    TSV and Parquet files, which hold gigabytes of images, count with their size and ETag or date; JSON and JSONL with
    their whole content, and with size and ETag or date of every image they name.

    Raises:
        InputError: as `read_benchmark`.
    """
    form, files = _format(config), _files(config)
    state = hashlib.sha256(config.kind.encode())
    texts = [url for url in files if suffix_of(url, form) in (".json", ".jsonl")]
    for url in files:
        if url in texts:
            for chunk in content_of(url):
                state.update(chunk)
        else:
            found = stat(url)
            state.update(repr([found.size, found.etag]).encode())
    if texts:
        for part in stamped(read_benchmark(config), images):
            state.update(part)
    return state.hexdigest()[:KEY_LENGTH]


def doubts(kind: BenchmarkKind, samples: Sequence[EvaluationSample]) -> list[str]:
    """Say where a published benchmark is not what its authors describe."""
    if kind == "jsonl":
        return []
    published = PUBLISHED[kind]
    found = []
    if len(samples) != published.num_rows:
        found.append(f"expected {published.num_rows} rows, got {len(samples)}")
    if published.rotations > 1:
        counts = Counter(sample.group for sample in samples).values()
        odd = sum(count != published.rotations for count in counts)
        if odd:
            found.append(f"expected {published.rotations} rotations of each question, got {odd} questions with others")
    untold = sum(sample.options is None and sample.answer in tuple(ascii_uppercase) for sample in samples)
    if untold:
        found.append(f"{untold} questions are answered by a letter, but no options could be told from their text")
    return found


# --- files --------------------------------------------------------------------------------------------------------


def _files(config: BenchmarkConfig) -> list[str]:
    path = config.path.rstrip("/")
    if config.kind == "jsonl":
        if path.endswith(".tsv"):
            raise InputError(
                f"benchmark {config.name} of kind jsonl must be rows of JSON, got {path}; set kind to the published "
                "benchmark that it is"
            )
        return files_of(FileData(kind="jsonl", path=path))
    published = PUBLISHED[config.kind]
    fs, inner = filesystem(path)
    if is_folder(path):
        for pattern in published.files:
            folder, _, name = f"{path}/{pattern}".rpartition("/")
            if found := sorted(each for each in _names(folder) if fnmatch(each, name)):
                return [f"{folder}/{each}" for each in found]
    elif patiently(lambda: fs.isfile(inner), path):
        return [path]
    raise InputError(
        f"benchmark {config.name} must have its file at {path}, or below it one of {', '.join(published.files)}, but "
        f"there is none; download {published.download}, and put it there"
    )


def _names(folder: str) -> list[str]:
    fs, inner = filesystem(folder)
    try:
        return [PurePosixPath(name).name for name in patiently(lambda: fs.ls(inner, detail=False), folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []


# --- rows ---------------------------------------------------------------------------------------------------------


class _Fields(NamedTuple):
    question: str
    image: str
    answer: str
    options: tuple[str, ...] | None
    id: str | None
    category: str | None
    subcategory: str | None
    group: str | None = None
    cycle: str | None = None
    boxes: Any = None
    detail_image: str | None = None


def _row(found: _Fields, row: int, config: BenchmarkConfig) -> BenchmarkRow:
    if not found.question.strip():
        raise InputError("question must not be empty")
    labels = (found.id, found.category, found.subcategory, found.group, found.cycle)
    images = (found.image, found.detail_image)
    require_unicode(found.question, found.answer, *(found.options or ()), *images, *labels)
    return BenchmarkRow(
        row=row,
        id=found.id if found.id is not None else str(row),
        image=found.image,
        question=found.question,
        answer=found.answer,
        options=found.options,
        category=found.category,
        subcategory=found.subcategory,
        group=found.group,
        cycle=found.cycle,
        rotated=config.kind != "jsonl" and PUBLISHED[config.kind].rotations > 1,
        region=parse_region(found.boxes, "xyxy"),
        detail_image=found.detail_image,
    )


def _own(row: dict[str, Any]) -> _Fields:
    """Read a row of the project's own format."""
    missing = [name for name in ("id", "image", "question", "answer") if row.get(name) is None]
    if missing:
        raise InputError(f"row must have id, image, question and answer; {', '.join(missing)} missing")
    fields = own(row)
    options, answer = row.get("options"), answer_of(row["answer"])
    if options is not None:
        if not isinstance(options, list) or not 2 <= len(options) <= len(ascii_uppercase):
            raise InputError("options must be a list of 2 to 26 texts; leave them out for an open question")
        options = tuple(answer_of(option, "each option") for option in options)
        answer = letter_of(answer, options)
    return _Fields(
        question=fields.question,
        image=fields.image,
        answer=answer,
        options=options,
        id=fields.id,
        category=label_of(row, "category"),
        subcategory=label_of(row, "subcategory"),
        group=fields.group,
        cycle=label_of(row, "cycle"),
        boxes=fields.boxes,
        detail_image=fields.detail_image,
    )


_LONGEST_PATH = 4096
_QUESTIONS = ("question", "query", "text", "Text", "prompt")
_ANSWERS = ("answer", "response", "label", "Ground truth")
_IMAGES = ("image", "images", "image_path", "bytes", "Image")
_IDS = ("index", "id", "Question_id", "question_id")
_CATEGORIES = ("category", "question_type")
_SUBCATEGORIES = ("l2_category", "l2-category", "Category")


def _published(row: dict[str, Any]) -> _Fields:
    """Read a row of a published benchmark: the layouts differ in names, and in where they have the options."""
    question, answer = plain_question(text_of(row, _needed(row, _QUESTIONS))), answer_of(row[_needed(row, _ANSWERS)])
    image = image_of(row, _needed(row, _IMAGES))
    if len(image) > _LONGEST_PATH:
        raise InputError("image must be a path; images in base64 are read from TSV and Parquet files")
    options = lettered_options(row) or listed_options(row)
    inside = split_options(question)
    if options is not None:
        answer = published_letter(answer, options)
        if inside is not None and inside.options == options:
            question = inside.question
    elif inside is not None:
        try:
            answer = published_letter(answer, inside.options)
            question, options = inside
        except InputError:
            # What looks like options may be a part of an open question: it is asked as it stands.
            pass
    category = _label(row, _CATEGORIES)
    if category is None and _label(row, ("Task",)) is not None:
        category = "/".join(label for label in (_label(row, ("Task",)), _label(row, ("Subtask",))) if label)
    identifier, name = _label(row, _IDS), first_given(row, _IDS)
    if name == "question_id" and category is not None:
        # V*'s numbers may begin anew in each category.
        identifier = f"{category}/{identifier}"
    return _Fields(
        question=question,
        image=image,
        answer=answer,
        options=options,
        id=identifier,
        category=category,
        subcategory=_label(row, _SUBCATEGORIES),
        cycle=_label(row, ("cycle_category",)),
    )


_OWN_IMAGES = ("image", "detail_image")
_OWN_FIELDS = ("id", "question", "answer", "options", "category", "subcategory", "group", "cycle", "region")
_OWN = Format(".jsonl", (*_OWN_FIELDS, *_OWN_IMAGES), _OWN_IMAGES, _own)
_PUBLISHED = Format(
    ".tsv",
    (
        *(*_QUESTIONS, *_ANSWERS, *_IMAGES, *_IDS, *OPTIONS, *_CATEGORIES, *_SUBCATEGORIES),
        *("Task", "Subtask", "cycle_category", *ascii_uppercase),
    ),
    _IMAGES,
    _published,
    base64=True,
)


def _format(config: BenchmarkConfig) -> Format[_Fields]:
    return _OWN if config.kind == "jsonl" else _PUBLISHED


# --- fields -------------------------------------------------------------------------------------------------------


def _needed(row: dict[str, Any], names: Sequence[str]) -> str:
    name = first_given(row, names)
    if name is None:
        raise InputError(f"row must have {names[0]}, or what other layouts call it ({', '.join(names[1:])}), got none")
    return name


def _label(row: dict[str, Any], names: Sequence[str]) -> str | None:
    name = first_given(row, names)
    return label_of(row, name) if name is not None else None
