"""What is in the store: `python -m flows.store ls|show|verify|gc [--config my.toml] [--store URL]`."""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from prefect.settings import PREFECT_HOME, get_current_settings, temporary_settings
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from flows.config import PROJECT, RunConfig, load_config, resolve_paths
from flows.garbage import collect, find_garbage
from flows.run import open_store
from flows.server import prefect_server
from flows.terminal import make_terminal, show_on_terminal
from tasks.adapters.store import KEEP, DamagedError, Store, StoredFile, StoreError, artefact_names
from tasks.adapters.training_data import CheckpointJob, TrainJob
from tasks.artifacts import Manifest
from tasks.report import ReportJob
from vzero_core.errors import InputError, VZeroError

PREFECT = PROJECT / ".vzero" / "prefect"
NUM_CHECKS = 4
"""Files checked at once."""
NUM_INPUTS = 6
"""Of an artefact with many inputs, such as the report of a run, so many of the first and of the last are shown."""
SHORT = 12
"""Digits of a key or digest that are shown."""

_Name = tuple[str, str]


def show_artefacts(store: Store, console: Console) -> None:
    """Print the runs, and how many artefacts of which stage there are."""
    files = _files(store)
    manifests = {(manifest.stage, manifest.key): manifest for manifest in store.manifests(files)}
    runs = Table("run", "rounds", "student's accuracy", "finished", "key", title="runs")
    reports = [manifest for manifest in manifests.values() if manifest.stage == ReportJob.stage]
    for report in sorted(reports, key=lambda manifest: manifest.created_at):
        rounds = str(len(report.job["rounds"]))
        runs.add_row(report.job["name"], rounds, _accuracy(report, manifests), _date(report), report.key[:SHORT])
    stages = Table("stage", "artefacts", "pruned", "files", "size", "newest", title=escape(store.url))
    by_stage: dict[str, list[Manifest]] = defaultdict(list)
    for manifest in manifests.values():
        by_stage[manifest.stage].append(manifest)
    for stage, members in sorted(by_stage.items()):
        present = [entry for manifest in members if not manifest.pruned for entry in manifest.files]
        stages.add_row(
            stage,
            str(len(members)),
            str(sum(manifest.pruned for manifest in members)),
            str(len(present)),
            decimal(sum(entry.size for entry in present)),
            _date(max(members, key=lambda manifest: manifest.created_at)),
        )
    if reports:
        console.print(runs)
    console.print(stages)


def show_artefact(store: Store, console: Console, *, prefix: str, depth: int) -> None:
    """Print one artefact: its files, figures and where it comes from.

    Raises:
        InputError: no artefact's key begins so, or several do.
    """
    files = _files(store)
    manifests = {(manifest.stage, manifest.key): manifest for manifest in store.manifests(files)}
    found = [manifest for manifest in manifests.values() if manifest.key.startswith(prefix)]
    if len(found) != 1:
        names = ", ".join(f"{manifest.stage}/{manifest.key[: len(prefix) + 4]}" for manifest in found[:10])
        what = f"{len(found)} do: {names}; give more digits" if found else "none does; `flows.store ls` lists them"
        raise InputError(f"one artefact's key must begin with {prefix!r}, but {what}")
    [manifest] = found
    kept = any(file.path == f"{manifest.stage}/{manifest.key}/{KEEP}" for file in files)
    facts = {
        "artefact": f"{manifest.stage}/{manifest.key}",
        "digest": manifest.digest,
        "made": f"{_date(manifest)} on {manifest.host} by {manifest.code}",
        "state": "pruned" if manifest.pruned else "kept for good" if kept else "present",
        "place": store.path_of(manifest.ref, ""),
        "summary": json.dumps(manifest.summary, indent=1, ensure_ascii=False),
        "measured": json.dumps(manifest.measured, indent=1),
    }
    table = Table("", "", show_header=False)
    # A place is to be copied: whole.
    table.columns[1].overflow = "fold"
    for name, value in facts.items():
        table.add_row(name, escape(value))
    console.print(table)
    listing = Table("file", "size", "sha256")
    for entry in manifest.files:
        listing.add_row(escape(entry.path), decimal(entry.size), entry.sha256[:SHORT])
    console.print(listing)
    tree = Tree(_label(manifest))
    _grow(tree, manifest, manifests, {(manifest.stage, manifest.key)}, depth)
    console.print(tree)


def verify(store: Store, console: Console) -> int:
    """Check all files of all artefacts against their checksums; give the number of damaged or missing ones."""
    problems, wanted = [], []
    for stage, key in artefact_names(_files(store)):
        try:
            manifest = store.find(stage, key)
        except StoreError as error:
            problems.append(str(error))
            continue
        if manifest is not None and not manifest.pruned:
            wanted += [(manifest, entry) for entry in manifest.files]
    total = sum(entry.size for _, entry in wanted)

    def check(number: int) -> tuple[int, str | None]:
        manifest, entry = wanted[number]
        try:
            store.check(manifest, entry)
        except DamagedError as error:
            return entry.size, str(error)
        return entry.size, None

    with make_terminal().track("bytes", total) as advance, ThreadPoolExecutor(NUM_CHECKS) as pool:
        for size, problem in pool.map(check, range(len(wanted))):
            advance(size)
            problems += [problem] if problem else []
    for problem in problems:
        console.print(problem, style="red", markup=False, soft_wrap=True)
    console.print(f"{len(wanted)} files, {decimal(total)}: {len(problems)} damaged or missing", highlight=False)
    return len(problems)


def collect_garbage(store: Store, console: Console, *, older_than: float, delete: bool) -> None:
    """Print what is no longer needed, and delete it where asked to."""
    # Listed first: what is committed in between is then named by a manifest.
    files = _files(store)
    garbage = find_garbage(files, list(store.manifests(files)), timedelta(hours=older_than))
    table = Table("what", "where", "size")
    for thing in collect(store, garbage) if delete else garbage:
        table.add_row(thing.what, escape(thing.path), decimal(thing.size))
    if garbage:
        console.print(table)
    total = decimal(sum(thing.size for thing in garbage))
    advice = "; --delete does it" if garbage and not delete else ""
    console.print(f"{len(garbage)} {'deleted' if delete else 'to delete'}, {total}{advice}", highlight=False)


def _files(store: Store) -> list[StoredFile]:
    files = store.files()
    if not files:
        raise StoreError(f"{store.url} must be a store, but nothing is there; check --config and --store")
    return files


def _accuracy(report: Manifest, manifests: dict[_Name, Manifest]) -> str:
    """Give the student's accuracy before and after on the first benchmark of a run."""
    student = [made for made in report.job["evaluations"] if made["label"].startswith("student")]
    names = [
        (made["ref"]["stage"], made["ref"]["key"])
        for made in student
        if made.get("benchmark") == student[0].get("benchmark")
    ]
    found = [manifests[name].summary["accuracy"] for name in names if name in manifests]
    return f"{found[0]:.1%} -> {found[-1]:.1%}" if found else "not measured"


def _inputs(manifest: Manifest) -> Iterator[tuple[str, _Name]]:
    for name, ref in manifest.inputs.items():
        yield name, (ref.stage, ref.key)
    # A state is named before its round is committed: by the round's key, not by a reference.
    if manifest.stage == CheckpointJob.stage:
        yield "round", (TrainJob.stage, manifest.job["train_key"])


def _grow(tree: Tree, manifest: Manifest, manifests: dict[_Name, Manifest], shown: set[_Name], depth: int) -> None:
    """Add where an artefact comes from; what is deeper is counted, what was shown before is named alone."""
    if depth == 0:
        folded = _ancestors(manifest, manifests) - shown
        if folded:
            tree.add(f"... {len(folded)} more artefacts", style="dim")
        return
    inputs = list(_inputs(manifest))
    num_folded = max(len(inputs) - 2 * NUM_INPUTS, 0)
    for number, (name, place) in enumerate(inputs):
        earlier = manifests.get(place)
        if NUM_INPUTS <= number < NUM_INPUTS + num_folded:
            if number == NUM_INPUTS:
                tree.add(f"... {num_folded} more inputs", style="dim")
        elif earlier is None:
            tree.add(f"{name}: {place[0]}/{place[1][:SHORT]} is gone", style="red")
        elif place in shown:
            tree.add(f"{name}: {place[0]}/{place[1][:SHORT]}, as elsewhere here", style="dim")
        else:
            shown.add(place)
            _grow(tree.add(f"{name}: {_label(earlier)}"), earlier, manifests, shown, depth - 1)


def _ancestors(manifest: Manifest, manifests: dict[_Name, Manifest]) -> set[_Name]:
    found: set[_Name] = set()
    pending = [manifest]
    while pending:
        for _, place in _inputs(pending.pop()):
            if place not in found and place in manifests:
                found.add(place)
                pending.append(manifests[place])
    return found


def _label(manifest: Manifest) -> str:
    pruned = ", pruned" if manifest.pruned else ""
    return f"[bold]{manifest.stage}[/bold]/{manifest.key[:SHORT]}, {_date(manifest)}{pruned}"


def _date(manifest: Manifest) -> str:
    return f"{manifest.created_at.astimezone():%Y-%m-%d %H:%M}"


@contextmanager
def store_named(config_path: Path | None, url: str | None) -> Iterator[tuple[Store, Path]]:
    """Open the store that a command's options name; give it with the work folder.

    Args:
        config_path: TOML configuration; None for the laptop's.
        url: folder or URL instead of the configuration's.
    """
    config = load_config(config_path) if config_path else resolve_paths(RunConfig(), PROJECT)
    place = config.store.model_copy(update={"url": url} if url else {})
    with ExitStack() as stack:
        if place.prefect_block is not None:
            stack.enter_context(prefect_server(PREFECT))
        elif not get_current_settings().api.url:
            # Where runs from the command line leave Prefect's records.
            stack.enter_context(temporary_settings({PREFECT_HOME: PREFECT}))
        work_dir = Path(config.placement.work_dir)
        yield open_store(place, work_dir), work_dir


def _parse(arguments: list[str] | None) -> Any:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", type=Path, help="TOML configuration of the runs; without it the laptop's")
    common.add_argument("--store", help="folder or URL of the store, instead of the configuration's")
    parser = argparse.ArgumentParser(prog="python -m flows.store", description="Look into the artefact store.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ls", parents=[common], help="runs, and artefacts by stage")
    show = commands.add_parser("show", parents=[common], help="one artefact: files, figures, where it comes from")
    show.add_argument("key", help="first digits of its key")
    show.add_argument("--depth", type=int, default=4, help="generations of inputs that are shown (%(default)s)")
    commands.add_parser("verify", parents=[common], help="read everything and check it; exit code 1 on damage")
    gc = commands.add_parser("gc", parents=[common], help="list what is no longer needed")
    gc.add_argument("--delete", action="store_true", help="delete it")
    gc.add_argument(
        "--older-than",
        type=float,
        default=24.0,
        metavar="HOURS",
        help="age from which attempts without a manifest can go (%(default)s)",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run one command."""
    options = _parse(arguments)
    show_on_terminal()
    console = Console()
    try:
        with store_named(options.config, options.store) as (store, _):
            if options.command == "ls":
                show_artefacts(store, console)
            elif options.command == "show":
                show_artefact(store, console, prefix=options.key, depth=options.depth)
            elif options.command == "verify":
                return 1 if verify(store, console) else 0
            else:
                collect_garbage(store, console, older_than=options.older_than, delete=options.delete)
    except VZeroError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
