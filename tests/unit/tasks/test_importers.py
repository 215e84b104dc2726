"""Rows are read as they are asked for; a bad one comes with its number and reason, and ends nothing."""

import errno
import gzip
import io
import json
import os
import tracemalloc
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from support.formats import SECRET, WRITERS, png, save, write_jsonl, write_parquet

from tasks.adapters import images as images_module
from tasks.adapters import row_files as module
from tasks.adapters.files import StoreUnavailableError
from tasks.adapters.images import ImageReader
from tasks.adapters.importers import (
    SourceRow,
    check_rows,
    count_rows,
    data_version,
    image_root,
    import_row,
    locate,
    name_bad_rows,
    read_source,
    row_digest,
    source_digest,
)
from tasks.artifacts import BadRow
from tasks.config import FileData, SmallWorldData
from vzero_core.errors import InputError
from vzero_core.views import Box

GOOD = {"id": "a", "image": "a.png", "question": "what?", "region": [1, 2, 3, 4]}
VISCOT = {"image": ["a.png", "a.png###[1, 2, 3, 4]"], "conversations": [{"from": "human", "value": "what?"}]}


@pytest.fixture(autouse=True)
def image(tmp_path: Path) -> None:
    Image.new("RGB", (10, 8)).save(tmp_path / "a.png")


def jsonl(folder: Path, rows: list[Any]) -> FileData:
    write_jsonl(folder / "d.jsonl", rows)
    return FileData(kind="jsonl", path=str(folder / "d.jsonl"))


def array(folder: Path, text: str | bytes) -> FileData:
    save(folder / "d.json", text if isinstance(text, bytes) else text.encode())
    return FileData(kind="viscot_363k", path=str(folder / "d.json"))


def reasons(source: FileData) -> dict[int, str]:
    return {row.row: row.reason for row in read_source(source) if isinstance(row, BadRow)}


class Counted(io.FileIO):
    """Counts the bytes that are read."""

    total = 0

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer)
        Counted.total += count
        return count

    def read(self, size: int = -1) -> bytes:
        content = super().read(size)
        Counted.total += len(content)
        return content


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counted]:
    """Every file is opened so that what is read of it is counted."""
    Counted.total = 0
    for opener in (module, images_module):
        monkeypatch.setattr(opener, "open_file", Counted)
    return Counted


# --- JSONL --------------------------------------------------------------------------------------------------------


def test_lines_are_numbered_as_an_editor_numbers_them(tmp_path: Path) -> None:
    source = jsonl(tmp_path, [GOOD, "", "  ", GOOD])
    assert [row.row for row in read_source(source)] == [1, 4]
    assert count_rows(source) == 2


@pytest.mark.parametrize("line", ["{broken", "[1, 2]", '"text"', "NaN", "7", "[" * 100_000, "1" * 5000, "{}{}"])
def test_a_line_that_is_no_object_is_set_aside_and_the_next_is_read(tmp_path: Path, line: str) -> None:
    source = jsonl(tmp_path, [GOOD, line, GOOD])
    assert list(reasons(source)) == [2]
    assert "row must be a JSON object" in reasons(source)[2]
    assert len(list(read_source(source))) == 3


def test_a_line_that_is_no_text_is_set_aside(tmp_path: Path) -> None:
    line = json.dumps(GOOD).encode()
    save(tmp_path / "d.jsonl", b"\xef\xbb\xbf" + line + b"\n\xff\xfe\xfa\n" + line)
    assert list(reasons(FileData(kind="jsonl", path=str(tmp_path / "d.jsonl")))) == [2]


def test_a_bad_row_keeps_its_id_where_it_has_one(tmp_path: Path) -> None:
    rows = list(read_source(jsonl(tmp_path, [GOOD | {"question": 7}, GOOD | {"id": 7, "question": 7}])))
    assert [row.id for row in rows] == ["a", "7"]


def test_lines_are_read_one_by_one(tmp_path: Path, counted: type[Counted]) -> None:
    source = jsonl(tmp_path, [GOOD, "{broken", *[GOOD] * 50_000])
    rows = read_source(source)
    assert isinstance(next(rows), SourceRow)
    assert isinstance(next(rows), BadRow)
    assert counted.total < 1000 < os.path.getsize(source.path)


# --- a JSON array -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 4])
def test_an_array_is_read_whatever_its_layout(tmp_path: Path, indent: int | None) -> None:
    source = array(tmp_path, b"\xef\xbb\xbf\n " + json.dumps([VISCOT] * 5000, indent=indent).encode() + b"\n")
    assert [row.row for row in read_source(source)] == list(range(1, 5001))
    assert count_rows(source) == 5000
    with pytest.raises(InputError, match=r"^data must have rows"):
        list(read_source(array(tmp_path, "[\n]")))


def test_a_row_longer_than_what_is_read_at_once_is_read(tmp_path: Path) -> None:
    turn = {"from": "human", "value": "x" * 3_000_000 + "ä"}
    rows = list(read_source(array(tmp_path, json.dumps([VISCOT, VISCOT | {"conversations": [turn]}, VISCOT]))))
    assert [isinstance(row, SourceRow) for row in rows] == [True] * 3


def test_a_member_of_an_array_that_is_no_row_is_set_aside(tmp_path: Path) -> None:
    assert list(reasons(array(tmp_path, json.dumps([VISCOT, 7, "text", None, [], VISCOT])))) == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("{broken}]", "row 2 is no JSON"),
        ('{"image": "a', "row 2 is no JSON"),
        ("", "row 2 is no JSON"),
        ("[" * 100_000, "row 2 is not"),
        (b"\xff\xfe", "must be JSON in UTF-8, but row"),
    ],
)
def test_a_broken_array_gives_the_rows_before_and_then_stops(tmp_path: Path, rest: Any, message: str) -> None:
    """What follows cannot be told apart, so it must not be skipped silently."""
    start = f"[{json.dumps(VISCOT)}, {' ' * 3_000_000}".encode()
    rows = read_source(array(tmp_path, start + (rest if isinstance(rest, bytes) else rest.encode())))
    assert isinstance(next(rows), SourceRow)
    with pytest.raises(InputError, match=message):
        next(rows)


ROW = json.dumps(VISCOT)


@pytest.mark.parametrize(
    ("text", "message", "count"),
    [
        (f"[{ROW}{ROW}]", "row 1 is followed by '{'", 1),
        (f"[{ROW} {ROW}]", "row 1 is followed by '{'", 1),
        (f"[{ROW}", "row 1 is followed by nothing", 1),
        (f"[{ROW},{ROW}\n", "row 2 is followed by nothing", 2),
        (f"[{ROW},", "row 2 is no JSON", 1),
        (f"[{ROW},]", "row 2 is no JSON", 1),
        (f"[{ROW},,{ROW}]", "row 2 is no JSON", 1),
        (f"[,{ROW}]", "row 1 is no JSON", 0),
        ("[", "row 1 is no JSON", 0),
        (f"[{ROW}]garbage", "must end with its JSON array, but 'g' follows", 1),
        (f"[{ROW}]\n[{ROW}]", "must end with its JSON array, but '\\[' follows", 1),
        (f"[{ROW}]{' ' * 3_000_000}]", "must end with its JSON array, but '\\]' follows", 1),
        (f"[{ROW}{' ' * 3_000_000}{ROW}]", "row 1 is followed by '{'", 1),
        ("[]x", "must end with its JSON array, but 'x' follows", 0),
    ],
)
def test_an_array_that_is_not_whole_is_refused(tmp_path: Path, text: str, message: str, count: int) -> None:
    source = array(tmp_path, text)
    rows = read_source(source)
    assert [isinstance(row, SourceRow) for row in islice(rows, count)] == [True] * count
    with pytest.raises(InputError, match=rf"d\.json .*{message}"):
        next(rows)
    with pytest.raises(InputError, match=message):
        count_rows(source)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_an_array_is_read_the_same_whatever_is_read_at_once(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers too, which are rows of a wrong form, but whole ones: 12 is not 1 and 2."""
    monkeypatch.setattr(module, "_CHUNK", chunk)
    source = array(tmp_path, f" \n[ {ROW},12 , -3,{ROW},true, 7]\n ")
    found = list(read_source(source))
    assert [isinstance(row, SourceRow) for row in found] == [True, False, False, True, False, False]
    assert count_rows(source) == 6
    with pytest.raises(InputError, match=r"row 1 is followed by '\{'"):
        list(read_source(array(tmp_path, f"[{ROW}{ROW}]")))


@pytest.mark.parametrize("kind", ["jsonl", "viscot_363k"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be", "gzip"])
def test_a_file_that_is_no_utf_8_is_refused_as_a_whole(tmp_path: Path, kind: Any, encoding: str) -> None:
    text = f"\ufeff[{ROW}]" if encoding.endswith("-be") else f"[{ROW}]"
    save(tmp_path / "d", gzip.compress(text.encode()) if encoding == "gzip" else text.encode(encoding))
    source = FileData(kind=kind, path=str(tmp_path / "d"))
    name = encoding[:6].upper() if encoding != "gzip" else "gzip"
    reader = ImageReader(str(tmp_path), 1000)
    for read in (count_rows, lambda source: list(read_source(source)), lambda source: source_digest(source, reader)):
        with pytest.raises(InputError, match=f"/d must be UTF-8, got .*{name}"):
            read(source)


@pytest.mark.parametrize("text", ['{"data": []}', "hello"])
def test_what_is_no_array_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="must be a JSON array of rows"):
        list(read_source(array(tmp_path, text)))


def test_an_array_is_read_in_little_memory_and_from_its_start(tmp_path: Path, counted: type[Counted]) -> None:
    turn = {"from": "human", "value": "what? " * 2000}
    source = array(tmp_path, json.dumps([VISCOT | {"conversations": [turn]}] * 2000))
    size = os.path.getsize(source.path)
    assert size > 20_000_000
    rows = read_source(source)
    next(rows)
    assert counted.total < size / 10
    tracemalloc.start()
    try:
        assert sum(1 for _ in rows) == 1999
        assert tracemalloc.get_traced_memory()[1] < size / 3
    finally:
        tracemalloc.stop()


# --- Parquet ------------------------------------------------------------------------------------------------------


def test_embedded_images_are_not_read_with_the_rows(tmp_path: Path, counted: type[Counted]) -> None:
    """50 rows with an image of 1 MB each, and answers of 1 MB: neither is touched."""
    picture = {"bytes": os.urandom(1_000_000), "path": "x.png"}
    row = {"id": "a", "image": picture, "question": "what?", "region": [1.0, 2.0, 3.0, 4.0], "answer": SECRET * 60_000}
    write_parquet(tmp_path / "t.parquet", [row] * 50, compression="none", use_dictionary=False)
    source = FileData(kind="parquet", path=str(tmp_path / "t.parquet"))
    assert os.path.getsize(source.path) > 90_000_000
    rows = list(read_source(source))
    assert count_rows(source) == len(rows) == 50
    assert isinstance(rows[49], SourceRow)
    assert rows[49].image == "t.parquet#row=49&column=image&index=0"
    assert rows[49].dropped == ("answer",)
    assert counted.total < 1_000_000


def test_row_groups_are_read_as_they_are_asked_for(tmp_path: Path, counted: type[Counted]) -> None:
    rows = [GOOD | {"question": os.urandom(500).hex()} for _ in range(20_000)]
    write_parquet(tmp_path / "t.parquet", rows, row_group_size=500, compression="none")
    found = read_source(FileData(kind="parquet", path=str(tmp_path / "t.parquet")))
    next(found)
    assert counted.total < os.path.getsize(tmp_path / "t.parquet") / 10
    assert sum(1 for _ in found) == 19_999


def test_embedded_images_are_numbered_across_row_groups(tmp_path: Path) -> None:
    rows = [{"id": str(number), "image": png((8, 8 + number)), "question": "what?"} for number in range(5)]
    write_parquet(tmp_path / "t.parquet", rows, row_group_size=2)
    source = FileData(kind="parquet", path=str(tmp_path / "t.parquet"))
    reader = ImageReader(image_root(source), 1000)
    found = [import_row(row, reader, decode=True) for row in read_source(source) if isinstance(row, SourceRow)]
    assert [row.image.height for row in found if row.image is not None] == [8, 9, 10, 11, 12]


def test_embedded_images_are_found_where_the_image_root_is_another_folder(tmp_path: Path) -> None:
    write_parquet(tmp_path / "rows" / "t.parquet", [{"id": "a", "image": png(), "question": "what?"}])
    source = FileData(kind="parquet", path=str(tmp_path / "rows" / "t.parquet"), image_root=str(tmp_path / "images"))
    (row,) = read_source(source)
    assert isinstance(row, SourceRow)
    assert import_row(row, ImageReader(image_root(source), 10_000), decode=True).problem is None


@pytest.mark.parametrize("content", [b"PAR1", b"no Parquet at all", b""])
def test_what_is_no_parquet_is_refused(tmp_path: Path, content: bytes) -> None:
    save(tmp_path / "t.parquet", content)
    source = FileData(kind="parquet", path=str(tmp_path / "t.parquet"))
    for read in (count_rows, lambda source: list(read_source(source))):
        with pytest.raises(InputError, match=r"t\.parquet must be a whole Parquet file"):
            read(source)


def test_a_lost_server_is_no_broken_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            raise OSError(errno.EIO, "gone")

    write_parquet(tmp_path / "t.parquet", [GOOD])
    monkeypatch.setattr(images_module, "open_file", Failing)
    with pytest.raises(OSError, match="gone") as error:
        count_rows(FileData(kind="parquet", path=str(tmp_path / "t.parquet")))
    assert not isinstance(error.value, InputError)


def test_a_column_with_a_dot_in_its_name_is_named_whole(tmp_path: Path) -> None:
    write_parquet(tmp_path / "t.parquet", [GOOD | {"x.y": 1, "z": {"a": 1, "b": 2}}])
    (row,) = read_source(FileData(kind="parquet", path=str(tmp_path / "t.parquet")))
    assert isinstance(row, SourceRow)
    assert row.dropped == ("x.y", "z")


def test_a_linked_parquet_file_gives_its_images(tmp_path: Path) -> None:
    """Caches of downloads keep files so; that the file is read was said in the configuration, not by a row."""
    write_parquet(tmp_path / "blobs" / "t", [{"id": "a", "image": png(), "question": "what?"}])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "t.parquet").symlink_to(tmp_path / "blobs" / "t")
    source = FileData(kind="parquet", path=str(tmp_path / "data" / "t.parquet"))
    (row,) = read_source(source)
    assert isinstance(row, SourceRow)
    assert import_row(row, ImageReader(image_root(source), 10_000), decode=True).problem is None


# --- files --------------------------------------------------------------------------------------------------------


def test_the_files_of_a_folder_follow_one_another_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for name, rows in {"b": [GOOD, "{broken"], "a": [GOOD, GOOD, GOOD], "c": [GOOD]}.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    for name in ("README.md", ".hidden.jsonl", "other.json"):
        save(folder / name, b"{broken")
    source = FileData(kind="jsonl", path=str(folder))
    rows = list(read_source(source))
    assert [row.row for row in rows] == [1, 2, 3, 4, 5, 6]
    assert reasons(source)[5].startswith("b.jsonl row 2: row must be a JSON object")
    assert count_rows(source) == 6
    assert image_root(source) == str(folder)


def test_rows_without_ids_are_named_after_their_files(tmp_path: Path) -> None:
    row = {name: value for name, value in GOOD.items() if name != "id"}
    for name in ("a", "b"):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", [row, row])
    assert [row.id for row in read_source(FileData(kind="jsonl", path=f"{tmp_path}/data/"))] == [
        "a:1",
        "a:2",
        "b:1",
        "b:2",
    ]


def test_a_folder_without_such_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^data of kind parquet must be \.parquet files, got none in"):
        list(read_source(FileData(kind="parquet", path=str(tmp_path))))


@pytest.mark.parametrize("kind", ["jsonl", "viscot_363k", "parquet"])
def test_a_missing_file_is_refused(tmp_path: Path, kind: Any) -> None:
    source = FileData(kind=kind, path=str(tmp_path / "no"))
    for read in (count_rows, lambda source: list(read_source(source))):
        with pytest.raises(InputError, match=r"there is no such file: .*/no"):
            read(source)


def test_data_without_rows_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "t.parquet", [], pa.schema([("image", pa.string()), ("question", pa.string())]))
    parquet = FileData(kind="parquet", path=str(tmp_path / "t.parquet"))
    for source in (jsonl(tmp_path, ["  "]), parquet, array(tmp_path, " ")):
        with pytest.raises(InputError, match=r"^data must have rows, but .* is empty"):
            list(read_source(source))


def test_relative_paths_count_from_the_image_root_or_the_files_folder() -> None:
    assert image_root(FileData(kind="jsonl", path="data/d.jsonl")) == "data"
    assert image_root(FileData(kind="jsonl", path="d.jsonl")) == "."
    assert image_root(FileData(kind="jsonl", path="data/d.jsonl", image_root="s3://bucket/x")) == "s3://bucket/x"


def test_the_small_world_is_drawn_once(tmp_path: Path) -> None:
    small = SmallWorldData(num_prompts=3, num_evaluation=2)
    source = locate(small, tmp_path)
    rows = list(read_source(source))
    assert [isinstance(row, SourceRow) and not row.dropped for row in rows] == [True] * 3
    stamp = Path(source.path).stat().st_mtime_ns
    assert locate(small, tmp_path) == source
    assert Path(source.path).stat().st_mtime_ns == stamp
    assert locate(SmallWorldData(num_prompts=3, num_evaluation=2, seed=1), tmp_path) != source
    assert locate(source, tmp_path) == source


# --- a row and its images -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"image": "missing.png"}, "image missing.png must exist"),
        ({"image": "text.png"}, "image text.png must be an image"),
        ({"image": "../a.png"}, "must stay inside"),
        ({"image": ""}, "image must be a path or one of"),
        ({"image": "foo://x/y.png"}, "image must be a path or one of"),
        ({"image": "http://127.0.0.1:1/x.png"}, "image http://127.0.0.1:1/x.png must be reachable"),
        ({"image": "a.png/b.png"}, "must be a file"),
        ({"image": "a\0.png"}, "must be a path"),
        ({"detail_image": "missing.png"}, "image missing.png must exist"),
        ({"negative_image": "missing.png", "region": [1]}, "region must be four numbers, such as [x1, y1, x2, y2]"),
        ({"negative_image": "missing.png", "region": [1]}, "got [1]; image missing.png must exist"),
    ],
)
def test_what_is_wrong_with_images_stands_in_the_row(tmp_path: Path, changes: Any, problem: str, decode: bool) -> None:
    save(tmp_path / "text.png", b"no image")
    (row,) = read_source(jsonl(tmp_path, [GOOD | changes]))
    assert isinstance(row, SourceRow)
    found = import_row(row, ImageReader(str(tmp_path), 1000), decode=decode)
    assert problem in (found.problem or "")
    assert (found.image is None) is ("image" in changes)


def test_a_lost_server_is_no_fault_of_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(url: str) -> bytes:
        raise StoreUnavailableError("gone")

    monkeypatch.setattr(images_module, "read_bytes", lost)
    for uri in ("a.png", "s3://bucket/a.png", "lakefs://repository/main/a.png"):
        (row,) = read_source(jsonl(tmp_path, [GOOD | {"image": uri}]))
        assert isinstance(row, SourceRow)
        with pytest.raises(StoreUnavailableError):
            import_row(row, ImageReader(str(tmp_path), 1000), decode=True)


def test_a_region_is_given_as_it_is_and_not_judged(tmp_path: Path) -> None:
    (row,) = read_source(jsonl(tmp_path, [GOOD | {"region": [50, 50, -1, 7]}]))
    assert isinstance(row, SourceRow)
    assert import_row(row, ImageReader(str(tmp_path), 1000), decode=True).region == Box(50, 50, -1, 7)


# --- digest -------------------------------------------------------------------------------------------------------


def touch(path: Path, content: bytes) -> None:
    """Change a file and, whatever the clock's grain, its time."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    save(path, content)
    os.utime(path, ns=(before + 10**9, before + 10**9))


@pytest.mark.parametrize("kind", list(WRITERS))
def test_the_digest_sees_rows_and_images(tmp_path: Path, kind: str) -> None:
    source = WRITERS[kind](tmp_path / "x")
    reader = ImageReader(image_root(source), 10**6)
    (first, *_) = read_source(source)
    assert isinstance(first, SourceRow)
    digests = [source_digest(source, reader)]
    assert source_digest(source, reader) == digests[0]
    for uri in first.images:
        file = Path(reader.locate(uri.partition("#")[0]))
        touch(file, file.read_bytes())
        digests.append(source_digest(source, reader))
    other = source.model_copy(update={"box_unit": "fraction"})
    digests.append(source_digest(other, reader))
    assert len(set(digests)) == len(digests)


def test_the_digest_sees_every_line_of_a_text(tmp_path: Path) -> None:
    reader = ImageReader(str(tmp_path), 1000)
    rows = [[GOOD], [GOOD, GOOD], [GOOD, "{broken"], [GOOD | {"answer": "x"}], [GOOD | {"answer": "y"}]]
    assert len({source_digest(jsonl(tmp_path, each), reader) for each in rows}) == len(rows)


def test_the_digest_sees_an_image_that_appears(tmp_path: Path) -> None:
    source = jsonl(tmp_path, [GOOD | {"image": "b.png", "detail_image": "../x.png"}])
    reader = ImageReader(str(tmp_path), 1000)
    before = source_digest(source, reader)
    save(tmp_path / "b.png", png())
    assert source_digest(source, reader) != before


def test_the_digest_passes_over_images_that_cannot_be_there(tmp_path: Path) -> None:
    uris = ["foo://x/y.png", "gs://x/y.png", "simplecache::file:///a", "http://127.0.0.1:1/x.png", "a\0", "", "\x1b"]
    uris += [f"a.parquet#row={'9' * 5000}&column=image&index=0", "x#row=0&column=image&index=0", "s3://BAD BUCKET/x"]
    rows = [GOOD | {"image": uri} for uri in uris]
    reader = ImageReader(str(tmp_path), 1000)
    assert source_digest(jsonl(tmp_path, rows), reader) != source_digest(jsonl(tmp_path, rows[1:]), reader)


def test_the_digest_of_parquet_sees_rows_but_reads_no_embedded_image(tmp_path: Path, counted: type[Counted]) -> None:
    path = tmp_path / "t.parquet"
    reader = ImageReader(str(tmp_path), 1000)
    picture = os.urandom(2_000_000)

    def digest(question: str) -> str:
        row = {"id": "a", "image": picture, "question": question}
        write_parquet(path, [row] * 10, compression="none", use_dictionary=False)
        os.utime(path, ns=(0, 0))
        return source_digest(FileData(kind="parquet", path=str(path)), reader)

    assert digest("what?") == digest("what?") != digest("who??")
    assert counted.total < 1_000_000


# --- messages -----------------------------------------------------------------------------------------------------


def test_ids_and_field_names_cannot_steer_a_terminal(tmp_path: Path) -> None:
    escape = "\x1b[31mRED\x1b[2J"
    rows = [{"id": escape, "image": 7, "question": "?"}, GOOD | {escape: 1, "\ud800": 1}]
    bad, good = read_source(jsonl(tmp_path, rows))
    assert isinstance(bad, BadRow)
    assert isinstance(good, SourceRow)
    assert bad.id == r"\x1b[31mRED\x1b[2J"
    assert good.dropped == (r"\ud800", r"\x1b[31mRED\x1b[2J")
    text = name_bad_rows([BadRow(row=1, id=escape + "x" * 1000, reason=f"it is {escape}")])
    assert text.isprintable()
    assert text.endswith(r": it is \x1b[31mRED\x1b[2J")
    assert len(text) < 150


def test_of_many_bad_rows_the_first_are_named() -> None:
    bad = [BadRow(row=number, id=None, reason=f"reason {number}") for number in range(1, 8)]
    text = name_bad_rows(bad)
    assert "row 5 (no id): reason 5" in text
    assert "reason 6" not in text
    assert "... and 2 more" in text
    assert "more" not in name_bad_rows(bad[:5])


def named(source: FileData) -> list[str]:
    return [row_digest(row) for row in read_source(source)]


def test_a_row_is_the_same_in_another_line_and_another_file(tmp_path: Path) -> None:
    bad = {"id": "z", "image": "a.png"}
    before = named(jsonl(tmp_path, [GOOD, bad]))
    assert named(jsonl(tmp_path, [GOOD | {"id": "new"}, bad, GOOD]))[1:] == before[::-1]
    folder = tmp_path / "several"
    for name, rows in (("x", [GOOD | {"id": "new"}]), ("y", [bad, GOOD])):
        write_jsonl(folder / f"{name}.jsonl", rows)
    source = FileData(kind="jsonl", path=str(folder), image_root=str(tmp_path), license="CC")
    assert named(source)[1:] == before[::-1]


def test_bad_rows_are_told_apart_by_what_they_are(tmp_path: Path) -> None:
    rows = [{"id": "z", "image": "a.png", "extra": number} for number in range(3)]
    assert len({*named(jsonl(tmp_path, rows))}) == 3


def test_a_picture_inside_a_file_has_no_name_of_its_own(tmp_path: Path) -> None:
    rows = [{"id": name, "question": name, "region": [1, 2, 3, 4], "image": png()} for name in "ab"]
    write_parquet(tmp_path / "x.parquet", rows)
    before = named(FileData(kind="parquet", path=str(tmp_path / "x.parquet")))
    write_parquet(tmp_path / "y.parquet", rows[::-1])
    assert named(FileData(kind="parquet", path=str(tmp_path / "y.parquet"))) == before[::-1]
    assert len({*before}) == 2


@pytest.mark.parametrize(
    "change",
    [{"id": "b"}, {"image": "b.png"}, {"question": "who?"}, {"region": [1, 2, 3, 5]}, {"detail_image": "a.png"}],
)
def test_a_row_that_says_something_else_is_another_one(tmp_path: Path, change: dict[str, Any]) -> None:
    first, second = named(jsonl(tmp_path, [GOOD, GOOD | change]))
    assert first != second


def test_an_answer_is_no_part_of_a_row(tmp_path: Path) -> None:
    first, second = named(jsonl(tmp_path, [GOOD, GOOD | {"answer": SECRET}]))
    assert first == second


def test_the_digest_of_what_is_new_does_not_see_what_is_known(tmp_path: Path) -> None:
    reader = ImageReader(str(tmp_path), 1000)
    new = GOOD | {"id": "new"}
    known = {*named(jsonl(tmp_path, [GOOD]))}
    once = source_digest(jsonl(tmp_path, [GOOD, new]), reader, known)
    # In the place of a known row, or without it, the new one is what it was; its line counts as it is read.
    assert source_digest(jsonl(tmp_path, [GOOD | {"answer": SECRET}, new]), reader, known) == once
    assert source_digest(jsonl(tmp_path, [GOOD, new | {"question": "who?"}]), reader, known) != once


def test_the_version_of_the_data_is_their_listing(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write_jsonl(folder / "x.jsonl", [GOOD])
    source = FileData(kind="jsonl", path=str(folder))
    versions = [data_version(source)]
    assert data_version(source) == versions[0]
    write_jsonl(folder / "y.jsonl", [GOOD])
    versions.append(data_version(source))
    (folder / "y.jsonl").rename(folder / "z.jsonl")
    versions.append(data_version(source))
    write_jsonl(folder / "z.jsonl", [GOOD, GOOD])
    versions.append(data_version(source))
    assert len(set(versions)) == 4
    # Another file beside them is none of the data's.
    save(folder / "notes.txt", b"hello")
    assert data_version(source) == versions[-1]
    with pytest.raises(InputError, match="there is no such file"):
        data_version(FileData(kind="jsonl", path=str(tmp_path / "gone.jsonl")))
    assert data_version(SmallWorldData()) != data_version(SmallWorldData(num_prompts=2000))


def check(source: FileData) -> None:
    check_rows(source, ImageReader(image_root(source), 10**6), threads=2)


def test_rows_are_checked_with_their_images(tmp_path: Path) -> None:
    check(jsonl(tmp_path, [GOOD, GOOD | {"id": "b", "region": None, "positive_image": "a.png"}]))
    save(tmp_path / "text.png", b"no image")
    bad = [
        {"id": "form", "image": "a.png"},
        GOOD | {"id": "gone", "negative_image": "gone.png"},
        GOOD | {"id": "text", "image": "text.png"},
        GOOD | {"id": "region", "region": [1]},
    ]
    with pytest.raises(InputError) as caught:
        check(jsonl(tmp_path, [GOOD, *bad]))
    first, *lines = str(caught.value).splitlines()
    assert first == "rows must have the form of jsonl, and images that are there, 4 have not:"
    wanted = ["row 2 (form): row must have image and question", "row 3 (gone): image gone.png must exist"]
    wanted += ["row 4 (text): image text.png must be an image", "row 5 (region): region must be four numbers"]
    assert [line.strip()[: len(start)] for line, start in zip(lines, wanted, strict=True)] == wanted


def test_of_images_that_are_checked_the_headers_are_read(tmp_path: Path, counted: type[Counted]) -> None:
    Image.effect_noise((700, 700), 50).save(tmp_path / "noise.png")
    content = (tmp_path / "noise.png").read_bytes()
    # No decoder would take it.
    save(tmp_path / "cut.png", content[: len(content) // 2])
    check(jsonl(tmp_path, [GOOD | {"image": "cut.png"}]))
    assert 0 < counted.total < 80_000 < len(content) // 2


@pytest.mark.parametrize("kind", list(WRITERS))
def test_rows_of_every_format_pass_the_check(tmp_path: Path, kind: str) -> None:
    check(WRITERS[kind](tmp_path / "x"))
