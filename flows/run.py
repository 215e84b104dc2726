"""What a run works with: store, data, engines, terminal; opened at its start and closed at its end."""

import fcntl
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

from prefect.filesystems import RemoteFileSystem

from flows.config import PROJECT, RunConfig, resolve_paths
from flows.terminal import make_terminal
from tasks.adapters.accelerator import require_trackers
from tasks.adapters.benchmarks import benchmark_digest, benchmark_root
from tasks.adapters.dataset import Dataset
from tasks.adapters.files import configure_s3
from tasks.adapters.hub import require_token
from tasks.adapters.images import ImageReader
from tasks.adapters.importers import data_version, image_root, locate, source_digest
from tasks.adapters.judge import check_judge
from tasks.adapters.lakefs_repo import LakeFSRepo, parse_lakefs_url
from tasks.adapters.store import Store
from tasks.adapters.trainer_process import TrainerSettings
from tasks.config import DataConfig, EngineFingerprint, FileData, ModelConfig, SmallWorldData, StoreConfig, VLLMEngine
from tasks.dashboard import show_progress
from tasks.evaluation_config import HELD_OUT, BenchmarkConfig
from tasks.ports import DatasetRepo
from tasks.serve import Engines
from tasks.stage import Benchmark, RunContext
from vzero_core.errors import ConfigError

log = logging.getLogger("vzero.run")

_GIB = 1 << 30


@contextmanager
def open_run(config: RunConfig) -> Iterator[RunContext]:
    """Open what a run works with; whatever was started is stopped at the end, also after an error."""
    config = resolve_paths(config, PROJECT)
    with _sole_user(Path(config.placement.work_dir)):
        yield from _opened(config)


@contextmanager
def _sole_user(work_dir: Path) -> Iterator[None]:
    """Wait until no other run uses the work folder: its weights and servers are those of one run."""
    work_dir.mkdir(parents=True, exist_ok=True)
    with (work_dir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning(
                "another run uses %s; waiting for it to end (placement.work_dir names another folder)", work_dir
            )
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _opened(config: RunConfig) -> Iterator[RunContext]:
    require_trackers(config.tracking.trackers)
    if any(benchmark.judge is not None for benchmark in config.measured):
        check_judge(config.placement.judge)
    work_dir = Path(config.placement.work_dir)
    store = open_store(config.store, work_dir)
    pin = _make_pin()
    source = _pinned(config.data.source, pin)
    data = locate(source, work_dir)
    # Asked now, because what is missing or misspelt must not end a run of days.
    if config.publish.hub is not None:
        require_token(config.publish.hub)
    if config.outputs.repository is not None:
        LakeFSRepo(config.outputs.repository).pin(config.outputs.base)
    # Before it is read: what comes between counts as new the next time.
    version = data_version(source)
    # Asked now, because Prefect would pass over its error in a task's cache key, and wait for the store once more.
    _ = store.identity
    max_pixels = config.data.max_image_pixels
    dataset = Dataset(store, ImageReader(image_root(data), max_pixels))
    benchmarks = {
        settings.name: _open_benchmark(settings, store, max_pixels) for settings in _benchmarks(config, data, pin)
    }
    terminal = make_terminal()
    engines = Engines(
        store,
        dataset,
        student=config.student,
        teacher=config.teacher,
        placement=config.placement,
        training=TrainerSettings(
            store=config.store.url,
            cache_bytes=int(config.store.cache_gib * _GIB),
            images=image_root(data),
            max_image_pixels=max_pixels,
            student=config.student.path,
            work_dir=work_dir,
            max_batch_tokens=config.placement.max_batch_tokens,
            threads=config.placement.threads,
            placement=config.placement.trainer,
            trackers=config.tracking.trackers,
            run_name=f"{config.name}, seed {config.seed}",
        ),
        work_dir=work_dir,
        track=partial(show_progress, terminal),
    )
    with engines:
        yield RunContext(
            store=store,
            data=data,
            data_version=version,
            compared=_compared(benchmarks, config.data, pin),
            dataset=dataset,
            benchmarks=benchmarks,
            judge=config.placement.judge,
            engines=engines,
            terminal=terminal,
            checkpoint_every=config.checkpoint.every,
            image_threads=config.placement.image_threads,
        )


def version_of_data(config: RunConfig) -> str:
    """Name the state of the training data, by a listing alone; in lakeFS, that of the branch's last commit.

    Raises:
        InputError: there are none.
    """
    config = resolve_paths(config, PROJECT)
    # Sets also how buckets are reached.
    open_store(config.store, Path(config.placement.work_dir))
    return data_version(_pinned(config.data.source, _make_pin()))


def open_store(config: StoreConfig, work_dir: Path) -> Store:
    """Open the store, with the settings of a Prefect block where one is named.

    Raises:
        ConfigError: there is no such block, or the store's URL cannot be used.
    """
    if config.prefect_block is not None:
        try:
            block = RemoteFileSystem.load(config.prefect_block.removeprefix("remote-file-system/"))
        except ValueError as error:
            raise ConfigError(
                f"store.prefect_block must name a Remote File System block on the Prefect server in use, got "
                f"{config.prefect_block!r}: {error}"
            ) from error
        assert isinstance(block, RemoteFileSystem), "loaded at once, outside any event loop"
        configure_s3(block.settings)
    return Store(config.url, work_dir, cache_bytes=int(config.cache_gib * _GIB))


def _benchmarks(config: RunConfig, data: FileData, pin: Callable[[str], str]) -> list[BenchmarkConfig]:
    """Give the data's own held-out questions, if there are any, and what else is measured on."""
    own = []
    if data.evaluation_path is not None:
        evaluate = config.evaluate
        own.append(
            BenchmarkConfig(
                name=HELD_OUT,
                kind="jsonl",
                path=data.evaluation_path,
                protocol=evaluate.protocol,
                generation=evaluate.generation,
            )
        )
    others = [
        settings.model_copy(
            update={
                "path": pin(settings.path),
                "image_root": pin(settings.image_root) if settings.image_root is not None else None,
            }
        )
        for settings in config.measured
    ]
    return [*own, *others]


def _open_benchmark(settings: BenchmarkConfig, store: Store, max_pixels: int) -> Benchmark:
    images = ImageReader(benchmark_root(settings), max_pixels)
    return Benchmark(settings, Dataset(store, images), benchmark_digest(settings, images))


def _compared(
    benchmarks: Mapping[str, Benchmark], config: DataConfig, pin: Callable[[str], str]
) -> dict[str, FileData | BenchmarkConfig]:
    """Give the evaluation data that training is kept clear of: what the run measures on, and what is named."""
    named = [FileData(kind="jsonl", path=pin(path)) for path in config.compare_with]
    return {
        **{found.source: found.config for found in benchmarks.values()},
        **{source_digest(source, ImageReader(image_root(source), config.max_image_pixels)): source for source in named},
    }


def _make_pin() -> Callable[[str], str]:
    """Give a function that lets a lakeFS URL name a commit; a branch is asked once, so that all see one commit."""
    commits: dict[tuple[str, str], str] = {}

    def pin(url: str) -> str:
        if not url.startswith("lakefs://"):
            return url
        name, ref, path = parse_lakefs_url(url)
        repository: DatasetRepo = LakeFSRepo(name)
        if (name, ref) not in commits:
            commits[name, ref] = repository.pin(ref)
        return repository.url(commits[name, ref], path)

    return pin


def _pinned(data: SmallWorldData | FileData, pin: Callable[[str], str]) -> SmallWorldData | FileData:
    """Let lakeFS URLs name the commits that their branches have now, so that a run reads one version to its end."""
    if isinstance(data, SmallWorldData):
        return data
    found = {name: getattr(data, name) for name in ("path", "image_root", "evaluation_path")}
    return data.model_copy(update={name: pin(url) for name, url in found.items() if url is not None})


def fingerprint(model: ModelConfig) -> EngineFingerprint:
    """Give what samples and replays: part of the key of everything it makes."""
    if isinstance(model.engine, VLLMEngine):
        return EngineFingerprint(
            engine="vllm", version=model.engine.version, dtype=model.dtype, quantization=model.engine.quantization
        )
    return trainer_fingerprint(model)


def trainer_fingerprint(model: ModelConfig) -> EngineFingerprint:
    """Give what trains, which is also the engine in the box: transformers, in the process of the run."""
    return EngineFingerprint(
        engine="transformers",
        version=_version("transformers"),
        # A local version such as +cpu is a build, not another arithmetic.
        torch=_version("torch").split("+")[0],
        dtype=model.dtype,
    )


# Every round names what computes; to look a version up is to search the disk.
_version = cache(version)
