"""Seconds to validate 23,000 rows of 4K images by their headers alone: `python tests/benchmarks/validation_speed.py`.

The images are few files under many names: what is read of each is its header.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from prefect import flow
from rich.console import Console
from rich.table import Table

from flows.config import PROJECT, RunConfig
from flows.data import validated_samples
from flows.run import open_run
from flows.server import prefect_server
from flows.terminal import show_on_terminal
from tasks.artifacts import ArtifactRef
from tasks.check_models import CheckModelsJob, ModelJob, check_models, model

NUM_ROWS = 23_000
SIZE = (3840, 2160)


def write_rows(folder: Path, num_rows: int) -> None:
    """Write the images and the JSONL file."""
    for number in range(8):
        coarse = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
    drawn = np.random.default_rng(0)
    with (folder / "train.jsonl").open("w") as file:
        for row in range(num_rows):
            name = f"row-{row}.jpg"
            (folder / name).hardlink_to(folder / f"{row % 8}.jpg")
            x, y, side = (int(value) for value in drawn.integers((0, 0, 20), (3000, 1500, 600)))
            question = f"digit on the red square {row} ?"
            values = {"id": str(row), "image": name, "question": question, "region": [x, y, x + side, y + side]}
            file.write(json.dumps(values) + "\n")


@flow(name="validation speed")
def validate_rows(config: RunConfig) -> dict[str, float]:
    """Give the seconds of each part."""
    with open_run(config) as run:
        names: list[ArtifactRef] = [model(ModelJob(weights=role, role=role), run) for role in ("student", "teacher")]
        checked = check_models(CheckModelsJob(student=names[0], teacher=names[1], prompt=config.prompt), run)
        started = time.perf_counter()
        samples, docs = validated_samples(config, run, checked)
        whole = time.perf_counter() - started
        rows = run.store.manifest(samples).inputs["rows"]
        seconds = {ref.stage: run.store.manifest(ref).measured["seconds"] for ref in (rows, samples, docs)}
        return {**seconds, "all of it": whole}


def main() -> None:
    """Measure and print."""
    num_rows = int(sys.argv[1]) if len(sys.argv) > 1 else NUM_ROWS
    show_on_terminal()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, num_rows)
        config = RunConfig.model_validate(
            {
                "data": {"source": {"kind": "jsonl", "path": str(folder / "train.jsonl")}, "images": "header"},
                "store": {"url": str(folder / "store")},
                "placement": {"work_dir": str(folder / "work")},
            }
        )
        with prefect_server(PROJECT / ".vzero" / "prefect"):
            seconds = validate_rows(config)
    table = Table(title=f"{num_rows:,} rows, header-only image checks", title_justify="left")
    table.add_column("")
    table.add_column("seconds", justify="right")
    for what, value in seconds.items():
        table.add_row(what, f"{value:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
