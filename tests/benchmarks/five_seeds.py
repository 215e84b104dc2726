"""The small world over five seeds: what the student gains, which checkpoint is chosen. `make five-seeds` runs it."""

import tomllib
from pathlib import Path

from flows.config import PROJECT, RunConfig
from flows.full_pipeline import vzero
from flows.server import prefect_server
from flows.terminal import show_on_terminal

# What the demo promises, in accuracy.
REQUIRED_MEAN, REQUIRED_EACH = 0.20, 0.12


def main() -> None:
    """Run every seed, print the gains, and fail where they are below what is required."""
    show_on_terminal()
    seeds = tomllib.loads((Path(__file__).parent / "five_seeds.toml").read_text())["seeds"]
    gains = []
    print("| seed | before | chosen | last | best | gain |\n|---|---|---|---|---|---|", flush=True)
    with prefect_server(PROJECT / ".vzero" / "prefect"):
        for seed in seeds:
            every = RunConfig().selection.every
            config = RunConfig.model_validate(
                {
                    "name": "five-seeds",
                    "seed": seed,
                    "data": {"source": {"seed": seed}},
                    "evaluate": {"every": every},
                    "publish": {"url": None},
                }
            )
            result = vzero(config)
            student = [score for score in result.scores if score.label.startswith("student")]
            # The chosen one is measured last; of the others, the last round where it is not the chosen one.
            before, chosen = student[0].accuracy, student[-1].accuracy
            candidates = [score.accuracy for score in student[1:]]
            last = next((score.accuracy for score in student if score.label.startswith("student, after")), chosen)
            gains.append(chosen - before)
            print(
                f"| {seed} | {before:.3f} | {chosen:.3f} (round {result.chosen_round}) | {last:.3f} "
                f"| {max(candidates):.3f} | {gains[-1]:+.3f} |",
                flush=True,
            )
    mean = sum(gains) / len(gains)
    print(f"mean gain {mean:+.3f}, smallest {min(gains):+.3f}")
    assert mean >= REQUIRED_MEAN, f"the mean gain must be at least {REQUIRED_MEAN}, got {mean:.3f}"
    assert min(gains) >= REQUIRED_EACH, f"each gain must be at least {REQUIRED_EACH}, got {min(gains):.3f}"


if __name__ == "__main__":
    main()
