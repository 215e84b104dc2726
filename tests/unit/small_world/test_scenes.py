import json

import numpy as np
import pytest
from PIL import Image

from tasks.small_world.dataset import write_dataset
from tasks.small_world.scenes import CELL, CELLS, DETAIL_SIZE, GRID, PICTURE_SIZE, SCALE, SHIFTS, make_sample


def test_a_sample_depends_on_its_name_alone():
    first, again = make_sample(3, "train", 7), make_sample(3, "train", 7)
    assert np.array_equal(first.detail, again.detail)
    assert np.array_equal(first.picture, again.picture)
    assert (first.question, first.region) == (again.question, again.region)
    assert first.detail.shape == (DETAIL_SIZE, DETAIL_SIZE, 3)
    assert first.picture.shape == (PICTURE_SIZE, PICTURE_SIZE, 3)
    assert first.detail.dtype == first.picture.dtype == np.uint8


def test_splits_and_seeds_share_no_scene():
    names = [(0, "train"), (1, "train"), (20_000, "eval")]
    scenes = [make_sample(seed, split, index).objects for seed, split in names for index in range(100)]
    assert len(set(scenes)) == len(scenes)


@pytest.mark.parametrize("index", range(100))
def test_the_region_covers_the_digit_and_stays_inside(index):
    sample = make_sample(0, "train", index)
    x1, y1, x2, y2 = (value * SCALE for value in sample.region)
    assert 0 <= x1 < x2 <= DETAIL_SIZE
    assert 0 <= y1 < y2 <= DETAIL_SIZE
    assert (x2 - x1, y2 - y1) == (CELL, CELL)
    target = next(item for item in sample.objects if CELLS[item.cell] == sample.question.cell)
    row, column = divmod(target.cell, GRID)
    dx, dy = SHIFTS[target.shift]
    left, top = column * CELL + 10 + dx, row * CELL + (12 if target.shape == 2 else 8) + dy
    assert x1 <= left
    assert left + 10 <= x2
    assert y1 <= top
    assert top + 14 <= y2


def test_training_rows_hold_no_answer(tmp_path):
    write_dataset(tmp_path / "data", num_prompts=3, num_eval=2, seed=5)
    rows = [json.loads(line) for line in (tmp_path / "data/train.jsonl").read_text().splitlines()]
    keys = {"id", "image", "detail_image", "question", "region", "group", "source", "license"}
    assert [set(row) for row in rows] == [keys] * 3
    sample = make_sample(5, "train", 1)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "data" / rows[1]["image"])), sample.picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "data" / rows[1]["detail_image"])), sample.detail)


def test_held_out_rows_are_the_same_for_every_seed(tmp_path):
    for seed in (0, 1):
        write_dataset(tmp_path / str(seed), num_prompts=1, num_eval=3, seed=seed)
    first, second = ((tmp_path / str(seed) / "eval.jsonl").read_text() for seed in (0, 1))
    assert first == second
    assert set(json.loads(first.splitlines()[0])) == {"id", "image", "detail_image", "question", "region", "answer"}


def test_an_existing_folder_is_refused_and_no_partial_one_is_left(tmp_path):
    write_dataset(tmp_path / "data", num_prompts=0, num_eval=1, seed=0)
    with pytest.raises(FileExistsError, match="remove it"):
        write_dataset(tmp_path / "data", num_prompts=0, num_eval=1, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
