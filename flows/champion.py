"""Which published student is the champion: `python -m flows.champion show|history|rollback|promote|fetch`.

Each takes `--config my.toml`, or `--url` with the folder or URL of the versions; without them the laptop's.
"""

import argparse
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from flows.config import PROJECT, RunConfig, load_config, resolve_paths
from flows.store import store_named
from flows.terminal import show_on_terminal
from tasks.adapters.lakefs_repo import LakeFSRepo
from tasks.adapters.registry import Registry, RegistryError
from tasks.commit_outputs import CHAMPION
from vzero_core.errors import ConfigError, VZeroError

SHORT = 12
"""Digits of a digest or of a version of the data that are shown."""


def show(registry: Registry, console: Console) -> None:
    """Print all versions, and which one is the champion."""
    last = registry.last()
    champion = last.champion if last is not None else None
    # A name is to be copied: whole.
    name = Column("version", no_wrap=True)
    table = Table("", name, "published", "trained on from", "weights", "data", title=escape(registry.url))
    for version in registry.versions():
        cells = (
            "*" if version.name == champion else "",
            version.name,
            _date(version.created_at),
            version.parent or "",
            version.policy.digest[:SHORT],
            version.data[:SHORT],
        )
        table.add_row(*map(escape, cells))
    console.print(table)
    if champion is None:
        console.print("There is no champion yet.")
    else:
        console.print(f"champion: {champion}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"model:    {registry.model_url(champion)}", markup=False, highlight=False, soft_wrap=True)


def show_history(registry: Registry, console: Console) -> None:
    """Print every entry of the history, the oldest first."""
    # No table: names and reasons are too long for columns.
    for move in registry.history():
        facts = {"champion": move.champion, "about": move.version, "data": move.data, "reason": move.reason}
        lines = [f"{move.number}  {_date(move.at)}  {move.kind}"]
        lines += [f"   {name + ':':<9} {value}" for name, value in facts.items() if value]
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def roll_back(registry: Registry, console: Console, lakefs: LakeFSRepo | None) -> None:
    """Make the champion before the present one champion again."""
    move = registry.rollback()
    assert move.champion is not None, "a rollback names a champion"
    _say(console, move.version, move.champion)
    _move_tag(registry, console, lakefs, move.champion)


def promote(registry: Registry, console: Console, lakefs: LakeFSRepo | None, name: str) -> None:
    """Make a version champion, whatever its figures are."""
    last = registry.last()
    before = last.champion if last is not None else None
    if before == name:
        console.print(f"{name} is the champion already", markup=False, highlight=False)
    else:
        data = last.data if last is not None else None
        registry.move(last, kind="by hand", champion=name, version=name, data=data, reason="by hand")
        _say(console, before, name)
    _move_tag(registry, console, lakefs, name)


def fetch(registry: Registry, console: Console, name: str | None, target: Path) -> None:
    """Copy a version's model, by default the champion's, to a new folder.

    Raises:
        RegistryError: there is no such version, or something else lies in the folder.
    """
    if name is None:
        champion = registry.champion()
        if champion is None:
            raise RegistryError(f"{registry.url} must have a champion to fetch, got none; name a version")
        name = champion.name
    registry.fetch(name, target)
    console.print(f"{name}: {target}", markup=False, highlight=False, soft_wrap=True)


def _say(console: Console, before: str | None, after: str) -> None:
    console.print(f"champion: {before or 'none'} -> {after}", markup=False, highlight=False, soft_wrap=True)


def _move_tag(registry: Registry, console: Console, lakefs: LakeFSRepo | None, name: str) -> None:
    """Let lakeFS's tag follow the champion, where outputs are published there."""
    if lakefs is None:
        return
    commit = registry.version(name).commit
    if commit is None:
        text = f"lakeFS: {name} has no commit there; the tag {CHAMPION} stays where it is"
    else:
        lakefs.tag(CHAMPION, commit)
        text = f"lakeFS: the tag {CHAMPION} names commit {commit}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _date(when: datetime) -> str:
    return f"{when.astimezone():%Y-%m-%d %H:%M}"


def _parse(arguments: list[str] | None) -> Any:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", type=Path, help="TOML configuration; without it the laptop's")
    common.add_argument("--url", help="folder or URL of the versions, instead of the configuration's")
    parser = argparse.ArgumentParser(
        prog="python -m flows.champion", description="Look at the published students, and name the champion."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("show", parents=[common], help="all versions, and the champion")
    commands.add_parser("history", parents=[common], help="who was champion when, and why")
    commands.add_parser("rollback", parents=[common], help="make the champion before the present one champion again")
    by_hand = commands.add_parser("promote", parents=[common], help="make a version champion")
    by_hand.add_argument("name", help="of the version")
    copy = commands.add_parser("fetch", parents=[common], help="copy a version's model, a plain Hugging Face folder")
    copy.add_argument("name", nargs="?", help="of the version; without it the champion's")
    copy.add_argument("--to", type=Path, required=True, help="new or empty folder")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run one command."""
    options = _parse(arguments)
    show_on_terminal()
    console = Console()
    try:
        config = load_config(options.config) if options.config else resolve_paths(RunConfig(), PROJECT)
        url = options.url or config.publish.url
        if url is None:
            raise ConfigError("publish.url must say where versions are published, got none; set it, or give --url")
        outputs = config.outputs
        # The store's settings say how a bucket is reached.
        with store_named(options.config, None):
            registry = Registry(url)
            lakefs = None
            if options.command in ("rollback", "promote") and outputs.repository is not None and outputs.publish:
                # Before anything is moved: it says what is missing in the environment.
                lakefs = LakeFSRepo(outputs.repository)
            if options.command == "show":
                show(registry, console)
            elif options.command == "history":
                show_history(registry, console)
            elif options.command == "rollback":
                roll_back(registry, console, lakefs)
            elif options.command == "promote":
                promote(registry, console, lakefs, options.name)
            else:
                fetch(registry, console, options.name, options.to)
    except (VZeroError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
