"""What a run works with: store, data, engines, terminal; opened at its start and closed at its end."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from flows.config import PROJECT, RunConfig, resolve_paths
from flows.terminal import make_terminal
from tasks.adapters.dataset import Dataset
from tasks.adapters.images import ImageReader
from tasks.adapters.importers import folder_of, locate
from tasks.adapters.store import Store
from tasks.config import EngineFingerprint, ModelConfig
from tasks.serve import Engines
from tasks.stage import RunContext


@contextmanager
def open_run(config: RunConfig) -> Iterator[RunContext]:
    """Open what a run works with; whatever was started is stopped at the end, also after an error."""
    config = resolve_paths(config, PROJECT)
    work_dir = Path(config.placement.work_dir)
    store = Store(config.store.url, work_dir)
    data = locate(config.data.source, work_dir)
    images, evaluation_images = (
        ImageReader(folder_of(path or ""), config.data.max_image_pixels) for path in (data.train, data.evaluation)
    )
    dataset = Dataset(store, images)
    engines = Engines(
        store, dataset, student=config.student, teacher=config.teacher, placement=config.placement, work_dir=work_dir
    )
    with engines:
        yield RunContext(
            store=store,
            data=data,
            dataset=dataset,
            evaluation=Dataset(store, evaluation_images),
            engines=engines,
            terminal=make_terminal(),
            checkpoint_every=config.checkpoint.every,
        )


def fingerprint(model: ModelConfig) -> EngineFingerprint:
    """Give what computes: part of the key of everything it makes."""
    return EngineFingerprint(
        engine="transformers",
        version=version("transformers"),
        # A local version such as +cpu is a build, not another arithmetic.
        torch=version("torch").split("+")[0],
        dtype=model.dtype,
    )
