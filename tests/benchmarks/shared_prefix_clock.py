"""How `shared_prefix.py` measures: CPU seconds of steps and of their parts, and the memory that they take at most."""

import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

REPEATS = 5
SLOW, SLOW_REPEATS = 8.0, 3
"""Steps of more CPU seconds are repeated less often, and their first one counts, for which warming up is little."""
MIB = 1024
"""Of the kilobytes that getrusage counts in."""


class Clock:
    """Collects the steps of one process."""

    def __init__(self, repeats: int) -> None:
        """Set how many steps there are after the first."""
        self._repeats = repeats
        self._steps: list[dict[str, float]] = []
        self._parts: dict[str, float] = defaultdict(float)
        self._before = 0
        self._started = 0.0

    def part(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Give the same function, its seconds counted as a part of the step."""

        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.process_time()
            result = call(*arguments, **options)
            self.add(name, time.process_time() - started)
            return result

        return timed

    def add(self, name: str, seconds: float) -> None:
        """Count seconds as a part of the step."""
        self._parts[name] += seconds

    def start(self) -> None:
        """Begin a step; the memory in use before the first does not count."""
        if not self._steps:
            self._before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._parts.clear()
        self._started = time.process_time()

    def stop(self) -> bool:
        """End a step; tells whether another one is wanted."""
        self._steps.append({"all": time.process_time() - self._started, **self._parts})
        wanted = 1 + self._repeats
        return len(self._steps) < (min(wanted, SLOW_REPEATS) if self._slow else wanted)

    def result(self) -> dict[str, Any]:
        """Give the medians, how many steps they are of, and the memory in MiB."""
        steps = self._steps if self._slow else self._steps[1:] or self._steps
        seconds = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._before
        return {"seconds": seconds, "repeats": len(steps), "peak_mib": peak / MIB}

    @property
    def _slow(self) -> bool:
        return self._steps[0]["all"] > SLOW
