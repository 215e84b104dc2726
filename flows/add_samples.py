"""Adds rows to the training data, and asks for a retraining: `python -m flows.add_samples new.jsonl --config TOML`."""

import argparse
import sys
from pathlib import Path, PurePosixPath

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import get_current_settings

from flows.config import PROJECT, RunConfig, load_config, resolve_paths
from flows.events import announce_samples
from flows.run import open_store, version_of_data
from flows.terminal import show_on_terminal
from tasks.adapters.files import patiently, sha256_file
from tasks.adapters.formats import FORMATS
from tasks.adapters.images import ImageReader
from tasks.adapters.importers import check_rows, image_root
from tasks.adapters.lakefs_repo import LakeFSRepo, parse_lakefs_url
from tasks.adapters.row_files import is_folder
from tasks.adapters.transfers import open_folder
from tasks.config import FileData
from vzero_core.errors import ConfigError, InputError, VZeroError

DEPLOYMENT = "vzero-retrain/retrain"


def add_samples(config: RunConfig, rows: Path) -> str:
    """Copy a file of rows into the data's folder, after a look at every row and its images; give where it lies.

    Rows that are there already, in a file of any name that this made, are not added again.

    Args:
        config: whose data it is added to; their path is a folder.
        rows: file in the format of the data; images are named as in the files that are there, and lie there already.

    Raises:
        ConfigError: the data are no folder.
        InputError: a row cannot be read, or an image of it.
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
    root = image_root(source)
    check_rows(
        source.model_copy(update={"path": str(rows), "image_root": root}),
        ImageReader(root, config.data.max_image_pixels),
        config.placement.image_threads,
    )
    folder = open_folder(source.path)
    # Named by its content: the same file is added once, whatever its own name.
    ending = f"-{sha256_file(rows)[:12]}{suffix}"
    there = patiently(lambda: folder.fs.ls(folder.path, detail=False), folder.url)
    names = sorted(PurePosixPath(path).name for path in there if path.endswith(ending))
    name = names[0] if names else f"{rows.stem}{ending}"
    # Where it is there already, an earlier call may have been cut before what follows.
    folder.create(name, rows.read_bytes())
    if source.path.startswith("lakefs://"):
        repository, branch, _ = parse_lakefs_url(source.path)
        LakeFSRepo(repository).commit(branch, f"Add samples {name}", {"file": name})
    return f"{folder.url}/{name}"


def ask_for_retraining(config: RunConfig) -> str:
    """Tell the Prefect server of the new samples, where one is configured; say what comes of it."""
    url = get_current_settings().api.url
    if not url:
        return "no Prefect server is configured (PREFECT_API_URL): a retraining starts at the next poll"
    try:
        announce_samples(config, version_of_data(config), "add_samples")
        with get_client(sync_client=True) as client:
            client.read_deployment_by_name(DEPLOYMENT)
    except httpx.TransportError as error:
        return f"added, but no Prefect server answers at {url}: a retraining starts at the next poll ({error!r})"
    except PrefectHTTPStatusError as error:
        return f"added, but Prefect's server at {url} does not listen: a retraining starts at the next poll ({error})"
    except ObjectNotFound:
        return f"added, but no deployment {DEPLOYMENT} is registered at {url}: python -m flows.deploy"
    return f"the Prefect server was told: its deployment {DEPLOYMENT} starts"


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
        print(ask_for_retraining(config))
    except VZeroError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
