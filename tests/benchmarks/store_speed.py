"""Speed of the store against plain s3fs on the same S3 server, side by side: `python tests/benchmarks/store_speed.py`.

The store hashes and checks what plain s3fs only copies. Both sides take turns in going first, and the ratio is taken
within each repeat, so that other work on the machine meets both.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.seaweed import BUCKET, SeaweedServer

from tasks.adapters.files import configure_s3
from tasks.adapters.store import Outcome, Store
from tasks.artifacts import Job


class SpeedJob(Job):
    """A set of files."""

    stage: ClassVar[str] = "speed"

    name: str


class Comparison:
    """One server, one set of files, and how long each side takes."""

    def __init__(self, server: SeaweedServer, folder: Path, *, count: int, size: int) -> None:
        """Write random files of one size."""
        self.count, self.size = count, size
        # No cache: what is read comes from the server.
        self.store = Store(f"s3://{BUCKET}/store", folder / "work", cache_bytes=0)
        self.fs = server.client()
        self.folder, self.source = folder, folder / "source"
        self.source.mkdir()
        generator = np.random.default_rng()
        for index in range(count):
            (self.source / f"{index}.bin").write_bytes(generator.bytes(size))

    def seconds(self, *, ours_first: bool) -> dict[str, tuple[float, float]]:
        """Give the seconds of the store and of plain s3fs, by what is done."""
        name = uuid.uuid4().hex
        plain, job = f"{BUCKET}/plain/{name}", SpeedJob(name=name)
        store, fs, folder = self.store, self.fs, self.folder

        def write_ours() -> None:
            def make(target: Path) -> Outcome:
                shutil.copytree(self.source, target / "files", copy_function=os.link)
                return Outcome()

            store.produce(job, make)

        def fetch_ours() -> None:
            store.fetch(store.produce(job, _refuse), "files", folder / "ours")

        def read_ours() -> None:
            ref = store.produce(job, _refuse)
            for index in range(self.count):
                store.read(ref, f"files/{index}.bin")

        def read_plain() -> None:
            for index in range(self.count):
                fs.cat_file(f"{plain}/{index}.bin")

        pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "write": (write_ours, lambda: fs.put(f"{self.source}/", f"{plain}/", recursive=True)),
            "read to disk": (fetch_ours, lambda: fs.get(f"{plain}/", f"{folder}/plain/", recursive=True)),
            "read one by one": (read_ours, read_plain),
        }
        found = {}
        for what, (ours, other) in pairs.items():
            calls = (ours, other) if ours_first else (other, ours)
            times = [_seconds(call) for call in calls]
            found[what] = (times[0], times[1]) if ours_first else (times[1], times[0])
        shutil.rmtree(folder / "ours")
        shutil.rmtree(folder / "plain")
        fs.rm(f"{BUCKET}/plain", recursive=True)
        fs.rm(f"{BUCKET}/store", recursive=True)
        return found


def main() -> None:
    """Measure, and print the medians."""
    parser = argparse.ArgumentParser(description="Speed of the store against plain s3fs.")
    parser.add_argument("--repeats", type=int, default=7)
    repeats: int = parser.parse_args().repeats
    folder = Path(tempfile.mkdtemp(prefix="store-speed-"))
    server = SeaweedServer(folder / "server")
    table = Table("", "store", "plain s3fs", "ratio", title=f"median of {repeats} interleaved repeats")
    try:
        server.start()
        configure_s3(server.options("admin"))
        for count, size in ((8, 32 << 20), (300, 20_000)):
            comparison = Comparison(server, folder, count=count, size=size)
            comparison.seconds(ours_first=True)
            found = [comparison.seconds(ours_first=bool(number % 2)) for number in range(repeats)]
            amount, unit = (count * size / 1e6, "MB/s") if size > 1 << 20 else (float(count), "objects/s")
            for what in found[0]:
                ours, plain = (amount / statistics.median(times[what][side] for times in found) for side in (0, 1))
                ratio = statistics.median(times[what][1] / times[what][0] for times in found)
                label = f"{what}, {count} files of {size / 1e6:.3g} MB"
                table.add_row(label, f"{ours:.0f} {unit}", f"{plain:.0f} {unit}", f"{ratio:.2f}")
            shutil.rmtree(comparison.source)
    finally:
        server.stop()
        shutil.rmtree(folder)
    Console().print(table)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _refuse(_: Path) -> Outcome:
    raise AssertionError("what was written must be there")


if __name__ == "__main__":
    main()
