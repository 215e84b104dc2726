"""The cache gives what was put in, or nothing; it never grows beyond its size."""

import hashlib
import os
import threading
from pathlib import Path

import pytest

from tasks.adapters.cache import FileCache

SIZE = 160


def add(cache: FileCache, content: bytes) -> str:
    name = hashlib.sha256(content).hexdigest()
    cache.add(name, content)
    return name


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_contents_come_back_until_they_are_damaged(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", SIZE)
    name = add(cache, b"hello")
    assert cache.read(name) == b"hello"
    assert cache.copy(name, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"hello"
    (tmp_path / "cache" / name).write_bytes(b"hullo")
    assert not cache.copy(name, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert list((tmp_path / "cache").iterdir()) == []
    assert add(cache, b"hello") == name
    (tmp_path / "cache" / name).write_bytes(b"")
    assert cache.read(name) is None
    assert cache.read("0" * 64) is None


def test_a_file_is_linked_not_read(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"hello")
    cache = FileCache(tmp_path / "cache", SIZE)
    name = hashlib.sha256(b"hello").hexdigest()
    cache.add(name, source)
    assert source.stat().st_nlink == 2
    source.unlink()
    assert cache.read(name) == b"hello"


def test_the_size_is_never_exceeded_and_the_least_used_goes_first(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, SIZE)
    names = []
    for number in range(40):
        names.append(add(cache, bytes([number]) * 10))
        # Times of their own, in the order of use, whatever the clock's resolution.
        os.utime(tmp_path / names[-1], ns=(number, number))
        assert used(tmp_path) <= SIZE
        if number == 10:
            assert cache.read(names[0]) == bytes(10)
    held = [number for number, name in enumerate(names) if (tmp_path / name).exists()]
    # At a count, 150 bytes stay: 160 less a 16th; one more file fits before the next. The first was used in between.
    assert held == [0, *range(25, 40)]


@pytest.mark.parametrize("size", [SIZE // 4, SIZE])
def test_a_file_too_large_is_not_kept(tmp_path: Path, size: int) -> None:
    cache = FileCache(tmp_path / "cache", SIZE)
    assert cache.read(add(cache, bytes(size))) is None
    assert cache.read(add(cache, bytes(SIZE // 4 - 1))) is not None


def test_without_room_there_is_no_cache(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 0)
    assert cache.read(add(cache, b"")) is None
    assert not (tmp_path / "cache").exists()


def test_several_may_share_it(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        cache = FileCache(tmp_path, SIZE)
        try:
            for number in range(200):
                content = bytes([(number * 7 + seed) % 30]) * 20
                found = cache.read(add(cache, content))
                assert found in (None, content)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    # Each may be a 16th ahead of its last count.
    assert used(tmp_path) <= SIZE + 4 * (SIZE // 16 + 20)
