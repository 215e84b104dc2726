"""What is trained on and what is set aside: of one part, and over generations of retraining."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks.adapters.dataset import (
    SAMPLES,
    SEEN,
    VIEW_SHARDS,
    Dataset,
    SampleViews,
    SeenRow,
    ViewShard,
    open_png,
    to_png,
    views_file,
)
from tasks.adapters.images import ImageReader
from tasks.adapters.store import Outcome, Store, write_json
from tasks.adapters.tables import read_rows, write_rows
from tasks.artifacts import ArtifactRef, ImageRef, Sample
from tasks.build_views import ViewShardJob, ViewsJob
from tasks.import_data import ImportDataJob
from tasks.training_set import TrainingSetJob, split_prompts, training_set
from vzero_core.config import ViewConfig
from vzero_core.errors import InputError

PER_SHARD = 3


def sample(name: str, image: str) -> Sample:
    ref = ImageRef(uri=image, width=8, height=8, size_bytes=1, sha256=image.ljust(64, "."))
    return Sample(id=name, image=ref, question="q")


class World:
    """A store with parts of a dataset, whose crops tell by their width which sample they are of."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(str(folder), folder / "work")
        self.dataset = Dataset(self.store, ImageReader(str(folder), 10**6))
        self.context: Any = SimpleNamespace(store=self.store, dataset=self.dataset)
        self.widths: dict[str, int] = {}

    def rows(self, *digests: str) -> ArtifactRef:
        def make(folder: Path) -> Outcome:
            write_rows(folder / SEEN, [SeenRow(digest=digest) for digest in digests], SeenRow)
            return Outcome()

        return self.store.produce(ImportDataJob(source="".join(digests), images="decode", max_image_pixels=1), make)

    def views(self, samples: list[Sample], title: str) -> ArtifactRef:
        """Crops in shards of three samples."""
        shards = []
        for start in range(0, len(samples), PER_SHARD):
            inside = samples[start : start + PER_SHARD]

            def make(folder: Path, inside: list[Sample] = inside) -> Outcome:
                write_rows(folder / views_file(0), [self._crops(title, found) for found in inside], SampleViews)
                write_rows(folder / SAMPLES, inside, Sample)
                return Outcome()

            source = ArtifactRef(stage="samples", key=title, digest=title)
            job = ViewShardJob(samples=source, views=ViewConfig(), seed=0, shard=start, num_shards=1)
            shards.append(ViewShard(ref=self.store.produce(job, make), num_samples=len(inside)))

        def join(folder: Path) -> Outcome:
            write_rows(folder / SAMPLES, samples, Sample)
            write_json(folder / VIEW_SHARDS, [shard.model_dump() for shard in shards])
            return Outcome()

        return self.store.produce(ViewsJob(shards=tuple(shard.ref for shard in shards), max_bad_share=1), join)

    def _crops(self, title: str, found: Sample) -> SampleViews:
        width = self.widths.setdefault(f"{title} {found.id}", len(self.widths) + 1)
        png = to_png(Image.new("RGB", (width, 1)))
        return SampleViews(
            sample_id=found.id,
            positive_png=png,
            negative_png=png,
            positive_box=None,
            negative_box=None,
            positive_frame=(1, 1),
            negative_frame=(1, 1),
        )

    def put(
        self,
        samples: list[Sample],
        title: str,
        previous: ArtifactRef | None = None,
        *,
        replay_share: float = 0.5,
        num_held_out: int = 4,
        seed: int = 0,
    ) -> ArtifactRef:
        """The training set of new samples, after a previous one."""
        job = TrainingSetJob(
            rows=self.rows(*(f"{title} {found.id}" for found in samples)),
            views=self.views(samples, title),
            previous=previous,
            replay_share=replay_share,
            num_held_out=num_held_out,
            seed=seed,
        )
        made: ArtifactRef = training_set.fn(job, self.context)
        return made

    def split(self, ref: ArtifactRef) -> tuple[set[str], set[str]]:
        training, asked = self.dataset.split(ref)
        return set(training), set(asked)


def samples_of(title: str, count: int, per_image: int = 1) -> list[Sample]:
    return [sample(f"{title}{number}", f"{title}{number // per_image}") for number in range(count)]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_first_set_is_all_there_is(world: World) -> None:
    new = samples_of("a", 10)
    made = world.put(new, "first")
    training, asked = world.dataset.split(made)
    assert world.dataset.samples(made) == new
    assert (training, asked) == split_prompts(new, 4, 0)
    # The shards as they are: nothing that depends on the way to it.
    assert {shard["positions"] for shard in json.loads(world.store.read(made, VIEW_SHARDS))} == {None}


def test_new_samples_come_with_a_share_of_the_old(world: World) -> None:
    first = world.put(samples_of("a", 40), "first")
    made = world.put(samples_of("b", 12), "second", first, replay_share=0.25)
    training, asked = world.split(made)
    # A quarter is old: of four prompts asked three are new, so nine new ones are learned, and three old ones with them.
    assert sorted(name[0] for name in training) == ["a"] * 3 + ["b"] * 9
    assert sorted(name[0] for name in asked) == ["a"] + ["b"] * 3
    assert asked & {name for name in world.split(first)[1]} == {name for name in asked if name[0] == "a"}
    summary = world.store.manifest(made).summary
    assert summary == {"num_samples": 16, "num_new": 9, "num_replayed": 3, "num_held_out": 4, "num_parts": 2}


def test_without_a_share_nothing_old_is_learned(world: World) -> None:
    first = world.put(samples_of("a", 20), "first")
    training, asked = world.split(world.put(samples_of("b", 9), "second", first, replay_share=0))
    assert {name[0] for name in training | asked} == {"b"}


def test_every_sample_has_its_own_crops(world: World) -> None:
    first = world.put(samples_of("a", 20), "first")
    changed = [*samples_of("b", 7), sample("a3", "other")]
    made = world.put(changed, "second", first, replay_share=0.6)
    found = world.dataset.samples(made)
    titles = {name.id: "second" for name in changed}
    assert len(found) > 12
    for position, one in enumerate(found):
        crops = world.dataset.views(made, one.id, position)
        assert open_png(crops.positive_png).width == world.widths[f"{titles.get(one.id, 'first')} {one.id}"]


def test_a_sample_replaces_the_earlier_one_of_its_id(world: World) -> None:
    first = world.put(samples_of("a", 12), "first")
    corrected = sample("a3", "better")
    made = world.put([corrected, *samples_of("b", 3)], "second", first, replay_share=0.9)
    found = {one.id: one for one in world.dataset.samples(made)}
    assert found["a3"] == corrected
    assert len(found) == len(world.dataset.samples(made))
    third = world.put(samples_of("c", 9), "third", made, replay_share=0.9)
    assert {one.image for one in world.dataset.samples(third) if one.id == "a3"} <= {corrected.image}


def test_another_question_on_an_image_that_was_set_aside_is_set_aside_too(world: World) -> None:
    first = world.put(samples_of("a", 12), "first")
    _, asked = world.split(first)
    again = [sample(f"again {name}", name) for name in sorted(asked)]
    training, _ = world.split(world.put([*again, *samples_of("b", 6)], "second", first))
    assert not training & {one.id for one in again}


def test_a_correction_changes_no_side(world: World) -> None:
    """Neither the picture of a prompt set aside is trained on, nor is one that was trained on asked."""
    first = world.put(samples_of("a", 12), "first", num_held_out=6)
    training, asked = world.split(first)
    better = [sample(name, f"better {name}") for name in sorted(training | asked)[:3]]
    same = [sample(name, name) for name in sorted(training | asked)[3:]]
    second = world.put([*better, *same, *samples_of("b", 8)], "second", first, num_held_out=6)
    again, now_asked = world.split(second)
    assert not {one.id for one in same} & asked & again
    assert not {one.id for one in same} & training & now_asked


def test_without_any_prompt_to_set_aside_it_stops(world: World) -> None:
    first = world.put(samples_of("a", 6), "first", num_held_out=0)
    with pytest.raises(InputError, match="prompts must be set aside, got none"):
        world.put([sample("b", "a1")], "second", first)


def test_rows_that_were_looked_at_are_remembered(world: World) -> None:
    first = world.put(samples_of("a", 2), "first")
    second = world.put(samples_of("b", 2), "second", first)
    seen = [row.digest for row in read_rows(world.store.read(second, SEEN), SeenRow)]
    assert seen == ["first a0", "first a1", "second b0", "second b1"]


@given(
    sizes=st.lists(st.integers(4, 14), min_size=2, max_size=4),
    corrected=st.booleans(),
    per_image=st.integers(1, 3),
    share=st.sampled_from([0.0, 0.3, 0.5, 0.8]),
    num_held_out=st.integers(0, 6),
    seeds=st.lists(st.integers(0, 3), min_size=4, max_size=4),
)
@settings(max_examples=25)
def test_what_checkpoints_are_compared_by_is_never_trained_on(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    corrected: bool,
    per_image: int,
    share: float,
    num_held_out: int,
    seeds: list[int],
) -> None:
    world = World(tmp_path_factory.mktemp("world"))
    made = None
    ever_asked: set[str] = set()
    ever_trained: set[str] = set()
    for number, size in enumerate(sizes):
        # Parts share images with one another, and where samples are corrected, they share ids.
        name = "" if corrected else f"{number} "
        new = [sample(f"{name}{index}", f"i{index // per_image + 3 * number}") for index in range(size)]
        try:
            made = world.put(new, str(number), made, replay_share=share, num_held_out=num_held_out, seed=seeds[number])
        except InputError:
            # Nothing was left to set aside.
            return
        images = {one.id: one.image.sha256 for one in world.dataset.samples(made)}
        training, asked = world.dataset.split(made)
        assert len(images) == len(training) + len(asked)
        ever_asked |= {str(images[name]) for name in asked}
        ever_trained |= {str(images[name]) for name in training}
        assert not ever_asked & ever_trained


def test_what_is_set_aside_of_one_part_depends_on_the_seed_and_not_on_the_order() -> None:
    found = samples_of("a", 18, per_image=3)
    chosen = {tuple(split_prompts(found, 6, seed)[1]) for seed in range(8)}
    assert len(chosen) > 1
    assert split_prompts(found[::-1], 6, 0)[1] == split_prompts(found, 6, 0)[1]
    # More of them are the same ones, and others.
    assert split_prompts(found, 9, 0)[1][:6] == split_prompts(found, 6, 0)[1]


def test_prompts_of_one_image_are_set_aside_together() -> None:
    found = samples_of("a", 18, per_image=3)
    training, held_out = split_prompts(found, 4, seed=0)
    # Two images of three prompts each: four prompts cut the second one, so it goes as a whole.
    assert len(held_out) == 6
    assert sorted(training + held_out) == sorted(one.id for one in found)
    images = {one.id: one.image for one in found}
    assert not {images[name] for name in training} & {images[name] for name in held_out}


def test_nothing_is_set_aside_where_nothing_is_asked_for() -> None:
    found = samples_of("a", 3)
    assert split_prompts(found, 0, 0) == (["a0", "a1", "a2"], [])
