"""Stages: regions where there are none, each checked by what the teacher makes of it (docs/REGIONS.md)."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, TypeVar

from PIL import Image, ImageStat
from pydantic import Field

from tasks.adapters.dataset import QUARANTINE, SAMPLES, cut
from tasks.adapters.grounding import PER_MILLE, parse_box, resized_size, to_pixels
from tasks.adapters.models import load_processor, model_folder
from tasks.adapters.store import Outcome
from tasks.adapters.tables import read_rows, write_rows
from tasks.artifacts import ArtifactRef, BadRow, Job, Record, Sample
from tasks.config import EngineFingerprint, GridRegions, GroundingRegions, PromptConfig, Proposer
from tasks.ports import Advance, ReplayRequest, SamplingRequest
from tasks.stage import RunContext, stage
from vzero_core.config import PositiveCropConfig, Resample
from vzero_core.errors import InputError
from vzero_core.views import Box, Size, positive_crop, scale_box
from vzero_core.windows import WHOLE, windows

log = logging.getLogger("vzero.propose_regions")

PROPOSALS = "proposals.parquet"
SAMPLES_PER_SHARD = 256
"""What is proposed again at most when a run is killed."""
MAX_PIXELS = 2**24
"""Pixels of the pictures that the engine is handed at once; it bounds memory."""

R = TypeVar("R", SamplingRequest, ReplayRequest)
Response = tuple[int, ...]


class RegionShardJob(Job):
    """Propose regions for some of a dataset's samples; nothing about it is random, so it has no seed."""

    stage: ClassVar[str] = "region_shard"

    samples: ArtifactRef
    teacher: ArtifactRef
    prompt: PromptConfig
    crop: PositiveCropConfig
    resample: Resample
    proposer: Proposer
    max_new_tokens: int
    engine: EngineFingerprint
    shard: int
    num_shards: int

    @property
    def title(self) -> str:
        """How the run is called on the dashboard."""
        return "regions" + (f", shard {self.shard} of {self.num_shards}" if self.num_shards > 1 else "")


class RegionsJob(Job):
    """Join the shards and keep what the teacher supports; another threshold asks the teacher nothing again."""

    stage: ClassVar[str] = "regions"

    samples: ArtifactRef
    shards: tuple[ArtifactRef, ...]
    min_contrast: float
    min_kept_share: float


class Proposal(Record):
    """A region that nobody drew, and what became of it."""

    sample_id: str
    box: Box | None = Field(default=None, description="xyxy, pixels of the full image; none: no box was found.")
    contrast: float | None = Field(default=None, description="What showing it is worth against hiding it, nats/token.")
    reply: str | None = Field(default=None, description="What the teacher said when it was asked for a box.")
    problem: str | None = Field(default=None, description="Why the proposal is not kept; none: it is.")


def num_region_shards(num_samples: int) -> int:
    """Give how many shards a dataset's regions are proposed in."""
    return -(-num_samples // SAMPLES_PER_SHARD)


@stage(RegionShardJob)
def propose_region_shard(job: RegionShardJob, context: RunContext, folder: Path) -> Outcome:
    """Propose a region for every sample without one, and ask the teacher what it is worth."""
    start = job.shard * SAMPLES_PER_SHARD
    asked = [
        sample
        for sample in context.dataset.samples(job.samples)[start : start + SAMPLES_PER_SHARD]
        if sample.region is None and (sample.positive_image is None or sample.negative_image is None)
    ]
    proposals: list[Proposal] = []
    num_passes = 0
    if asked:
        total = len(asked) * expected_passes(job.proposer)
        with context.engines.asking_teacher(), context.progress(job.title, total) as advance:
            teacher = Teacher(job, context, advance)
            proposals = teacher.propose(asked)
            num_passes = teacher.num_passes
    write_rows(folder / PROPOSALS, proposals, Proposal)
    return Outcome(summary={"num_proposed": len(proposals), "num_passes": num_passes})


@stage(RegionsJob)
def propose_regions(job: RegionsJob, context: RunContext, folder: Path) -> Outcome:
    """Give every sample its region; those whose proposal the teacher does not support are set aside."""
    store = context.store
    proposals = [
        _judged(row, job.min_contrast)
        for shard in job.shards
        for row in read_rows(store.read(shard, PROPOSALS), Proposal)
    ]
    of_sample = {proposal.sample_id: proposal for proposal in proposals}
    kept: list[Sample] = []
    bad: list[BadRow] = []
    for row, sample in enumerate(context.dataset.samples(job.samples), start=1):
        proposal = of_sample.get(sample.id)
        if proposal is None:
            kept.append(sample)
        elif proposal.problem is None:
            kept.append(sample.model_copy(update={"region": proposal.box}))
        else:
            bad.append(BadRow(row=row, id=sample.id, reason=proposal.problem))
    num_kept = len(proposals) - len(bad)
    summary: dict[str, float] = {"num_samples": len(kept), "num_proposed": len(proposals), "num_kept": num_kept}
    if proposals:
        share = num_kept / len(proposals)
        num_passes = sum(store.manifest(shard).summary["num_passes"] for shard in job.shards)
        summary |= {"kept_share": share, "passes_per_sample": num_passes / len(proposals)}
        log.info("the teacher supports %d of %d proposed regions (%.1f%%)", num_kept, len(proposals), 100 * share)
        if share < job.min_kept_share or not kept:
            raise InputError(
                f"regions: the teacher must support at least {job.min_kept_share:.1%} of the proposals "
                f"(regions.min_kept_share), and one at least, got {num_kept} of {len(proposals)}; the first it does "
                f"not is {bad[0].id}: {bad[0].reason}; draw the regions, or try another proposer"
            )
    write_rows(folder / SAMPLES, kept, Sample)
    write_rows(folder / QUARANTINE, bad, BadRow)
    write_rows(folder / PROPOSALS, proposals, Proposal)
    return Outcome(summary=summary)


class Teacher:
    """Asks the teacher what it makes of regions; no answer is known here, only its own response."""

    def __init__(self, job: RegionShardJob, context: RunContext, advance: Advance) -> None:
        """Set the teacher to ask, and how."""
        self._job = job
        # A sample's windows follow one another: its image is decoded once for all of them.
        self._image = lru_cache(maxsize=1)(context.dataset.image)
        self._detail = lru_cache(maxsize=1)(context.dataset.detail)
        self._renderer = context.engines.renderer
        self._teacher_path = context.engines.teacher_path
        self._engine = context.engines.teacher(job.teacher)
        self._advance = advance
        self.num_passes = 0

    def propose(self, samples: Sequence[Sample]) -> list[Proposal]:
        """Give a proposal for every sample, and what it is worth."""
        proposer = self._job.proposer
        responses = self.respond(samples)
        if isinstance(proposer, GridRegions):
            boxes = self.search(samples, responses, proposer)
            found = [Proposal(sample_id=sample.id, box=box) for sample, box in zip(samples, boxes, strict=True)]
        else:
            found = self._ask(samples, proposer)
        boxed = [position for position, proposal in enumerate(found) if proposal.box is not None]
        contrasts = self.contrasts(
            [samples[position] for position in boxed],
            [responses[position] for position in boxed],
            [proposal.box for proposal in found if proposal.box is not None],
        )
        for position, contrast in zip(boxed, contrasts, strict=True):
            found[position] = found[position].model_copy(update={"contrast": contrast})
        return found

    def respond(self, samples: Sequence[Sample]) -> list[Response]:
        """Give the teacher's likeliest response to each question, from the full image alone."""
        requests = (self._question(sample, self._job.prompt) for sample in samples)
        replies = self._sample(requests, self._job.max_new_tokens)
        return [token_ids for token_ids, _ in replies]

    def search(self, samples: Sequence[Sample], responses: Sequence[Response], proposer: GridRegions) -> list[Box]:
        """Give the window that the response depends on most: hidden, it costs the response most.

        Each scale searches inside the window found at the one before. Windows of a scale are compared with one
        another alone: a larger one always hides more.

        Returns:
            One box a sample, in pixels of its full image.
        """
        frames = [WHOLE] * len(samples)
        for scale in proposer.scales:
            candidates = [windows(frame, scale, proposer.overlap) for frame in frames]
            flat = [(number, box) for number, boxes in enumerate(candidates) for box in boxes]
            hidden = self.hidden(
                [samples[number] for number, _ in flat],
                [responses[number] for number, _ in flat],
                [scale_box(box, Size(1, 1), _size(samples[number])) for number, box in flat],
            )
            left = iter(hidden)
            frames = [min((next(left), box) for box in boxes)[1] for boxes in candidates]
        return [scale_box(frame, Size(1, 1), _size(sample)) for frame, sample in zip(frames, samples, strict=True)]

    def contrasts(self, samples: Sequence[Sample], responses: Sequence[Response], boxes: Sequence[Box]) -> list[float]:
        """Give what each region is worth to the teacher's own response, in nats per token.

        c = mean_k log p(y_k | image, crop of the region) - mean_k log p(y_k | image without the region)
        """
        shown = self.shown(samples, responses, boxes)
        hidden = self.hidden(samples, responses, boxes)
        return [high - low for high, low in zip(shown, hidden, strict=True)]

    def shown(self, samples: Sequence[Sample], responses: Sequence[Response], boxes: Sequence[Box]) -> list[float]:
        """Give the mean log-prob of each response where the region's crop stands beside the image, as in training."""
        return self._score(
            self._replay(sample, [self._image(sample), self._crop(sample, box)], response)
            for sample, response, box in zip(samples, responses, boxes, strict=True)
        )

    def hidden(self, samples: Sequence[Sample], responses: Sequence[Response], boxes: Sequence[Box]) -> list[float]:
        """Give the mean log-prob of each response where the region is painted over and no crop is shown."""
        return self._score(
            self._replay(sample, [paint_over(self._image(sample), box)], response)
            for sample, response, box in zip(samples, responses, boxes, strict=True)
        )

    def _ask(self, samples: Sequence[Sample], proposer: GroundingRegions) -> list[Proposal]:
        requests = (self._question(sample, proposer.prompt) for sample in samples)
        replies = self._sample(requests, proposer.max_reply_tokens)
        processor = None
        if proposer.convention == "resized_pixels":
            processor = load_processor(model_folder(self._teacher_path)).image_processor
        found = []
        for sample, (_, reply) in zip(samples, replies, strict=True):
            frame = PER_MILLE if processor is None else resized_size(processor, self._image(sample))
            try:
                box = to_pixels(parse_box(reply), frame, _size(sample))
            except InputError as error:
                found.append(Proposal(sample_id=sample.id, reply=reply, problem=str(error)))
            else:
                found.append(Proposal(sample_id=sample.id, reply=reply, box=box))
        return found

    def _question(self, sample: Sample, prompt: PromptConfig) -> SamplingRequest:
        return SamplingRequest(prompt=self._renderer.prompt(sample.question, [self._image(sample)], prompt), seeds=(0,))

    def _replay(self, sample: Sample, images: Sequence[Image.Image], response: Response) -> ReplayRequest:
        return ReplayRequest(
            prompt=self._renderer.prompt(sample.question, images, self._job.prompt), responses=(response,)
        )

    def _crop(self, sample: Sample, box: Box) -> Image.Image:
        detail = self._detail(sample)
        scaled = scale_box(box, _size(sample), Size(*detail.size))
        crop = positive_crop(scaled, detail.width, detail.height, self._job.crop)
        return cut(detail, crop.frame_size, crop.box, crop.size, self._job.resample)

    def _sample(self, requests: Iterable[SamplingRequest], max_new_tokens: int) -> list[tuple[Response, str]]:
        replies: list[tuple[Response, str]] = []
        for chunk in _chunks(requests):
            found = self._engine.sample(chunk, temperature=0.0, max_new_tokens=max_new_tokens, advance=self._advance)
            replies += [(response.token_ids, response.text) for (response,) in found]
            self.num_passes += len(chunk)
        return replies

    def _score(self, requests: Iterable[ReplayRequest]) -> list[float]:
        means: list[float] = []
        for chunk in _chunks(requests):
            found = self._engine.score(chunk, advance=self._advance)
            means += [float(scores.logprobs.double().mean()) for (scores,) in found]
            self.num_passes += len(chunk)
        return means


def expected_passes(proposer: Proposer) -> int:
    """Give the number of prompts that the teacher reads for one sample: response, proposal, shown and hidden."""
    if isinstance(proposer, GroundingRegions):
        return 4
    frames = [WHOLE, *(Box(0.0, 0.0, scale, scale) for scale in proposer.scales)]
    searched = zip(frames, proposer.scales, strict=False)
    return 3 + sum(len(windows(frame, scale, proposer.overlap)) for frame, scale in searched)


def paint_over(image: Image.Image, box: Box) -> Image.Image:
    """Give a copy of an image with a box in the image's mean colour; the box is rounded outward."""
    red, green, blue = (round(value) for value in ImageStat.Stat(image).mean)
    painted = image.copy()
    corners = (math.floor(box.x1), math.floor(box.y1), math.ceil(box.x2), math.ceil(box.y2))
    painted.paste((red, green, blue), corners)
    return painted


def _judged(proposal: Proposal, min_contrast: float) -> Proposal:
    if proposal.contrast is None or proposal.contrast >= min_contrast:
        return proposal
    problem = (
        f"region must be worth at least {min_contrast:g} nats per token to the teacher (regions.min_contrast), "
        f"got {proposal.contrast:.3g}"
    )
    return proposal.model_copy(update={"problem": problem})


def _size(sample: Sample) -> Size:
    return Size(sample.image.width, sample.image.height)


def _chunks(requests: Iterable[R]) -> Iterator[list[R]]:
    chunk: list[R] = []
    pixels = 0
    for request in requests:
        size = sum(image.width * image.height for image in request.prompt.images)
        if chunk and pixels + size > MAX_PIXELS:
            yield chunk
            chunk, pixels = [], 0
        chunk.append(request)
        pixels += size
    if chunk:
        yield chunk
