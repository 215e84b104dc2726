"""Adds rows to the training data, and asks for a retraining: `python -m flows.add_samples new.jsonl --config TOML`."""

import argparse
import sys
from pathlib import Path

from prefect.settings import get_current_settings

from flows.config import PROJECT, RunConfig, load_config, resolve_paths
from flows.events import announce_samples
from flows.run import open_store, version_of_data
from flows.server import send_queued
from flows.terminal import show_on_terminal
from tasks.adapters.files import sha256_file
from tasks.adapters.formats import FORMATS
from tasks.adapters.importers import check_rows, image_root
from tasks.adapters.lakefs_repo import LakeFSRepo, parse_lakefs_url
from tasks.adapters.row_files import is_folder
from tasks.adapters.transfers import open_folder
from tasks.config import FileData
from vzero_core.errors import ConfigError, InputError, VZeroError


def add_samples(config: RunConfig, rows: Path) -> str:
    """Copy a file of rows into the data's folder, after a look at every row; give where it lies. Once is enough.

    Args:
        config: whose data it is added to; their path is a folder.
        rows: file in the format of the data; images are named as in the files that are there.

    Raises:
        ConfigError: the data are no folder.
        InputError: a row cannot be read.
    """
    source = config.data.source
    if not isinstance(source, FileData) or not is_folder(source.path):
        raise ConfigError(
            "data.source.path must be a folder, which files of rows can be added to, got "
            f"{source.path if isinstance(source, FileData) else 'the small world'}; put the file you have into one"
        )
    suffix = FORMATS[source.kind].suffix
    if rows.suffix != suffix:
        raise InputError(f"rows of kind {source.kind} must be a {suffix} file, got {rows}; convert it")
    check_rows(source.model_copy(update={"path": str(rows), "image_root": image_root(source)}))
    # Named by its content: the same file is added once.
    name = f"{rows.stem}-{sha256_file(rows)[:12]}{suffix}"
    folder = open_folder(source.path)
    # Where it is there already, an earlier call may have been cut before what follows.
    folder.create(name, rows.read_bytes())
    if source.path.startswith("lakefs://"):
        repository, branch, _ = parse_lakefs_url(source.path)
        LakeFSRepo(repository).commit(branch, f"Add samples {name}", {"file": name})
    return f"{folder.url}/{name}"


def main(arguments: list[str] | None = None) -> int:
    """Add a file of rows from the command line."""
    parser = argparse.ArgumentParser(prog="python -m flows.add_samples", description="Add rows to the training data.")
    parser.add_argument("rows", type=Path, help="file in the format of the data")
    parser.add_argument("--config", type=Path, required=True, help="TOML configuration that names the data's folder")
    options = parser.parse_args(arguments)
    show_on_terminal()
    try:
        config = resolve_paths(load_config(options.config), PROJECT)
        # Sets also how buckets are reached.
        open_store(config.store, Path(config.placement.work_dir))
        print(f"added {add_samples(config, options.rows)}")
        if get_current_settings().api.url:
            announce_samples(config, version_of_data(config), "add_samples")
            send_queued()
            print("the Prefect server was told: its deployment vzero-retrain/retrain starts")
        else:
            print("no Prefect server is configured (PREFECT_API_URL): a retraining starts at the next poll")
    except VZeroError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
