"""How the questions of a benchmark are cut into shards."""

import pytest

from tasks.artifacts import EvaluationSample, ImageRef
from tasks.predict import MAX_SHARD_PIXELS, MAX_SHARD_QUESTIONS, shards


def sample(number: int, width: int, height: int) -> EvaluationSample:
    image = ImageRef(uri="a.png", width=width, height=height, size_bytes=1)
    return EvaluationSample(id=str(number), image=image, question="q", answer="a")


@pytest.mark.parametrize("count", [1, MAX_SHARD_QUESTIONS, MAX_SHARD_QUESTIONS + 1, 3 * MAX_SHARD_QUESTIONS])
def test_small_images_are_cut_by_number(count: int) -> None:
    found = list(shards([sample(number, 64, 64) for number in range(count)]))
    assert [first for first, _ in found] == list(range(0, count, MAX_SHARD_QUESTIONS))
    assert [last for _, last in found] == [*[first for first, _ in found[1:]], count]


def test_large_images_are_cut_by_size() -> None:
    # 8K: 7680 x 4320 = 33 million pixels, eight of them in 268 million.
    found = list(shards([sample(number, 7680, 4320) for number in range(20)]))
    assert found == [(0, 8), (8, 16), (16, 20)]


def test_an_image_above_the_limit_is_a_shard_of_its_own() -> None:
    large = MAX_SHARD_PIXELS // 1000 + 1
    found = list(shards([sample(0, 64, 64), sample(1, large, 1000), sample(2, large, 1000), sample(3, 64, 64)]))
    assert found == [(0, 1), (1, 2), (2, 3), (3, 4)]
