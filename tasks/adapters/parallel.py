"""Work on images in threads: Pillow lets go of the interpreter while it decodes and resizes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(call: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Give `call(item)` of each item, in order, computed in threads.

    Items are taken as they are needed: at most two a thread are under way or waiting, however many there are.
    """
    with ThreadPoolExecutor(threads) as executor:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(executor.submit(call, item))
                if len(waiting) == 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
