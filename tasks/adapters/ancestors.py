"""What artefacts were made of, and that of what, to the beginning."""

from collections.abc import Iterable

from tasks.adapters.store import Store
from tasks.artifacts import ArtifactRef, Manifest


def with_ancestors(store: Store, refs: Iterable[ArtifactRef]) -> list[Manifest]:
    """Give the manifests of artefacts and of all behind them, each once, what was used before what used it."""
    found: dict[tuple[str, str], Manifest] = {}
    opened: dict[tuple[str, str], Manifest] = {}
    waiting = list(refs)[::-1]
    while waiting:
        current = waiting[-1]
        name = current.stage, current.key
        if name in opened:
            waiting.pop()
            found.setdefault(name, opened[name])
            continue
        opened[name] = store.manifest(current)
        inputs = opened[name].inputs.values()
        waiting += [made for made in reversed(inputs) if (made.stage, made.key) not in opened]
    return list(found.values())
