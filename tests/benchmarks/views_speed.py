"""Images per second of the views stage against the decoder alone, side by side.

`python tests/benchmarks/views_speed.py` runs it. It also says how exact JPEG draft mode would be, which the stage does
not use (docs/VIEWS.md).
"""

import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from tasks.adapters.dataset import SAMPLES, Dataset
from tasks.adapters.images import ImageReader
from tasks.adapters.parallel import in_order
from tasks.adapters.store import Outcome, Store
from tasks.adapters.tables import write_rows
from tasks.artifacts import Sample
from tasks.build_views import ViewShardJob, build_view_shard
from tasks.import_data import ImportDataJob
from tasks.stage import RunContext
from vzero_core.config import PositiveCropConfig, ViewConfig
from vzero_core.views import Box

SIZE = (3840, 2160)
NUM_PICTURES, NUM_IMAGES, NUM_REPEATS, THREADS = 8, 64, 5, 2
VIEWS = ViewConfig(positive=PositiveCropConfig(min_pixels=65_536))


class Silent:
    """A terminal that shows nothing."""

    def track(self, title: str, total: int) -> Any:
        """Give a context manager that counts nothing."""
        return nullcontext(lambda count: None)


def picture(seed: int) -> Image.Image:
    """A 4K picture with structure at all sizes and some noise, as photographs have."""
    noise = np.random.default_rng(seed)
    total = np.zeros((SIZE[1], SIZE[0], 3), dtype=np.float32)
    for cells in (8, 32, 128, 512):
        coarse = Image.fromarray(noise.integers(0, 255, (cells, cells * 16 // 9, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize(SIZE, Image.Resampling.BICUBIC)) / 4
    return Image.fromarray((total + noise.normal(0, 3, total.shape)).clip(0, 255).astype(np.uint8))


def write_images(folder: Path) -> list[str]:
    """Write a few pictures under many names."""
    for seed in range(NUM_PICTURES):
        picture(seed).save(folder / f"picture-{seed}.jpg", quality=92)
    for number in range(NUM_IMAGES):
        (folder / f"{number}.jpg").hardlink_to(folder / f"picture-{number % NUM_PICTURES}.jpg")
    return [f"{number}.jpg" for number in range(NUM_IMAGES)]


def decode(path: Path) -> None:
    """What the decoder alone does."""
    with path.open("rb") as file:
        Image.open(file).load()


def draft_error(path: Path) -> tuple[float, int]:
    """Mean and largest difference, in grey levels of 255, between draft mode at half size and the stage's filter."""
    full = Image.open(path)
    half = np.asarray(full.resize((SIZE[0] // 2, SIZE[1] // 2), Image.Resampling.BICUBIC)).astype(int)
    draft = Image.open(path)
    draft.draft("RGB", (SIZE[0] // 2, SIZE[1] // 2))
    difference = np.abs(np.asarray(draft).astype(int) - half)
    return float(difference.mean()), int(difference.max())


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a process of its own, so that its memory is not counted.
        with ProcessPoolExecutor(1) as executor:
            names = executor.submit(write_images, folder).result()
        reader = ImageReader(str(folder), 10**9)
        noise = np.random.default_rng(1)
        samples = []
        for number, uri in enumerate(names):
            side = noise.integers(40, 400, 2)
            x, y = noise.integers(0, SIZE[0] - side[0]), noise.integers(0, SIZE[1] - side[1])
            image = reader.inspect(uri, decode=True).ref
            samples.append(
                Sample(id=str(number), image=image, question="q", region=Box(x, y, x + side[0], y + side[1]))
            )
        times: dict[str, list[float]] = {"decoder alone": [], "views": []}
        for repeat in range(NUM_REPEATS):
            started = time.perf_counter()
            for _ in in_order(lambda uri: decode(folder / uri), names, THREADS):
                pass
            times["decoder alone"].append(time.perf_counter() - started)
            store = Store(str(folder / f"store-{repeat}"), folder / "work")

            def make(target: Path) -> Outcome:
                write_rows(target / SAMPLES, samples, Sample)
                return Outcome()

            nothing: Any = SimpleNamespace()
            context = RunContext(
                store=store,
                data=nothing,
                data_version="v",
                compared={},
                dataset=Dataset(store, reader),
                benchmarks={},
                judge=nothing,
                engines=nothing,
                terminal=Silent(),
                checkpoint_every=1,
                image_threads=THREADS,
            )
            ref = store.produce(ImportDataJob(source="s", images="decode", max_image_pixels=1), make)
            started = time.perf_counter()
            build_view_shard.fn(ViewShardJob(samples=ref, views=VIEWS, seed=0, shard=0, num_shards=1), context)
            times["views"].append(time.perf_counter() - started)
        table = Table(
            title=f"{NUM_IMAGES} JPEG images of {SIZE[0]} x {SIZE[1]}, {THREADS} threads", title_justify="left"
        )
        for column in ("", "images/s (median)", "of the decoder's"):
            table.add_column(column, justify="right" if column else "left")
        ratio = statistics.median(
            alone / views for alone, views in zip(times["decoder alone"], times["views"], strict=True)
        )
        for what, seconds in times.items():
            share = "1" if what == "decoder alone" else f"{ratio:.2f}"
            table.add_row(what, f"{NUM_IMAGES / statistics.median(seconds):.1f}", share)
        Console().print(table)
        print(f"largest resident memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
        mean, largest = draft_error(folder / "picture-0.jpg")
        print(f"draft mode at half size: {mean:.2f} grey levels from the stage's filter in the mean, {largest} at most")


if __name__ == "__main__":
    main()
