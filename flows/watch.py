"""Looks for new data, the poll behind retraining: `python -m flows.watch [--config my.toml]`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.command import run_command
from flows.config import LAPTOP, RunConfig
from flows.events import announce_samples
from flows.publication import is_retraining, open_registry
from flows.run import version_of_data


@flow(name="vzero-watch", flow_run_name="{config.name}, look for new data")
def watch(config: RunConfig = LAPTOP) -> State[Any]:
    """Tell, by an event, that the data are not those that were last considered; nothing is read but a listing.

    Args:
        config: the whole configuration.
    """
    registry = open_registry(config)
    last = registry.last() if registry is not None else None
    if registry is None or last is None or last.champion is None:
        return Completed(message="there is no champion yet that could learn; run vzero/full-pipeline")
    data = version_of_data(config)
    if last.data == data:
        return Completed(message=f"no new data since entry {last.number} of the history ({last.kind})")
    if is_retraining(config):
        return Completed(message="new data; a retraining is going on or waits, they are looked at again after it")
    announce_samples(config, data, "poll")
    return Completed(message="new data: a retraining is asked for")


def main(arguments: list[str] | None = None) -> int:
    """Look once, from the command line."""
    parser = argparse.ArgumentParser(prog="python -m flows.watch", description="Tell the Prefect server of new data.")
    parser.add_argument("--config", type=Path, help="TOML configuration; without it the small world is looked at")
    options = parser.parse_args(arguments)
    return run_command(options.config, watch)


if __name__ == "__main__":
    sys.exit(main())
