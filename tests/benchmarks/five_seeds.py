"""The small world over five seeds: what the student gains. `make five-seeds` runs it."""

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
    print("| seed | before | after | gain |\n|---|---|---|---|", flush=True)
    with prefect_server(PROJECT / ".vzero" / "prefect"):
        for seed in seeds:
            config = RunConfig.model_validate({"name": "five-seeds", "seed": seed, "data": {"source": {"seed": seed}}})
            scores = vzero(config).scores
            before, after = scores[0].accuracy, scores[-1].accuracy
            gains.append(after - before)
            print(f"| {seed} | {before:.3f} | {after:.3f} | {after - before:+.3f} |", flush=True)
    mean = sum(gains) / len(gains)
    print(f"mean gain {mean:+.3f}, smallest {min(gains):+.3f}")
    assert mean >= REQUIRED_MEAN, f"the mean gain must be at least {REQUIRED_MEAN}, got {mean:.3f}"
    assert min(gains) >= REQUIRED_EACH, f"each gain must be at least {REQUIRED_EACH}, got {min(gains):.3f}"


if __name__ == "__main__":
    main()
