"""Regions for samples without one: found by a real teacher on the small world, refused where it supports none."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from PIL import Image
from prefect import flow
from pydantic import ValidationError
from support.plain import plain_logprobs
from support.tiny_models import picture

import tasks.propose_regions
from tasks.adapters.dataset import QUARANTINE, SAMPLES, Dataset
from tasks.adapters.images import ImageReader
from tasks.adapters.models import load_model, model_folder
from tasks.adapters.prompts import PromptProcessor
from tasks.adapters.store import Outcome, Store
from tasks.adapters.tables import read_rows, write_rows
from tasks.adapters.transformers_engine import TransformersEngine
from tasks.artifacts import ArtifactRef, BadRow, ImageRef, Job, Sample
from tasks.config import EngineFingerprint, GridRegions, GroundingRegions, PromptConfig
from tasks.ports import Response, SamplingRequest
from tasks.propose_regions import (
    PROPOSALS,
    Proposal,
    RegionShardJob,
    RegionsJob,
    expected_passes,
    num_region_shards,
    paint_over,
    propose_region_shard,
    propose_regions,
)
from tasks.small_world.scenes import make_sample
from vzero_core.config import PositiveCropConfig
from vzero_core.errors import InputError
from vzero_core.views import Box

pytestmark = pytest.mark.e2e

NUM_SAMPLES = 24
CROP = PositiveCropConfig(min_side_px=32, min_pixels=1024)
TEACHER = "embedded:teacher"


class GivenJob(Job):
    stage: ClassVar[str] = "samples"

    name: str


class World:
    """Samples of the small world in a store, and a teacher; true regions are known to the tests alone."""

    def __init__(self, folder: Path, teacher: Any = None, teacher_path: str = TEACHER) -> None:
        self.folder = folder
        self.store = Store(str(folder / "store"), folder / "attempts")
        self.dataset = Dataset(self.store, ImageReader(str(folder), max_pixels=100_000))
        self.truth: dict[str, Box] = {}
        self.passes = 0
        model = model_folder(teacher_path)
        self.teacher = teacher or TransformersEngine(
            model, "teacher", dtype="float32", device="cpu", max_batch_tokens=16_384
        )
        self.context: Any = SimpleNamespace(
            store=self.store,
            dataset=self.dataset,
            progress=self._progress,
            engines=SimpleNamespace(
                teacher=lambda _: self.teacher,
                asking_teacher=nullcontext,
                renderer=PromptProcessor(model),
                teacher_path=teacher_path,
            ),
        )

    def samples(self, count: int = NUM_SAMPLES) -> list[Sample]:
        found = []
        for number in range(count):
            scene = make_sample(0, "train", number)
            name = f"s{number:02d}"
            self.truth[name] = Box(*scene.region)
            found.append(
                Sample(
                    id=name,
                    image=self.image(f"{name}.png", Image.fromarray(scene.picture)),
                    detail_image=self.image(f"{name}-detail.png", Image.fromarray(scene.detail)),
                    question=scene.question.text,
                )
            )
        return found

    def image(self, uri: str, pixels: Image.Image) -> ImageRef:
        pixels.save(self.folder / uri)
        content = (self.folder / uri).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        return ImageRef(uri=uri, width=pixels.width, height=pixels.height, size_bytes=len(content), sha256=digest)

    def job(self, samples: Sequence[Sample], proposer: Any, shard: int = 0, num_shards: int = 1) -> RegionShardJob:
        def write(folder: Path) -> Outcome:
            write_rows(folder / SAMPLES, samples, Sample)
            return Outcome()

        name = hashlib.sha256("".join(sample.model_dump_json() for sample in samples).encode()).hexdigest()
        return RegionShardJob(
            samples=self.store.produce(GivenJob(name=name), write),
            teacher=ArtifactRef(stage="model", key="teacher", digest="teacher"),
            prompt=PromptConfig(),
            crop=CROP,
            resample="bicubic",
            proposer=proposer,
            max_new_tokens=8,
            engine=EngineFingerprint(engine="any", version="any", torch="any", dtype="float32"),
            shard=shard,
            num_shards=num_shards,
        )

    def run(
        self, samples: Sequence[Sample], proposer: Any, *, min_contrast: float = 0.1, min_kept_share: float = 0.2
    ) -> "Made":
        @flow
        def both_stages() -> ArtifactRef:
            num_shards = num_region_shards(len(samples))
            jobs = [self.job(samples, proposer, shard, num_shards) for shard in range(num_shards)]
            join = RegionsJob(
                samples=jobs[0].samples,
                shards=tuple(propose_region_shard(job, self.context) for job in jobs),
                min_contrast=min_contrast,
                min_kept_share=min_kept_share,
            )
            return propose_regions(join, self.context)

        self.passes = 0
        return Made(self, both_stages())

    @contextmanager
    def _progress(self, title: str, total: int) -> Iterator[Any]:
        def advance(count: int) -> None:
            self.passes += count

        self.total = total
        yield advance


class Made:
    """What the stage wrote."""

    def __init__(self, world: World, ref: ArtifactRef) -> None:
        self.samples = read_rows(world.store.read(ref, SAMPLES), Sample)
        self.bad = read_rows(world.store.read(ref, QUARANTINE), BadRow)
        self.proposals = read_rows(world.store.read(ref, PROPOSALS), Proposal)
        self.summary = world.store.manifest(ref).summary


class Recorded:
    """A teacher that scores as the small world's does, and answers the question for a box as a grounding model does."""

    def __init__(self, teacher: TransformersEngine, replies: list[str]) -> None:
        self._teacher = teacher
        self._replies = replies
        self.score = teacher.score

    def sample(
        self, requests: Sequence[SamplingRequest], *, temperature: float, max_new_tokens: int, advance: Any
    ) -> list[list[Response]]:
        if all("where" not in request.prompt.text for request in requests):
            return self._teacher.sample(
                requests, temperature=temperature, max_new_tokens=max_new_tokens, advance=advance
            )
        advance(len(requests))
        assert len(requests) == len(self._replies)
        return [
            [Response(token_ids=(0,), logprobs=(0.0,), text=text, truncated=False, weights="t")]
            for text in self._replies
        ]


ASK = PromptConfig(template="where {question}")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("regions"))


@pytest.fixture(scope="module")
def grid(world: World, prefect_api: str) -> Made:
    return world.run(world.samples(), GridRegions())


def holds_centre(box: Box | None, true: Box) -> bool:
    assert box is not None
    x, y = (true.x1 + true.x2) / 2, (true.y1 + true.y2) / 2
    return box.x1 <= x <= box.x2 and box.y1 <= y <= box.y2


def test_the_grid_finds_what_the_question_asks_about(world: World, grid: Made) -> None:
    # A window picked at random holds the centre in fewer than 1 of 10 cases.
    hits = [holds_centre(proposal.box, world.truth[proposal.sample_id]) for proposal in grid.proposals]
    assert len(hits) == NUM_SAMPLES
    assert sum(hits) >= 0.85 * NUM_SAMPLES
    assert all((box.x2 - box.x1, box.y2 - box.y1) == (16, 16) for _, box, *_ in map(tuple_of, grid.proposals))


def tuple_of(proposal: Proposal) -> tuple[str, Box, float]:
    assert proposal.box is not None
    assert proposal.contrast is not None
    return proposal.sample_id, proposal.box, proposal.contrast


def test_every_sample_is_kept_with_its_region_or_set_aside_with_the_reason(world: World, grid: Made) -> None:
    supported = {name: box for name, box, contrast in map(tuple_of, grid.proposals) if contrast >= 0.1}
    assert {sample.id: sample.region for sample in grid.samples} == supported
    names = [sample.id for sample in world.samples()]
    assert [sample.id for sample in grid.samples] == [name for name in names if name in supported]
    assert [(row.row, row.id) for row in grid.bad] == [
        (position, name) for position, name in enumerate(names, start=1) if name not in supported
    ]
    assert 0 < len(supported) < NUM_SAMPLES, "the samples must show both cases"
    assert all(
        row.reason.startswith("region must be worth at least 0.1 nats per token to the teacher") for row in grid.bad
    )
    assert grid.summary["num_kept"] == len(supported)
    assert grid.summary["kept_share"] == len(supported) / NUM_SAMPLES


def test_the_contrast_is_what_the_crop_is_worth_against_the_hidden_region(world: World, grid: Made) -> None:
    folder = model_folder(TEACHER)
    model, processor = load_model(folder, "float32", "cpu"), PromptProcessor(folder)
    sample = world.samples()[0]
    proposal = grid.proposals[0]
    assert proposal.box is not None
    full, detail = (Image.open(world.folder / f"s00{suffix}.png") for suffix in ("", "-detail"))
    asked = processor.encode(processor.prompt(sample.question, [full], PromptConfig()))
    asked["input_ids"], prompt_length = asked["input_ids"], asked["input_ids"].shape[1]
    response = model.generate(**asked, do_sample=False, max_new_tokens=8)[0, prompt_length:].tolist()
    crop = detail.crop(tuple(2 * int(value) for value in proposal.box))
    hidden = full.copy()
    mean = [round(sum(band.tobytes()) / (64 * 64)) for band in full.split()]
    hidden.paste(tuple(mean), tuple(int(value) for value in proposal.box))
    values = [
        plain_logprobs(model, processor.encode(processor.prompt(sample.question, images, PromptConfig())), response)
        for images in ([full, crop], [hidden])
    ]
    assert proposal.contrast == pytest.approx((values[0].mean() - values[1].mean()).item(), abs=1e-4)


def test_the_teacher_reads_as_many_prompts_as_the_summary_says(world: World, prefect_api: str, tmp_path: Path) -> None:
    here = World(tmp_path, world.teacher)
    # One for the response, 9 windows at either scale, the proposal shown and hidden.
    made = here.run(here.samples(3), GridRegions(), min_kept_share=0)
    assert made.summary["passes_per_sample"] == 1 + 9 + 9 + 2
    assert here.passes == here.total == 3 * 21
    assert expected_passes(GridRegions(scales=(0.25,))) == 1 + 49 + 2


def test_what_brings_a_region_or_crops_passes_untouched(world: World, prefect_api: str, tmp_path: Path) -> None:
    here = World(tmp_path, world.teacher)
    samples = here.samples(4)
    samples[1] = samples[1].model_copy(update={"region": Box(1, 2, 3, 4)})
    crops = {"positive_image": samples[2].detail_image, "negative_image": samples[2].image}
    samples[2] = samples[2].model_copy(update=crops)
    made = here.run(samples, GridRegions(), min_contrast=0)
    assert [sample.id for sample in made.samples] == ["s00", "s01", "s02", "s03"]
    assert made.samples[1:3] == samples[1:3]
    assert [proposal.sample_id for proposal in made.proposals] == ["s00", "s03"]


def test_a_shard_without_anything_to_do_starts_no_teacher(prefect_api: str, tmp_path: Path) -> None:
    here = World(tmp_path, SimpleNamespace())
    samples = [sample.model_copy(update={"region": Box(1, 2, 3, 4)}) for sample in here.samples(2)]
    made = here.run(samples, GridRegions())
    assert made.samples == samples
    assert made.summary == {"num_samples": 2, "num_proposed": 0, "num_kept": 0}


def test_shards_together_are_the_whole(
    world: World, grid: Made, prefect_api: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = World(tmp_path, world.teacher)
    monkeypatch.setattr(tasks.propose_regions, "SAMPLES_PER_SHARD", 5)
    # Smaller batches too: what the engine is handed at once must not matter.
    monkeypatch.setattr(tasks.propose_regions, "MAX_PIXELS", 100_000)
    made = here.run(here.samples(), GridRegions())
    assert made.summary == grid.summary
    assert (made.samples, [row.id for row in made.bad]) == (grid.samples, [row.id for row in grid.bad])
    assert [proposal.sample_id for proposal in made.proposals] == [proposal.sample_id for proposal in grid.proposals]
    contrasts = [[proposal.contrast for proposal in part.proposals] for part in (made, grid)]
    assert contrasts[0] == pytest.approx(contrasts[1], abs=1e-4)


def test_another_threshold_asks_the_teacher_nothing_again(world: World, grid: Made, prefect_api: str) -> None:
    made = world.run(world.samples(), GridRegions(), min_contrast=1.0)
    assert world.passes == 0
    assert 0 < made.summary["num_kept"] < grid.summary["num_kept"]
    strong = [name for name, _, contrast in map(tuple_of, grid.proposals) if contrast >= 1]
    assert [sample.id for sample in made.samples] == strong


def test_too_few_supported_regions_stop_the_run(world: World, prefect_api: str, tmp_path: Path) -> None:
    here = World(tmp_path, world.teacher)
    with pytest.raises(InputError) as caught:
        here.run(here.samples(3), GridRegions(), min_contrast=100)
    assert str(caught.value).startswith(
        "regions: the teacher must support at least 20.0% of the proposals (regions.min_kept_share), and one at "
        "least, got 0 of 3; the first it does not is s00: region must be worth at least 100 nats per token"
    )
    with pytest.raises(InputError, match=r"at least 99\.0% of the proposals .* got [1-9]\d* of 24"):
        world.run(world.samples(), GridRegions(), min_kept_share=0.99)
    with pytest.raises(InputError, match="and one at least, got 0 of 3"):
        here.run(here.samples(3), GridRegions(), min_contrast=100, min_kept_share=0)


def test_a_box_in_words_is_kept_where_it_is_right(world: World, prefect_api: str, tmp_path: Path) -> None:
    here = World(tmp_path, SimpleNamespace())
    samples = here.samples(6)
    boxes = [here.truth[sample.id] for sample in samples]
    assert not holds_centre(Box(0, 0, 16, 16), boxes[4])
    boxes[4] = Box(0, 0, 16, 16)
    thousandths = [[round(value * 1000 / 64) for value in box] for box in boxes]
    replies = [f'```json\n[{{"bbox_2d": {box}, "label": "it"}}]\n```' for box in thousandths]
    replies[5] = "I cannot see it."
    here.teacher = Recorded(world.teacher, replies)
    made = here.run(samples, GroundingRegions(prompt=ASK))
    # What the teacher says of s02 by itself is wrong, and the crop tells it so: that looks like no support.
    assert [sample.id for sample in made.samples] == ["s00", "s01", "s03"]
    for sample in made.samples:
        # A thousandth of 64 pixels.
        assert sample.region == pytest.approx(here.truth[sample.id], abs=0.064)
    assert [(row.row, row.id) for row in made.bad] == [(3, "s02"), (5, "s04"), (6, "s05")]
    assert made.bad[1].reason.startswith("region must be worth at least 0.1 nats per token to the teacher")
    assert made.bad[2].reason == "reply must hold a box of four numbers, got 'I cannot see it.'"
    assert made.proposals[5] == Proposal(sample_id="s05", reply=replies[5], problem=made.bad[2].reason)
    assert made.summary["passes_per_sample"] == (6 + 6 + 2 * 5) / 6


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_5", "idefics3"])
def test_a_teacher_that_talks_nonsense_ends_in_the_quarantine(
    family: str, folders: dict[str, Path], prefect_api: str, tmp_path: Path
) -> None:
    here = World(tmp_path, teacher_path=str(folders[family]))
    samples = [
        Sample(id=f"r{number}", image=here.image(f"{number}.png", picture(24, 16, number)), question="w1 w2")
        for number in range(3)
    ]
    samples[1] = samples[1].model_copy(update={"region": Box(0, 0, 8, 8)})
    convention = "per_mille" if family == "idefics3" else "resized_pixels"
    proposer = GroundingRegions(prompt=PromptConfig(template="w3 {question}"), convention=convention)
    made = here.run(samples, proposer, min_kept_share=0)
    assert made.samples == [samples[1]]
    assert [row.row for row in made.bad] == [1, 3]
    assert all(row.reason.startswith("reply must hold a box of four numbers, got '") for row in made.bad)
    assert all(proposal.reply for proposal in made.proposals)


def test_what_is_painted_over_has_the_mean_colour_and_reaches_outward() -> None:
    image = Image.new("RGB", (4, 2), (10, 20, 30))
    image.paste((50, 20, 30), (0, 0, 2, 2))
    painted = paint_over(image, Box(1.5, 0.2, 2.5, 0.8))
    assert [painted.getpixel((x, 0)) for x in range(4)] == [(50, 20, 30), (30, 20, 30), (30, 20, 30), (10, 20, 30)]
    assert [painted.getpixel((x, 1)) for x in range(4)] == [image.getpixel((x, 1)) for x in range(4)]
    assert image.getpixel((1, 0)) == (50, 20, 30)


def test_all_that_changes_the_result_changes_the_key(world: World) -> None:
    job = world.job(world.samples(1), GridRegions())
    changes: list[dict[str, Any]] = [
        {"proposer": GridRegions(overlap=0.25)},
        {"proposer": GroundingRegions()},
        {"shard": 1},
        {"num_shards": 2},
        {"prompt": PromptConfig(system="w1")},
        {"crop": PositiveCropConfig()},
        {"resample": "lanczos"},
        {"max_new_tokens": 9},
        {"teacher": ArtifactRef(stage="model", key="teacher", digest="other")},
    ]
    keys = {job.key, *(job.model_copy(update=change).key for change in changes)}
    assert len(keys) == 1 + len(changes)


@pytest.mark.parametrize("scales", [(), (0.25, 0.5), (0.5, 0.5), (1.0, 0.5), (0.5, 0.0), (0.5, -0.1)])
def test_scales_that_do_not_narrow_the_search_are_refused(scales: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match=r"scales must fall, all between 0 and 1, got|at least 1 item"):
        GridRegions(scales=scales)
