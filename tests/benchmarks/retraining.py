"""Whether new samples teach the champion: `python tests/benchmarks/retraining.py --seed 11 --rounds 30`, some minutes.

The demo's run makes a champion; twice, as many new scenes as it had come in. Printed are the accuracy on the same
1,000 questions, which decide nothing, and what was decided without labels.
"""

import argparse
import tempfile
from pathlib import Path

from flows.config import RunConfig
from flows.full_pipeline import vzero
from flows.retrain import retrain
from flows.server import prefect_server
from flows.summary import RunResult, describe
from flows.terminal import show_on_terminal

GENERATIONS = 2


def config_of(folder: Path, seed: int, num_prompts: int, rounds: int) -> RunConfig:
    """A run on the first scenes of a seed; what is left out is the demo's."""
    return RunConfig.model_validate(
        {
            "name": f"retraining-{seed}",
            "seed": seed,
            "data": {"source": {"seed": seed, "num_prompts": num_prompts}},
            "retrain": {"num_rounds": rounds},
            "store": {"url": str(folder / "store")},
            "publish": {"url": str(folder / "published")},
            "placement": {"work_dir": str(folder / "work")},
        }
    )


def show(what: str, result: RunResult) -> None:
    """Print what a run gave."""
    print(
        f"{what}: {result.scores[-1].accuracy:.3f}; {describe(result.changes[0])}; {result.published.reason}",
        flush=True,
    )


def main() -> None:
    """Make a champion and retrain it."""
    parser = argparse.ArgumentParser(description="Retrain the small world's champion.")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--rounds", type=int, default=30, help="of a retraining")
    options = parser.parse_args()
    show_on_terminal()
    folder = Path(tempfile.mkdtemp(prefix="retraining-"))
    first = config_of(folder, options.seed, 1984, options.rounds)
    with prefect_server(folder / "prefect"):
        show("champion", vzero(first))
        for generation in range(1, GENERATIONS + 1):
            config = config_of(folder, options.seed, 1984 * (1 + generation), options.rounds)
            result = retrain(config)
            assert isinstance(result, RunResult), "there are new samples"
            show(f"retraining {generation}", result)


if __name__ == "__main__":
    main()
