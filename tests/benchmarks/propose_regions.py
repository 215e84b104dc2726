"""What `propose_regions` finds in the small world, where the true regions are known, and what the student gains.

    python tests/benchmarks/propose_regions.py --folder DIR [--seed 0] [--samples 1920] [--compare 200] [--train]

Nothing that proposes sees a true region or an answer; both serve measuring alone.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from flows.config import RunConfig
from flows.full_pipeline import vzero
from flows.run import fingerprint, open_run
from flows.server import prefect_server
from flows.terminal import show_on_terminal
from tasks.adapters.dataset import SAMPLES
from tasks.adapters.store import Outcome
from tasks.adapters.tables import read_rows, write_rows
from tasks.artifacts import ArtifactRef, ImageRef, Job, Sample
from tasks.config import GridRegions, RegionsConfig
from tasks.propose_regions import (
    PROPOSALS,
    Proposal,
    RegionShardJob,
    RegionsJob,
    Teacher,
    num_region_shards,
    propose_region_shard,
    propose_regions,
)
from tasks.small_world.dataset import write_dataset
from tasks.stage import RunContext
from vzero_core.views import Box, Size, scale_box
from vzero_core.windows import WHOLE, windows

NUM_QUESTIONS = 1000
PICTURE = Size(64, 64)
FINE, OVERLAP = 0.25, 0.5
REGIONS = RegionsConfig(proposer=GridRegions())
THRESHOLDS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5)


class GivenJob(Job):
    """Samples as they are written here: without regions."""

    stage: ClassVar[str] = "samples"

    folder: str
    num_samples: int


def main() -> None:
    """Measure the proposals, then the ways that were not taken, then the student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1920)
    parser.add_argument("--compare", type=int, default=200, help="samples on which other scores are measured; 0: none")
    parser.add_argument("--train", action="store_true", help="train on true, proposed and random regions")
    options = parser.parse_args()
    show_on_terminal()
    folder = options.folder.absolute() / f"seed-{options.seed}"
    if not folder.exists():
        write_dataset(folder, num_prompts=options.samples, num_eval=NUM_QUESTIONS, seed=options.seed)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    truth = {row["id"]: Box(*row["region"]) for row in rows}
    config = run_config(folder, "train", options.seed)
    with prefect_server(options.folder.absolute() / "prefect"):
        with open_run(config) as run:
            samples = [unmarked(row, folder) for row in rows[: options.samples]]
            jobs = shard_jobs(config, run, samples, folder)
            made = propose_regions(
                RegionsJob(
                    samples=jobs[0].samples,
                    shards=tuple(propose_region_shard(job, run) for job in jobs),
                    min_contrast=REGIONS.min_contrast,
                    min_kept_share=REGIONS.min_kept_share,
                ),
                run,
            )
            proposals = read_rows(run.store.read(made, PROPOSALS), Proposal)
            print(f"\nproposals: {json.dumps(run.store.manifest(made).summary)}")
            report_proposals(proposals, truth)
            if options.compare:
                compare(Teacher(jobs[0], run, lambda _: None), samples[: options.compare], truth)
        if options.train:
            train(folder, options.seed, rows, proposals)


def run_config(folder: Path, name: str, seed: int) -> RunConfig:
    """A run on one of the JSONL files of a folder."""
    source = {"kind": "jsonl", "path": str(folder / f"{name}.jsonl"), "evaluation_path": str(folder / "eval.jsonl")}
    return RunConfig.model_validate(
        {
            "name": f"regions-{name}",
            "seed": seed,
            "data": {"source": source},
            "selection": {"num_prompts": 0},
            "store": {"url": str(folder / "store")},
            "publish": {"url": None},
            "placement": {"work_dir": str(folder / "work"), "threads": 1},
        }
    )


def unmarked(row: dict[str, Any], folder: Path) -> Sample:
    """A sample as somebody has it who drew no box."""
    image, detail_image = (image_ref(folder, row[name]) for name in ("image", "detail_image"))
    return Sample(id=row["id"], image=image, detail_image=detail_image, question=row["question"])


def image_ref(folder: Path, uri: str) -> ImageRef:
    """An image of the small world, as validation describes it."""
    content = (folder / uri).read_bytes()
    with Image.open(folder / uri) as image:
        width, height = image.size
    digest = hashlib.sha256(content).hexdigest()
    return ImageRef(uri=uri, width=width, height=height, size_bytes=len(content), sha256=digest)


def shard_jobs(config: RunConfig, run: RunContext, samples: Sequence[Sample], folder: Path) -> list[RegionShardJob]:
    """The jobs of the shards of these samples."""

    def write(attempt: Path) -> Outcome:
        write_rows(attempt / SAMPLES, samples, Sample)
        return Outcome()

    given = run.store.produce(GivenJob(folder=str(folder), num_samples=len(samples)), write)
    num_shards = num_region_shards(len(samples))
    return [
        RegionShardJob(
            samples=given,
            teacher=ArtifactRef(stage="model", key="teacher", digest="teacher"),
            prompt=config.prompt,
            crop=config.views.positive,
            resample=config.views.resample,
            proposer=GridRegions(),
            max_new_tokens=REGIONS.max_new_tokens,
            engine=fingerprint(config.teacher),
            shard=shard,
            num_shards=num_shards,
        )
        for shard in range(num_shards)
    ]


def report_proposals(proposals: Sequence[Proposal], truth: dict[str, Box]) -> None:
    """Print what was found, and what the threshold keeps of it."""
    pairs = [(proposal, truth[proposal.sample_id]) for proposal in proposals]
    print_places("grid", [(proposal.box, true) for proposal, true in pairs])
    kept = [pair for pair in pairs if pair[0].problem is None]
    print_places("grid, kept", [(proposal.box, true) for proposal, true in kept])


def print_places(name: str, pairs: Sequence[tuple[Box, Box]]) -> None:
    """Print hit rate (the box holds the true centre), mean IoU and the share that covers half of the region."""
    hits = sum(holds_centre(box, true) for box, true in pairs) / len(pairs)
    ious = sum(overlap(box, true) / (area(box) + area(true) - overlap(box, true)) for box, true in pairs) / len(pairs)
    covered = sum(overlap(box, true) >= area(true) / 2 for box, true in pairs) / len(pairs)
    print(f"| {name} | n={len(pairs)} | hit {hits:.3f} | IoU {ious:.3f} | half covered {covered:.3f} |", flush=True)


def compare(teacher: Teacher, samples: Sequence[Sample], truth: dict[str, Box]) -> None:
    """Print other scores on one fine grid, and what thresholds keep of right and of wrong places."""
    responses = teacher.respond(samples)
    grid = [scale_box(box, Size(1, 1), PICTURE) for box in windows(WHOLE, FINE, OVERLAP)]
    flat = [(sample, response, box) for sample, response in zip(samples, responses, strict=True) for box in grid]
    places, spoken, boxes = zip(*flat, strict=True)
    shown = rows_of(teacher.shown(places, spoken, boxes), len(grid))
    hidden = rows_of(teacher.hidden(places, spoken, boxes), len(grid))
    scores = {
        "crop less the mean of disjoint places' crops": [
            [value - mean_disjoint(values, grid, index) for index, value in enumerate(values)] for values in shown
        ],
        "hidden": [[-value for value in values] for values in hidden],
        "crop less hidden": [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(shown, hidden, strict=True)],
    }
    print(f"\none grid of {len(grid)} windows")
    for name, table in scores.items():
        best = [grid[max(range(len(grid)), key=values.__getitem__)] for values in table]
        print_places(name, [(box, truth[sample.id]) for box, sample in zip(best, samples, strict=True)])
    found = teacher.search(samples, responses, GridRegions())
    hits = [holds_centre(box, truth[sample.id]) for box, sample in zip(found, samples, strict=True)]
    right = [value for value, hit in zip(teacher.contrasts(samples, responses, found), hits, strict=True) if hit]
    wrong_boxes = [a_wrong_window(sample, truth[sample.id], grid) for sample in samples]
    wrong = teacher.contrasts(samples, responses, wrong_boxes)
    print("\n| min_contrast | right places kept | wrong places kept | right among kept, were half wrong |")
    for threshold in THRESHOLDS:
        good, bad = (sum(value >= threshold for value in values) / len(values) for values in (right, wrong))
        print(f"| {threshold} | {good:.3f} | {bad:.3f} | {good / (good + bad):.3f} |", flush=True)


def a_wrong_window(sample: Sample, box: Box, grid: Sequence[Box]) -> Box:
    """A window that does not meet a box, the same one every time."""
    free = [window for window in grid if overlap(window, box) == 0]
    return random.Random(f"{sample.id}{tuple(box)}").choice(free)


def mean_disjoint(values: Sequence[float], grid: Sequence[Box], index: int) -> float:
    """The mean over the windows that do not meet the one of this index."""
    others = [value for value, window in zip(values, grid, strict=True) if overlap(window, grid[index]) == 0]
    return sum(others) / len(others)


def train(folder: Path, seed: int, rows: Sequence[dict[str, Any]], proposals: Sequence[Proposal]) -> None:
    """Run the pipeline on true, proposed and random regions."""
    found = {proposal.sample_id: proposal.box for proposal in proposals if proposal.problem is None}
    grid = [scale_box(box, Size(1, 1), PICTURE) for box in windows(WHOLE, FINE, OVERLAP)]
    arms = {
        "true": {row["id"]: row["region"] for row in rows},
        "proposed": {name: list(box) for name, box in found.items() if box is not None},
        "random": {row["id"]: list(random.Random(f"random window {row['id']}").choice(grid)) for row in rows},
    }
    print("\n| regions | samples | student before | after | gain |", flush=True)
    for arm, regions in arms.items():
        marked = [{**row, "region": regions[row["id"]]} for row in rows if row["id"] in regions]
        (folder / f"{arm}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in marked))
        scores = vzero(run_config(folder, arm, seed)).scores
        before, after = scores[0].accuracy, scores[-1].accuracy
        print(f"| {arm} | {len(marked)} | {before:.3f} | {after:.3f} | {after - before:+.3f} |", flush=True)


def rows_of(values: Sequence[float], width: int) -> list[Sequence[float]]:
    """Cut a list into rows."""
    return [values[start : start + width] for start in range(0, len(values), width)]


def holds_centre(box: Box, true: Box) -> bool:
    """Whether a box holds the centre of the true region."""
    x, y = (true.x1 + true.x2) / 2, (true.y1 + true.y2) / 2
    return box.x1 <= x < box.x2 and box.y1 <= y < box.y2


def area(box: Box) -> float:
    """Area in square pixels."""
    return (box.x2 - box.x1) * (box.y2 - box.y1)


def overlap(first: Box, second: Box) -> float:
    """Area that two boxes share."""
    width = min(first.x2, second.x2) - max(first.x1, second.x1)
    height = min(first.y2, second.y2) - max(first.y1, second.y1)
    return max(width, 0.0) * max(height, 0.0)


if __name__ == "__main__":
    main()
