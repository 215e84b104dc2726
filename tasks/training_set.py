"""Stage: what a run trains on, new samples and some that were learned before, and what is set aside for good."""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tasks.adapters.dataset import HELD_OUT_IDS, SAMPLES, SEEN, VIEW_SHARDS, SeenRow, ViewShard
from tasks.adapters.store import Outcome, Store, write_json
from tasks.adapters.tables import write_rows
from tasks.artifacts import ArtifactRef, Job, Record, Sample, digest_json
from tasks.stage import RunContext, stage
from vzero_core.errors import InputError

PARTS = "parts.json"


class Part(Record):
    """Samples that came together, and those of them that no training may ever use."""

    views: ArtifactRef
    held_out: tuple[str, ...]


class TrainingSetJob(Job):
    """Put the samples of a run together."""

    stage: ClassVar[str] = "training_set"

    rows: ArtifactRef
    """The import that the new samples come from."""
    views: ArtifactRef
    """Crops of the new samples."""
    previous: ArtifactRef | None
    """Training set of the student that is trained on; None: there was none."""
    replay_share: float
    num_held_out: int
    """Prompts that the student's checkpoints are compared by."""
    seed: int

    @property
    def title(self) -> str:
        """How the run is called on the dashboard."""
        return "training set"


@dataclass(frozen=True)
class _Place:
    """Where a sample stands."""

    part: int
    position: int
    sample: Sample


@stage(TrainingSetJob)
def training_set(job: TrainingSetJob, context: RunContext, folder: Path) -> Outcome:
    """Take all new samples and some old ones; of both, some prompts are only asked, to compare checkpoints by them.

    A sample replaces an earlier one of its id. What was set aside once is never trained on later, nor is another
    question about its image; what is set aside now is of images that were not trained on before.
    """
    old = _read_parts(context.store, job.previous) if job.previous is not None else []
    ever = [place for number, part in enumerate(old) for place in _places(context, part.views, number)]
    new = context.dataset.samples(job.views)
    new_ids = {sample.id for sample in new}
    pool = {place.sample.id: place for place in ever if place.sample.id not in new_ids}
    # Also of samples that were replaced since.
    was_aside = [place for place in ever if place.sample.id in old[place.part].held_out]
    clear_of = {image_of(place.sample) for place in was_aside}
    known = {image_of(place.sample) for place in ever}
    aside = {place.sample.id for place in was_aside if pool.get(place.sample.id) == place}

    # The checkpoints are compared by old and new samples in the proportion of the training.
    num_new = job.num_held_out if not old else math.ceil(job.num_held_out * (1 - job.replay_share))
    _, drawn = split_prompts([sample for sample in new if image_of(sample) not in known], num_new, job.seed)
    touched = [sample.id for sample in new if image_of(sample) in clear_of]
    asked = [*drawn, *_ranked(aside, job.seed, "held out")[: max(job.num_held_out - len(drawn), 0)]]
    if job.num_held_out and not asked:
        raise InputError(
            "selection.num_prompts prompts must be set aside, got none: all new samples show images that were trained "
            "on, and none was set aside before; add samples of other images"
        )
    part = Part(views=job.views, held_out=(*drawn, *touched))
    learned = new_ids - set(part.held_out)
    share = job.replay_share / (1 - job.replay_share)
    can_replay = {name for name, place in pool.items() if image_of(place.sample) not in clear_of}
    replayed = _ranked(can_replay, job.seed, f"replay {len(old)}")[: round(share * len(learned))]

    chosen = {*learned, *asked, *replayed}
    places = [place for place in ever if pool.get(place.sample.id) == place and place.sample.id in chosen]
    places += [place for place in _places(context, job.views, len(old)) if place.sample.id in chosen]
    write_rows(folder / SAMPLES, [place.sample for place in places], Sample)
    shards = _shards(context.store, [*(earlier.views for earlier in old), job.views], places)
    write_json(folder / VIEW_SHARDS, [shard.model_dump() for shard in shards])
    write_json(folder / HELD_OUT_IDS, asked)
    write_json(folder / PARTS, [found.model_dump() for found in (*old, part)])
    # Rows that were looked at so far, good or bad: none of them is new to the next training.
    seen = context.dataset.seen(job.rows) | (context.dataset.seen(job.previous) if job.previous is not None else set())
    write_rows(folder / SEEN, [SeenRow(digest=digest) for digest in sorted(seen)], SeenRow)
    return Outcome(
        summary={
            "num_samples": len(places),
            "num_new": len(learned),
            "num_replayed": len(replayed),
            "num_held_out": len(asked),
            "num_parts": len(old) + 1,
        }
    )


def image_of(sample: Sample) -> str:
    """Name a sample's image by its content, or by its place where it was not read."""
    return sample.image.sha256 or sample.image.uri


def split_prompts(samples: Sequence[Sample], num_held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """Set prompts aside, with all prompts of the same image.

    Args:
        samples: to be split.
        num_held_out: so many are set aside at least.
        seed: of the run.

    Returns:
        Ids of the samples to train on, and of those set aside.
    """
    by_image: dict[str, list[str]] = defaultdict(list)
    for sample in samples:
        by_image[image_of(sample)].append(sample.id)
    held_out: list[str] = []
    for image in _ranked(by_image, seed, "held out"):
        if len(held_out) >= num_held_out:
            break
        held_out += sorted(by_image[image])
    aside = set(held_out)
    return [sample.id for sample in samples if sample.id not in aside], held_out


def require_prompts(sample_ids: Sequence[str], prompts_per_round: int) -> None:
    """Make sure that there are as many samples to train on as a round needs.

    Raises:
        InputError: there are not.
    """
    if len(sample_ids) < prompts_per_round:
        raise InputError(
            "rounds.prompts_per_round must be at most the number of samples that selection.num_prompts leaves, got "
            f"{prompts_per_round} and {len(sample_ids)} samples; lower one of the two or add samples"
        )


def _ranked(names: set[str] | dict[str, list[str]], seed: int, purpose: str) -> list[str]:
    """Give names in an order that is random, and the same for each name whatever the others are."""
    return sorted(names, key=lambda name: digest_json([seed, name, purpose]))


def _read_parts(store: Store, ref: ArtifactRef) -> list[Part]:
    return [Part.model_validate(part) for part in json.loads(store.read(ref, PARTS))]


def _places(context: RunContext, views: ArtifactRef, part: int) -> list[_Place]:
    return [_Place(part, position, sample) for position, sample in enumerate(context.dataset.samples(views))]


def _shards(store: Store, views: Sequence[ArtifactRef], places: Sequence[_Place]) -> list[ViewShard]:
    """Say in which shards of which parts the crops of samples lie, in the samples' order."""
    shards = []
    for part, ref in enumerate(views):
        positions = [place.position for place in places if place.part == part]
        start = 0
        for shard in (ViewShard.model_validate(row) for row in json.loads(store.read(ref, VIEW_SHARDS))):
            inside = [position - start for position in positions if 0 <= position - start < shard.num_samples]
            start += shard.num_samples
            if len(inside) == shard.num_samples:
                shards.append(shard)
            elif inside:
                shards.append(ViewShard(ref=shard.ref, num_samples=len(inside), positions=tuple(inside)))
    return shards
