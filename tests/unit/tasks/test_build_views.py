"""Crops in shards: what a plain cut of the whole picture gives, at its place in the table, from images read once."""

import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tasks.build_views as stages
from tasks.adapters.dataset import QUARANTINE, SAMPLES, Dataset, cut, open_png
from tasks.adapters.images import ImageReader
from tasks.adapters.store import Outcome, Store
from tasks.adapters.tables import read_rows, write_rows
from tasks.artifacts import ArtifactRef, BadRow, ImageRef, Sample
from tasks.build_views import ViewShardJob, ViewsJob, build_view_shard, build_views, num_view_shards
from tasks.config import JudgeServerConfig
from tasks.import_data import ImportDataJob
from tasks.stage import RunContext
from vzero_core.config import NegativeCropConfig, PositiveCropConfig, ViewConfig
from vzero_core.errors import InputError
from vzero_core.views import Box, PixelBox, Size, negative_crop, positive_crop

VIEWS = ViewConfig(
    positive=PositiveCropConfig(min_side_px=8, min_pixels=100),
    negative=NegativeCropConfig(downsample=2, when_impossible="quarantine"),
)


class Silent:
    def track(self, title: str, total: int) -> Any:
        return nullcontext(lambda count: None)


class CountingReader(ImageReader):
    def __init__(self, root: str) -> None:
        super().__init__(root, 10**7)
        self.reads: Counter[str] = Counter()

    def read(self, ref: ImageRef) -> Image.Image:
        self.reads[ref.uri] += 1
        return super().read(ref)


class World:
    """Eleven samples of six pictures: one has no place for an irrelevant crop, one brings its crops along."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(str(folder / "store"), folder / "work")
        self.reader = CountingReader(str(folder))
        noise = np.random.default_rng(0)
        for number in range(6):
            pixels = noise.integers(0, 255, (60 + number, 81, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
        for name in ("given+", "given-"):
            Image.fromarray(noise.integers(0, 255, (9, 7, 3), dtype=np.uint8)).save(folder / f"{name}.png")
        refs = {path.stem: self.reader.inspect(path.name, decode=True).ref for path in folder.glob("*.png")}
        self.samples = [
            Sample(id=f"s{n}", image=refs[str(n % 5)], question="q", region=Box(2.5 * n, 3, 2.5 * n + 7, 13.5))
            for n in range(9)
        ]
        self.samples.insert(3, Sample(id="huge", image=refs["5"], question="q", region=Box(0, 0, 80, 60)))
        self.samples.insert(
            6,
            Sample(
                id="given",
                image=refs["5"],
                question="q",
                positive_image=refs["given+"],
                negative_image=refs["given-"],
            ),
        )
        self.context: Any = RunContext(
            store=self.store,
            data=SimpleNamespace(),  # type: ignore[arg-type]
            data_version="v",
            compared={},
            dataset=Dataset(self.store, self.reader),
            benchmarks={},
            judge=JudgeServerConfig(),
            engines=SimpleNamespace(),  # type: ignore[arg-type]
            terminal=Silent(),
            checkpoint_every=1,
            image_threads=2,
        )

        def make(target: Path) -> Outcome:
            write_rows(target / SAMPLES, self.samples, Sample)
            return Outcome()

        self.ref = self.store.produce(ImportDataJob(source="s", images="decode", max_image_pixels=1), make)

    def shard(self, number: int) -> ArtifactRef:
        count = num_view_shards(len(self.samples))
        job = ViewShardJob(samples=self.ref, views=VIEWS, seed=7, shard=number, num_shards=count)
        ref: ArtifactRef = build_view_shard.fn(job, self.context)
        return ref

    def build(self, max_bad_share: float = 0.2) -> ArtifactRef:
        shards = tuple(self.shard(number) for number in range(num_view_shards(len(self.samples))))
        ref: ArtifactRef = build_views.fn(ViewsJob(shards=shards, max_bad_share=max_bad_share), self.context)
        return ref


@pytest.fixture(params=[4, 100])
def world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(stages, "SAMPLES_PER_SHARD", request.param)
    return World(tmp_path)


def plain(world: World, sample: Sample) -> tuple[Image.Image, Image.Image]:
    """Both crops by resizing the whole picture first."""
    image = Image.open(Path(world.reader.locate(sample.image.uri))).convert("RGB")
    assert sample.region is not None
    positive = positive_crop(sample.region, *image.size, VIEWS.positive)
    negative = negative_crop(positive, VIEWS.negative, seed=7, sample_id=sample.id)
    pictures = []
    for crop in (positive, negative):
        frame = image.resize(crop.frame_size, Image.Resampling.BICUBIC)
        pictures.append(frame.crop(crop.box).resize(crop.size, Image.Resampling.BICUBIC))
    return pictures[0], pictures[1]


def difference(first: Image.Image, second: Image.Image) -> int:
    assert first.size == second.size
    return int(np.abs(np.asarray(first).astype(int) - np.asarray(second).astype(int)).max())


def test_every_sample_has_the_crops_of_a_plain_cut(world: World) -> None:
    views = world.build()
    table = world.context.dataset.samples(views)
    assert [sample.id for sample in table] == [sample.id for sample in world.samples if sample.id != "huge"]
    # Twice: a second reader starts from the store alone.
    for dataset in (world.context.dataset, Dataset(world.store, world.reader)):
        for position, sample in enumerate(table):
            found = dataset.views(views, sample.id, position)
            if sample.id == "given":
                continue
            expected = plain(world, sample)
            assert difference(open_png(found.positive_png), expected[0]) == 0
            assert difference(open_png(found.negative_png), expected[1]) <= 1


def test_given_crops_are_taken_as_they_are(world: World) -> None:
    views = world.build()
    table = world.context.dataset.samples(views)
    position = next(number for number, sample in enumerate(table) if sample.id == "given")
    found = world.context.dataset.views(views, "given", position)
    for png, name in ((found.positive_png, "given+.png"), (found.negative_png, "given-.png")):
        assert difference(open_png(png), Image.open(Path(world.reader.locate(name)))) == 0
    assert (found.positive_box, found.negative_box) == (None, None)


def test_a_sample_without_a_place_is_set_aside_with_its_row(world: World) -> None:
    views = world.build()
    (bad,) = read_rows(world.store.read(views, QUARANTINE), BadRow)
    assert (bad.row, bad.id) == (4, "huge")
    assert "no such place" in bad.reason
    assert world.store.manifest(views).summary == {"num_samples": 10, "num_bad": 1}


def test_too_many_of_them_stop_the_run(world: World) -> None:
    with pytest.raises(InputError, match=r"at most 5.0% .* got 1 of 11; the first is huge"):
        world.build(max_bad_share=0.05)


def test_an_image_is_read_once_a_shard_and_not_where_crops_are_given(world: World) -> None:
    world.build()
    shards = num_view_shards(len(world.samples))
    assert max(world.reader.reads.values()) <= shards
    if shards == 1:
        assert world.reader.reads == Counter({f"{n}.png": 1 for n in range(6)} | {"given+.png": 1, "given-.png": 1})


def test_a_shard_that_is_done_is_not_cut_again(world: World) -> None:
    first = world.shard(0)
    read = sum(world.reader.reads.values())
    assert world.shard(0) == first
    assert sum(world.reader.reads.values()) == read
    views = world.build()
    shards = json.loads(world.store.read(views, "shards.json"))
    assert shards[0]["ref"] == first.model_dump()


@pytest.mark.parametrize("size", [(64, 48), (81, 61), (200, 31)])
@pytest.mark.parametrize("downsample", [2, 3])
@pytest.mark.parametrize("resample", ["bicubic", "lanczos", "bilinear"])
def test_a_cut_is_that_of_the_whole_resized_frame(size: tuple[int, int], downsample: int, resample: Any) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))
    frame = Size(size[0] // downsample, size[1] // downsample)
    whole = image.resize(frame, getattr(Image.Resampling, resample.upper()))
    for box in (
        PixelBox(0, 0, 5, 4),
        PixelBox(frame.width - 6, frame.height - 7, frame.width, frame.height),
        PixelBox(3, 2, 10, 9),
        PixelBox(0, 0, *frame),
    ):
        assert difference(cut(image, frame, box, box.size, resample), whole.crop(box)) <= 1
