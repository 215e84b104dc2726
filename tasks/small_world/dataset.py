"""Writes the small world as a dataset on disk, in the project's own JSONL format."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from tasks.small_world.scenes import Pixels, make_sample

TRAIN_SPLIT, EVAL_SPLIT = "train", "eval"
# The held-out questions are the same in every run, whatever the run's seed.
EVAL_SEED = 20_000
SOURCE = "small_world"
LICENSE = "Apache-2.0"


def write_dataset(folder: Path, *, num_prompts: int, num_eval: int, seed: int) -> None:
    """Write `train.jsonl`, `eval.jsonl` and their images; the folder appears whole or not at all.

    Args:
        folder: to create; its parent is created too.
        num_prompts: training rows, drawn with `seed`. They hold neither an answer nor the target's cell.
        num_eval: held-out rows, the first of one fixed list whatever the seed; they hold the answer.
        seed: of the training rows.

    Raises:
        FileExistsError: the folder exists.
        ValueError: a count is negative.
    """
    if num_prompts < 0 or num_eval < 0:
        raise ValueError(f"num_prompts and num_eval must be >= 0, got {num_prompts} and {num_eval}")
    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        _write_split(partial, TRAIN_SPLIT, seed, num_prompts)
        _write_split(partial, EVAL_SPLIT, EVAL_SEED, num_eval)
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_split(folder: Path, split: str, seed: int, count: int) -> None:
    (folder / "images" / split).mkdir(parents=True)
    with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
        for row in _rows(folder, split, seed, count):
            file.write(json.dumps(row) + "\n")


def _rows(folder: Path, split: str, seed: int, count: int) -> Iterator[dict[str, Any]]:
    for index in range(count):
        sample = make_sample(seed, split, index)
        stem = f"images/{split}/{index:05d}"
        image, detail_image = f"{stem}.png", f"{stem}_detail.png"
        _save(sample.picture, folder / image)
        _save(sample.detail, folder / detail_image)
        row: dict[str, Any] = {
            "id": f"{split}-{seed}-{index:05d}",
            "image": image,
            "detail_image": detail_image,
            "question": sample.question.text,
            "region": list(sample.region),
        }
        if split == TRAIN_SPLIT:
            row |= {"group": f"{split}-{seed}-{index:05d}", "source": SOURCE, "license": LICENSE}
        else:
            row |= {"answer": sample.question.answer}
        yield row


def _save(pixels: Pixels, path: Path) -> None:
    # Noise does not compress; trying takes longer than writing it.
    Image.fromarray(pixels).save(path, compress_level=0)
