"""Results come in order, the source is not drained ahead, and an error ends it all."""

import threading
from collections.abc import Iterator

import pytest

from tasks.adapters.parallel import in_order


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 5, 50])
def test_results_come_in_order(threads: int, count: int) -> None:
    assert list(in_order(lambda item: item * item, range(count), threads)) == [item * item for item in range(count)]


def test_only_a_few_items_are_taken_ahead() -> None:
    taken = []

    def items() -> Iterator[int]:
        for item in range(1000):
            taken.append(item)
            yield item

    results = in_order(lambda item: item, items(), threads=2)
    assert [next(results) for _ in range(10)] == list(range(10))
    assert len(taken) <= 10 + 2 * 2
    results.close()  # type: ignore[attr-defined]


def test_work_runs_at_the_same_time() -> None:
    barrier = threading.Barrier(2, timeout=30)
    # Each of the two waits for the other: one after the other, they would never end.
    assert list(in_order(lambda item: barrier.wait() >= 0, range(2), threads=2)) == [True, True]


def test_an_error_comes_where_its_item_stands() -> None:
    results = in_order(lambda item: 1 // (3 - item), range(100), threads=2)
    assert [next(results) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
